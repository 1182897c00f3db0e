import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forgetrace.artifacts import UserError, read_json, read_tensors
from forgetrace.curvature.diagonal import DiagonalFisher, fit_fisher
from forgetrace.curvature.draws import losses_of_draws
from forgetrace.curvature.ekfac import EKFAC, eigenvalues, eigenvectors, fit_ekfac, second_moments
from forgetrace.curvature.fit import fit
from forgetrace.curvature.per_example import matrix_layers
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout
from forgetrace.unlearning.step import query_gradient
from forgetrace.unlearning.variants import load_curvature, read_query, unlearn_query

from ..conftest import settings
from .reference import draw_gradients, run_draws

CPU = torch.device("cpu")
DRAWS = 12


def pieces(layout) -> tuple:
    return load_unet(layout, CPU), load_scheduler(layout), load_encoded(layout)


def batches(layout, unet, chunk: int, draws: int = DRAWS):
    return losses_of_draws(unet, load_scheduler(layout), load_encoded(layout), draws, chunk, 5, "test")


def fitted(model: nn.Module, losses) -> dict[str, torch.Tensor]:
    """The factors of a model of one batch of examples."""
    bases = eigenvectors(second_moments(model, [losses]))
    return bases | eigenvalues(model, bases, [losses])


def linear_example(a: torch.Tensor, delta: torch.Tensor, bias: bool = True) -> tuple[nn.Module, object]:
    """A linear layer with inputs a, (B, in), and the output gradients δ, (B, out), it is made to have."""
    model = nn.Sequential(nn.Linear(a.shape[1], delta.shape[1], bias=bias)).double().requires_grad_(False)
    return model, lambda: (model(a) * delta).sum(dim=1)


def dense_fisher(a: torch.Tensor, delta: torch.Tensor) -> np.ndarray:
    """E[vec(g) vec(g)ᵀ] of g = δ (a, 1)ᵀ, row by row."""
    a = np.hstack([a.numpy(), np.ones((len(a), 1))])
    vectors = np.stack([np.outer(d, x).ravel() for d, x in zip(delta.numpy(), a, strict=True)])
    return vectors.T @ vectors / len(vectors)


def in_basis(factors: dict[str, torch.Tensor], layer: str) -> np.ndarray:
    """The eigenvectors of the whole matrix, one per column, for gradients flattened row by row."""
    return np.kron(factors[f"{layer}.Q_G"].double().numpy(), factors[f"{layer}.Q_A"].double().numpy())


def random_factors(outputs: int, columns: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    q_a, q_g = (torch.linalg.qr(torch.randn(n, n, generator=random).double()).Q for n in (columns, outputs))
    values = torch.rand(outputs, columns, generator=random).double() + 0.1
    return {"layer.Q_A": q_a, "layer.Q_G": q_g, "layer.Lambda": values}


def as_rows(gradient: torch.Tensor) -> torch.Tensor:
    """A weight's gradient, (outputs, channels, height, width) or (outputs, inputs), as the matrix of its layer."""
    return gradient.permute(0, 2, 3, 1).reshape(len(gradient), -1) if gradient.ndim == 4 else gradient


def test_where_inputs_and_residuals_are_independent_the_inverse_is_exact():
    """Every input meets every output gradient: the second moment is exactly a Kronecker product."""
    torch.manual_seed(0)
    inputs, deltas = torch.randn(9, 3).double(), torch.randn(7, 4).double()
    a, delta = inputs.repeat_interleave(7, dim=0), deltas.repeat(9, 1)
    factors, gradient = fitted(*linear_example(a, delta)), torch.randn(4, 4).double()
    weight, bias = gradient[:, :3], gradient[:, 3]
    found = EKFAC(factors, damping=0).precondition({"0.weight": weight, "0.bias": bias})
    exact = np.linalg.solve(dense_fisher(a, delta), gradient.numpy().ravel()).reshape(4, 4)
    np.testing.assert_allclose(found["0.weight"], exact[:, :3], rtol=1e-5, atol=1e-6 * abs(exact).max())
    np.testing.assert_allclose(found["0.bias"], exact[:, 3], rtol=1e-5, atol=1e-6 * abs(exact).max())


def test_lambda_fits_better_than_the_product_of_the_factors_eigenvalues():
    """Where a and δ depend on each other: Λ is the diagonal of Fisher in its basis, so no diagonal is nearer."""
    torch.manual_seed(1)
    a = torch.randn(200, 3).double()
    delta = torch.tanh(a @ torch.randn(3, 4).double()) * (1 + a[:, :1].square())
    model, losses = linear_example(a, delta)
    factors, moments = fitted(model, losses), second_moments(model, [losses])
    dense, basis = dense_fisher(a, delta), in_basis(factors, "0")
    np.testing.assert_allclose(factors["0.Lambda"].numpy().ravel(), np.diag(basis.T @ dense @ basis), rtol=1e-5)

    def distance(values: np.ndarray) -> float:
        return np.linalg.norm(basis * values.ravel() @ basis.T - dense)

    kfac = np.kron(moments["0.G"].numpy(), moments["0.A"].numpy()) / 200**2
    plain = np.diag(basis.T @ kfac @ basis)
    assert np.linalg.norm(basis * plain @ basis.T - kfac) < 1e-6 * np.linalg.norm(kfac)  # that is K-FAC
    assert distance(factors["0.Lambda"].numpy()) < 0.97 * distance(plain)


def test_lambda_is_that_of_single_draws(tiny):
    gradients, factors = draw_gradients(tiny, DRAWS), fit_ekfac(*pieces(tiny), DRAWS, 5, 5)
    layers = matrix_layers(load_unet(tiny, CPU))
    kinds = {(type(layer), layer.bias is not None) for layer in layers.values()}
    assert kinds == {(nn.Conv2d, True), (nn.Linear, True), (nn.Linear, False)}
    assert any(layer.weight.shape[2:] == (3, 3) for layer in layers.values() if type(layer) is nn.Conv2d)
    for name, layer in layers.items():
        expected = 0
        for gradient in gradients:
            matrix = as_rows(gradient[f"{name}.weight"])
            if layer.bias is not None:
                matrix = torch.cat([matrix, gradient[f"{name}.bias"][:, None]], dim=1)
            q_a, q_g = (factors[f"{name}.Q_{side}"].double() for side in "AG")
            expected = expected + (q_g.T @ matrix @ q_a).square() / DRAWS
        found = factors[f"{name}.Lambda"]
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected.max()), msg=name)
        torch.testing.assert_close(found.sum(), expected.sum(), rtol=1e-5, atol=0, msg=name)


WATCHED = (
    "conv_in",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.resnets.0.conv_shortcut",
    "time_embedding.linear_1",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
)


@pytest.mark.parametrize("name", WATCHED)
def test_the_bases_are_those_of_single_calls(tiny, name):
    """Inputs and output gradients seen by hooks, one draw at a time; patches by PyTorch's own unfold."""
    unet = load_unet(tiny, CPU)
    layer, inputs, deltas = unet.get_submodule(name), [], []
    moments = second_moments(unet, batches(tiny, unet, 5))
    layer.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()[0]))
    layer.register_forward_hook(lambda _, x, y: y.register_hook(lambda delta: deltas.append(delta[0])) and None)
    list(run_draws(tiny, unet, DRAWS))
    assert len(inputs) == len(deltas) == DRAWS
    if type(layer) is nn.Conv2d:
        patches = [F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride) for x in inputs]
        inputs = [x.unflatten(0, (layer.in_channels, -1)).transpose(0, 1).flatten(0, 1).T for x in patches]
        deltas = [delta.flatten(1).T for delta in deltas]
    a, delta = (torch.cat([x.reshape(-1, x.shape[-1]) for x in values]).double() for values in (inputs, deltas))
    if layer.bias is not None:
        a = F.pad(a, (0, 1), value=1)
    bases = eigenvectors(moments)
    for side, vectors in (("A", a), ("G", delta)):
        expected, basis = vectors.T @ vectors, bases[f"{name}.Q_{side}"].double()
        torch.testing.assert_close(moments[f"{name}.{side}"], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        rotated = basis.T @ expected @ basis
        rest = rotated - torch.diag(rotated.diag())
        assert float(rest.abs().max()) < 1e-5 * float(rotated.max())
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double(), rtol=0, atol=1e-6)


def test_the_chunk_size_does_not_matter(tiny):
    """Eigenvectors of near-equal eigenvalues may turn with rounding: moments and eigenvalues are compared."""
    unet = load_unet(tiny, CPU)
    whole = second_moments(unet, batches(tiny, unet, DRAWS))
    bases = eigenvectors(whole)
    values = eigenvalues(unet, bases, batches(tiny, unet, DRAWS))
    for chunk in (1, 5):
        again = second_moments(unet, batches(tiny, unet, chunk)) | eigenvalues(unet, bases, batches(tiny, unet, chunk))
        assert again.keys() == whole.keys() | values.keys()
        for name, value in (whole | values).items():
            torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-5 * float(value.max()), msg=name)


def test_in_the_basis_of_the_weights_it_is_the_diagonal_fisher(tiny):
    unet, scheduler, encoded = pieces(tiny)
    fisher = fit_fisher(unet, scheduler, encoded, DRAWS, 5, 5)
    bases = {}
    for name, moment in second_moments(unet, []).items():
        bases[name.replace(".A", ".Q_A").replace(".G", ".Q_G")] = torch.eye(len(moment))
    factors = bases | eigenvalues(unet, bases, batches(tiny, unet, 5))
    layers = matrix_layers(unet)
    for name, value in fisher.items():
        layer, _, key = name.rpartition(".")
        if layer not in layers:
            assert "norm" in layer
            torch.testing.assert_close(factors[name], value, rtol=1e-6, atol=0)
            continue
        found = factors[f"{layer}.Lambda"]
        found = found[:, -1] if key == "bias" else found[:, : value[0].numel()]
        scale = float(factors[f"{layer}.Lambda"].sum())
        expected = value if key == "bias" else as_rows(value)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-13 * scale, msg=name)
    # Damping is relative to the mean of weight and bias together, so the two are damped alike only without a bias.
    gradients = {name: torch.randn_like(weight) for name, weight in unet.named_parameters()}
    ekfac = EKFAC(factors, 0.1).precondition(gradients)
    diagonal = DiagonalFisher(fisher, 0.1).precondition(gradients)
    assert list(ekfac) == list(diagonal)
    alike = [name for name in ekfac if getattr(layers.get(name.rpartition(".")[0]), "bias", None) is None]
    assert len(alike) > 20
    for name in alike:
        torch.testing.assert_close(ekfac[name], diagonal[name], rtol=1e-3, atol=0, msg=name)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 3)])
@pytest.mark.parametrize("given", [("weight", "bias"), ("weight",), ("bias",)])
def test_preconditioning_is_that_of_the_whole_matrix(shape, given):
    columns = int(np.prod(shape[1:]))
    factors, random = random_factors(4, columns + 1), torch.Generator().manual_seed(1)
    gradients = {"layer.weight": torch.randn(shape, generator=random), "layer.bias": torch.randn(4, generator=random)}
    gradients = {f"layer.{key}": gradients[f"layer.{key}"] for key in given}
    matrix = np.zeros((4, columns + 1))
    if "weight" in given:
        matrix[:, :-1] = as_rows(gradients["layer.weight"])
    if "bias" in given:
        matrix[:, -1] = gradients["layer.bias"]
    basis, values = in_basis(factors, "layer"), factors["layer.Lambda"].numpy()
    dense = basis * (values.ravel() + 0.3 * values.mean()) @ basis.T
    expected = np.linalg.solve(dense, matrix.ravel()).reshape(4, -1)
    found = EKFAC(factors, 0.3).precondition(gradients)
    assert found.keys() == gradients.keys()
    assert all(found[name].shape == gradients[name].shape for name in found)
    assert all(value.dtype == torch.float32 for value in found.values())
    if "weight" in given:
        np.testing.assert_allclose(as_rows(found["layer.weight"]), expected[:, :-1], rtol=1e-4, atol=1e-5)
    if "bias" in given:
        np.testing.assert_allclose(found["layer.bias"], expected[:, -1], rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """A layer called twice, one the loss does not see, and two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.twice, self.unseen = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied, self.too = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.too.weight = self.tied.weight

    def forward(self, x):
        self.unseen(x)
        return self.too(torch.tanh(self.tied(self.twice(torch.tanh(self.twice(x))))))


def test_a_layer_called_twice_has_the_gradient_of_both_calls_and_a_shared_weight_is_diagonal():
    torch.manual_seed(2)
    model, x = Shared().double(), torch.randn(6, 3).double()
    gradients = []
    for example in x:
        loss = model(example[None]).sin().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: torch.stack(parts) for name, parts in zip(names, zip(*gradients, strict=True), strict=True)}
    factors = fitted(model.requires_grad_(False), lambda: model(x).sin().sum(dim=1))
    assert factors.keys() == {f"{n}.{k}" for n in ("twice", "unseen") for k in ("Q_A", "Q_G", "Lambda")} | {
        "tied.weight"
    }
    matrices = torch.cat([gradients["twice.weight"], gradients["twice.bias"][:, :, None]], dim=2)
    q_a, q_g = factors["twice.Q_A"].double(), factors["twice.Q_G"].double()
    expected = (q_g.T @ matrices @ q_a).square().mean(dim=0)
    torch.testing.assert_close(factors["twice.Lambda"], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(factors["tied.weight"], gradients["tied.weight"].square().mean(dim=0))
    assert not factors["unseen.Lambda"].any()


def test_an_eigenvalue_of_zero_is_refused_without_damping(tiny):
    """No caption uses the fourth dimension of the token states; rounding must not hide it."""
    unet, scheduler, encoded = pieces(tiny)
    encoded.captions[:, :, 3] = 0
    factors = fit_ekfac(unet, scheduler, encoded, 40, 40, 5)
    name = next(name for name in factors if name.endswith("attn2.to_k.Lambda"))
    outputs, inputs = factors[name].shape
    unused = int((factors[name] == 0).all(dim=0).sum())
    assert 1 <= unused < inputs
    layer = name.removesuffix(".Lambda")
    gradients = {f"{layer}.weight": torch.ones(outputs, inputs)}
    with pytest.raises(UserError, match=rf"The Fisher information of {layer} has \d+ zero entries.*damping above 0"):
        EKFAC(factors, damping=0).precondition(gradients)
    assert torch.isfinite(EKFAC(factors, damping=0.1).precondition(gradients)[f"{layer}.weight"]).all()


def test_a_diagonal_entry_of_zero_is_refused_without_damping():
    factors = random_factors(2, 3) | {"norm.weight": torch.tensor([1.0, 0.0]).double()}
    gradients = {"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2), "norm.weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"The Fisher information of norm\.weight has 1 zero entries"):
        EKFAC(factors, damping=0).precondition(gradients)
    # λ of norm.weight is 0.5 · 0.5.
    found = EKFAC(factors, damping=0.5).precondition(gradients)
    assert list(found) == list(gradients)
    torch.testing.assert_close(found["norm.weight"], torch.tensor([0.8, 4.0]))


def test_a_step_from_the_stages_files_raises_the_loss_of_the_query(tiny):
    variants = {
        "ekfac": {"curvature": "ekfac", "step_size": 1e-4, "draws": 32},
        "kv": {"curvature": "ekfac", "weights": "cross-attn-kv", "step_size": 1e-3, "draws": 32},
    }
    layout = Layout("tiny", settings(unlearn=variants))
    assert {layout.ekfac, layout.ekfac_report} <= layout.files()
    assert not {layout.ekfac, layout.ekfac_report} & tiny.files()
    fit(layout, "ekfac", "cpu")
    factors, report = read_tensors(layout.ekfac), read_json(layout.ekfac_report)
    weights = read_tensors(tiny.weights)
    assert report["entries"] == sum(value.numel() for value in weights.values())
    assert report["draws"] == 60
    assert report["tensors"]["conv_in"]["mean"] == pytest.approx(float(factors["conv_in.Lambda"].mean()))
    assert report["made_by"]["config"]["fit"] == {"draws": 60, "chunk": 7}
    assert {str(value.dtype) for name, value in factors.items() if ".Q_" in name} == {"torch.float32"}
    curvature = load_curvature(layout, "ekfac", 0.1)
    assert isinstance(curvature, EKFAC)
    unlearn_query(layout, "ekfac", "report-00", "cpu")
    losses = read_json(layout.unlearned("ekfac", "report-00")["losses"])
    rise = {name: losses["after"][name] / losses["before"][name] - 1 for name in ("query", "others")}
    assert rise["query"] > 1e-3
    assert rise["query"] > 2 * abs(rise["others"])
    unet, target, changed = load_unet(tiny, CPU), read_query(tiny, "report-00"), layout.unlearned("ekfac", "report-00")
    gradient = query_gradient(unet, load_scheduler(tiny), target, list(weights), range(32), 5)
    for name, change in curvature.precondition(gradient).items():
        after = read_tensors(changed["weights"])[name]
        torch.testing.assert_close(after, weights[name] + 1e-4 / 40 * change, rtol=1e-5, atol=1e-6, msg=name)
    unlearn_query(layout, "kv", "report-00", "cpu")
    losses = read_json(layout.unlearned("kv", "report-00")["losses"])
    assert losses["after"]["query"] > losses["before"]["query"]
