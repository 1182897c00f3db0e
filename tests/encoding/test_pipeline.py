import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_array, read_json, sha256_of
from forgetrace.config import Encode
from forgetrace.encoding.captions import caption_states, text_source
from forgetrace.encoding.clip_text import clip_states
from forgetrace.encoding.codec import clipped, codec_of
from forgetrace.encoding.encode import encode
from forgetrace.encoding.pipeline import parts
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from ..conftest import IMAGES, settings, write_data
from ..pipelines import CHANNELS, SPECIAL, TOKENS, VOCABULARY, WIDTH, save_pipeline

PICTURES = np.random.default_rng(0).integers(0, 256, (35, 16, 20, 3), dtype=np.uint8)
CAPTIONS = ["a bold red seven", "", "x"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def section(folder: Path, **more) -> Encode:
    return Encode(image_encoder="autoencoder-kl", text_encoder="clip", pipeline=str(folder), **more)


def diffusers_pipeline(folder: Path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@torch.no_grad()
def test_latents_and_images_are_those_of_diffusers(saved):
    codec = codec_of(section(saved))
    latents = codec.encode(PICTURES)
    assert (latents.shape, latents.dtype) == ((35, CHANNELS, 4, 5), np.float32)
    pipe = diffusers_pipeline(saved)
    from PIL import Image

    prepared = pipe.image_processor.preprocess([Image.fromarray(image) for image in PICTURES])
    # The pipeline resizes nothing here: 16 and 20 are multiples of its 4.
    expected = pipe.vae.encode(prepared).latent_dist.mean * 0.5
    np.testing.assert_allclose(latents, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(codec.encode(PICTURES[3:4]), latents[3:4], atol=1e-5)
    images = codec.decode(latents)
    assert (images.shape, images.dtype) == (PICTURES.shape, np.uint8)
    decoded = pipe.image_processor.postprocess(pipe.vae.decode(expected / 0.5).sample, output_type="np")
    assert np.abs(images.astype(int) - np.round(decoded * 255)).max() <= 1


def test_token_states_are_those_the_pipeline_conditions_on(saved):
    states = clip_states(str(saved), CAPTIONS, batch=2)
    assert (states.shape, states.dtype) == ((3, TOKENS, WIDTH), np.float32)
    pipe = diffusers_pipeline(saved)
    for caption, own in zip(CAPTIONS, states, strict=True):
        expected, _ = pipe.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        np.testing.assert_allclose(own, expected[0].detach().numpy(), atol=1e-5)
    assert np.abs(states[1, -1]).max() > 0.1  # padding has states too
    np.testing.assert_array_equal(caption_states(section(saved), CAPTIONS, 5), states[:, :5])
    np.testing.assert_array_equal(caption_states(section(saved, tokens=5), CAPTIONS), states[:, :5])


def as_published(folder: Path) -> Path:
    """The files of a pipeline as Stable Diffusion 2's are: of older versions of diffusers and transformers."""
    import json

    from safetensors.torch import load_file, save_file

    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, weight in load_file(weights).items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[name] = weight
    assert sum(".proj_attn." in name for name in renamed) == 4
    save_file(renamed, weights, {"format": "pt"})
    tokenizer = folder / "tokenizer"
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    words = [*VOCABULARY, *SPECIAL]
    (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[1]}
    # Padding is word number 0, which SD 2 calls "!".
    named = json.dumps(ends | {"pad_token": words[0], "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"})
    (tokenizer / "tokenizer_config.json").write_text(named)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(ends | {"pad_token": words[0]}))
    config = json.loads((folder / "text_encoder/config.json").read_text())
    # OpenCLIP's activation; the numbers of special tokens as they stood in early configs, of no use then or now.
    config |= {"hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    (folder / "text_encoder/config.json").write_text(json.dumps(config))
    return folder


def test_a_pipeline_of_older_versions_is_read_like_one_of_today(saved, folder):
    published = as_published(folder)
    expected = codec_of(section(saved)).encode(PICTURES)
    np.testing.assert_array_equal(codec_of(section(published)).encode(PICTURES), expected)
    states, pipe = clip_states(str(published), CAPTIONS), diffusers_pipeline(published)
    assert pipe.tokenizer("x").input_ids == [len(VOCABULARY), VOCABULARY.index("x</w>"), len(VOCABULARY) + 1]
    assert pipe.tokenizer("x", padding="max_length").input_ids[3:] == [0] * (TOKENS - 3)
    assert pipe.text_encoder.config.hidden_act == "gelu"
    for caption, own in zip(CAPTIONS, states, strict=True):
        expected, _ = pipe.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        np.testing.assert_allclose(own, expected[0].detach().numpy(), atol=1e-5)
    # Neither the activation nor the padding is that of a pipeline of Stable Diffusion 1's kind.
    assert np.abs(states - clip_states(str(saved), CAPTIONS)).max() > 1e-3


def test_long_captions_are_cut_with_a_warning(saved, caplog):
    caplog.set_level(logging.WARNING)
    long = "a very long caption"
    assert clip_states(str(saved), [long]).shape == (1, TOKENS, WIDTH)
    (record,) = [record for record in caplog.records if "cut" in record.getMessage()]
    assert record.getMessage() == "1 captions are longer than 12 tokens and are cut, such as 'a very long caption'."


def test_an_experiment_is_encoded_with_them(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = Layout("tiny", settings(encode=section(saved).model_dump(exclude_unset=True)))
    write_data(layout)
    encode(layout)
    encoded = load_encoded(layout)
    assert encoded.latents.shape == (IMAGES, CHANNELS, 4, 4)
    assert encoded.captions.shape[1:] == (TOKENS, WIDTH)
    before = read_json(layout.encode_manifest)
    assert before["latent_shape"] == [CHANNELS, 4, 4]
    # Other weights are another source: trainings on their latents are others.
    other = save_pipeline(tmp_path / "other", seed=1)
    layout = Layout("tiny", settings(encode=section(other).model_dump(exclude_unset=True)))
    encode(layout)
    assert read_json(layout.encode_manifest)["source"] != before["source"]
    assert not np.array_equal(read_array(layout.latents), encoded.latents)


def test_files_are_known_by_their_hash(saved):
    source, files = text_source(section(saved)), codec_of(section(saved)).files
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert files[weights] == sha256_of(saved / weights)
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= source.keys()
    assert not files.keys() & source.keys()


def test_sampled_latents_are_not_clipped(saved):
    far = np.full((1, CHANNELS, 4, 4), 3.0, dtype=np.float32)
    np.testing.assert_array_equal(clipped(section(saved), far), far)
    assert clipped(Encode(), far).max() == 1


def test_images_that_do_not_fit_are_one_sentence(saved):
    with pytest.raises(UserError, match=r"sides are multiples of 4, not 16x18: change prepare.size"):
        codec_of(section(saved)).encode(PICTURES[:, :, :18])


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("vae/config.json", r"The pipeline .* lacks vae/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", r"The pipeline .* lacks weights in vae/"),
    ],
)
def test_what_a_folder_lacks_is_named(folder, lost, sentence):
    (folder / lost).unlink()
    with pytest.raises(UserError, match=sentence):
        codec_of(section(folder))


def test_damaged_and_partial_weights_are_refused(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    dropped = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != dropped}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"lack {dropped}|cannot be read"):
        codec_of(section(folder))
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"vae cannot be read \(.*: save or download the pipeline again"):
        codec_of(section(folder))
    (folder / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer cannot be read"):
        clip_states(str(folder), CAPTIONS)


def test_without_network_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/nothing' is no folder.*hf download nobody/nothing.*encode.pipeline"):
        parts("nobody/nothing", ["vae"])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"image_encoder": "autoencoder-kl"}, "need a pipeline"),
        ({"pipeline": "somewhere"}, "need a pipeline, others have no use"),
        ({"image_encoder": "autoencoder-kl", "pipeline": "x", "factor": 2}, "factor has no effect"),
    ],
)
def test_a_section_that_does_not_fit_is_refused(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        settings(encode=keys)
