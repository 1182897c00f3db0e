import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from forgetrace.artifacts import UserError, read_json, read_tensors
from forgetrace.curvature.contract import Identity
from forgetrace.curvature.diagonal import DiagonalFisher, fisher_report, fit_fisher
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.encoding.store import load_encoded

from .reference import draw_gradients

CPU = torch.device("cpu")


def fitted(layout, draws: int, chunk: int) -> dict[str, torch.Tensor]:
    return fit_fisher(load_unet(layout, CPU), load_scheduler(layout), load_encoded(layout), draws, chunk, 5)


def test_the_fisher_is_the_mean_of_squared_single_gradients(tiny):
    gradients, fisher = draw_gradients(tiny, 12), fitted(tiny, 12, 5)
    assert fisher.keys() == gradients[0].keys()
    far = 0
    for name, value in fisher.items():
        stacked = torch.stack([gradient[name] for gradient in gradients])
        expected = stacked.square().mean(dim=0)
        assert value.dtype == torch.float64
        assert value.shape == expected.shape
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.max()), msg=name)
        # What it must not be: the square of the mean gradient is smaller wherever gradients disagree.
        far += float(stacked.mean(dim=0).square().sum()) < 0.5 * float(value.sum())
    assert far > 0.9 * len(fisher)


def test_the_chunk_size_does_not_matter(tiny):
    whole = fitted(tiny, 12, 12)
    for chunk in (1, 5, 100):
        for name, value in fitted(tiny, 12, chunk).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6 * float(whole[name].max()))


def test_the_mean_runs_over_all_draws(tiny):
    """Twelve draws are the first six and the next six: a mean, not a sum."""
    six, twelve = fitted(tiny, 6, 6), fitted(tiny, 12, 6)
    gradients = draw_gradients(tiny, 12)[6:]
    name = "conv_in.weight"
    rest = torch.stack([gradient[name].square() for gradient in gradients]).mean(dim=0)
    torch.testing.assert_close(twelve[name], (six[name] + rest) / 2, rtol=1e-5, atol=1e-6 * float(rest.max()))


def test_the_stage_writes_fisher_and_report(tiny):
    fisher, report = read_tensors(tiny.fisher), read_json(tiny.fisher_report)
    expected = fitted(tiny, 60, 20)
    for name, value in fisher.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6 * float(value.max()))
    assert report["draws"] == 60
    assert report["entries"] == sum(value.numel() for value in fisher.values())
    assert report["zeros"] == sum(entry["zeros"] for entry in report["tensors"].values())
    assert report["made_by"]["config"]["fit"] == {"draws": 60, "chunk": 7}
    with safe_open(tiny.fisher, "pt") as content:
        assert "provenance" in content.metadata()


def test_a_caption_dimension_nobody_uses_is_reported_as_zero(tiny):
    encoded = load_encoded(tiny)
    encoded.captions[:, :, 3] = 0
    fisher = fit_fisher(load_unet(tiny, CPU), load_scheduler(tiny), encoded, 6, 6, 5)
    name = next(name for name in fisher if name.endswith("attn2.to_k.weight"))
    assert (fisher[name][:, 3] == 0).all()
    report = fisher_report(fisher, 6)
    assert report["tensors"][name]["zeros"] == int((fisher[name] == 0).sum()) >= fisher[name].shape[0]
    ones = {key: torch.ones_like(value) for key, value in fisher.items()}
    with pytest.raises(UserError, match=rf"The Fisher information of {name} has \d+ zero entries.*damping above 0"):
        DiagonalFisher({name: fisher[name]}, damping=0).precondition({name: ones[name]})
    assert torch.isfinite(DiagonalFisher(fisher, damping=0.1).precondition({name: ones[name]})[name]).all()


def test_report_closed_form():
    fisher = {"a": torch.tensor([0.0, 2.0, 4.0]).double(), "b": torch.zeros(2, 2).double()}
    assert fisher_report(fisher, 7) == {
        "draws": 7,
        "entries": 7,
        "zeros": 5,
        "tensors": {
            "a": {"entries": 3, "zeros": 1, "mean": 2.0},
            "b": {"entries": 4, "zeros": 4, "mean": 0.0},
        },
    }


def test_preconditioning_closed_form():
    fisher = {"a": torch.tensor([1.0, 3.0]).double(), "b": torch.tensor([[4.0]]).double()}
    gradients = {"a": torch.tensor([2.0, -2.0]), "b": torch.tensor([[1.0]])}
    # λ of a is 0.5 · 2 = 1, of b 0.5 · 4 = 2.
    result = DiagonalFisher(fisher, damping=0.5).precondition(gradients)
    torch.testing.assert_close(result["a"], torch.tensor([1.0, -0.5]))
    torch.testing.assert_close(result["b"], torch.tensor([[1 / 6]]))
    assert result["a"].dtype == torch.float32
    undamped = DiagonalFisher(fisher, damping=0).precondition(gradients)
    torch.testing.assert_close(undamped["a"], torch.tensor([2.0, -2 / 3]))


def test_weights_that_no_draw_moves_stay_where_they_are():
    fisher = {"a": torch.zeros(2, 2).double(), "b": torch.ones(2).double()}
    ones = {name: torch.ones(value.shape) for name, value in fisher.items()}
    result = DiagonalFisher(fisher, damping=0.1).precondition(ones)
    torch.testing.assert_close(result["a"], torch.zeros(2, 2))
    torch.testing.assert_close(result["b"], torch.full((2,), 1 / 1.1))
    with pytest.raises(UserError, match="of a has 4 zero entries"):
        DiagonalFisher(fisher, damping=0).precondition(ones)


def test_small_entries_survive_in_float64():
    """A Fisher entry of 1e-42 is no number in float32 arithmetic that flushes denormals."""
    fisher = {"a": torch.tensor([1e-42, 1e-42], dtype=torch.float64)}
    result = DiagonalFisher(fisher, damping=1.0).precondition({"a": torch.tensor([1e-30, 0.0])})
    torch.testing.assert_close(result["a"], torch.tensor([5e11, 0.0]))


@given(st.floats(1e-3, 1e3), st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6))
def test_scaling_the_fisher_scales_the_step_down(factor, entries):
    """(cF + d·mean(cF))⁻¹ = (F + d·mean F)⁻¹ / c: the damping is relative."""
    fisher = torch.tensor(entries).double()
    gradient = {"a": torch.linspace(-1, 1, len(entries))}
    one = DiagonalFisher({"a": fisher}, 0.1).precondition(gradient)["a"]
    scaled = DiagonalFisher({"a": factor * fisher}, 0.1).precondition(gradient)["a"]
    torch.testing.assert_close(scaled * factor, one, rtol=1e-5, atol=0)


def test_the_identity_leaves_gradients_alone():
    gradients = {"a": torch.randn(3)}
    assert Identity().precondition(gradients)["a"] is gradients["a"]
