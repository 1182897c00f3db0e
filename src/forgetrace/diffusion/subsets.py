"""The weight subsets of AbU's ablation (arXiv 2406.09408, Table 3) and MUCS's, by diffusers' weight names."""

from collections.abc import Iterable

CROSS, SELF, FEED_FORWARD, TIME = ".attn2.", ".attn1.", ".ff.", "time_embedding."


def select(names: Iterable[str], subset: str) -> list[str]:
    """Names of the weights a variant may change, in the given order.

    Args:
        names: all weight names of a diffusers UNet.
        subset: ``cross-attn-kv``, ``cross-attn``, ``attn``, ``all``, or ``mlp``: the transformer blocks' feed-forward
            layers and the time embedding without their biases (MUCS, arXiv 2605.17938).
    """
    chosen = {
        "cross-attn-kv": lambda name: CROSS in name and (".to_k." in name or ".to_v." in name),
        "cross-attn": lambda name: CROSS in name,
        "attn": lambda name: CROSS in name or SELF in name,
        "mlp": lambda name: name.endswith(".weight") and (FEED_FORWARD in name or name.startswith(TIME)),
        "all": lambda name: True,
    }[subset]
    return [name for name in names if chosen(name)]
