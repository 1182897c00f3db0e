"""The weight subsets of AbU's ablation (arXiv 2406.09408, Table 3), by diffusers' weight names."""

from collections.abc import Iterable

CROSS, SELF = ".attn2.", ".attn1."


def select(names: Iterable[str], subset: str) -> list[str]:
    """Names of the weights a variant may change, in the given order.

    Args:
        names: all weight names of a diffusers UNet.
        subset: ``cross-attn-kv``, ``cross-attn``, ``attn`` or ``all``.
    """
    chosen = {
        "cross-attn-kv": lambda name: CROSS in name and (".to_k." in name or ".to_v." in name),
        "cross-attn": lambda name: CROSS in name,
        "attn": lambda name: CROSS in name or SELF in name,
        "all": lambda name: True,
    }[subset]
    return [name for name in names if chosen(name)]
