import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import (
    UserError,
    read_arrays,
    read_image,
    read_json,
    read_table,
    read_tensors,
    write_image,
    write_json,
    write_table,
    write_tensors,
)
from forgetrace.counterfactual import retrain as module
from forgetrace.counterfactual.measure import measure, measure_key, query_losses
from forgetrace.counterfactual.retrain import measure_shared, retrain
from forgetrace.diffusion import training as training_module
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.diffusion.training import checkpoints_of
from forgetrace.encoding.store import load_encoded

from ..conftest import in_child, settings

CPU = torch.device("cpu")
MODEL = ("unlearn", 10, "report-00")


def files(layout, query: str = "report-00") -> dict[str, str]:
    return layout.measure("unlearn", 10, query, query)


@pytest.fixture(scope="module")
def retrained(built, tmp_path_factory):
    """A folder in which one leave-K-out model has been measured."""
    from forgetrace.layout import Layout

    folder = tmp_path_factory.mktemp("retrained")
    shutil.copytree(built, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        retrain(Layout("tiny", settings()), [MODEL], "cpu")
    return folder


@pytest.fixture
def measured(retrained, tiny, tmp_path):
    """The tiny experiment with one leave-K-out model measured; a copy."""
    shutil.copytree(retrained / "results", tmp_path / "results", dirs_exist_ok=True)
    return tiny


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """Names of the trainings that are run, which end without having learned anything."""
    names = []

    def train(layout, encoded, trainings, device, *rest):
        names.extend(training.name for training in trainings)
        keys = [training_module.training_key(layout, training, "fp32") for training in trainings]
        return [(read_tensors(layout.weights), None, {"seed": 5, "key": key}) for key in keys]

    monkeypatch.setattr(module, "train_as_one", train)
    return names


def test_the_measurement_is_kept_and_the_rest_is_gone(measured):
    record = read_json(files(measured)["losses"])
    assert (record["query"], record["method"], record["k"], record["member"]) == ("report-00", *MODEL)
    assert record["regenerated"] is True
    assert record["timesteps"] == [0, 20, 40, 60, 80]
    assert record["loss"] == pytest.approx(np.mean(record["losses"]), abs=1e-7)
    assert len(record["key"]) == 64
    assert record["processor"]
    assert read_image(files(measured)["image"]).shape == (16, 16, 3)
    assert not Path(measured.retrained(*MODEL)).exists()
    assert not Path(measured.checkpoints("unlearn-k10-report-00")).exists()


def test_the_model_left_out_the_top_k_and_was_trained_like_the_base(measured, monkeypatch):
    """The same run by hand: the plain training loop without these ten images, then its losses."""
    from forgetrace.diffusion.training import Training, train
    from forgetrace.encoding.store import load_encoded

    encoded = load_encoded(measured)
    top = set(read_table(measured.score("unlearn", "report-00"))["image_id"][:10])
    removed = np.array([image in top for image in encoded.image_ids])
    weights, _, _ = train(measured, encoded, Training("by-hand", 5, removed), "cpu")
    unet = load_unet(measured, CPU)
    unet.load_state_dict(weights)
    _, losses = query_losses(measured, unet, read_arrays(measured.query("report-00")["tensors"]))
    np.testing.assert_allclose(read_json(files(measured)["losses"])["losses"], losses, atol=1e-8)


def test_without_removed_images_a_retraining_is_the_base_model(tiny):
    layout = replace(tiny, config=settings(retrain={"keep_weights": True}))
    retrain(layout, [("unlearn", 0, "report-00")], "cpu")
    kept, base = read_tensors(layout.retrained("unlearn", 0, "report-00")), read_tensors(layout.weights)
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base)


def test_models_trained_as_one_say_what_they_say_alone(tiny, monkeypatch):
    layout = asked_at_once(tiny, stack=2)
    models = [MODEL, HALF, ("random", 10, "draw0"), ("unlearn", 10, "pool0")]
    sizes, as_one = [], module.train_as_one
    monkeypatch.setattr(module, "train_as_one", lambda *given: sizes.append(len(given[2])) or as_one(*given))
    retrain(layout, models, "cpu")
    assert sizes == [2, 2]
    own = read_json(files(layout)["losses"])
    at_once = [read_json(layout.losses(*model))["queries"]["report-00"]["loss"] for model in (models[1], models[3])]
    weights = read_tensors(layout.retrained("random", 10, "draw0"))
    retrain(layout, models, "cpu")
    assert sizes == [2, 2]
    assert not Path(layout.checkpoints("stacked")).exists() or not any(Path(layout.checkpoints("stacked")).iterdir())

    alone = asked_at_once(tiny)
    for path in (files(layout)["losses"], *(layout.losses(*model) for model in (models[1], models[3]))):
        os.remove(path)
    os.remove(layout.retrained("random", 10, "draw0"))
    retrain(alone, models, "cpu")
    assert sizes == [2, 2, 1, 1, 1, 1]
    again = read_json(files(layout)["losses"])
    assert again["key"] == own["key"]
    np.testing.assert_allclose(again["losses"], own["losses"], rtol=1e-3)
    for model, before in zip((models[1], models[3]), at_once, strict=True):
        assert read_json(layout.losses(*model))["queries"]["report-00"]["loss"] == pytest.approx(before, rel=1e-3)
    for name, tensor in read_tensors(layout.retrained("random", 10, "draw0")).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3)


STACK = [("half", 0, "draw0"), ("half", 0, "draw1"), ("random", 10, "draw0")]


def interrupted_when_asked(layout, monkeypatch, asked: int, models=STACK) -> None:
    """Retrain and be interrupted once so many models have been asked."""
    count, brief = [], module.brief_measures

    def failing(*given):
        if len(count) == asked:
            raise KeyboardInterrupt
        count.append(1)
        return brief(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "brief_measures", failing)
        with pytest.raises(KeyboardInterrupt):
            retrain(layout, models, "cpu")


@pytest.mark.parametrize("taken_back", [True, False])
def test_models_that_are_trained_but_not_all_asked_are_not_trained_again(tiny, monkeypatch, taken_back):
    layout = asked_at_once(tiny, stack=2, subsets=2)
    interrupted_when_asked(layout, monkeypatch, 1)
    first = Path(layout.losses(*STACK[0]))
    if taken_back:  # by Snakemake, after a failed job
        first.unlink()
    steps, run_step = [], training_module._Loop.run_step
    monkeypatch.setattr(training_module._Loop, "run_step", lambda loop: steps.append(loop.called) or run_step(loop))
    retrain(layout, STACK, "cpu")
    assert steps == ["random-k10-draw0"] * 8
    assert first.exists()
    assert Path(layout.losses(*STACK[1])).exists()
    assert not any(Path(layout.checkpoints("stacked")).glob("*"))


def test_what_was_missing_of_a_stack_and_trained_as_one_is_not_trained_again(tiny, monkeypatch):
    """One of three halves was there already: the other two were one training, of which one has been asked."""
    halves = [("half", 0, f"draw{i}") for i in range(3)]
    retrain(asked_at_once(tiny, stack=3, subsets=3), halves[:1], "cpu")
    layout = asked_at_once(tiny, stack=3, subsets=3)
    interrupted_when_asked(layout, monkeypatch, 1, halves)
    assert [Path(layout.losses(*half)).exists() for half in halves] == [True, True, False]
    steps, run_step = [], training_module._Loop.run_step
    monkeypatch.setattr(training_module._Loop, "run_step", lambda loop: steps.append(loop.called) or run_step(loop))
    retrain(layout, halves, "cpu")
    assert not steps
    assert Path(layout.losses(*halves[2])).exists()
    assert not any(Path(layout.checkpoints("stacked")).glob("*"))


def test_an_unchanged_measurement_is_kept(measured, trainings):
    before = Path(files(measured)["losses"]).read_bytes()
    os.utime(measured.score("unlearn", "report-00"))  # newer, but the same
    retrain(measured, [MODEL], "cpu")
    assert trainings == []
    assert Path(files(measured)["losses"]).read_bytes() == before


CHANGES = {
    "recipe": {"train": {"learning_rate": 1e-3}},
    "sampler": {"synthesize": {"sampler_steps": 4}},
    "timesteps of the loss": {"evaluate": {"timestep_stride": 25}},
}
IRRELEVANT = {
    "checkpoints": {"train": {"checkpoint_every": 2}},
    "snapshots": {"train": {"snapshots": 1}},
    "bootstrap": {"evaluate": {"bootstrap": 7}},
    "scan": {"scan": {"batch_size": 3}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_retrains(measured, trainings, change):
    retrain(replace(measured, config=settings(**CHANGES[change])), [MODEL], "cpu")
    assert trainings == ["unlearn-k10-report-00"]


@pytest.mark.parametrize("change", IRRELEVANT)
def test_a_setting_without_influence_does_not(measured, trainings, change):
    retrain(replace(measured, config=settings(**IRRELEVANT[change])), [MODEL], "cpu")
    assert trainings == []


def test_another_removed_set_retrains(measured, trainings):
    path = measured.score("unlearn", "report-00")
    table = read_table(path)
    shuffled = table.assign(image_id=np.roll(table["image_id"], 3))
    inside_the_top = table.assign(image_id=[*table["image_id"][:10][::-1], *table["image_id"][10:]])
    write_table(path, inside_the_top)  # the same set in another order removes the same images
    retrain(measured, [MODEL], "cpu")
    assert trainings == []
    write_table(path, shuffled)
    retrain(measured, [MODEL], "cpu")
    assert trainings == ["unlearn-k10-report-00"]


def test_another_query_retrains(measured, trainings):
    layout = replace(measured, config=settings().model_copy(update={"seed": 6}))
    synthesize(layout, "report-00", "cpu")  # the same name, other noise
    retrain(measured, [MODEL], "cpu")
    assert trainings == ["unlearn-k10-report-00"]


@pytest.mark.parametrize("damage", ["missing image", "another image", "truncated", "no key", "missing"])
def test_a_measurement_that_is_not_whole_is_made_again(measured, trainings, damage):
    losses, image = (Path(files(measured)[name]) for name in ("losses", "image"))
    if damage == "missing image":
        image.unlink()
    elif damage == "another image":  # of a run that was killed before it wrote its losses
        write_image(image, 255 - read_image(image))
    elif damage == "truncated":
        losses.write_text(losses.read_text()[:100])
    elif damage == "missing":
        losses.unlink()
    else:
        write_json(losses, {"loss": 1})
    retrain(measured, [MODEL], "cpu")
    assert trainings == ["unlearn-k10-report-00"]


def test_a_measurement_of_before_images_had_hashes_is_kept(measured, trainings):
    record = read_json(files(measured)["losses"])
    assert len(record.pop("image_sha256")) == 64
    write_json(files(measured)["losses"], record)
    retrain(measured, [MODEL], "cpu")
    assert trainings == []


def test_a_measurement_killed_between_its_files_is_made_again(measured, trainings, monkeypatch):
    def killed():
        monkeypatch.setattr("forgetrace.counterfactual.measure.write_json", lambda *_: os.kill(os.getpid(), 9))
        measure(measured, load_unet(measured, CPU), MODEL, "report-00", "another key")

    assert in_child(killed) == signal.SIGKILL
    retrain(measured, [MODEL], "cpu")
    assert trainings == ["unlearn-k10-report-00"]


def test_a_killed_retraining_resumes_to_the_same_measurement(measured, monkeypatch):
    expected = {name: Path(path).read_bytes() for name, path in files(measured).items()}
    for path in files(measured).values():
        os.remove(path)
    run_step = training_module._Loop.run_step

    def deadly(loop):
        run_step(loop)
        if loop.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        monkeypatch.setattr(training_module._Loop, "run_step", deadly)
        retrain(measured, [MODEL], "cpu")

    assert in_child(killed) == signal.SIGKILL
    assert not any(os.path.exists(path) for path in files(measured).values())
    steps = []
    monkeypatch.setattr(training_module._Loop, "run_step", lambda loop: (steps.append(loop.step), run_step(loop)))
    retrain(measured, [MODEL], "cpu")
    assert steps == [3, 4, 5, 6, 7]
    assert {name: Path(path).read_bytes() for name, path in files(measured).items()} == expected


def test_shared_models_keep_their_weights_and_nothing_else(tiny, trainings):
    for method, k, member in (("random", 10, "draw1"), ("seed", 0, "draw0")):
        retrain(tiny, [(method, k, member)], "cpu")
        assert Path(tiny.retrained(method, k, member)).is_file()
    assert trainings == ["random-k10-draw1", "seed-k0-draw0"]
    assert not Path(f"{tiny.root}/retrain/measures").exists()


def test_shared_models_that_are_there_are_kept(tiny, monkeypatch):
    retrain(tiny, [("random", 10, "draw0")], "cpu")
    monkeypatch.setattr(module, "train_as_one", lambda *_: pytest.fail("trained again"))
    retrain(tiny, [("random", 10, "draw0")], "cpu")


def test_weights_asked_for_later_are_trained_and_then_kept(measured, trainings):
    keeping = replace(measured, config=settings(retrain={"keep_weights": True}))
    retrain(keeping, [MODEL], "cpu")
    assert trainings == ["unlearn-k10-report-00"]
    assert Path(keeping.retrained(*MODEL)).is_file()


@pytest.mark.parametrize("stage", ["encode", "train", "retrain", "measure"])
def test_a_raised_version_retrains(measured, trainings, stage):
    numbers = dict.fromkeys(("encode", "train", "retrain", "measure"), 0)
    write_json("workflow/versions.yaml", numbers)  # JSON is YAML; zeros are what a missing file means
    retrain(measured, [MODEL], "cpu")
    assert trainings == []
    write_json("workflow/versions.yaml", numbers | {stage: 1})
    retrain(measured, [MODEL], "cpu")
    assert trainings == ["unlearn-k10-report-00"]


def test_checkpoints_of_models_that_have_said_all_are_removed(measured, trainings):
    left = Path(checkpoints_of(measured, [module.training_of(measured, load_encoded(measured), *MODEL)]), "last.pt")
    left.parent.mkdir(parents=True)
    left.write_text("of a run that was killed before it tidied up")
    stack = Path(measured.checkpoints("stacked"), "some")
    for names in (["unlearn-k10-report-00"], ["unlearn-k10-report-00", "another"]):
        write_json(stack / "names.json", names)
        retrain(measured, [MODEL], "cpu")
        assert stack.exists() == (len(names) == 2)  # of a job that may go on
    assert trainings == []
    assert not left.exists()


def test_the_base_model_makes_its_query_again(tiny, trainings):
    for method, k, member in tiny.shared_models()[1:]:
        retrain(tiny, [(method, k, member)], "cpu")
    measure_shared(tiny, "report-00", "cpu")
    for model in tiny.shared_models():
        assert read_json(tiny.measure(*model, "report-00")["losses"])["query"] == "report-00"
    base = tiny.measure("base", 0, "base", "report-00")
    np.testing.assert_array_equal(read_image(base["image"]), read_image(tiny.query("report-00")["image"]))


def test_what_shared_models_have_said_is_not_asked_again(tiny, trainings, monkeypatch):
    for method, k, member in tiny.shared_models()[1:]:
        retrain(tiny, [(method, k, member)], "cpu")
    asked, ask = [], module.measure
    monkeypatch.setattr(module, "measure", lambda *given: asked.append(given[2]) or ask(*given))
    measure_shared(tiny, "report-00", "cpu")
    assert asked == tiny.shared_models()
    measure_shared(tiny, "report-00", "cpu")
    assert asked == tiny.shared_models()
    last = tiny.shared_models()[-1]
    Path(tiny.measure(*last, "report-00")["image"]).unlink()
    write_tensors(tiny.weights, read_tensors(tiny.weights), {"of": "another training"})
    measure_shared(tiny, "report-00", "cpu")
    assert asked == [*tiny.shared_models(), tiny.shared_models()[0], last]


def test_a_shared_model_that_lacks_weights_is_not_measured(tiny, trainings):
    for method, k, member in tiny.shared_models()[1:]:
        retrain(tiny, [(method, k, member)], "cpu")
    path = tiny.retrained("random", 10, "draw1")
    write_tensors(path, dict(list(read_tensors(path).items())[1:]), {})
    with pytest.raises(UserError, match=rf"^{path} belongs to another architecture .* 1 are missing"):
        measure_shared(tiny, "report-00", "cpu")


def test_shared_models_differ_from_the_base_where_they_learned_something_else(tiny):
    retrain(tiny, [("random", 10, "draw0")], "cpu")
    weights, base = read_tensors(tiny.retrained("random", 10, "draw0")), read_tensors(tiny.weights)
    assert any(not torch.equal(weights[name], base[name]) for name in base)


def test_a_users_image_has_losses_only(tiny):
    measure(tiny, load_unet(tiny, CPU), ("base", 0, "base"), "mine", "key")
    record = read_json(tiny.measure("base", 0, "base", "mine")["losses"])
    assert "image_sha256" not in record
    assert record["regenerated"] is False
    assert not Path(tiny.measure("base", 0, "base", "mine")["image"]).exists()


def test_a_users_image_is_not_retrained_for_its_missing_picture(tiny, trainings):
    for _ in range(2):
        retrain(tiny, [("unlearn", 10, "mine")], "cpu")
    assert trainings == ["unlearn-k10-mine"]


def test_losses_one_draw_at_a_time(tiny):
    unet, scheduler = load_unet(tiny, CPU), load_scheduler(tiny)
    arrays = read_arrays(tiny.query("report-00")["tensors"])
    timesteps, losses = query_losses(tiny, unet, arrays)
    assert timesteps.tolist() == [0, 20, 40, 60, 80]
    bank = NoiseBank(5, "evaluate", np.tile(timesteps, 2), (12, 8, 8))
    latent, prompt = torch.from_numpy(arrays["latent"])[None], torch.from_numpy(arrays["prompt"])[None]
    for i, timestep in enumerate(timesteps):
        values = [
            example_losses(
                unet, scheduler, latent, prompt, torch.tensor([timestep]), torch.from_numpy(bank.noise("", draw))[None]
            ).item()
            for draw in (i, i + 5)
        ]
        assert losses[i] == pytest.approx(np.mean(values), rel=1e-5)


def test_a_query_that_was_not_synthesized_is_one_sentence(tiny):
    for path in tiny.query("report-01").values():
        os.remove(path)
    with pytest.raises(UserError, match=r"report-01/query.npz is missing"):
        measure_key(tiny, "report-01", "key")
    with pytest.raises(UserError, match=r"report-01/query.npz is missing"):
        measure_shared(tiny, "report-01", "cpu")


HALF = ("half", 0, "draw0")
AT_ONCE = {"methods": ["unlearn"], "subsets": 2, "subset_seeds": 2, "pools": 1, "pooled_k": [10], "queries": 1}


def asked_at_once(layout, queries: int = 1, **retrain):
    """The tiny experiment with models of halves and of one pool, asked about this many queries and the user's image."""
    pool = {"pool": "report", "count": queries}
    mine = {"name": "mine", "image": "mine.png", "prompt": "my own"}
    config = settings(synthesize={"queries": [pool, mine]}, retrain=AT_ONCE | retrain)
    return replace(layout, config=config)


def test_a_half_is_asked_about_every_query_and_only_that_is_kept(tiny, trainings):
    layout = asked_at_once(tiny)
    retrain(layout, [HALF], "cpu")
    record = read_json(layout.losses(*HALF))
    assert (record["method"], record["k"], record["member"], record["removed"]) == (*HALF, 20)
    assert list(record["queries"]) == ["report-00", "mine"]
    assert record["queries"]["report-00"]["processor"]
    assert record["queries"]["report-00"].keys() == {"key", "processor", "loss", "mse"}
    assert record["queries"]["mine"].keys() == {
        "key",
        "processor",
        "loss",
    }  # a user's image has no noise to be made from again
    assert not Path(layout.retrained(*HALF)).exists()


def test_a_brief_measure_says_what_a_whole_one_says(tiny, trainings):
    """On the base model, whose weights the stand-in for a training returns: it makes its own query again."""
    layout = asked_at_once(tiny)
    retrain(layout, [HALF], "cpu")
    measure(layout, load_unet(layout, CPU), ("base", 0, "base"), "report-00", "key")
    brief, whole = read_json(layout.losses(*HALF)), read_json(layout.measure("base", 0, "base", "report-00")["losses"])
    assert brief["queries"]["report-00"]["loss"] == whole["loss"]
    assert brief["queries"]["report-00"]["mse"] == 0


def test_a_pool_leaves_out_its_tops_and_is_asked_about_every_query(tiny, trainings):
    layout = asked_at_once(tiny)
    retrain(layout, [("unlearn", 10, "pool0")], "cpu")
    record = read_json(layout.losses("unlearn", 10, "pool0"))
    assert record["removed"] == 10  # one judged query: the pool's union is its top
    assert list(record["queries"]) == ["report-00", "mine"]
    assert trainings == ["unlearn-k10-pool0"]


def test_a_trained_half_differs_from_the_base_and_its_repetition(tiny):
    layout = asked_at_once(tiny)
    for member in ("draw0", "draw0-seed1"):
        retrain(layout, [("half", 0, member)], "cpu")
    first, again = (read_json(layout.losses("half", 0, member))["queries"] for member in ("draw0", "draw0-seed1"))
    assert first["report-00"]["loss"] != again["report-00"]["loss"]
    assert first["report-00"]["key"] != again["report-00"]["key"]


def test_what_is_measured_is_not_trained_again(tiny, trainings):
    layout = asked_at_once(tiny)
    retrain(layout, [HALF], "cpu")
    before = Path(layout.losses(*HALF)).read_bytes()
    for path in (layout.query("report-00")["tensors"], layout.index):
        os.utime(path)  # newer, but the same
    retrain(layout, [HALF], "cpu")
    assert trainings == ["half-k0-draw0"]
    assert Path(layout.losses(*HALF)).read_bytes() == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_trains_a_half_again(tiny, trainings, change):
    layout = asked_at_once(tiny)
    retrain(layout, [HALF], "cpu")
    before = layout.config.model_dump()
    kept = {"synthesize": before["synthesize"], "retrain": AT_ONCE}
    changed = {section: {**before[section], **keys} for section, keys in CHANGES[change].items()}
    retrain(replace(layout, config=settings(**kept | changed)), [HALF], "cpu")
    assert trainings == ["half-k0-draw0"] * 2


DAMAGES = {
    "truncated": lambda text: text[:100],
    "empty": lambda text: "",
    "no mapping": lambda text: "[3]",
    "a number": lambda text: "3",
    "no queries": lambda text: '{"method": "half"}',
    "queries in a list": lambda text: '{"queries": ["report-00"]}',
    "a query's number": lambda text: '{"queries": {"report-00": 3, "mine": 4}}',
    "other keys": lambda text: text.replace('"key": "', '"key": "0'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_made_again(tiny, trainings, damage):
    layout = asked_at_once(tiny)
    retrain(layout, [HALF], "cpu")
    path = Path(layout.losses(*HALF))
    whole = path.read_text()
    path.write_text(DAMAGES[damage](whole))
    retrain(layout, [HALF], "cpu")
    assert trainings == ["half-k0-draw0"] * 2
    assert path.read_text() == whole


def test_a_killed_training_of_a_half_leaves_no_record(tiny, trainings, monkeypatch):
    layout = asked_at_once(tiny)

    def killed():
        monkeypatch.setattr(module, "write_json", lambda *_: os.kill(os.getpid(), 9))
        retrain(layout, [HALF], "cpu")

    assert in_child(killed) == signal.SIGKILL
    assert not Path(layout.losses(*HALF)).exists()
    retrain(layout, [HALF], "cpu")
    assert trainings == ["half-k0-draw0"]  # the other one was in the child


def test_a_further_query_costs_a_training_unless_the_weights_were_kept(tiny, trainings):
    for keep_weights, trained in ((False, 2), (True, 1)):
        trainings.clear()
        few, more = (asked_at_once(tiny, queries, keep_weights=keep_weights) for queries in (1, 2))
        for path in (few.losses(*HALF), few.retrained(*HALF)):
            Path(path).unlink(missing_ok=True)
        retrain(few, [HALF], "cpu")
        known = read_json(few.losses(*HALF))["queries"]
        retrain(more, [HALF], "cpu")
        assert len(trainings) == trained
        queries = read_json(few.losses(*HALF))["queries"]
        assert queries.keys() == {"report-00", "report-01", "mine"}
        assert {query: queries[query] for query in known} == known


def test_weights_of_a_half_asked_for_later_are_trained_and_then_kept(tiny, trainings):
    retrain(asked_at_once(tiny), [HALF], "cpu")
    keeping = asked_at_once(tiny, keep_weights=True)
    for _ in range(2):
        retrain(keeping, [HALF], "cpu")
    assert trainings == ["half-k0-draw0"] * 2
    assert keeping.retrained(*HALF) in keeping.files()
