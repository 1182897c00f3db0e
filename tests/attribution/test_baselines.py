from dataclasses import replace

import numpy as np
import pytest

from forgetrace.artifacts import read_array, read_image, read_table, write_image
from forgetrace.attribution.baselines import Pixel, PixelL2, Random, Text, cosine, pool_tokens
from forgetrace.attribution.registry import attributor
from forgetrace.datasets.images import TrainingImages
from forgetrace.encoding.store import load_encoded

from ..conftest import CAPTIONS, IMAGES, fake_token_states, settings


def test_cosine_by_hand():
    rows = np.array([[3.0, 4.0], [-4.0, 3.0], [-3.0, -4.0], [0.0, 0.0]])
    np.testing.assert_allclose(cosine(rows, np.array([6.0, 8.0])), [1, 0, -1, 0], atol=1e-12)
    np.testing.assert_array_equal(cosine(rows, np.zeros(2)), np.zeros(4))


def test_l2_by_hand():
    np.testing.assert_array_equal(
        PixelL2.similarity(np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([0.0, 1.0])), [-2, -1]
    )


def test_pooling_leaves_padding_out():
    states = np.array([[[1.0, 3.0], [3.0, 5.0], [0, 0]], [[2.0, 0.0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]])
    np.testing.assert_array_equal(pool_tokens(states), [[2, 4], [2, 0], [0, 0]])


@pytest.mark.parametrize("method", ["pixel", "pixel-l2"])
def test_the_query_itself_is_the_nearest_picture(tiny, method):
    source = attributor(tiny, method)
    write_image(tiny.query("report-00")["image"], read_image(f"{tiny.data}/images/tiny-17.png"))
    scores = source.scores("report-00")
    assert scores.shape == (IMAGES,)
    assert scores.argmax() == 17
    assert scores[17] == pytest.approx(1 if method == "pixel" else 0, abs=1e-12)
    images = [read_image(f"{tiny.data}/images/tiny-{i:02d}.png").astype(float) / 127.5 - 1 for i in range(IMAGES)]
    a, b = images[3].ravel(), images[17].ravel()
    expected = a @ b / np.sqrt((a @ a) * (b @ b)) if method == "pixel" else -((a - b) ** 2).sum()
    assert scores[3] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["pixel", "pixel-l2"])
def test_training_images_are_read_once_for_all_queries_and_orientations(tiny, monkeypatch, method):
    encode = tiny.config.encode.model_copy(update={"flips": True})
    flipped = replace(tiny, config=tiny.config.model_copy(update={"encode": encode}))
    alone = {name: attributor(flipped, method).scores(name) for name in ("report-00", "report-01")}
    read, opened = TrainingImages.__call__, []
    monkeypatch.setattr(TrainingImages, "__call__", lambda self, name: opened.append(name) or read(self, name))
    together = attributor(flipped, method).scores_of(["report-01", "report-00"])
    assert len(opened) == len(set(opened)) == IMAGES
    assert all(np.array_equal(together[name], scores) for name, scores in alone.items())
    # The larger of what the picture and its mirror image have.
    picture = read_image(tiny.query("report-00")["image"])
    views = []
    for side in (1, -1):
        write_image(tiny.query("report-00")["image"], picture[:, ::side])
        views.append(attributor(tiny, method).scores("report-00"))
    np.testing.assert_array_equal(alone["report-00"], np.maximum(*views))


def test_pixel_scores_of_a_users_image(tiny):
    assert np.isfinite(Pixel(tiny, "pixel").scores("mine")).all()


def test_text_compares_captions_with_the_prompt(tiny):
    scores = Text(tiny, "text").scores("report-00")
    index = read_table(tiny.index)
    prompt = fake_token_states(["report prompt one"])[0, :4].astype(float).mean(axis=0)
    for caption, found in zip(index["caption"][:CAPTIONS], scores, strict=False):
        states = fake_token_states([caption])[0, :3].astype(float).mean(axis=0)
        expected = states @ prompt / np.sqrt((states @ states) * (prompt @ prompt))
        assert found == pytest.approx(expected)
    # Images of one caption tie.
    np.testing.assert_array_equal(scores[:CAPTIONS], scores[CAPTIONS : 2 * CAPTIONS])
    assert len(read_array(tiny.captions)) == CAPTIONS + 1


def test_random_scores_differ_by_query_and_seed_only(tiny):
    scores = Random(tiny, "random").scores("report-00")
    assert len(set(scores)) == IMAGES
    np.testing.assert_array_equal(Random(tiny, "random").scores("report-00"), scores)
    assert not np.array_equal(Random(tiny, "random").scores("report-01"), scores)
    other = replace(tiny, config=settings().model_copy(update={"seed": 6}))
    assert not np.array_equal(Random(other, "random").scores("report-00"), scores)
    assert len(load_encoded(tiny)) == len(scores)


@pytest.mark.parametrize("method", ["pixel", "pixel-l2", "text", "random"])
def test_declared_inputs_exist(tiny, method):
    from pathlib import Path

    assert all(Path(path).is_file() for path in attributor(tiny, method).inputs("report-00"))


@pytest.mark.parametrize("method", ["pixel", "pixel-l2"])
def test_images_that_do_not_fit_into_memory_are_compared_in_blocks(tiny, monkeypatch, method):
    whole = attributor(tiny, method).scores("report-00")
    monkeypatch.setattr("forgetrace.attribution.baselines.AT_ONCE", 3 * 16 * 16 * 3)
    np.testing.assert_allclose(attributor(tiny, method).scores("report-00"), whole, rtol=1e-12)
    assert len(whole) == 40
