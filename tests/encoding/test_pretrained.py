import json

import numpy as np
import pytest
import torch
from PIL import Image

from forgetrace.artifacts import UserError, sha256_of
from forgetrace.encoding.image_encoder import BATCH
from forgetrace.encoding.images import load_encoder
from forgetrace.encoding.pretrained import model_folder

from ..image_models import save_clip, save_dinov2, save_vit

IMAGES = np.random.default_rng(0).integers(0, 256, size=(BATCH + 3, 16, 20, 3), dtype=np.uint8)


def clip_by_hand(folder, pixels):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def class_token_by_hand(folder, pixels):
    from transformers import AutoModel

    # The first position of the last layer, normalised as the model's end does it.
    model = AutoModel.from_pretrained(folder).eval()
    hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    return model.layernorm(hidden)[:, 0]


@pytest.mark.parametrize(
    ("save", "by_hand", "side"),
    [(save_clip, clip_by_hand, 16), (save_vit, class_token_by_hand, 16), (save_dinov2, class_token_by_hand, 14)],
)
@torch.no_grad()
def test_features_are_those_of_transformers_in_any_batch(tmp_path, save, by_hand, side):
    folder = save(tmp_path / "model")
    encoder = load_encoder(str(folder))
    features = encoder(IMAGES)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (np.array(settings[key], dtype=np.float32) for key in ("image_mean", "image_std"))
    pixels = np.stack([(prepared(image, settings, side) / 255 - mean) / std for image in IMAGES])
    expected = by_hand(folder, torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))).numpy()
    assert features.dtype == np.float64
    np.testing.assert_allclose(features, expected, atol=2e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-3
    np.testing.assert_allclose(encoder(IMAGES[-1:]), features[-1:], atol=1e-6)


def prepared(image, settings, side):
    """Resized by Pillow as the preprocessor's config says, cropped at the centre where it says so."""
    height, width = image.shape[:2]
    size = settings["size"]
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(height, width)
        height, width = int(height * scale), int(width * scale)
    else:
        height, width = size["height"], size["width"]
    resized = np.asarray(Image.fromarray(image).resize((width, height), settings["resample"]), dtype=np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    return resized[top : top + side, left : left + side]


def test_the_files_that_shape_features_are_known_by_their_hash(tmp_path):
    folder = save_vit(tmp_path / "model")
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert load_encoder(str(folder)).files == {name: sha256_of(folder / name) for name in names}


def test_weights_of_before_safetensors_are_read(tmp_path):
    from safetensors.torch import load_file

    folder = save_vit(tmp_path / "model")
    expected = load_encoder(str(folder))(IMAGES[:2])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    encoder = load_encoder(str(folder))
    np.testing.assert_array_equal(encoder(IMAGES[:2]), expected)
    assert "pytorch_model.bin" in encoder.files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache on a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["owner/model", "owner/model@abc", "no/such/folder", "nowhere"])
def test_a_missing_model_is_one_sentence_with_the_way_out(cache, name):
    with pytest.raises(UserError) as error:
        load_encoder(name)
    message = str(error.value)
    repository, _, revision = name.partition("@")
    assert f"'{name}'" in message
    assert str(cache) in message
    assert f"`hf download {repository}{revision and ' --revision abc'}`" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert "\n" not in message


def test_a_cached_model_is_found_by_name_and_revision(cache):
    for revision, seed in (("a" * 40, 1), ("b" * 40, 2)):
        save_vit(cache / "models--owner--model" / "snapshots" / revision, seed)
    refs = cache / "models--owner--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert model_folder("owner/model").name == "a" * 40
    assert model_folder("owner/model@" + "b" * 40).name == "b" * 40
    assert not np.allclose(load_encoder("owner/model")(IMAGES[:1]), load_encoder("owner/model@" + "b" * 40)(IMAGES[:1]))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_named_with_it(tmp_path, name):
    folder = save_vit(tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"model lacks {name}"):
        load_encoder(str(folder))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    folder = save_vit(tmp_path / "model")
    (folder / name).write_bytes(b"no such thing")
    with pytest.raises(UserError, match="model"):
        load_encoder(str(folder))


def test_weights_that_would_be_random_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_clip(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack visual_projection\.weight"):
        load_encoder(str(folder))


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = save_vit(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "resnet"}))
    with pytest.raises(UserError, match=r"of the kind 'resnet'.*clip.*dinov2"):
        load_encoder(str(folder))
