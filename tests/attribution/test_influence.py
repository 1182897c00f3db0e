"""Gradient methods against plain loops, closed forms and the unlearning they are the derivative of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_table, read_tensors
from forgetrace.attribution.gradients import Gradients
from forgetrace.attribution.inner_products import products
from forgetrace.attribution.registry import attributor, check_methods
from forgetrace.attribution.scan import scan
from forgetrace.attribution.score import score
from forgetrace.attribution.unlearning import Unlearning
from forgetrace.config import Fit
from forgetrace.curvature.datainf import inverse_products
from forgetrace.curvature.per_example import from_columns, to_columns
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet, load_weights
from forgetrace.diffusion.noise import NoiseBank, spaced_timesteps
from forgetrace.encoding.store import load_encoded
from forgetrace.unlearning.variants import read_query, unlearn_query

from ..conftest import IMAGES, settings
from ..customized import customised

QUERY = "report-00"


def with_method(layout, **options):
    """The tiny experiment with one more method, ``m``."""
    methods = {"m": options, "random": {}}
    return replace(layout, config=settings(score={"methods": methods}, retrain={"methods": []}))


def slow_gradient(unet, scheduler, latent, caption, timestep: int, noise: np.ndarray) -> torch.Tensor:
    """The gradient of one loss by all weights, flat, float64."""
    weights = [weight.requires_grad_() for weight in unet.parameters()]
    loss = example_losses(
        unet, scheduler, latent[None], caption[None], torch.tensor([timestep]), torch.from_numpy(noise)[None]
    ).sum()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)]).double()


@pytest.fixture
def parts(tiny):
    """Model, schedule, data, and the training noise of two timesteps."""
    encoded, scheduler = load_encoded(tiny), load_scheduler(tiny)
    bank = NoiseBank(tiny.config.seed, "scan", spaced_timesteps(2, 100), tuple(encoded.latents.shape[1:]))
    return load_unet(tiny, torch.device("cpu")), scheduler, encoded, bank


def training_gradients(parts, row: int) -> list[torch.Tensor]:
    unet, scheduler, encoded, bank = parts
    latent, caption = encoded.batch(np.array([row]))[0], encoded.captions[encoded.caption_rows[row]]
    noise = bank.draws()
    return [slow_gradient(unet, scheduler, latent, caption, int(t), noise[i]) for i, t in enumerate(bank.timesteps)]


def query_gradients(layout, parts, noises: int) -> list[torch.Tensor]:
    """The mean over noises at every timestep."""
    unet, scheduler, _, bank = parts
    query = read_query(layout, QUERY)
    times = np.repeat(bank.timesteps, noises)
    noise = NoiseBank(layout.config.seed, f"query {QUERY}", times, bank.latent_shape).draws()
    found = [slow_gradient(unet, scheduler, query.latent, query.prompt, int(t), noise[i]) for i, t in enumerate(times)]
    return [torch.stack(found[i : i + noises]).mean(dim=0) for i in range(0, len(found), noises)]


@pytest.mark.parametrize("method", ["tracin", "retrac"])
def test_the_snapshots_sum_is_that_of_a_plain_loop(tiny, parts, method):
    layout = with_method(tiny, attributor=method, timesteps=2, noises=3)
    scores = attributor(layout, "m", "cpu").scores(QUERY)
    assert scores.shape == (IMAGES,)
    expected, rates = 0.0, read_table(layout.curve)["learning_rate"].to_numpy()
    # The rate falls to 0 with the last step: what a snapshot weighs is the rate on the way to it.
    for path, of_steps in zip(layout.snapshots, np.split(rates, len(layout.snapshots)), strict=True):
        load_weights(parts[0], path)
        of_query, of_image = query_gradients(layout, parts, 3), training_gradients(parts, 7)
        if method == "retrac":
            of_query, of_image = ([g / g.norm() for g in gradients] for gradients in (of_query, of_image))
        product = torch.stack(of_image).mean(dim=0) @ torch.stack(of_query).mean(dim=0)
        expected += of_steps.mean() * float(product)
    assert scores[7] == pytest.approx(expected, rel=1e-4)


def test_a_subset_of_weights_counts_alone(tiny):
    layout = with_method(tiny, attributor="tracin", timesteps=2, noises=1, weights="attn")
    some = attributor(layout, "m", "cpu").scores(QUERY)
    every = attributor(with_method(tiny, attributor="tracin", timesteps=2, noises=1), "m", "cpu").scores(QUERY)
    assert np.abs(some).sum() < np.abs(every).sum()
    assert not np.allclose(some, every)


@pytest.mark.parametrize("method", [{"attributor": "influence"}, {"attributor": "datainf"}])
def test_a_query_is_scored_alike_alone_and_with_others(tiny, method):
    source = attributor(with_method(tiny, timesteps=2, **method), "m", "cpu")
    together = source.scores_of([QUERY, "mine"])
    np.testing.assert_allclose(together[QUERY], source.scores(QUERY), rtol=1e-4, atol=1e-12)
    assert not np.allclose(together[QUERY], together["mine"], rtol=0.1)


def test_the_score_of_an_infinitesimal_unlearning_step_is_the_influence(tiny):
    """d/dα [L(z; θ_Q) − L(z; θ0)] at α = 0 is ⟨∇L(z), (F + λ)⁻¹ ∇L(ẑ)⟩ / N, and the distance shrinks with α."""
    timesteps = tiny.config.scan.timesteps
    influence = attributor(
        with_method(tiny, attributor="influence", timesteps=timesteps, damping=0.1), "m", "cpu"
    ).scores(QUERY)
    errors = []
    for step_size in (1e-5, 1e-6):
        variant = {"u": {"step_size": step_size, "draws": 2048}}
        methods = {"u": {"attributor": "unlearning"}, "random": {}}
        config = settings(unlearn=variant, score={"methods": methods}, retrain={"methods": []})
        layout = replace(tiny, config=config)
        unlearn_query(layout, "u", QUERY, "cpu")
        scan(layout, "u", QUERY, "cpu")
        scores = Unlearning(layout, "u").scores(QUERY) / step_size
        errors.append(np.abs(scores - influence).max() / np.abs(influence).max())
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("method", [{"attributor": "influence"}, {"attributor": "datainf"}])
def test_training_gradients_count_by_their_direction_alone_where_asked(tiny, parts, method):
    """By a plain loop: twice as long a gradient at one timestep changes nothing."""
    plain = with_method(tiny, timesteps=2, **method)
    scores = attributor(with_method(tiny, timesteps=2, unit_length=True, **method), "m", "cpu").scores(QUERY)
    source = Gradients(plain, "all", 2, "cpu")
    direction = attributor(plain, "m", "cpu").directions(source, [QUERY])
    flat = torch.cat([direction[name][0].flatten() for name in source.names]).double()
    gradients = [g / g.norm() for g in training_gradients(parts, 7)]
    assert scores[7] == pytest.approx(float(torch.stack(gradients).mean(dim=0) @ flat), rel=1e-3)
    assert not np.allclose(scores, attributor(plain, "m", "cpu").scores(QUERY), rtol=0.1)


def test_a_killed_pass_goes_on_where_it_was(tiny, monkeypatch):
    from forgetrace.attribution import inner_products

    layout = with_method(tiny, attributor="influence", timesteps=2)
    layout = replace(layout, config=layout.config.model_copy(update={"fit": Fit(draws=60, chunk=30)}))
    expected = attributor(layout, "m", "cpu").scores(QUERY)
    whole, calls = inner_products.products, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(inner_products, "products", counted)
    with pytest.raises(KeyboardInterrupt):
        attributor(layout, "m", "cpu").scores(QUERY)
    np.testing.assert_allclose(attributor(layout, "m", "cpu").scores(QUERY), expected, rtol=1e-4, atol=1e-12)
    assert len(calls) == 2 + 2  # of 80 gradients 30 were there


def test_a_killed_run_goes_through_no_block_of_queries_twice(tiny, monkeypatch):
    from forgetrace.attribution import inner_products

    layout = with_method(tiny, attributor="influence", timesteps=2)
    monkeypatch.setattr("forgetrace.attribution.gradients.HELD", 1)
    queries, method = [QUERY, "mine"], attributor(layout, "m", "cpu")
    expected, whole, calls = method.scores_of(queries), inner_products.products, []
    assert not list(Path(layout.checkpoints("score")).iterdir())

    def counted(*arguments):
        calls.append(1)
        return whole(*arguments)

    reduce, blocks = method.reduce, []

    def die(found):
        blocks.append(1)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return reduce(found)

    monkeypatch.setattr(inner_products, "products", counted)
    monkeypatch.setattr(method, "reduce", die)
    with pytest.raises(KeyboardInterrupt):
        method.scores_of(queries)
    assert calls
    calls.clear()
    again = attributor(layout, "m", "cpu").scores_of(queries)
    assert not calls  # the gradients of both blocks were there
    for query in queries:
        np.testing.assert_array_equal(again[query], expected[query])
    assert not list(Path(layout.checkpoints("score")).iterdir())


def test_customised_models_have_no_snapshots():
    for method in ("tracin", "retrac"):
        with pytest.raises(UserError, match=f"score.methods.{method} needs snapshots .* customised models"):
            check_methods(customised(score={"methods": {method: {}}}))


def test_what_a_killed_method_found_is_not_taken_for_another_s(tiny, monkeypatch):
    """TracIn and ReTrac have the same options, models and inputs, but other directions."""
    clean = attributor(with_method(tiny, attributor="retrac", timesteps=2), "m", "cpu").scores(QUERY)
    killed = attributor(with_method(tiny, attributor="tracin", timesteps=2), "m", "cpu")

    def die(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(killed, "reduce", die)
    with pytest.raises(KeyboardInterrupt):
        killed.scores(QUERY)
    assert list(Path(tiny.checkpoints("score")).iterdir())
    again = attributor(with_method(tiny, attributor="retrac", timesteps=2), "m", "cpu").scores(QUERY)
    np.testing.assert_allclose(again, clean, rtol=1e-5)


def test_the_number_of_draws_is_part_of_what_datainf_hangs_on(tiny):
    layout = with_method(tiny, attributor="datainf", timesteps=2)
    fewer = replace(layout, config=layout.config.model_copy(update={"fit": Fit(draws=7)}))
    keys = {attributor(each, "m").key([QUERY]) for each in (layout, fewer)}
    assert len(keys) == 2
    score(layout, "m", None, "cpu")
    before = read_table(layout.score("m", QUERY))
    score(fewer, "m", None, "cpu")
    assert not before.equals(read_table(layout.score("m", QUERY)))


def test_directions_are_held_of_as_many_queries_as_fit(tiny, monkeypatch):
    layout = with_method(tiny, attributor="influence", timesteps=2)
    together = attributor(layout, "m", "cpu").scores_of([QUERY, "mine"])
    monkeypatch.setattr("forgetrace.attribution.gradients.HELD", 1)
    one_by_one = attributor(layout, "m", "cpu").scores_of([QUERY, "mine"])
    for query, scores in together.items():
        np.testing.assert_allclose(one_by_one[query], scores, rtol=1e-4, atol=1e-10)


def test_products_of_a_linear_model_by_hand():
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))
    x, y = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [1.0]])
    found = products(
        model, lambda: (model(x) - y).square().sum(dim=1), {"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    )
    # Gradients 2 (f - y) x: residuals -2 and 2.
    np.testing.assert_allclose(found, [[-4, -8, 80], [12, 0, 144]])


def test_datainf_is_the_mean_of_the_exact_inverses():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    x = torch.randn(11, 3)
    batches = [lambda part=part: model(part).square().sum(dim=1) for part in x.split(4)]
    vectors = {name: torch.randn(2, *weight.shape) for name, weight in model.named_parameters()}
    found = inverse_products(model, [batches, batches], vectors, 0.1)
    for name, weight in model.named_parameters():
        g = torch.stack([torch.autograd.grad(model(row).square().sum(), weight)[0].flatten() for row in x]).double()
        level = 0.1 * g.square().mean()
        inverses = [torch.linalg.inv(row.outer(row) + level * torch.eye(len(row))) for row in g]
        expected = vectors[name].flatten(1).double() @ torch.stack(inverses).mean(dim=0)
        np.testing.assert_allclose(found[name].flatten(1), expected, rtol=1e-4)


def test_datainf_with_one_draw_is_the_exact_inverse_of_the_damped_fisher():
    model = torch.nn.Linear(3, 1, bias=False)
    x = torch.tensor([[1.0, 2.0, -1.0]])
    batches = [lambda: model(x).square().sum(dim=1)]
    v = torch.tensor([[[0.5, -1.0, 2.0]]])
    found = inverse_products(model, [batches, batches], {"weight": v}, 0.5)["weight"]
    g = torch.autograd.grad(model(x).square().sum(), model.weight)[0]
    fisher = g.T @ g + 0.5 * g.square().mean() * torch.eye(3)
    np.testing.assert_allclose(found[0, 0], torch.linalg.solve(fisher, v[0, 0]), rtol=1e-4, atol=1e-5)


def test_datainf_without_damping_is_refused():
    model = torch.nn.Linear(3, 1, bias=False)
    batches = [lambda: model(torch.ones(2, 3)).square().sum(dim=1)]
    with pytest.raises(UserError, match="set the method's damping above 0"):
        inverse_products(model, [batches, batches], {"weight": torch.ones(1, 1, 3)}, 0)


def test_datainf_leaves_weights_alone_that_no_draw_moves():
    model = torch.nn.Linear(3, 1)
    batches = [lambda: model(torch.zeros(2, 3)).square().sum(dim=1)]
    vectors = {"weight": torch.ones(1, 1, 3), "bias": torch.ones(1, 1)}
    found = inverse_products(model, [batches, batches], vectors, 0.1)
    np.testing.assert_array_equal(found["weight"], np.zeros((1, 1, 3)))
    assert found["bias"] > 0


def test_influence_on_a_linear_model_is_the_newton_estimate_of_leave_one_out():
    """⟨g_i, H⁻¹ g_q⟩ / N is the query's loss increase when image i is left out, to first order in 1/N."""
    torch.manual_seed(1)
    x, noise, query, answer = torch.randn(200, 3), torch.randn(200), torch.randn(3), torch.tensor(2.0)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * noise

    def fit(keep):
        return torch.linalg.lstsq(x[keep].double(), y[keep].double()).solution

    everything = torch.ones(200, dtype=bool)
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(fit(everything)[None])
    hessian = 2 * x.T @ x / 200
    g_query = torch.autograd.grad((model(query) - answer).square().sum(), model.weight)[0]
    direction = torch.linalg.solve(hessian, g_query[0]) / 200
    found = products(model, lambda: (model(x)[:, 0] - y).square(), {"weight": direction[None]})[:, 0]
    exact = []
    for i in range(200):
        keep = everything.clone()
        keep[i] = False
        exact.append(
            float(
                ((query.double() @ fit(keep) - answer).square() - (query @ model.weight[0] - answer).square()).detach()
            )
        )
    assert np.corrcoef(found, exact)[0, 1] > 0.999
    assert np.abs(found.numpy()).max() == pytest.approx(np.abs(exact).max(), rel=0.1)


def test_an_ekfac_influence_reads_its_factors(tiny):
    from forgetrace.curvature.fit import fit

    layout = with_method(tiny, attributor="influence", curvature="ekfac", timesteps=2)
    with pytest.raises(UserError, match=r"ekfac.safetensors is missing"):
        attributor(layout, "m", "cpu").scores(QUERY)
    fit(layout, "ekfac", "cpu")
    scores = attributor(layout, "m", "cpu").scores(QUERY)
    diagonal = attributor(with_method(tiny, attributor="influence", timesteps=2), "m", "cpu").scores(QUERY)
    assert np.isfinite(scores).all()
    assert 0.2 < np.corrcoef(scores, diagonal)[0, 1] < 0.99999


def by_hand(factors: dict, damping: float, gradient: dict) -> dict:
    """(F + λ)⁻¹ g, layer by layer: the eigenbasis where there is one, else each weight by itself."""
    layers = {name.removesuffix(".Lambda") for name in factors if name.endswith(".Lambda")}
    found = {}
    for name, g in gradient.items():
        layer, _, kind = name.rpartition(".")
        if layer not in layers:
            fisher = factors[name].double()
            found[name] = g / (fisher + damping * fisher.mean())
            continue
        q_a, q_g, values = (factors[f"{layer}.{key}"].double() for key in ("Q_A", "Q_G", "Lambda"))
        rows = to_columns(gradient[f"{layer}.weight"])
        bias = gradient.get(f"{layer}.bias")
        rows = rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)
        inverse = 1 / (values + damping * values.mean())
        change = torch.einsum("oi,pj,ij,qi,rj,qr->op", q_g, q_a, inverse, q_g, q_a, rows)
        weight = change if bias is None else change[:, :-1]
        found[name] = from_columns(weight, g.shape) if kind == "weight" else change[:, -1]
    return found


@pytest.mark.parametrize("curvature", ["diagonal", "ekfac"])
@pytest.mark.parametrize("damping", [0.01, 10.0])
def test_an_influence_is_that_of_the_damped_curvature(tiny, parts, curvature, damping):
    """Of one image, from a plain gradient and the fitted factors."""
    from forgetrace.curvature.fit import fit

    fit(tiny, curvature, "cpu")
    layout = with_method(tiny, attributor="influence", curvature=curvature, damping=damping, timesteps=2, draws=16)
    scores = attributor(layout, "m", "cpu").scores(QUERY)
    unet = parts[0]
    names = [name for name, _ in unet.named_parameters()]
    shapes = [weight.shape for weight in unet.parameters()]

    def named(flat: torch.Tensor) -> dict:
        pieces = flat.split([shape.numel() for shape in shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

    of_query = Gradients(layout, "all", 2, "cpu")._gradient(QUERY, 16)
    assert [*of_query] == names
    direction = by_hand(read_tensors(tiny.fitted(curvature)[0]), damping, {n: g.double() for n, g in of_query.items()})
    of_image = named(torch.stack(training_gradients(parts, 7)).mean(dim=0))
    expected = sum(float((of_image[name] * direction[name]).sum()) for name in names) / IMAGES
    assert scores[7] == pytest.approx(expected, rel=2e-3)
