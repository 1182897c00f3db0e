"""GroundingDINO with invented weights, saved to a folder as ``transformers`` saves it."""

import math

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError
from forgetrace.encoding.grounding import detect, whole_pixels

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "dog", "?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("grounding")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
                      out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=BertConfig(vocab_size=len(WORDS), **sizes), d_model=32, num_queries=5,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=16, encoder_n_points=2, decoder_n_points=2, num_feature_levels=3, max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def expected(folder, image: np.ndarray) -> list[list[int]]:
    """Every box the network proposes: from its shares of width and height, middle first, to corners in pixels."""
    from PIL import Image
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    inputs = AutoProcessor.from_pretrained(folder)(images=Image.fromarray(image), text="a dog.", return_tensors="pt")
    with torch.no_grad():
        shares = GroundingDinoForObjectDetection.from_pretrained(folder).eval()(**inputs).pred_boxes[0].numpy()
    height, width = image.shape[:2]
    found = []
    for x, y, wide, high in shares.tolist():
        left, right = max(0, math.floor((x - wide / 2) * width)), min(width, math.ceil((x + wide / 2) * width))
        top, bottom = max(0, math.floor((y - high / 2) * height)), min(height, math.ceil((y + high / 2) * height))
        if left < right and top < bottom:
            found.append([left, top, right, bottom])
    return found


def test_boxes_of_a_phrase_lie_in_the_image(folder):
    image = np.random.default_rng(0).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
    boxes = detect(image, "A dog", str(folder), 1e-6, CPU)
    assert boxes == detect(image, "a dog.", str(folder), 1e-6, CPU)
    assert boxes
    assert boxes == expected(folder, image)
    assert detect(image, "a dog", str(folder), 0.999999, CPU) == []


def test_missing_weights_are_one_clear_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"The detector .* lacks weights"):
        detect(image, "a dog", str(tmp_path), 0.3, CPU)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be loaded as a GroundingDINO"):
        detect(image, "a dog", str(tmp_path), 0.3, CPU)


def test_boxes_become_whole_pixels():
    boxes = np.array([[-3.2, 0.4, 2.1, 5.0], [9.0, 1.0, 12.0, 2.0], [1.0, 1.0, 99.0, 99.0]])
    assert whole_pixels(boxes, 6, 8) == [[0, 0, 3, 5], [1, 1, 8, 6]]
