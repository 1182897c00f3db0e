import pytest
import torch
from torch import nn

from forgetrace.artifacts import UserError
from forgetrace.curvature import per_example
from forgetrace.curvature.per_example import per_example_gradients


class Scale(nn.Module):
    """A layer of a kind nobody has heard of: ``w · x · y``."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, y):
        return self.w * x * y


class Twice(nn.Module):
    """One layer called twice, a weight of two layers, and a layer the loss does not see."""

    def __init__(self):
        super().__init__()
        self.first, self.tied, self.scale = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), Scale()
        self.unseen = nn.Linear(6, 6)
        self.tied.weight = self.first.weight

    def forward(self, x):
        y = self.first(torch.tanh(self.first(x)))
        self.unseen(x)
        return self.scale(self.tied(y), x)


LAYERS = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear on tokens": (nn.Linear(6, 4, bias=False), (3, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7)),
    "a convolution of many settings": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (4, 8, 6),
    ),
    "grouped convolution": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "circular convolution": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5, 5)),
    "same convolution": (nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 5)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3, 3)),
    "group norm without positions": (nn.GroupNorm(2, 4), (4,)),
    "layer norm": (nn.LayerNorm(6), (3, 6)),
    "layer norm over two dimensions": (nn.LayerNorm((3, 6)), (3, 6)),
    "a kind without a rule": (nn.Conv1d(4, 6, 3), (4, 9)),
    "twice": (Twice(), (6,)),
    "in place": (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(inplace=True)), (6,)),
}


def fast(model, inputs):
    found = {name: [] for name, _ in model.named_parameters()}
    for name, rows, gradients in per_example_gradients(model, lambda: losses(model, inputs)):
        assert rows.start == sum(map(len, found[name]))
        assert len(gradients) == rows.stop - rows.start
        found[name].append(gradients)
    return {name: torch.cat(gradients) for name, gradients in found.items()}


def losses(model, inputs):
    return model(inputs).sin().flatten(1).mean(dim=1)


@pytest.mark.parametrize("held", [1, 2**18])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_a_backward_pass_per_example(kind, held, monkeypatch):
    monkeypatch.setitem(per_example.HELD, "cpu", held)
    layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    model, inputs = layer.double(), torch.randn(5, *shape).double()
    for weight in model.parameters():
        nn.init.normal_(weight)
    expected = {name: [] for name, _ in model.named_parameters()}
    for example in inputs:
        model.requires_grad_(True)
        loss = losses(model, example[None]).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name].append(gradient)
    model.requires_grad_(False)
    found = fast(model, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert not gradient.requires_grad
        torch.testing.assert_close(gradient, torch.stack(expected[name]))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("wanted", [["scale.w"], ["first.bias", "unseen.bias"], []])
def test_only_wanted_weights_are_differentiated_by(wanted):
    """And hooked: the layers before them take no gradient."""
    torch.manual_seed(0)
    model, inputs = Twice().requires_grad_(False), torch.randn(5, 6)
    expected = fast(model, inputs)
    found = list(per_example_gradients(model, lambda: losses(model, inputs), wanted))
    assert [name for name, _, _ in found] == [name for name in expected if name in wanted]
    for name, rows, gradients in found:
        torch.testing.assert_close(gradients, expected[name][rows])


def test_a_layer_that_mixes_examples_is_refused():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 6), nn.Unflatten(0, (5, 2))).requires_grad_(False)
    with pytest.raises(UserError, match=r"The gradients of 1\.weight cannot be told apart by example"):
        fast(model, torch.randn(5, 2, 6))


def test_a_weight_that_no_layer_uses_is_refused():
    model = nn.MultiheadAttention(6, 2).requires_grad_(False)
    with pytest.raises(UserError, match="The gradients of in_proj_weight cannot"):
        list(per_example_gradients(model, lambda: torch.zeros(3, requires_grad=True)))
