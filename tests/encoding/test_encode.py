import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_array, read_image, read_json, read_table, write_image, write_json
from forgetrace.encoding import encode as module
from forgetrace.encoding.encode import encode
from forgetrace.encoding.latents import to_latents
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from ..conftest import CAPTIONS, IMAGES, fake_token_states, settings

FILES = ("latents", "captions", "index")


def test_the_encoded_set_is_the_training_images_in_order(tiny):
    encoded = load_encoded(tiny)
    assert encoded.image_ids == [f"tiny-{i:02d}" for i in range(IMAGES)]
    assert len(encoded) == IMAGES
    for row in (0, 17, IMAGES - 1):
        pixels = read_image(f"{tiny.data}/images/tiny-{row:02d}.png")
        np.testing.assert_array_equal(encoded.latents[row], to_latents(pixels[None], 2)[0])
        states = fake_token_states([f"caption {row % CAPTIONS}"])[0]
        np.testing.assert_array_equal(encoded.captions[encoded.caption_rows[row]], states)


def test_latents_stay_on_disk(tiny):
    encoded = load_encoded(tiny)
    assert isinstance(encoded.latents, np.memmap)
    batch = encoded.batch(np.array([3, 1, 3]))
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch, encoded.latents[[3, 1, 3]])


def test_the_last_caption_is_the_empty_one(tiny):
    encoded = load_encoded(tiny)
    assert encoded.empty_row == CAPTIONS
    np.testing.assert_array_equal(encoded.captions[encoded.empty_row], fake_token_states([""])[0])
    assert (encoded.caption_rows < CAPTIONS).all()


def test_held_out_images_are_not_encoded(tiny):
    metadata = Path(tiny.metadata)
    lines = metadata.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace('"split": "train"', '"split": "report"')
    metadata.write_text("".join(lines))
    encode(tiny)
    assert "tiny-04" not in load_encoded(tiny).image_ids
    assert len(load_encoded(tiny)) == IMAGES - 1


def test_a_subset_is_drawn_with_the_seed_and_keeps_the_order(tiny):
    def subset(seed: int) -> list[str]:
        sections = settings(encode={"max_images": 15}).model_copy(update={"seed": seed})
        layout = replace(tiny, config=sections)
        encode(layout)
        return load_encoded(layout).image_ids

    first = subset(5)
    assert len(first) == 15
    assert first == sorted(first)
    assert subset(5) == first
    assert subset(6) != first
    encode(replace(tiny, config=settings(encode={"max_images": 41})))
    assert len(load_encoded(tiny)) == IMAGES


def test_the_manifest_describes_the_files_and_its_source_is_machine_independent(tiny, tmp_path):
    manifest = read_json(tiny.encode_manifest)
    assert manifest["images"] == IMAGES
    assert manifest["latent_shape"] == [12, 8, 8]
    assert manifest["caption_shape"] == [5, 16]
    assert manifest["image_shape"] == [16, 16, 3]
    encode(tiny)
    assert read_json(tiny.encode_manifest) == manifest
    assert read_table(tiny.index).attrs["provenance"] == manifest["made_by"]
    other = Layout("tiny", tiny.config.model_copy(update={"seed": 6}))
    encode(other)
    assert read_json(tiny.encode_manifest)["source"] != manifest["source"]


@pytest.mark.parametrize("role", FILES)
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_a_damaged_file_is_noticed_before_it_is_used(tiny, role, damage):
    path = Path(getattr(tiny, role))
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-100])
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{path} is missing or not what the encode stage wrote: delete \S+manifest"):
        load_encoded(tiny)


def test_a_manifest_of_something_else_is_noticed(tiny):
    write_json(tiny.encode_manifest, {"images": 3})
    with pytest.raises(UserError, match="is missing or not what the encode stage wrote"):
        load_encoded(tiny)


def test_the_way_out_works(tiny):
    before = read_array(tiny.latents)
    Path(tiny.latents).write_bytes(b"")
    encode(tiny)
    np.testing.assert_array_equal(load_encoded(tiny).latents, before)


def test_a_truncated_image_names_itself(tiny):
    path = Path(f"{tiny.data}/images/tiny-23.png")
    path.write_bytes(path.read_bytes()[:500])
    manifest = Path(tiny.encode_manifest).read_bytes()
    with pytest.raises(UserError, match=f"^{path} is missing or damaged: delete {tiny.data}/manifest.json"):
        encode(tiny)
    assert Path(tiny.encode_manifest).read_bytes() == manifest
    assert len(load_encoded(tiny)) == IMAGES  # what was computed before is intact


def test_missing_and_misshapen_images_name_themselves(tiny):
    path = Path(f"{tiny.data}/images/tiny-23.png")
    write_image(path, np.zeros((16, 18, 3), np.uint8))
    with pytest.raises(UserError, match=rf"^{path} has shape \(16, 18, 3\), the dataset has \(16, 16, 3\)"):
        encode(tiny)
    path.unlink()
    with pytest.raises(UserError, match=f"^{path} is missing"):
        encode(tiny)


def test_images_are_read_and_written_a_few_at_a_time(tiny, monkeypatch):
    alive, most, real = {}, [], module.TrainingImages.__call__

    def watched(self, name: str) -> np.ndarray:
        pixels = real(self, name)
        alive[id(pixels)] = name
        weakref.finalize(pixels, alive.pop, id(pixels))
        most.append(len(alive))
        return pixels

    monkeypatch.setattr(module.TrainingImages, "__call__", watched)
    monkeypatch.setattr(module, "AT_ONCE", 7)
    before = Path(tiny.latents).read_bytes()
    encode(tiny)
    assert len(most) == IMAGES
    assert max(most) == 7
    assert Path(tiny.latents).read_bytes() == before


def test_of_several_captions_the_first_is_encoded(tiny):
    metadata = Path(tiny.metadata)
    lines = metadata.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace('"caption 4"', '["another caption", "caption 4"]')
    metadata.write_text("".join(lines))
    encode(tiny)
    assert read_table(tiny.index)["caption"].tolist()[4] == "another caption"
