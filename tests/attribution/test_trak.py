import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from forgetrace.artifacts import UserError, read_array, read_arrays, read_table
from forgetrace.attribution import kernel
from forgetrace.attribution.kernel import kernel_scores, residuals
from forgetrace.attribution.output_gradients import Examples, OutputGradients
from forgetrace.attribution.registry import all_features, attributor, check_methods, together
from forgetrace.attribution.score import score
from forgetrace.config import Config
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.diffusion.synthesis import journey, regenerate
from forgetrace.layout import Layout

from ..conftest import IMAGES, settings

OPTIONS = {"timesteps": 2, "noises": 2, "dimension": 24}
METHODS = {
    "trak": OPTIONS,
    "d-trak": OPTIONS,
    "journey": {"attributor": "journey-trak", "timestep": 40, **OPTIONS},
    "das": OPTIONS,
}
SAMPLED = {"queries": [{"pool": "report", "count": 2}], "sampler_steps": 3, "guidance": 2.0}


def config(methods: dict = METHODS, queries: dict = SAMPLED) -> Config:
    return settings(synthesize=queries, score={"methods": methods}, retrain={"methods": []}, fit={"chunk": 80})


def test_the_kernel_is_summed_in_place(monkeypatch):
    features = np.random.default_rng(0).standard_normal((2400, 1200), dtype=np.float32)
    monkeypatch.setattr(kernel, "HELD", 50 * 1200)
    tracemalloc.start()
    kernel_scores(features, features[:1], damping=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 8 * 1200**2  # a second matrix beside the sum would be twice of it


@pytest.fixture
def trak(tiny) -> Layout:
    """The tiny experiment with the TRAK family's methods and features."""
    layout = replace(tiny, config=config())
    for features in all_features(layout, "cpu").values():
        features.fit()
    return layout


def naive(training: np.ndarray, queries: np.ndarray, damping: float) -> np.ndarray:
    """The formula as it stands."""
    gram = training.T @ training
    penalty = damping * np.diag(gram).mean() * np.eye(len(gram))
    return queries @ np.linalg.inv(gram + penalty) @ training.T


@pytest.mark.parametrize("held", [1, 2**25])
@pytest.mark.parametrize(("images", "dimension"), [(30, 8), (8, 30), (12, 12)])
def test_the_kernel_is_its_formula_with_fewer_images_than_dimensions_or_more(images, dimension, held, monkeypatch):
    monkeypatch.setattr(kernel, "HELD", held)
    random = np.random.default_rng(0)
    training, queries = random.standard_normal((images, dimension)), random.standard_normal((3, dimension))
    np.testing.assert_allclose(
        kernel_scores(training, queries, 0.2), naive(training, queries, 0.2), rtol=1e-8, atol=1e-12
    )


def test_the_scale_of_the_features_does_not_matter():
    random = np.random.default_rng(0)
    training, queries = random.standard_normal((9, 5)), random.standard_normal((2, 5))
    np.testing.assert_allclose(
        kernel_scores(1e-4 * training, 1e-4 * queries, 0.1), kernel_scores(training, queries, 0.1), rtol=1e-8
    )


def test_without_damping_dependent_gradients_are_refused():
    training = np.ones((9, 5))
    with pytest.raises(UserError, match="linearly dependent: set the method's damping above 0"):
        kernel_scores(training, training, 0.0)
    assert np.isfinite(kernel_scores(training, training, 0.1)).all()


def regression():
    """400 points of 12 dimensions, 5 queries, and the weights without each point by ridge regression."""
    random = np.random.default_rng(1)
    inputs, queries = random.standard_normal((400, 12)), random.standard_normal((5, 12))
    truth = random.standard_normal(12)
    targets = inputs @ truth + 0.5 * random.standard_normal(400)
    ridge = 1e-3 * np.diag(inputs.T @ inputs).mean() * np.eye(12)

    def solve(kept):
        return np.linalg.solve(inputs[kept].T @ inputs[kept] + ridge, inputs[kept].T @ targets[kept])

    everything = np.arange(400)
    without = np.stack([solve(np.delete(everything, i)) for i in everything])
    return inputs, targets, queries, queries @ truth, solve(everything), without


def test_scores_are_exact_leave_one_out_changes_of_a_linear_model_s_output():
    """f = wᵀx has the gradient x; the score times the error is what leaving a point out takes from the output."""
    inputs, targets, queries, _, weights, without = regression()
    exact = (queries @ weights)[:, None] - queries @ without.T
    scores = kernel_scores(inputs, queries, 1e-3) * (targets - inputs @ weights)
    for found, expected in zip(scores, exact, strict=True):
        assert pearsonr(found, expected).statistic > 0.99
        np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())


def test_a_positive_score_of_loss_gradients_is_a_point_without_which_the_query_s_loss_rises():
    inputs, targets, queries, wanted, weights, without = regression()

    def losses(weights):
        return (queries @ weights - wanted) ** 2

    rises = np.stack([losses(other) for other in without], axis=1) - losses(weights)[:, None]
    of_training = 2 * (inputs @ weights - targets)[:, None] * inputs
    of_queries = 2 * (queries @ weights - wanted)[:, None] * queries
    for found, expected in zip(kernel_scores(of_training, of_queries, 1e-3), rises, strict=True):
        assert pearsonr(found, expected).statistic > 0.8


def test_error_terms_by_hand():
    """Roots 3 and 4 have length 5; where one timestep has all the error, its share is 1 of 2."""
    np.testing.assert_allclose(residuals(np.array([[9, 16], [4, 0], [0.25, 0.25]])), [0.7, 0.5, 1 / np.sqrt(2)])


@pytest.mark.parametrize("method", ["trak", "d-trak", "das"])
def test_scores_by_hand(trak, method):
    output = {"trak": "loss", "d-trak": "square", "das": "mean"}[method]
    training = read_array(trak.features(f"{output}-all-t2-d24")).astype(float)
    source = OutputGradients(trak, output, "all", 24, "cpu")
    arrays = read_arrays(trak.query("report-01")["tensors"])
    timesteps = np.array([0, 0, 50, 50])
    bank = NoiseBank(5, "query features", timesteps, (12, 8, 8))
    rows = [
        source.single(
            Examples(
                torch.from_numpy(arrays["latent"])[None],
                torch.from_numpy(arrays["prompt"])[None],
                torch.from_numpy(timesteps[i : i + 1]),
                torch.from_numpy(bank.noise("", i))[None],
            )
        )[0].numpy()
        for i in range(4)
    ]
    expected = naive(training, np.mean(rows, axis=0)[None], 0.1)[0]
    if method == "das":
        roots = np.sqrt(read_array(trak.features("losses-t2")).astype(float))
        expected *= (roots / np.sqrt((roots**2).sum(axis=1, keepdims=True))).mean(axis=1)
    found = attributor(trak, method, "cpu").scores("report-01")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_methods_differ_by_the_output_function_alone(trak):
    """D-TRAK's scores are TRAK's, once its features stand in for TRAK's and its gradient for the query's."""
    d_trak, plain = (attributor(trak, method, "cpu") for method in ("d-trak", "trak"))
    expected = d_trak.scores("report-00")
    assert not np.allclose(plain.scores("report-00"), expected)
    plain.output = "square"
    np.testing.assert_array_equal(plain.scores("report-00"), expected)


def test_a_training_image_asked_for_itself_is_among_its_own_first(trak):
    """With one gradient in both roles the score is that image's leverage, which no other exceeds."""
    training = read_array(trak.features("loss-all-t2-d24")).astype(float)
    scores = kernel_scores(training, training, 0.1)
    assert (np.diag(scores) > 0).all()
    assert (scores <= np.sqrt(np.outer(np.diag(scores), np.diag(scores))) + 1e-9).all()


def test_the_scores_of_a_query_do_not_hang_on_the_others(trak):
    for method in METHODS:
        source = attributor(trak, method, "cpu")
        together_ = source.scores_of(["report-00", "report-01"])
        for query, scores in together_.items():
            np.testing.assert_allclose(source.scores(query), scores, rtol=1e-9, err_msg=method)
        assert not np.allclose(*together_.values())


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_what_the_model_makes_out_on_the_way_by_hand(tiny, prediction, monkeypatch):
    """x̂₀ from z_t and the guided output: √ᾱ z − √(1−ᾱ) v, or (z − √(1−ᾱ) ε) / √ᾱ."""
    schedule = {"prediction": prediction, "schedule": "linear"}
    layout = replace(tiny, config=settings(synthesize=SAMPLED, train=schedule))
    scheduler = load_scheduler(tiny)
    scheduler.register_to_config(prediction_type=prediction)
    monkeypatch.setattr("forgetrace.diffusion.synthesis.load_scheduler", lambda layout: scheduler)
    unet, arrays = load_unet(tiny, torch.device("cpu")), read_arrays(tiny.query("report-00")["tensors"])
    empty = torch.from_numpy(np.array(read_array(tiny.captions)[-1]))[None]
    latents, prompt = torch.from_numpy(arrays["initial_noise"])[None], torch.from_numpy(arrays["prompt"])[None]
    seen = []
    for timestep, estimate, reached in journey(layout, unet, arrays["initial_noise"], arrays["prompt"]):
        with torch.no_grad():
            with_prompt, without = (unet(latents, timestep, states).sample for states in (prompt, empty))
        output = without + 2 * (with_prompt - without)
        kept = scheduler.alphas_cumprod[timestep]
        if prediction == "epsilon":
            expected = (latents - (1 - kept).sqrt() * output) / kept.sqrt()
        else:
            expected = kept.sqrt() * latents - (1 - kept).sqrt() * output
        torch.testing.assert_close(estimate, expected, rtol=1e-4, atol=1e-5 / float(kept.sqrt()))
        latents = reached
        seen.append(timestep)
    assert seen == [99, 66, 32]
    end = regenerate(layout, unet, arrays["initial_noise"], arrays["prompt"])
    np.testing.assert_array_equal(latents[0].clamp(-1, 1), end)


def test_a_journey_asks_at_the_step_nearest_to_the_timestep(trak, monkeypatch):
    asked = []

    def spy(self, latents, captions, timesteps, noise, region):
        assert region is None
        asked.append((latents.numpy(), timesteps.tolist(), noise))
        return np.ones((1, 24), np.float32)

    monkeypatch.setattr(OutputGradients, "mean", spy)
    attributor(trak, "journey", "cpu").scores_of(["report-00", "report-01"])
    unet = load_unet(trak, torch.device("cpu"))
    for query, (latents, timesteps, noise) in zip(("report-00", "report-01"), asked, strict=True):
        arrays = read_arrays(trak.query(query)["tensors"])
        steps = {t: estimate for t, estimate, _ in journey(trak, unet, arrays["initial_noise"], arrays["prompt"])}
        assert timesteps == [32, 32]  # of 99, 66 and 32
        np.testing.assert_array_equal(latents, steps[32])
        assert not np.array_equal(noise[0], noise[1])
        np.testing.assert_array_equal(noise, asked[0][2])
    asked.clear()
    late = {"late": {"attributor": "journey-trak", "timestep": 90, "timesteps": 2, "dimension": 24}}
    attributor(replace(trak, config=config(late)), "late", "cpu").scores("report-00")
    assert asked[0][1] == [99] * 20


def test_a_journey_needs_queries_that_were_sampled(tiny):
    methods = {"j": {"attributor": "journey-trak"}}
    with pytest.raises(UserError, match=r"score\.methods\.j: the query 'mine' is an image file, .* remove the method"):
        check_methods(config(methods, {}))
    check_methods(config(methods))
    methods["j"]["timestep"] = 100
    with pytest.raises(UserError, match=r"score\.methods\.j\.timestep must be below train\.timesteps \(100\)"):
        check_methods(config(methods))


def test_a_journey_of_a_given_model_s_images_is_one_sentence(trak):
    method = attributor(trak, "journey", "cpu")
    with pytest.raises(UserError, match=r"score.methods.journey: the images of a given model were made elsewhere"):
        method.of_query(None, {"latent": np.zeros(1), "prompt": np.zeros(1)})


def test_journey_trak_shares_the_features_of_trak():
    layout = Layout("tiny", config())
    assert set(all_features(layout)) == {"loss-all-t2-d24", "square-all-t2-d24", "mean-all-t2-d24", "losses-t2"}
    assert set(together(layout)) == set(METHODS)


def test_a_user_s_own_image_is_scored_like_any_other(tiny):
    layout = replace(tiny, config=config({"trak": {**OPTIONS, "weights": "attn"}}, {}))
    for features in all_features(layout, "cpu").values():
        features.fit()
    scores = attributor(layout, "trak", "cpu").scores("mine")
    assert scores.shape == (IMAGES,)
    assert np.isfinite(scores).all()


def test_every_method_scores_from_end_to_end(trak):
    for method in METHODS:
        score(trak, method, device="cpu")
        for query in trak.config.queries():
            table = read_table(trak.score(method, query))
            assert table["rank"].tolist() == list(range(1, IMAGES + 1))
            assert table["score"].is_monotonic_decreasing
            assert table["score"].nunique() == IMAGES


def test_options_that_a_method_has_not_are_refused():
    with pytest.raises(UserError, match="'trak' has no such option"):
        check_methods(config({"trak": {"timestep": 3}}))
