"""A text encoder with one token more, whose embedding can be learned (Custom Diffusion, arXiv 2212.04488).

All that is needed of an encoder is its tokenizer, its model and how the states it ends in become those a UNet is
conditioned by, so MiniLM and the CLIP of a pipeline serve alike. The new token has no row in the embedding table: where
it stands, a hook puts the learned row in place of what the table holds of the rare token, and everything behind the
table is the frozen encoder's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from forgetrace.artifacts import UserError
from forgetrace.config import NEW_TOKEN, Encode
from forgetrace.encoding import text


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder.

    Attributes:
        tokenizer: of ``transformers``; changed by whoever adds a token.
        model: likewise; its embedding table is that of ``get_input_embeddings``.
        scale: states are divided by it.
        padded: positions captions are padded to.
        masked: whether padding is hidden from the model and has states of zero.
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    scale: float
    padded: int
    masked: bool


def text_encoder(settings: Encode, tokens: int, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder a config names, loaded for itself alone.

    Args:
        settings: the section encode.
        tokens: positions of the experiment's captions.
        device: where to put it.
    """
    if settings.text_encoder == "minilm":
        tokenizer, model = text.load()
        encoder = TextEncoder(tokenizer, model, text.STATE_SCALE, tokens, masked=True)
    else:
        from forgetrace.encoding.clip_text import load_clip

        tokenizer, model = load_clip(settings.pipeline, device)
        encoder = TextEncoder(tokenizer, model, 1.0, tokenizer.model_max_length, masked=False)
    encoder.model.requires_grad_(False).eval().to(device)
    return encoder


class NewToken:
    """Token states of prompts that may hold V*.

    Attributes:
        row: embedding of V*, (width of the table,); requires a gradient.
    """

    def __init__(self, encoder: TextEncoder, rare: str, tokens: int):
        """Take the rare token's embedding to start from.

        Args:
            encoder: the encoder; V* is added to its tokenizer.
            rare: one token of its vocabulary.
            tokens: positions of a prompt whose states are kept.

        Raises:
            UserError: ``rare`` is no single token.
        """
        ids = encoder.tokenizer(rare, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(
                f"customize.rare_token: the text encoder reads '{rare}' as {len(ids)} tokens; choose another."
            )
        encoder.tokenizer.add_tokens([AddedToken(NEW_TOKEN, normalized=False)])
        self._encoder, self._tokens, self._rare = encoder, tokens, ids[0]
        self._id = encoder.tokenizer.convert_tokens_to_ids(NEW_TOKEN)
        table = encoder.model.get_input_embeddings().weight
        self.row = table[self._rare].detach().clone().requires_grad_()

    def states(self, prompts: list[str]) -> torch.Tensor:
        """Token states (n, tokens, width), float32, through which gradients reach :attr:`row`.

        Raises:
            UserError: a prompt has more tokens than the experiment's captions.
        """
        encoder = self._encoder
        self._check_lengths(prompts)
        inputs = encoder.tokenizer(prompts, padding="max_length", max_length=encoder.padded, return_tensors="pt")
        inputs = inputs.to(self.row.device)
        new = inputs["input_ids"] == self._id
        ids = inputs["input_ids"].masked_fill(new, self._rare)
        mask = {"attention_mask": inputs["attention_mask"]} if encoder.masked else {}
        with self._in_place(new):
            hidden = encoder.model(input_ids=ids, **mask).last_hidden_state
        if encoder.masked:
            hidden = hidden * inputs["attention_mask"][..., None]
        return hidden[:, : self._tokens] / encoder.scale

    def _check_lengths(self, prompts: list[str]) -> None:
        lengths = [len(ids) for ids in self._encoder.tokenizer(prompts)["input_ids"]]
        most = min(self._encoder.padded, self._tokens)
        long = max(range(len(prompts)), key=lengths.__getitem__)
        if lengths[long] > most:
            raise UserError(
                f"customize: the prompt '{prompts[long]}' has {lengths[long]} tokens, this experiment's captions have "
                f"{most}; shorten it or raise encode.tokens."
            )

    @contextmanager
    def _in_place(self, new: torch.Tensor) -> Iterator[None]:
        """Embed V*, where ``new`` (n, tokens) has it, by its row."""
        hook = self._encoder.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: torch.where(new[..., None], self.row, output)
        )
        try:
            yield
        finally:
            hook.remove()
