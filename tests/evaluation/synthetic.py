"""A small results folder as ``retrain`` leaves it, with values a test can compute by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import write_image, write_json, write_table
from forgetrace.attribution.ranking import rank
from forgetrace.config import HALF_SET, RANDOM, SEED_SET, parse_config
from forgetrace.counterfactual.sets import half
from forgetrace.layout import BASE, Layout

TIMESTEPS = [0, 500]
SIDES = {"side1": {"boxes": [[0, 0, 8, 16]]}, "side2": {"boxes": [[8, 0, 16, 16]]}}
BASE_LOSS = 0.1
TRAINING_IMAGES = 12
# The rise of a query's loss without the top K of a method; a query's number is added as thousandths.
RISE = {BASE: 0.0, "unlearn": 0.05, "pixel-l2": 0.02, RANDOM: 0.01, SEED_SET: 0.002}
# How much the regenerated image differs from the query image, in grey levels of 255.
SHIFT = {BASE: 0, "unlearn": 51, "pixel-l2": 25, RANDOM: 10, SEED_SET: 5}


def experiment(own_image: bool = False, more: int = 0, regions: bool = False, **retrain) -> Layout:
    """An experiment of four queries, two methods and three random draws.

    Args:
        own_image: add a query that is a user's image.
        more: judge so many further methods.
        regions: each query has two, side1 and side2; ``write_results`` leaves their losses inside to the test.
        retrain: overrides of the config's section.
    """
    queries: list[dict] = [{"pool": "report", "count": 4}]
    if own_image:
        queries.append({"name": "mine", "image": "mine.png", "prompt": "a cat"})
    further = [f"pixel-number-{i}" for i in range(more)]
    methods = {
        "unlearn": {"attributor": "unlearning"},
        "pixel-l2": {},
        **{method: {"attributor": "pixel"} for method in further},
    }
    content = {
        "seed": 3,
        "unlearn": {"unlearn": {"step_size": 1e-3}},
        "synthesize": {"queries": queries} | ({"regions": SIDES} if regions else {}),
        "score": {"methods": methods | {"random": {}}},
        "retrain": {"methods": list(methods), "k": [2, 4], **retrain},
        "evaluate": {"bootstrap": 500},
        "figures": {"top": 3},
    }
    return Layout("synthetic", parse_config(content, "config/synthetic.yaml"))


def loss_rise(method: str, k: int, member: str, query: str) -> float:
    """The rise of the loss that :func:`write_results` plants: draw 1 of random rises 0.001 more."""
    number = 0 if query == "mine" else int(query[-1])
    per_draw = 0.001 * int(member[-1]) if method in (RANDOM, SEED_SET) else 0.0
    return 0.0 if method == BASE else _rise(method) + k * 0.001 + number * 0.001 + per_draw


def _rise(method: str) -> float:
    """Of the loss; of the further methods, the less the higher their number."""
    return RISE[method] if method in RISE else 0.04 / (1 + int(method.rpartition("-")[2]))


def write_results(layout: Layout, picture: Callable[[int], np.ndarray] | None = None) -> None:
    """Write what ``evaluate`` and ``figures`` read, below the current folder.

    Args:
        layout: of :func:`experiment`.
        picture: gives the i-th image, (16, 16, 3), uint8; by default random squares.
    """
    picture = picture or _squares
    _write_training(layout, picture)
    for number, query in enumerate(layout.config.queries()):
        own = layout.config.image_query(query) is not None
        original = picture(100 + number)
        files = layout.query(query)
        record = {"query": query, "prompt": f"a blue {query} for $5", "source": "file" if own else "pool"}
        write_json(files["record"], record)
        write_image(files["image"], original)
        _write_scores(layout, query)
        for method, k, member in layout.measured_models(query):
            measure = layout.measure(method, k, member, query)
            loss = BASE_LOSS + loss_rise(method, k, member, query)
            content = {
                "loss": loss,
                "losses": [loss - 0.01, loss + 0.01],
                "timesteps": TIMESTEPS,
                "key": "noise",
                "regenerated": not own,
            }
            write_json(measure["losses"], content)
            write_image(measure["image"], original if own else _shifted(original, SHIFT.get(method, 15)))
    write_at_once(layout)


def write_at_once(layout: Layout) -> None:
    """Write what models of halves and pools say of every query.

    The losses of halves are what the scores of ``unlearn`` foretell, those of repetitions a tenth higher. Targets of a
    pool rise by :data:`RISE`, K and number of the query as in :func:`loss_rise`, controls by 0.005 and their number.
    """
    for method, k, member in layout.half_models() + layout.pooled_models():
        queries = {}
        for number, query in enumerate(layout.config.queries()):
            if method == HALF_SET:
                kept = half(layout, TRAINING_IMAGES, member.partition("-")[0])
                loss, mse = (1.1 if "seed" in member else 1.0) - kept @ scores(layout, "unlearn", query), 0.0
            else:
                target = query in layout.pool(member)
                rise = _rise(method) + 0.001 * k if target else 0.005
                loss, mse = BASE_LOSS + rise + 0.001 * number, 0.04 if target else 0.01
            queries[query] = {"key": "noise", "loss": float(loss)}
            if layout.config.image_query(query) is None:
                queries[query]["mse"] = mse
        record = {"method": method, "k": k, "member": member, "removed": 6, "queries": queries}
        write_json(layout.losses(method, k, member), record)


def _write_training(layout: Layout, picture: Callable[[int], np.ndarray]) -> None:
    names = [f"digit-{i:04d}" for i in range(TRAINING_IMAGES)]
    for i, name in enumerate(names):
        write_image(f"{layout.data}/images/{name}.png", picture(i))
    captions = [f"a bold {colour} seven" for colour in ("red", "green", "blue")] * (TRAINING_IMAGES // 3)
    columns = {
        "image_id": names,
        "file_name": [f"images/{name}.png" for name in names],
        "caption": captions,
        "caption_row": [0, 1, 2] * (TRAINING_IMAGES // 3),
    }
    write_table(layout.index, pd.DataFrame(columns))
    steps = np.arange(1, 101)
    curve = {"step": steps, "loss": 1 / steps**0.5, "learning_rate": 1e-3 * (1 - steps / 100)}
    write_table(layout.curve, pd.DataFrame(curve))


def scores(layout: Layout, method: str, query: str) -> np.ndarray:
    """Scores by image: of ``unlearn`` rolled by the query's number, of ``pixel-l2`` their negatives, else shuffled."""
    number = layout.config.queries().index(query)
    # No arithmetic series, in which sums of many halves would be equal but for rounding.
    falling = np.roll(0.03 * 0.87 ** np.arange(TRAINING_IMAGES) - 0.01, number)
    shuffled = np.random.default_rng(number).permutation(falling)
    return {"unlearn": falling, "pixel-l2": -falling}.get(method, shuffled)


def _write_scores(layout: Layout, query: str) -> None:
    ids = [f"digit-{i:04d}" for i in range(TRAINING_IMAGES)]
    for method in layout.config.score.methods:
        write_table(layout.score(method, query), rank(ids, scores(layout, method, query)))


def _squares(i: int) -> np.ndarray:
    """An image of four squares, the same for the same i; dark enough to be lightened by 51 levels."""
    return np.random.default_rng(i).integers(0, 200, (2, 2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def _shifted(image: np.ndarray, levels: int) -> np.ndarray:
    return np.clip(image.astype(int) + levels, 0, 255).astype(np.uint8)


def flat_encoder(images: np.ndarray) -> np.ndarray:
    """Stands in for a real image encoder: the pixels themselves are the features."""
    return images.reshape(len(images), -1).astype(float)


def remove(path: str) -> None:
    """Delete a file."""
    Path(path).unlink()
