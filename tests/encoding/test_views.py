"""Several captions of an image, and mirror images: each draw takes one of an image's views, a scan looks at all."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_arrays, read_image, read_table, write_arrays, write_image
from forgetrace.attribution.baselines import cosine, pool_tokens
from forgetrace.attribution.registry import attributor, check_methods
from forgetrace.attribution.scan import scan, scan_noise
from forgetrace.attribution.score import score
from forgetrace.curvature.draws import training_draws
from forgetrace.curvature.fit import fit
from forgetrace.diffusion import training as training_module
from forgetrace.diffusion.base import train_base
from forgetrace.diffusion.draws import draw_step
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.diffusion.training import Training, train
from forgetrace.encoding import captions as captions_module
from forgetrace.encoding.encode import encode
from forgetrace.encoding.latents import to_latents
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import Layout
from forgetrace.planning.work import SCAN, count
from forgetrace.unlearning.variants import unlearn_query

from ..conftest import IMAGES, fake_token_states, parse_config, settings, write_data

CPU = torch.device("cpu")
CAPTIONS = [f"caption {i}" for i in range(6)] + ["a seventh"]
VIEWS = {"encode": {"flips": True}, "retrain": {"methods": []}}


def texts(i: int) -> str | list[str]:
    """One caption, two or three, some of them shared."""
    own = [CAPTIONS[i % 6], CAPTIONS[(i + 1) % 6], CAPTIONS[6]][: 1 + i % 3]
    return own[0] if len(own) == 1 else own


def prepared(**sections) -> Layout:
    layout = Layout("tiny", settings(**{**VIEWS, **sections}))
    write_data(layout)
    rows = [json.loads(line) for line in Path(layout.metadata).read_text().splitlines()]
    rows = [row | {"text": texts(i)} for i, row in enumerate(rows)]
    Path(layout.metadata).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return layout


@pytest.fixture
def layout(tiny) -> Layout:
    """Encoded, with the tiny experiment's θ0."""
    layout = prepared()
    encode(layout)
    return layout


def test_mirror_images_and_all_captions_are_encoded(layout):
    encoded = load_encoded(layout)
    assert (len(encoded), encoded.latents.shape[0], encoded.orientations) == (IMAGES, 2 * IMAGES, 2)
    for i in (0, 1, 2, 39):
        pixels = read_image(f"{layout.data}/images/tiny-{i:02d}.png")
        np.testing.assert_array_equal(encoded.latents[i], to_latents(pixels[None], 2)[0])
        np.testing.assert_array_equal(encoded.latents[IMAGES + i], to_latents(pixels[None, :, ::-1], 2)[0])
        own = [texts(i)] if isinstance(texts(i), str) else texts(i)
        assert encoded.counts(np.array([i])) == len(own)
        for number, caption in enumerate(own):
            (row,) = encoded.caption(np.array([i]), number)
            np.testing.assert_array_equal(encoded.captions[row], fake_token_states([caption])[0])
    assert len(encoded.captions) == len(CAPTIONS) + 1
    assert read_table(layout.index)["caption"][2] == "caption 2"


def test_half_precision_and_parts(tiny, monkeypatch):
    layout = prepared()
    encode(layout)
    whole = load_encoded(layout).captions
    monkeypatch.setattr(captions_module, "AT_ONCE", 3)
    monkeypatch.setattr("forgetrace.encoding.text.longest", lambda captions: whole.shape[1])
    encode(layout)
    assert torch.equal(load_encoded(layout).captions, whole)
    layout = prepared(encode={"caption_dtype": "float16"})
    encode(layout)
    half = load_encoded(layout)
    assert half.captions.dtype == torch.float16
    assert half.states(torch.tensor([1, 2])).dtype == torch.float32
    torch.testing.assert_close(half.captions.float(), whole, atol=2e-3, rtol=1e-3)


def test_views_are_chosen_uniformly(layout):
    encoded = load_encoded(layout)
    random = np.random.default_rng(0).random((9000, 2))
    image = 2  # of three captions
    latents, captions = encoded.views(np.full(9000, image), random)
    _, each = np.unique(np.stack([latents, captions.numpy()]), axis=1, return_counts=True)
    assert len(each) == 6
    assert np.abs(each - 1500).max() < 4 * np.sqrt(1500)
    assert encoded.caption(np.array([image])) == captions_of(encoded, image)[0]


def captions_of(encoded: Encoded, image: int) -> list[int]:
    return [int(encoded.caption(np.array([image]), n)) for n in range(int(encoded.counts(np.array([image]))[0]))]


def test_images_of_one_view_ask_for_no_random_numbers(tiny):
    encoded = load_encoded(tiny)
    assert not encoded.has_views
    assert encoded.picks(0, "any", [1, 2]) is None


def test_training_takes_every_view_and_removal_leaves_the_others_draws(layout, monkeypatch):
    asked = []
    plain = training_module.example_losses

    def spy(unet, scheduler, latents, captions, *rest):
        asked.append((latents.clone(), captions.clone()))
        return plain(unet, scheduler, latents, captions, *rest)

    monkeypatch.setattr(training_module, "example_losses", spy)
    encoded, recipe = load_encoded(layout), layout.config.train
    removed = np.zeros(IMAGES, dtype=bool)
    train(layout, encoded, Training("all", 5, removed), "cpu")
    whole, asked[:] = list(asked), []
    removed[:10] = True
    train(layout, encoded, Training("without", 5, removed), "cpu")
    seen = set()
    for step, ((latents, captions), (latents_without, captions_without)) in enumerate(zip(whole, asked, strict=True)):
        draw = draw_step(5, step, np.zeros(IMAGES, bool), recipe.batch_size, 100, (12, 8, 8), recipe.caption_dropout)
        for slot, image in enumerate(draw.rows):
            rows = [image + mirrored * IMAGES for mirrored in (0, 1)]
            (row,) = [row for row in rows if np.array_equal(latents[slot], encoded.latents[row])]
            known = [*captions_of(encoded, image), encoded.empty_row]
            assert any(torch.equal(captions[slot], encoded.captions[c]) for c in known)
            seen.add(row >= IMAGES)
            if image >= 10:
                assert torch.equal(latents[slot], latents_without[slot])
                assert torch.equal(captions[slot], captions_without[slot])
    assert seen == {False, True}


def test_draws_of_the_fisher_take_views_and_are_a_function_of_their_number(layout):
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    latents, captions, _, _ = training_draws(scheduler, encoded, range(60), 5, "fisher")
    again = training_draws(scheduler, encoded, range(37, 41), 5, "fisher")
    assert torch.equal(again[0], latents[37:41])
    assert torch.equal(again[1], captions[37:41])
    mirrored = [any(np.array_equal(one, row) for row in encoded.latents[IMAGES:]) for one in latents]
    assert 15 < sum(mirrored) < 45


@torch.no_grad()
def slow_losses(layout: Layout, unet, row: int) -> np.ndarray:
    """One latent at every scan timestep, the mean over its image's captions, one evaluation each."""
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    bank, image = scan_noise(layout, encoded, scheduler), row % IMAGES
    latent = torch.from_numpy(np.array(encoded.latents[row]))[None]
    return np.array(
        [
            np.mean(
                [
                    float(
                        example_losses(
                            unet,
                            scheduler,
                            latent,
                            encoded.captions[caption][None],
                            torch.tensor([timestep]),
                            torch.from_numpy(bank.noise(encoded.image_ids[image], draw))[None],
                        )
                    )
                    for caption in captions_of(encoded, image)
                ]
            )
            for draw, timestep in enumerate(bank.timesteps)
        ]
    )


@pytest.mark.parametrize("noise", ["shared", "per-image"])
def test_a_scan_is_the_mean_over_captions_of_both_orientations(layout, noise):
    layout = replace(layout, config=settings(**VIEWS, scan={"timesteps": 4, "noise": noise, "batch_size": 6}))
    scan(layout, device="cpu")
    losses = read_arrays(layout.base_scan)["losses"]
    assert losses.shape == (2 * IMAGES, 4)
    unet = load_unet(layout, CPU)
    for row in (0, 1, 2, 38, IMAGES, IMAGES + 1, IMAGES + 2, IMAGES + 38):
        np.testing.assert_allclose(losses[row], slow_losses(layout, unet, row), rtol=2e-4)


def test_of_both_orientations_the_larger_score_counts_or_the_mean(layout):
    methods = {"unlearn": {"attributor": "unlearning"}, "mean": {"attributor": "unlearning", "variant": "unlearn"}}
    methods["mean"]["flips"] = "mean"
    layout = replace(layout, config=settings(**VIEWS, score={"methods": methods}))
    check_methods(layout.config)
    random = np.random.default_rng(0)
    before, after = random.random((2, 2 * IMAGES, 4)).astype(np.float32)
    made = {"timesteps": np.arange(4)}
    write_arrays(layout.base_scan, {"losses": before} | made, {})
    write_arrays(layout.scan("unlearn", "report-00"), {"losses": after} | made, {})
    rises = (after.astype(float) - before).mean(axis=1)
    larger, mean = (attributor(layout, method, "cpu").scores("report-00") for method in methods)
    np.testing.assert_allclose(larger, np.maximum(rises[:IMAGES], rises[IMAGES:]))
    np.testing.assert_allclose(mean, (rises[:IMAGES] + rises[IMAGES:]) / 2)


def test_pixels_and_captions_are_compared_in_the_nearer_way(layout):
    query = layout.query("report-00")
    own = read_image(query["image"])
    flat = [pixels.astype(float).ravel() / 127.5 - 1 for pixels in (own, own[:, ::-1])]
    scores = attributor(layout, "pixel-l2", "cpu").scores("report-00")
    image = read_image(f"{layout.data}/images/tiny-07.png").astype(float).ravel() / 127.5 - 1
    assert scores[7] == pytest.approx(max(-np.square(image - each).sum() for each in flat))
    prompt = read_arrays(query["tensors"])["prompt"]
    scores, encoded = attributor(layout, "text", "cpu").scores("report-00"), load_encoded(layout)
    pooled = pool_tokens(encoded.captions[captions_of(encoded, 8)].numpy())
    assert len(pooled) == 3
    assert scores[8] == pytest.approx(cosine(pooled, pool_tokens(prompt[None])[0]).max())


def test_mirroring_the_query_is_mirroring_the_images_for_features(layout):
    plain = replace(layout, config=settings(score={"methods": {"efficientnet": {}}}, retrain={"methods": []}))
    flipped = replace(layout, config=settings(**VIEWS, score={"methods": {"efficientnet": {}}}))
    attributor(plain, "efficientnet", "cpu").compared().fit()
    scores, both = (attributor(one, "efficientnet", "cpu").scores("report-00") for one in (plain, flipped))
    path = layout.query("report-00")["image"]
    write_image(path, read_image(path)[:, ::-1])
    mirrored = attributor(plain, "efficientnet", "cpu").scores("report-00")
    np.testing.assert_allclose(both, np.maximum(scores, mirrored), rtol=1e-6)
    assert (mirrored > scores).any()


def test_gradient_methods_take_a_view_at_every_draw(layout):
    """They go through, depend on nothing but the image and the draw, and see more than the first view."""
    methods = {"influence": {"timesteps": 4}, "trak": {"timesteps": 4, "noises": 2, "dimension": 32}}
    scores = {}
    for name, sections in {"views": VIEWS, "again": VIEWS, "one": {"retrain": {"methods": []}}}.items():
        run = replace(layout, config=settings(**sections, score={"methods": methods}))
        if name == "one":
            write_data(run)
            encode(run)
        for method in methods:
            source = attributor(run, method, "cpu")
            for features in source.features():
                features.fit()
            scores[name, method] = source.scores("report-00")
    for method in methods:
        np.testing.assert_allclose(scores["views", method], scores["again", method], rtol=1e-5)
        assert not np.allclose(scores["views", method], scores["one", method], rtol=0.05)


def test_every_stage_up_to_the_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("forgetrace.encoding.text.token_states", fake_token_states)
    monkeypatch.setattr("forgetrace.unlearning.step.query_loss.__defaults__", (100,))
    layout = prepared(
        encode={"flips": True, "caption_dtype": "float16"},
        synthesize={"queries": [{"pool": "report", "count": 1}], "sampler_steps": 2, "guidance": 2.0},
    )
    encode(layout)
    train_base(layout, "cpu")
    synthesize(layout, "report-00", "cpu")
    fit(layout, "diagonal", "cpu")
    unlearn_query(layout, "unlearn", "report-00", "cpu")
    scan(layout, device="cpu")
    scan(layout, "unlearn", "report-00", "cpu")
    for method in layout.config.score.methods:
        if method != "skewed":
            score(layout, method, "report-00", "cpu")
            assert len(read_table(layout.score(method, "report-00"))) == IMAGES


@pytest.mark.parametrize("method", ["pixel", "pixel-l2", "efficientnet"])
def test_scores_of_pictures_hang_on_mirroring(method):
    """Their input files are the same with and without."""
    plain, viewed = (
        {"score": {"methods": {method: {}, "random": {}}}, **more} for more in ({"retrain": {"methods": []}}, VIEWS)
    )
    plain, viewed = (
        attributor(Layout("tiny", settings(**sections)), method).shaped_by() for sections in (plain, viewed)
    )
    assert plain == {}
    assert viewed == {"flips": True}


def test_what_cannot_go_together_is_refused():
    narrowed = {"scan": {"narrowing": {"tops": [200]}}, "score": {"methods": {"random": {}}}}
    with pytest.raises(UserError, match=r"scan.narrowing: not with encode.flips"):
        parse_config({"encode": {"flips": True}, **narrowed}, "x.yaml")
    methods = {"unlearn": {"attributor": "unlearning", "flips": "mean"}, "random": {}}
    with pytest.raises(UserError, match=r"score.methods.unlearn.flips has no effect without encode.flips"):
        check_methods(settings(score={"methods": methods}))


def test_the_plan_counts_captions_and_orientations():
    plain, viewed = (Layout("tiny", settings(**sections)) for sections in ({}, VIEWS))
    scans = [count(plain, 40, 7)["scan"].units[SCAN], count(viewed, 40, 7, views=2 * 2.5)["scan"].units[SCAN]]
    assert scans[1] == 5 * scans[0]
