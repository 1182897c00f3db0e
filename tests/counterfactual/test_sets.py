from dataclasses import replace

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_table, write_table
from forgetrace.counterfactual.sets import half, training_of
from forgetrace.diffusion.draws import draw_step
from forgetrace.encoding.store import load_encoded

from ..conftest import IMAGES, settings


def removed_by(layout, method: str, k: int, member: str) -> np.ndarray:
    return training_of(layout, load_encoded(layout), method, k, member).removed


@pytest.mark.parametrize("k", [0, 1, 10, IMAGES - 1])
def test_exactly_the_top_k_are_left_out(tiny, k):
    top = read_table(tiny.score("unlearn", "report-00"))["image_id"][:k]
    removed = removed_by(tiny, "unlearn", k, "report-00")
    assert {load_encoded(tiny).image_ids[row] for row in np.flatnonzero(removed)} == set(top)
    assert removed.dtype == bool


def test_the_rank_decides_not_the_order_of_the_file(tiny):
    expected = removed_by(tiny, "unlearn", 10, "report-00")
    path = tiny.score("unlearn", "report-00")
    write_table(path, read_table(path).sample(frac=1, random_state=0))
    np.testing.assert_array_equal(removed_by(tiny, "unlearn", 10, "report-00"), expected)


def test_a_leave_k_out_training_keeps_the_base_models_seed(tiny):
    training = training_of(tiny, load_encoded(tiny), "unlearn", 10, "report-00")
    assert training.seed == tiny.config.seed
    assert training.name == "unlearn-k10-report-00"


def test_random_sets_differ_by_draw_and_k_and_seed(tiny):
    sets = {
        (k, member): removed_by(tiny, "random", k, member) for k in (10, 20) for member in ("draw0", "draw1", "draw2")
    }
    for (k, _), removed in sets.items():
        assert removed.sum() == k
    assert len({removed.tobytes() for removed in sets.values()}) == 6
    np.testing.assert_array_equal(removed_by(tiny, "random", 10, "draw0"), sets[10, "draw0"])
    other = replace(tiny, config=settings().model_copy(update={"seed": 6}))
    assert not np.array_equal(removed_by(other, "random", 10, "draw0"), sets[10, "draw0"])


def test_random_sets_know_no_query(tiny):
    """They are named by draw alone: every query of a K is measured on the same models."""
    for query in tiny.config.queries():
        random = [model for model in tiny.measured_models(query) if model[0] == "random"]
        assert random == [("random", 10, "draw0"), ("random", 10, "draw1")]
    training = training_of(tiny, load_encoded(tiny), "random", 10, "draw0")
    assert training.seed == tiny.config.seed


def test_random_sets_are_drawn_evenly(tiny):
    counts = sum(removed_by(tiny, "random", 10, f"draw{i}").astype(int) for i in range(200))
    assert np.square(counts - 50).sum() / (50 * 0.75) < 75  # chi-squared, 39 degrees: p < 0.001


def test_seeds_remove_nothing_and_repeat_no_draw_of_the_base_model(tiny):
    trainings = [training_of(tiny, load_encoded(tiny), "seed", 0, f"draw{i}") for i in range(5)]
    assert not any(training.removed.any() for training in trainings)
    seeds = {training.seed for training in trainings}
    assert len(seeds) == 5
    assert tiny.config.seed not in seeds
    base = draw_step(tiny.config.seed, 0, trainings[0].removed, 8, 100, (12, 8, 8), 0.1)
    for seed in seeds:
        assert not np.array_equal(draw_step(seed, 0, trainings[0].removed, 8, 100, (12, 8, 8), 0.1).rows, base.rows)


@pytest.mark.parametrize("method", ["unlearn", "random"])
def test_something_must_be_left_to_train_on(tiny, method):
    with pytest.raises(UserError, match=r"retrain.k: 40 images cannot be left out of 40; choose a smaller K"):
        removed_by(tiny, method, IMAGES, "report-00")


def test_a_ranking_of_other_images_is_refused(tiny):
    path = tiny.score("unlearn", "report-00")
    write_table(path, read_table(path).replace({"image_id": {"tiny-03": "cat-03"}}))
    with pytest.raises(UserError, match=f"{path} ranks other images than the experiment trains on"):
        removed_by(tiny, "unlearn", 10, "report-00")


def test_a_missing_ranking_is_one_sentence(tiny):
    with pytest.raises(UserError, match=r"report-01.parquet is missing"):
        removed_by(tiny, "unlearn", 10, "report-01")


def with_pools(layout, **retrain):
    """The tiny experiment with its two ranked queries in a pool each, and one that is not judged."""
    asked = {
        "methods": ["unlearn"],
        "k": [10],
        "subsets": 3,
        "subset_seeds": 2,
        "pools": 2,
        "pooled_k": [10],
        **retrain,
    }
    queries = [{"name": name, "image": "mine.png", "prompt": "my own"} for name in ("mine", "yours", "theirs")]
    sections = {"synthesize": {"queries": queries}, "retrain": {"queries": 2, **asked}}
    return replace(layout, config=settings(**sections))


def ranked(layout, query: str, images: list[str]) -> None:
    """Write a ranking of which these images are the top."""
    table = read_table(layout.score("unlearn", "report-00")).sort_values("image_id")
    rank = table["image_id"].map({image: place for place, image in enumerate(images, 1)})
    rest = rank.isna().cumsum() + len(images)
    write_table(layout.score("unlearn", query), table.assign(rank=rank.fillna(rest).astype(int)))


def names(first: int, last: int) -> list[str]:
    return [f"tiny-{i:02d}" for i in range(first, last)]


def test_a_half_is_half_and_its_complement_is_left_out(tiny):
    for images in (40, 41):
        kept = half(tiny, images, "draw0")
        assert (kept.dtype, kept.shape, kept.sum()) == (bool, (images,), 20 + images % 2)
    np.testing.assert_array_equal(removed_by(tiny, "half", 0, "draw0"), ~half(tiny, IMAGES, "draw0"))


def test_halves_differ_by_draw_and_seed_and_are_drawn_evenly(tiny):
    halves = [half(tiny, IMAGES, f"draw{i}") for i in range(200)]
    assert len({kept.tobytes() for kept in halves}) == 200
    np.testing.assert_array_equal(half(tiny, IMAGES, "draw7"), halves[7])
    assert np.square(sum(halves) - np.full(IMAGES, 100)).sum() / (100 * 0.5) < 75  # chi-squared, 39 degrees: p < 0.001
    other = replace(tiny, config=settings().model_copy(update={"seed": 6}))
    assert not np.array_equal(half(other, IMAGES, "draw0"), halves[0])


def test_a_half_trained_again_is_the_same_half_with_another_training_seed(tiny):
    encoded = load_encoded(tiny)
    members = ["draw0", "draw0-seed1", "draw0-seed2", "draw1-seed1"]
    first, again, third, other = (training_of(tiny, encoded, "half", 0, member) for member in members)
    np.testing.assert_array_equal(first.removed, again.removed)
    np.testing.assert_array_equal(first.removed, third.removed)
    assert first.seed == tiny.config.seed  # common random numbers with the base model
    assert len({first.seed, again.seed, third.seed}) == 3
    assert other.seed == again.seed  # and among the halves of a repetition
    assert len({training.name for training in (first, again, third, other)}) == 4


def test_a_pool_leaves_out_the_union_of_the_tops_of_its_queries(tiny):
    layout = with_pools(tiny, queries=3)
    assert (layout.pool("pool0"), layout.pool("pool1")) == (["mine", "theirs"], ["yours"])
    for query, images in (("mine", names(0, 10)), ("theirs", names(6, 16)), ("yours", names(30, 40))):
        ranked(layout, query, images)
    image_ids = np.array(load_encoded(tiny).image_ids)
    assert image_ids[removed_by(layout, "unlearn", 10, "pool0")].tolist() == names(0, 16)
    assert image_ids[removed_by(layout, "unlearn", 10, "pool1")].tolist() == names(30, 40)
    assert training_of(layout, load_encoded(tiny), "unlearn", 10, "pool0").seed == tiny.config.seed


def test_queries_that_are_not_judged_are_in_no_pool(tiny):
    layout = with_pools(tiny)
    assert [layout.pool(f"pool{i}") for i in range(2)] == [["mine"], ["yours"]]


@pytest.mark.parametrize("k", [20, IMAGES, IMAGES + 1])
def test_a_pool_must_leave_something_to_train_on(tiny, k):
    layout = with_pools(tiny, pools=1, pooled_k=[k])
    ranked(layout, "mine", names(0, 20))
    ranked(layout, "yours", names(20, 40))
    with pytest.raises(UserError, match=f"retrain.pooled_k: {k} images of each query are all there are; choose a smal"):
        removed_by(layout, "unlearn", k, "pool0")
