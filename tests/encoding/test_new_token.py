import pytest
import torch

from forgetrace.artifacts import UserError
from forgetrace.config import Encode
from forgetrace.encoding.clip_text import clip_states
from forgetrace.encoding.new_token import NewToken, text_encoder
from forgetrace.encoding.text import STATE_SCALE

from ..pipelines import TOKENS, save_pipeline
from ..text_models import tiny_bert

LENGTH = 8


@pytest.fixture
def token(monkeypatch) -> NewToken:
    monkeypatch.setattr("forgetrace.encoding.text.load", tiny_bert)
    return NewToken(text_encoder(Encode(), LENGTH), "zu", LENGTH)


def test_a_prompt_without_it_has_the_frozen_states(token):
    tokenizer, model = tiny_bert()
    inputs = tokenizer(["a red digit"], padding="max_length", max_length=LENGTH, return_tensors="pt")
    expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    expected = expected * inputs["attention_mask"][..., None] / STATE_SCALE
    torch.testing.assert_close(token.states(["a red digit"]), expected)


def test_it_starts_as_the_rare_token(token):
    torch.testing.assert_close(token.states(["a V* style"]), token.states(["a zu style"]))
    with torch.no_grad():
        token.row += 1
    assert not torch.allclose(token.states(["a V* style"]), token.states(["a zu style"]))


def test_gradients_reach_its_row_and_nothing_else_of_the_encoder(token):
    states = token.states(["a V* style", "my own thing"])
    states.square().sum().backward()
    assert token.row.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in token._encoder.model.parameters())
    token.row.grad = None
    (0 * token.row.sum() + token.states(["my own thing"]).square().sum()).backward()
    assert not token.row.grad.any()  # no V*, no path to the row


def test_the_embedding_table_stays_as_it_is(token):
    before = tiny_bert()[1].get_input_embeddings().weight
    with torch.no_grad():
        token.row += 1
    token.states(["a V* style"])
    torch.testing.assert_close(token._encoder.model.get_input_embeddings().weight, before)


def test_the_clip_of_a_pipeline_takes_a_new_token_too(tmp_path):
    folder = str(save_pipeline(tmp_path / "sd"))
    settings = Encode(image_encoder="autoencoder-kl", text_encoder="clip", pipeline=folder)
    token = NewToken(text_encoder(settings, TOKENS), "z", TOKENS)
    known = torch.from_numpy(clip_states(folder, ["a z b"]))
    torch.testing.assert_close(token.states(["a z b"]).detach(), known)
    torch.testing.assert_close(token.states(["a V* b"]).detach(), known)
    token.states(["a V* b"]).square().sum().backward()
    assert token.row.grad.abs().sum() > 0


def test_a_prompt_that_is_too_long_and_a_token_that_is_none_are_named(token):
    with pytest.raises(UserError, match=r"'V\* style style style style style style style' has 10 tokens.* 8;"):
        token.states(["a V*", "V* style style style style style style style"])
    with pytest.raises(UserError, match=r"customize.rare_token: the text encoder reads 'red digit' as 2 tokens"):
        NewToken(token._encoder, "red digit", LENGTH)
