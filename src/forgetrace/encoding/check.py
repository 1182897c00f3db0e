"""What of a config only the images and captions can tell to be impossible; checked before any job.

Nothing here imports torch: Snakemake asks while it reads the rules.
"""

import numpy as np

from forgetrace.artifacts import UserError, read_json
from forgetrace.datasets.concepts import check_concepts, check_learnable
from forgetrace.datasets.prepare import TRAIN, count_trained, examples_of, image_shape, split_captions
from forgetrace.encoding.codec import codec_of
from forgetrace.encoding.given import check_given
from forgetrace.layout import Layout


def check_data(layout: Layout) -> None:
    """Check that images fit the encoder or what is given, and that held-out captions and every K leave some images.

    Raises:
        UserError: they do not; the message names the key.
    """
    config = layout.config
    shape, images = _shape_and_count(layout)
    if config.customize:
        check_concepts(config.customize, config.seed, shape)
        if config.learn:
            check_learnable(config.customize, config.seed, config.learn.kinds)
    check_given(config, images)
    if not (config.encode.pipeline or config.encode.given):  # what an autoencoder takes is known with its weights
        codec_of(config.encode).encode(np.zeros((1, *shape), dtype=np.uint8))
    images = min(images, config.encode.max_images or images)
    for key in ("k", "pooled_k") if config.leaves_out else ():
        if too_large := [k for k in getattr(config.retrain, key) if k >= images]:
            raise UserError(f"retrain.{key}: {too_large[0]} images cannot be left out of {images}; choose a smaller K.")
    if config.scan.narrowing and (top := max(config.scan.narrowing.tops)) >= images:
        raise UserError(f"scan.narrowing.tops: there is no top {top} of {images} images; choose smaller ones.")


def _shape_and_count(layout: Layout) -> tuple[list[int], int]:
    """Shape of an image and number of images that may be trained on."""
    try:
        manifest = read_json(layout.data_manifest)
        return manifest["image_shape"], manifest["counts"][TRAIN]
    except (UserError, KeyError):
        pass  # not prepared yet, or to be made again: the source tells in seconds
    settings = layout.config.prepare
    examples = examples_of(settings)
    held_out = [caption for pool in split_captions(examples, settings).values() for caption in pool]
    return image_shape(settings, examples), count_trained(examples, held_out)
