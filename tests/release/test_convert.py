import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image

from forgetrace.artifacts import UserError, read_array, read_image, read_json, read_tensors
from forgetrace.attribution.registry import check_methods
from forgetrace.config import Variant, load_config
from forgetrace.curvature.ekfac import EKFAC
from forgetrace.diffusion.given import given_scheduler
from forgetrace.encoding.given import distinct, encoded_files, fitted_file, query_files, query_image
from forgetrace.release import convert
from forgetrace.release.convert import alone_in, import_release

from . import published as made
from .published import CAPTIONS, IMAGES, QUERIES, captions_of, ekfac, fisher, states_of, unet

SMOKE = Path(__file__).parents[2] / "config/smoke.yaml"
GIVEN = Path("given")
TEXTS = [captions_of(i)[:CAPTIONS] for i in range(IMAGES)]


def files_of(folder: Path) -> dict[str, int]:
    return {path.as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def test_everything_of_abu_is_converted(abu):
    file, found = import_release(abu, GIVEN)
    assert found == f"AttributeByUnlearning: 83 images, {4 * IMAGES + 7} distinct captions, 2 queries 'sample'."
    files = encoded_files("given")
    np.testing.assert_array_equal(read_array(files["latents"]), np.load(abu / "coco17_train_latents.npy"))
    states, captions = read_array(files["captions"]), distinct(TEXTS)
    assert states.dtype == np.float16
    np.testing.assert_array_equal(states[:-1], np.stack([states_of(caption) for caption in captions]).astype("float16"))
    assert np.isnan(states[-1]).all()
    own, theirs = UNet2DConditionModel.from_pretrained("given/unet").eval(), unet().eval()
    kept, asked = (json.loads(model.to_json_string()) for model in (own, theirs))
    assert {key: value for key, value in kept.items() if key[0] != "_"} == {
        key: value for key, value in asked.items() if key[0] != "_"
    }
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.randn(2, made.TOKENS, made.WIDTH)
    assert torch.equal(own(*inputs).sample, theirs(*inputs).sample)
    schedule = given_scheduler("given", "train.pretrained")
    assert (schedule.config.prediction_type, schedule.config.num_train_timesteps) == ("epsilon", 1000)
    torch.testing.assert_close(schedule.betas, torch.linspace(1e-4, 0.02, 1000))
    kept = read_tensors(fitted_file("given", "diagonal"))
    assert kept.keys() == fisher().keys()
    assert all(torch.equal(kept[name], value) and value.dtype == torch.float64 for name, value in fisher().items())
    queries = query_files("given", "sample")
    np.testing.assert_array_equal(read_array(queries["latents"]), np.load(abu / "coco17_sample_latents.npy"))
    np.testing.assert_array_equal(
        read_array(queries["prompts"]), np.load(abu / "coco17_sample_text_embeddings.npy")[:, 0]
    )
    assert read_json(queries["record"]) == {"count": QUERIES, "prompts": ["prompt 0", "prompt 1"]}
    np.testing.assert_array_equal(read_image(query_image("given", "sample", 1)), read_image(abu / "sample/1.png"))
    assert file == Path("config/given.yaml")


def test_the_config_runs_the_published_setting(abu):
    file, _ = import_release(abu, GIVEN, "my-trial")
    config = load_config(file)
    check_methods(config)
    assert config.queries() == ["sample-000", "sample-001"]
    assert config.unlearn == {
        "unlearn": Variant(curvature="diagonal", weights="cross-attn-kv", step_size=0.01, damping=0, draws=50000)
    }
    assert (config.scan.timesteps, config.scan.noise, config.score.methods["unlearn"].flips) == (20, "release", "max")
    assert (config.prepare.path, config.prepare.size, config.encode.flips) == ("mscoco", made.SIZE, True)
    assert config.encode.given == config.fit.given == config.train.pretrained == "given"
    assert not config.train.trains


def test_generated_samples_are_queries_too_and_half_precision_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = made.write_abu(Path("mscoco"), "float16")
    for old, new in (("latents", "latents"), ("text_embeddings", "text_embeddings")):
        (folder / f"coco17_sample_{old}.npy").rename(folder / f"{new}.npy")
    (folder / "sample").rename(folder / "images")
    (folder / "sample_caption.txt").unlink()
    import_release(folder, GIVEN)
    assert (
        read_json(query_files("given", "sample")["record"])["prompts"][1] == "(the prompt of query 1 is not published)"
    )
    assert read_array(encoded_files("given")["captions"]).dtype == np.float16


def test_everything_of_fastgda_is_converted(fastgda):
    file, found = import_release(fastgda, GIVEN, "gda")
    assert found.endswith("2 queries 'test', 2 queries 'train'.")
    config = load_config(file)
    assert config.queries() == ["test-000", "test-001", "train-000", "train-001"]
    assert (config.prepare.path, config.unlearn["unlearn"].curvature) == ("coco/trainset", "ekfac")
    np.testing.assert_array_equal(
        read_image(query_image("given", "train", 1)), read_image(fastgda / "query_train/images/000001.png")
    )
    factors, parts = read_tensors(fitted_file("given", "ekfac")), ekfac()
    layers = set(parts["lambda_matrix"]) - {"conv_in"}
    assert factors.keys() == {f"{layer}.{part}" for layer in layers for part in ("Q_A", "Q_G", "Lambda")}
    # F⁻¹g by hand, for weights without and with a bias.
    for layer in ("time_embedding.linear_1", next(layer for layer in layers if layer.endswith("to_k"))):
        q_a, q_g = (parts[f"{part}_eigenvectors"][layer].double() for part in ("activation", "gradient"))
        mean = parts["lambda_matrix"][layer].double() / 40
        gradient = torch.randn(mean.shape, dtype=torch.float64)
        dense = torch.einsum("ia,jb,ab,ka,lb->ijkl", q_g, q_a, 1 / mean, q_g, q_a)
        expected = torch.einsum("ijkl,kl->ij", dense, gradient)
        width = gradient.shape[1] - 1 if layer.startswith("time") else gradient.shape[1]
        named = {f"{layer}.weight": gradient[:, :width]}
        named |= {f"{layer}.bias": gradient[:, -1]} if layer.startswith("time") else {}
        found = EKFAC(factors, 0).precondition(named)
        torch.testing.assert_close(found[f"{layer}.weight"], expected[:, :width], rtol=1e-4, atol=1e-4)


def test_an_interrupted_conversion_goes_on_where_it_was(abu, monkeypatch):
    whole = convert._states

    def killed(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_states", killed)
    with pytest.raises(KeyboardInterrupt):
        import_release(abu, GIVEN)
    before = files_of(GIVEN)
    assert "given/encoded/latents.npy" in before
    assert not any("captions" in path or "partial" in path for path in before)
    assert not Path("config/given.yaml").exists()
    monkeypatch.setattr(convert, "_states", whole)
    Path("given/encoded/.captions.npy.123.partial").write_text("what a killed import may leave")
    import_release(abu, GIVEN)
    after = files_of(GIVEN)
    assert not any("partial" in path for path in after)
    record = {"given/import.json"}
    assert {path: after[path] for path in before.keys() - record} == {
        path: before[path] for path in before.keys() - record
    }
    assert len(read_array(encoded_files("given")["captions"])) == 4 * IMAGES + 7 + 1
    # All is there: nothing is made again, and a config that was edited is kept.
    mine = Path("config/given.yaml").read_text() + "# mine\n"
    Path("config/given.yaml").write_text(mine)
    _, found = import_release(abu, GIVEN)
    assert files_of(GIVEN) == after
    assert found.endswith("config/given.yaml was there and is kept as it is.")
    assert Path("config/given.yaml").read_text() == mine


def test_only_what_a_changed_file_goes_into_is_made_again(abu):
    import_release(abu, GIVEN)
    before = files_of(GIVEN)
    torch.save({name: 2 * value for name, value in fisher().items()}, abu / "fisher_info.pt")
    import_release(abu, GIVEN)
    assert {path for path, time in files_of(GIVEN).items() if before[path] != time} == {
        "given/fit/fisher.safetensors",
        "given/import.json",
    }
    # Moved with all its files, a release is the same.
    after = files_of(GIVEN)
    shutil.move(abu, "elsewhere")
    import_release(Path("elsewhere"), GIVEN, "other")
    assert files_of(GIVEN) == after


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edited(path: Path, change) -> None:
    np.save(path, change(np.load(path)))


def without(path: Path, *names: str, **more) -> None:
    content = torch.load(path)
    torch.save({name: value for name, value in content.items() if not name.endswith(names)} | more, path)


def annotations(folder: Path, change) -> None:
    path = folder / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swapped(states: np.ndarray) -> np.ndarray:
    """The states of two images exchanged, so that captions they share with others are those of other words."""
    states[[3, 4]] = states[[4, 3]]
    return states


def with_nan(array: np.ndarray) -> np.ndarray:
    array[90, 0, 0, 0] = np.nan
    return array


LATENTS, STATES, SAMPLE = "coco17_train_latents.npy", "coco17_train_text_embeddings.npy", "coco17_sample_latents.npy"
PROMPTS = "coco17_sample_text_embeddings.npy"
DAMAGES = {
    "truncated latents": (lambda d: truncated(d / LATENTS), rf"{LATENTS} is no whole .npy file \(mmap length"),
    "no array": (lambda d: (d / LATENTS).write_text("not found"), rf"{LATENTS} is no whole .npy file"),
    "pickled array": (
        lambda d: np.save(d / LATENTS, np.array([Malicious()], dtype=object), allow_pickle=True),
        rf"{LATENTS} is no whole .npy file",
    ),
    "no mirror images": (
        lambda d: edited(d / LATENTS, lambda a: a[:IMAGES]),
        r"has shape \(83, 4, 4, 4\), expected \(166, any, any, any\), two for each of the annotated images",
    ),
    "numbers of double precision": (
        lambda d: edited(d / LATENTS, lambda a: a.astype(float)),
        rf"{LATENTS} holds float64, expected float16 or float32",
    ),
    "latents with NaN": (lambda d: edited(d / LATENTS, with_nan), rf"{LATENTS} holds NaN, infinity .* in row 90"),
    "truncated states": (lambda d: truncated(d / STATES), rf"{STATES} is no whole .npy file"),
    "too few states": (
        lambda d: edited(d / STATES, lambda a: a[1:]),
        r"has shape \(82, 5, 3, 8\), expected \(83, 5, any, any\), the states of 5 captions of each",
    ),
    "four captions": (lambda d: edited(d / STATES, lambda a: a[:, :4]), r"has shape \(83, 4, 3, 8\), expected"),
    "states of another width": (
        lambda d: edited(d / STATES, lambda a: a[..., :6]),
        r"model.bin takes token states of width 8, .* has token states of width 6",
    ),
    "states too large for half precision": (
        lambda d: edited(d / STATES, lambda a: a * 1e6),
        r"holds NaN, infinity or numbers beyond float16 in row 0",
    ),
    "states in another order": (
        lambda d: edited(d / STATES, swapped),
        r"has different states for the caption 'one of \d' of image .* in another order",
    ),
    "an image with four captions": (
        lambda d: annotations(
            d, lambda c: c.update(annotations=[a for a in c["annotations"] if a["id"] not in (20, 21)])
        ),
        r"lists .*jpg with 4 captions, expected 5 or more of every image",
    ),
    "a missing picture": (lambda d: (d / "train2017/000000000008.jpg").unlink(), r"lists 1 images that cannot be used"),
    "other annotations": (
        lambda d: annotations(d, lambda c: c["images"].pop()),
        r"(?s)2 problems.*shape \(166, 4, 4, 4\), expected \(164, .*shape \(83, 5, 3, 8\), expected \(82, 5",
    ),
    "truncated model": (lambda d: truncated(d / "model.bin"), r"model.bin cannot be read as tensors alone"),
    "a model that runs code": (
        lambda d: torch.save({"conv_in.weight": Malicious()}, d / "model.bin"),
        r"model.bin cannot be read as tensors alone \(.*mkdir",
    ),
    "no dictionary": (lambda d: torch.save(torch.zeros(2), d / "model.bin"), r"model.bin holds no tensors by name"),
    "a model with more than tensors": (
        lambda d: without(d / "model.bin", step=3),
        r"model.bin holds 'step', which is no tensor but int",
    ),
    "another model": (
        lambda d: torch.save({"weight": torch.zeros(2)}, d / "model.bin"),
        r"model.bin is no UNet2DConditionModel of the published kind",
    ),
    "a model without a weight": (
        lambda d: without(d / "model.bin", "conv_out.bias"),
        r"model.bin lacks 1 weights and has 0 of no use, such as conv_out.bias",
    ),
    "a weight of another shape": (
        lambda d: without(d / "model.bin", **{"conv_out.bias": torch.zeros(5)}),
        r"model.bin holds conv_out.bias of shape \(5,\), expected \(4,\) \(1 do not fit\)",
    ),
    "a model with NaN": (
        lambda d: without(d / "model.bin", **{"conv_out.bias": torch.full((4,), torch.nan)}),
        r"model.bin holds NaN or infinity in conv_out.bias",
    ),
    "a Fisher information of another shape": (
        lambda d: without(d / "fisher_info.pt", **{"conv_out.bias": torch.zeros(5)}),
        r"fisher_info.pt holds conv_out.bias of shape \(5,\), the model has shape \(4,\)",
    ),
    "a Fisher information without keys": (
        lambda d: without(d / "fisher_info.pt", "attn2.to_k.weight"),
        r"fisher_info.pt lacks \d+ of the weights cross-attn-kv .* such as .*attn2.to_k.weight",
    ),
    "a negative Fisher information": (
        lambda d: without(d / "fisher_info.pt", **{"conv_out.bias": -torch.ones(4)}),
        r"fisher_info.pt holds entries of conv_out.bias that are no mean squares",
    ),
    "a Fisher information that runs code": (
        lambda d: (d / "fisher_info.pt").write_bytes(pickle.dumps(Malicious(), 2)),
        r"fisher_info.pt cannot be read as tensors alone",
    ),
    "no query": (lambda d: edited(d / SAMPLE, lambda a: a[:0]), rf"{SAMPLE} has no query"),
    "queries of another shape": (
        lambda d: edited(d / SAMPLE, lambda a: a[:, :, :2]),
        r"has shape \(2, 4, 2, 4\), expected \(any, 4, 4, 4\), as those of training images",
    ),
    "too few prompts": (
        lambda d: edited(d / PROMPTS, lambda a: a[1:]),
        r"has shape \(1, 1, 3, 8\), expected \(2, 1, 3, 8\), one prompt of each query",
    ),
    "too few lines": (
        lambda d: (d / "sample_caption.txt").write_text("prompt 0\n"),
        r"sample_caption.txt has 1 lines, expected a prompt for each of 2 queries",
    ),
    "a missing query image": (lambda d: (d / "sample/1.png").unlink(), r"sample/1.png is missing"),
    "a damaged query image": (lambda d: truncated(d / "sample/1.png"), r"sample/1.png is no image that can be read"),
    "an oblong query image": (
        lambda d: made.picture(0, 8, 9).save(d / "sample/1.png"),
        r"sample/1.png has \(9, 8\) pixels, expected a square",
    ),
    "a query image of another size": (
        lambda d: made.picture(0, 8, 8).save(d / "sample/1.png"),
        r"has other sides than .*, expected squares of one size",
    ),
    "missing files": (
        lambda d: [(d / name).unlink() for name in ("model.bin", "fisher_info.pt")],
        r"lacks mscoco/model.bin, mscoco/fisher_info.pt: download what is missing",
    ),
    "two layouts": (lambda d: (d / "trainset").mkdir(), r"and there is both .*trainset and .*coco17_train_latents.npy"),
    "neither layout": (lambda d: (d / LATENTS).unlink(), r"is no release that forgetrace knows, .* there is neither"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_a_sentence_that_names_the_file(abu, damage):
    change, sentence = DAMAGES[damage]
    change(abu)
    with pytest.raises(UserError, match=sentence):
        import_release(abu, GIVEN)
    assert not Path("owned").exists()
    assert not Path("config/given.yaml").exists()


def test_all_that_does_not_fit_is_told_at_once(abu):
    for damage in ("truncated latents", "too few states", "truncated model", "too few lines", "a missing query image"):
        DAMAGES[damage][0](abu)
    with pytest.raises(UserError, match=r"do not fit together \(5 problems\)") as told:
        import_release(abu, GIVEN)
    assert str(told.value).count("\n") == 5


EKFAC_DAMAGES = {
    "another layer": (
        "lambda_matrix",
        lambda t: t.update(nowhere=torch.zeros(2, 2)),
        r"holds nowhere, which is no layer",
    ),
    "another shape": (
        "activation_eigenvectors",
        lambda t: t.update({"time_embedding.linear_1": torch.zeros(3, 3)}),
        r"activation_eigenvectors.safetensors holds time_embedding.linear_1 of shape \(3, 3\), expected \(33, 33\)",
    ),
    "no factor": (
        "gradient_eigenvectors",
        lambda t: t.pop("time_embedding.linear_1"),
        r"gradient_eigenvectors.safetensors lacks time_embedding.linear_1, which lambda_matrix has",
    ),
    "NaN": (
        "gradient_eigenvectors",
        lambda t: t["time_embedding.linear_1"].fill_(torch.nan),
        r"holds NaN or infinity for time_embedding.linear_1",
    ),
    "no example": (
        "num_lambda_processed",
        lambda t: t.update({"time_embedding.linear_1": torch.tensor([0])}),
        r"counts 0 examples of time_embedding.linear_1",
    ),
    "no keys": (
        "lambda_matrix",
        lambda t: [t.pop(name) for name in list(t) if name.endswith("to_k")],
        r"lambda_matrix.safetensors lacks \d+ of the weights cross-attn-kv",
    ),
}


@pytest.mark.parametrize("damage", EKFAC_DAMAGES)
def test_factors_that_do_not_fit_are_a_sentence(fastgda, damage):
    from safetensors.torch import load_file, save_file

    part, change, sentence = EKFAC_DAMAGES[damage]
    file = fastgda / f"ekfac_fisher/{part}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=sentence):
        import_release(fastgda, GIVEN)


def test_a_folder_holds_one_release(abu, published):
    import_release(abu, GIVEN)
    with pytest.raises(UserError, match=r"given holds AttributeByUnlearning's release: choose another folder with"):
        import_release(published["fastgda"], GIVEN)


def test_a_config_of_other_data_is_neither_taken_nor_changed(abu):
    other = Path("config/coco.yaml")
    import_release(abu, Path("elsewhere"), "theirs")
    for content in (SMOKE.read_text(), Path("config/theirs.yaml").read_text()):
        other.write_text(content)
        with pytest.raises(UserError, match=r"config/coco.yaml is there and does not use given: give --name"):
            import_release(abu, GIVEN, "coco")
        assert other.read_text() == content
    assert not GIVEN.exists()
    file, _ = import_release(abu, GIVEN, "own")
    assert import_release(abu, Path("./given"), "own")[1].endswith("config/own.yaml was there and is kept as it is.")
    assert file == Path("config/own.yaml")


def test_of_two_imports_into_a_folder_one_works_and_the_other_refuses(abu):
    with alone_in(GIVEN), pytest.raises(UserError, match=r"Another import writes to given: wait for it"):
        import_release(abu, GIVEN)
    assert list(GIVEN.iterdir()) == []
    import_release(abu, GIVEN)


def test_images_of_three_sizes_are_one_problem(fastgda):
    for number, side in ((0, 8), (1, 12)):
        Image.new("RGB", (side, side)).save(fastgda / f"query_test/images/{number}.png")
    with pytest.raises(UserError, match=r"1.png has other sides than .*0.png, expected squares of one size"):
        import_release(fastgda, GIVEN)


def test_names_that_cannot_be_are_refused_before_any_work(abu):
    with pytest.raises(UserError, match=r"'Not one' cannot name an experiment: give --name"):
        import_release(abu, GIVEN, "Not one")
    assert not GIVEN.exists()
    file, _ = import_release(abu, Path("My Data"))
    assert file == Path("config/my-data.yaml")
    assert yaml.safe_load(file.read_text())["encode"]["given"] == "My Data"
