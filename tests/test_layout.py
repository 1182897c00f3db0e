from pathlib import PurePosixPath

import pytest

from forgetrace.artifacts import UserError
from forgetrace.layout import Layout, load_layout

from .conftest import settings


@pytest.fixture
def layout() -> Layout:
    return Layout("tiny", settings())


def test_the_experiment_is_named_by_its_file(tmp_path):
    path = tmp_path / "my-trial.yaml"
    path.write_text("score: {methods: {random: {}}}")
    assert load_layout(path).root == "results/my-trial"
    with pytest.raises(UserError, match="Cannot read the config"):
        load_layout(tmp_path / "none.yaml")


def every_path(layout: Layout) -> list[str]:
    names = ("latents", "captions", "index", "encode_manifest", "weights", "architecture", "scheduler", "curve")
    paths = [getattr(layout, name) for name in (*names, "recipe", "base_scan", "metrics")]
    paths += [*layout.fitted("diagonal"), *layout.fitted("ekfac")]
    paths += [*layout.snapshots, layout.table("per_query"), layout.figure("delta"), layout.figure("delta", "pdf")]
    for query in layout.config.queries():
        paths += layout.query(query).values()
        for name in ("unlearn", "pixel"):
            paths += [*layout.unlearned(name, query).values(), layout.scan(name, query), layout.score(name, query)]
        for model in layout.measured_models(query):
            paths += layout.measure(*model, query).values()
    models = {model for query in layout.config.queries() for model in layout.measured_models(query)}
    return paths + [layout.retrained(*model) for model in models if model[0] != "base"]


def test_only_the_curvatures_that_variants_step_by_are_kept(layout):
    files = {*layout.fitted("diagonal"), *layout.fitted("ekfac")}
    assert len(files) == 4
    assert layout.fitted("none") == []
    assert layout.files() & files == {layout.fisher, layout.fisher_report}
    other = Layout("tiny", settings(unlearn={"unlearn": {"curvature": "ekfac", "step_size": 1}}))
    assert other.files() & files == {layout.ekfac, layout.ekfac_report}


def test_no_two_files_share_a_path(layout):
    paths = every_path(layout)
    assert len(set(paths)) == len(paths)
    # Nor is one file's path another's folder.
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    assert not folders & set(paths)


def test_results_lie_below_the_experiment_and_checkpoints_outside_the_outputs(layout):
    assert all(path.startswith("results/tiny/") for path in every_path(layout))
    assert not any("checkpoints" in path for path in every_path(layout))
    assert layout.checkpoints("base") == "results/tiny/checkpoints/base"


def test_data_are_shared_by_experiments(layout):
    other = Layout("other", settings(scan={"timesteps": 2}))
    for name in ("data", "metadata", "data_manifest"):
        assert getattr(layout, name) == getattr(other, name)
    assert layout.metadata == "data/digits/metadata.jsonl"


def test_data_of_other_settings_have_a_folder_of_their_own(layout):
    changes = [
        {"seed": 1},
        {"tuning_captions": 61},
        {"report_captions": 61},
        {"seed": 6, "tuning_captions": 1},
        {"seed": 1, "tuning_captions": 6},
    ]
    folders = {Layout("other", settings(prepare=change)).data for change in changes}
    assert len(folders | {layout.data}) == len(changes) + 1
    assert "data/digits-seed-1-tuning_captions-6" in folders
    # A default that is written out is the same setting.
    assert Layout("other", settings(prepare={"seed": 0, "report_captions": 60})).data == layout.data


def test_wildcards_go_through(layout):
    assert layout.score("{method}", "{query}") == "results/tiny/score/{method}/{query}.parquet"
    assert layout.retrained("{method}", "{k}", "{member}").count("{") == 3


def test_snapshots_are_named_by_step(layout):
    assert layout.snapshots == [
        "results/tiny/train/snapshots/step-000004.safetensors",
        "results/tiny/train/snapshots/step-000008.safetensors",
    ]


def test_models_a_query_is_measured_with():
    layout = Layout("tiny", settings(retrain={"methods": ["unlearn", "random"], "k": [5, 10], "seeds": 2}))
    shared = [
        ("base", 0, "base"),
        ("random", 5, "draw0"), ("random", 5, "draw1"), ("random", 10, "draw0"), ("random", 10, "draw1"),
        ("seed", 0, "draw0"), ("seed", 0, "draw1"),
    ]  # fmt: skip
    assert layout.shared_models() == shared
    own = [("unlearn", 5, "report-00"), ("unlearn", 10, "report-00")]
    assert layout.measured_models("report-00") == shared + own
    assert layout.retrained("base", 0, "base") == layout.weights


def test_models_of_halves_and_pools_and_the_tables_made_of_them():
    plain = ["per_query", "counterfactual", "comparisons"]
    assert Layout("tiny", settings()).tables() == plain
    layout = Layout("tiny", settings(retrain={"methods": [], "subsets": 2, "subset_seeds": 2}))
    assert [member for _, _, member in layout.half_models()] == ["draw0", "draw1", "draw0-seed1", "draw1-seed1"]
    assert {(method, k) for method, k, _ in layout.half_models()} == {("half", 0)}
    assert layout.tables() == [*plain, "lds", "lds_per_query", "agreement", "cost"]
    layout = Layout("tiny", settings(retrain={"pools": 2, "pooled_k": [5, 10]}))
    assert layout.pooled_models()[:4] == [
        ("unlearn", 5, "pool0"), ("unlearn", 5, "pool1"), ("unlearn", 10, "pool0"), ("unlearn", 10, "pool1"),
    ]  # fmt: skip
    assert len(layout.pooled_models()) == 6 * 2 * 2
    assert (layout.pool("pool0"), layout.pool("pool1")) == (["report-00", "mine"], ["report-01"])
    assert layout.tables() == [*plain, "pooled", "agreement", "cost"]
    wanted = {layout.losses("text", 5, "pool1"), layout.retrained("text", 5, "pool1"), layout.table("cost")}
    assert wanted <= layout.files()
    assert layout.checkpoints("text-k5-pool1") in layout.unfinished()


def test_every_retraining_is_in_one_set():
    layout = Layout("tiny", settings(retrain={"k": [5, 10], "subsets": 2, "pools": 1, "pooled_k": [3], "seeds": 2}))
    sets = layout.retraining_sets()
    assert list(sets) == ["shared", "half", "pools", "unlearn"]
    assert sets["shared"] == layout.shared_models()[1:]
    assert sets["unlearn"] == [("unlearn", k, query) for query in layout.config.queries() for k in (5, 10)]
    assert layout.retrainings() == [*sets["shared"], *layout.half_models(), *layout.pooled_models(), *sets["unlearn"]]
    assert len(set(layout.retrainings())) == len(layout.retrainings())
    assert list(Layout("tiny", settings(retrain={"methods": []})).retraining_sets()) == ["shared"]


def test_timings_lie_outside_the_results(layout):
    assert layout.timing("score", "pixel", "mine") == "timings/tiny/score/pixel/mine.tsv"


def test_own_data_are_named_by_their_path_and_settings():
    def data(**prepare) -> str:
        queries = [{"name": "mine", "image": "a.png", "prompt": "a"}]
        return Layout("tiny", settings(prepare=prepare, synthesize={"queries": queries})).data

    own = {"dataset": "folder", "path": "my photos/ä", "size": 32}
    assert data(**own).startswith("data/folder-my-photos-")
    changes = [{}, {"size": 16}, {"path": "my photos/ö"}, {"path": "my-photos"}, {"seed": 1}, {"tuning_captions": 0}]
    folders = {data(**own | change) for change in changes} | {data(dataset="coco", path=own["path"])}
    assert len(folders) == len(changes) + 1
    assert all(set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_/") for folder in folders)
    # .dvcignore leaves folders with a hyphen to their experiments.
    assert all("-" in folder for folder in folders)
