from itertools import pairwise

import pytest

from forgetrace.diffusion.model import build_unet
from forgetrace.diffusion.subsets import select

from ..conftest import settings


@pytest.fixture(scope="module")
def weights() -> dict[str, tuple[int, ...]]:
    unet = build_unet(settings().train, (12, 8, 8), 16, seed=0)
    return {name: tuple(weight.shape) for name, weight in unet.named_parameters()}


def test_subsets_are_nested(weights):
    subsets = [set(select(weights, name)) for name in ("cross-attn-kv", "cross-attn", "attn", "all")]
    for small, large in pairwise(subsets):
        assert small < large
    assert subsets[-1] == set(weights)


def test_keys_and_values_of_cross_attention_read_the_caption(weights):
    """Exactly these weights take token states (16 wide) as input; nothing else does."""
    chosen = select(weights, "cross-attn-kv")
    assert len(chosen) == 2 * 4  # one transformer in the lower down block and the middle, two in the up block
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in chosen)
    assert all(weights[name][1] == 16 for name in chosen)
    assert not any("attn2.to_q" in name or "attn2.to_out" in name for name in chosen)


def test_attention_leaves_out_norms_and_feed_forward(weights):
    rest = set(weights) - set(select(weights, "attn"))
    assert any(".ff." in name for name in rest)
    assert any(".norm1." in name for name in rest)
    assert not any("attn1" in name or "attn2" in name for name in rest)
    kinds = {name.split(".attn")[1].split(".", 1)[1] for name in select(weights, "attn")}
    assert kinds == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}


def test_mlp_is_the_matrices_of_feed_forward_and_time_embedding(weights):
    chosen = select(weights, "mlp")
    assert sum(name.startswith("time_embedding.linear_") for name in chosen) == 2
    feed_forward = [name for name in chosen if ".transformer_blocks.0.ff.net." in name]
    assert len(feed_forward) == 2 * 4  # both layers of every transformer
    assert len(chosen) == 2 + 2 * 4
    assert all(name.endswith(".weight") and len(weights[name]) == 2 for name in chosen)


def test_the_given_order_is_kept(weights):
    names = list(weights)
    assert select(reversed(names), "attn") == list(reversed(select(names, "attn")))


def test_an_unknown_subset_is_an_error(weights):
    with pytest.raises(KeyError):
        select(weights, "everything")
