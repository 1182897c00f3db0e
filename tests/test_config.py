import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from forgetrace.artifacts import UserError
from forgetrace.config import Config, ImageQuery, Narrowing, PoolQueries, Scan, Train, load_config, parse_config

MINIMAL = {"score": {"methods": {"random": {}}}}


def parse(**sections) -> Config:
    return parse_config({**MINIMAL, **sections}, "config/x.yaml")


def sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def test_defaults_round_trip(tmp_path):
    config = parse()
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(tmp_path / "x.yaml") == config
    assert config.queries() == ["report-00", "report-01", "report-02", "report-03"]
    assert config.seed == 0


@given(st.sampled_from([None, *sections()]), st.text("abcdefghij_", min_size=1, max_size=12))
def test_an_unknown_key_is_named(section, key):
    known = Config if section is None else sections()[section]
    if key in known.model_fields:
        return
    content = {**MINIMAL, key: 1} if section is None else {**MINIMAL, section: {**MINIMAL.get(section, {}), key: 1}}
    where = key if section is None else f"{section}.{key}"
    with pytest.raises(UserError, match=f"^config/x.yaml: unknown key '{where}' .*config/README.md"):
        parse_config(content, "config/x.yaml")


NUMBERS = [
    (section, key)
    for section, model in sections().items()
    for key, field in model.model_fields.items()
    if field.annotation in (int, float)
]


@given(st.sampled_from(NUMBERS), st.sampled_from([-1, -1e9, "many", [1], {}, float("inf"), float("nan"), None]))
@hypothesis_settings(max_examples=150)
def test_an_impossible_number_names_its_key(key, value):
    section, name = key
    with pytest.raises(UserError, match=f"'{section}.{name}': ") as caught:
        parse_config({**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}}, "config/x.yaml")
    assert "\n" not in str(caught.value)


def test_all_wrong_keys_are_named_at_once():
    with pytest.raises(UserError, match=r"unknown key 'train.stepz'.*'scan.timesteps'"):
        parse(train={"stepz": 1}, scan={"timesteps": 0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"retrain": {"k": [20, 20]}}, "retrain.k: an entry occurs twice"),
        ({"retrain": {"methods": ["random", "random"]}}, "retrain.methods: an entry occurs twice"),
        ({"retrain": {"methods": ["unlearn"]}}, "retrain.methods: 'unlearn' is not one of score.methods"),
        (
            {"synthesize": {"queries": [{"pool": "report", "count": 9}]}, "prepare": {"report_captions": 8}},
            "the pool 'report' has only 8 captions, not 9",
        ),
        ({"synthesize": {"queries": [{"pool": "train", "count": 1}]}}, "synthesize.queries.0"),
        ({"synthesize": {"queries": [{"pool": "report", "count": 2}, {"pool": "report", "count": 1}]}}, "same name"),
        (
            {
                "synthesize": {
                    "queries": [{"pool": "report", "count": 1}, {"name": "report-00", "image": "a", "prompt": "b"}]
                }
            },
            "two queries have the same name",
        ),
        *(
            (
                {"synthesize": {"queries": [{"name": name, "image": "a", "prompt": "b"}]}},
                f"synthesize.queries: the name '{name}' belongs to models of the evaluation",
            )
            for name in ("draw0", "pool0", "pool12")
        ),
        ({"retrain": {"queries": 5}}, "retrain.queries: the experiment has only 4"),
        ({"retrain": {"queries": ["report-09"]}}, "retrain.queries: there is no query 'report-09'"),
        ({"retrain": {"queries": ["report-00", "report-00"]}}, "retrain.queries: a query occurs twice"),
        ({"retrain": {"queries": []}}, "retrain.queries"),
        ({"retrain": {"pools": 3, "pooled_k": [9], "queries": 2}}, "retrain.pools: only 2 query images are judged"),
        ({"retrain": {"pools": 2}}, "retrain.pools and retrain.pooled_k go together"),
        ({"retrain": {"pooled_k": [9]}}, "retrain.pools and retrain.pooled_k go together"),
        ({"retrain": {"pools": 2, "pooled_k": [9, 9]}}, "retrain.pooled_k: an entry occurs twice"),
        ({"synthesize": {"queries": []}}, "'synthesize.queries'"),
        ({"synthesize": {"queries": [{"name": "../etc", "image": "a", "prompt": "b"}]}}, "queries.0.ImageQuery.name"),
        ({"synthesize": {"sampler_steps": 2000}}, "synthesize.sampler_steps: 2000 is more than train.timesteps"),
        ({"scan": {"timesteps": 51}, "train": {"timesteps": 50}}, "scan.timesteps: 51 is more than train.timesteps"),
        ({"train": {"cross_attention": [True]}}, "'train': cross_attention needs one entry per entry of channels"),
        ({"train": {"steps": 100}}, "'train': warmup_steps must be smaller than steps"),
        ({"train": {"steps": 3, "warmup_steps": 0}}, "'train': snapshots must not outnumber steps"),
        ({"train": {"channels": [8, 12]}}, "'train': every entry of channels must be divisible"),
        ({"train": {"prediction": "x0"}}, "'train.prediction'"),
        (
            {"train": {"prediction": "epsilon"}},
            "'train': prediction epsilon cannot .* squaredcos_cap_v2 .* take v_pred",
        ),
        ({"unlearn": {"v": {}}}, "'unlearn.v.step_size'"),
        (
            {"unlearn": {"v": {"procedure": "adam"}}},
            "'unlearn.v.step_size': give one, only procedure mucs has a default",
        ),
        ({"unlearn": {"v": {"step_size": None}}}, "'unlearn.v.step_size': give one"),
        ({"unlearn": {"v": {"procedure": "mucs", "step_size": 0}}}, "'unlearn.v.step_size'"),
        ({"unlearn": {"v": {"procedure": ["mucs"], "step_size": 1}}}, "'unlearn.v.procedure'"),
        ({"unlearn": {"v": "mucs"}}, "'unlearn.v'"),
        (
            {"unlearn": {"v": {"procedure": "adam", "step_size": 1, "curvature": "diagonal"}}},
            "'unlearn.v': curvature would have no effect with procedure adam: remove the key",
        ),
        (
            {"unlearn": {"v": {"procedure": "mucs", "damping": 0.1, "curvature": "diagonal"}}},
            "'unlearn.v': curvature and damping would have no effect with procedure mucs: remove",
        ),
        ({"unlearn": {"V 1": {"step_size": 1}}}, "unlearn"),
        ({"unlearn": {"v": {"step_size": 1, "weights": "most"}}}, "'unlearn.v.weights'"),
        ({"score": {"methods": {}}}, "'score.methods'"),
        ({"score": {"methods": {"a/b": {}}}}, "score.methods"),
        ({"seed": -1}, "'seed'"),
        ({"prepare": {"seed": 2**64}}, "'prepare.seed': Input should be less than"),
        ({"prepare": {"dataset": "cifar"}}, "'prepare.dataset'"),
    ],
)
def test_what_cannot_work_stops_before_any_job(content, message):
    with pytest.raises(UserError, match=message):
        parse_config({**MINIMAL, **content}, "config/x.yaml")


def test_queries_are_named_in_the_order_of_the_config():
    own = {"name": "mine", "image": "pictures/mine.png", "prompt": "a red seven"}
    queries = [{"pool": "tuning", "count": 2}, own, {"pool": "report", "count": 1}]
    config = parse(synthesize={"queries": queries})
    assert config.queries() == ["tuning-00", "tuning-01", "mine", "report-00"]
    assert config.image_query("mine") == ImageQuery(**own)
    assert config.image_query("tuning-00") is None
    assert isinstance(config.synthesize.queries[0], PoolQueries)
    assert [config.origin(query) for query in config.queries()] == ["tuning", "tuning", "own", "report"]
    assert config.reported_queries() == ["report-00"]
    tuning = parse(synthesize={"queries": queries[:1]})
    assert tuning.reported_queries() == ["tuning-00", "tuning-01"]


def test_queries_that_are_not_judged_come_last():
    config = parse(synthesize={"queries": [{"pool": "tuning", "count": 3}]}, retrain={"queries": 2})
    assert config.judged_queries() == ["tuning-00", "tuning-01"]
    assert parse(retrain={"queries": None}).judged_queries() == parse().queries()


def test_judged_queries_can_be_named():
    named = ["tuning-02", "tuning-00"]
    config = parse(synthesize={"queries": [{"pool": "tuning", "count": 3}]}, retrain={"queries": named})
    assert config.judged_queries() == named


@given(steps=st.integers(1, 3000), count=st.integers(1, 20))
def test_snapshots_are_distinct_and_end_with_the_training(steps, count):
    if count > steps:
        return
    kept = Train(steps=steps, warmup_steps=0, snapshots=count).snapshot_steps()
    assert len(set(kept)) == count
    assert kept == sorted(kept)
    assert kept[0] >= 1
    assert kept[-1] == steps


def test_a_digest_holds_the_named_sections_only():
    digest = parse(seed=4).digest_of("seed", "scan")
    assert digest.keys() == {"seed", "scan"}
    assert digest["seed"] == 4


def test_a_config_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        parse().seed = 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Cannot read the config .*x.yaml: No such file"),
        ("a: [1", "x.yaml is not valid YAML"),
        ("", "must hold sections"),
        ("- 1", "must hold sections"),
        ("just words", "must hold sections"),
    ],
)
def test_an_unreadable_config_is_one_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"seed: \xff\xfe", b"seed: \x00"])
def test_a_binary_config_is_one_sentence(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"x.yaml is not valid YAML"):
        load_config(tmp_path / "x.yaml")


def test_an_option_younger_than_finished_results_is_no_part_of_them_while_it_is_off():
    without, narrowed = Scan(), Scan(narrowing=Narrowing())
    assert "narrowing" not in without.model_dump(mode="json")
    assert narrowed.model_dump(mode="json")["narrowing"]["first"] == 6
    assert "shards" not in without.model_dump(mode="json")
    assert Scan(shards=3).of_base() == without.of_base()


def test_a_narrowed_scan_is_not_sharded():
    with pytest.raises(UserError, match=r"'scan': shards cannot split a narrowed scan, .*: remove shards or narrowing"):
        parse(scan={"shards": 2, "narrowing": {}})


def test_narrowing_looks_at_every_boundary_that_is_cut_at():
    with pytest.raises(UserError, match=r"scan.narrowing.tops: 10 of retrain.pooled_k is not among them"):
        parse(scan={"narrowing": {"tops": [20]}}, retrain={"k": [20], "pools": 1, "pooled_k": [10]})


@pytest.mark.parametrize(
    "encode",
    [{"tokens": 513}, {"tokens": 78, "text_encoder": "clip", "image_encoder": "autoencoder-kl", "pipeline": "x"}],
)
def test_no_more_tokens_are_kept_than_the_text_encoder_takes(encode):
    with pytest.raises(UserError, match=rf"tokens: {encode.get('text_encoder', 'minilm')} takes at most"):
        parse(encode=encode)


def test_a_newton_steps_results_hang_on_what_they_always_did():
    plain = parse(unlearn={"v": {"step_size": 1e-4}}).unlearn["v"]
    assert plain == parse(unlearn={"v": {"step_size": 1e-4, "procedure": "newton"}}).unlearn["v"]
    assert plain.model_dump() == plain.model_dump(mode="json") == {
        "curvature": "diagonal",
        "weights": "all",
        "step_size": 1e-4,
        "steps": 1,
        "draws": 2048,
        "damping": 0.1,
    }  # fmt: skip


def test_a_procedure_has_defaults_of_its_own():
    variants = {"a": {"procedure": "adam", "step_size": 1e-4}, "m": {"procedure": "mucs"}}
    adam, mucs = parse(unlearn=variants, train={"learning_rate": 3e-3}).unlearn.values()
    assert (adam.curvature, adam.weights, adam.steps, adam.draws, adam.step_size) == ("none", "all", 1, 2048, 1e-4)
    assert (mucs.curvature, mucs.weights, mucs.steps, mucs.draws) == ("none", "mlp", 1000, 100)
    assert mucs.step_size == pytest.approx(3e-4)
    with pytest.raises(UserError, match=r"unlearn.m.step_size: .* nobody knows of train.pretrained; give step_size"):
        parse(unlearn=variants, train={"pretrained": "a/model"})
    assert [variant.model_dump()["procedure"] for variant in (adam, mucs)] == ["adam", "mucs"]
    own = {"procedure": "mucs", "weights": "all", "steps": 7, "draws": 9, "step_size": 1}
    kept = parse(unlearn={"m": own}).unlearn["m"].model_dump()
    assert {key: kept[key] for key in own} == own


def test_coco_has_the_papers_size_and_a_folder_needs_one():
    assert parse(prepare={"dataset": "coco", "path": "coco"}).prepare.size == 128
    assert parse(prepare={"dataset": "coco", "path": "coco", "size": 64}).prepare.size == 64
    assert parse(prepare={"dataset": "folder", "path": "photos", "size": 32}).prepare.size == 32


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "folder"}, "'prepare': dataset folder needs path and size"),
        ({"dataset": "folder", "path": "photos"}, "'prepare': dataset folder needs size"),
        ({"dataset": "coco"}, "'prepare': dataset coco needs path"),
        ({"path": "photos", "size": 3}, "path and size would have no effect with dataset digits: remove the key"),
        ({"dataset": "folder", "path": "", "size": 3}, "'prepare.path'"),
        ({"dataset": "folder", "path": "photos", "size": 0}, "'prepare.size'"),
        ({"dataset": "folder", "path": "a", "size": 8, "report_captions": 0}, "the pool 'report' has only 0 captions"),
    ],
)
def test_a_dataset_needs_what_is_its_own(keys, message):
    with pytest.raises(UserError, match=message):
        parse(prepare=keys)


def test_results_of_the_digits_do_not_hang_on_options_of_own_data():
    """Digests, params and names of folders of finished results were made before there were these options."""
    assert set(parse(prepare={"seed": 3}).digest_of("prepare")["prepare"]) == {
        "dataset", "seed", "tuning_captions", "report_captions",
    }  # fmt: skip
