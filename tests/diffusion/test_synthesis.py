import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forgetrace.artifacts import UserError, read_array, read_arrays, read_image, read_json, write_image
from forgetrace.datasets.decoding import squared
from forgetrace.diffusion.model import load_unet
from forgetrace.diffusion.synthesis import regenerate, synthesize
from forgetrace.encoding.latents import to_latents, to_pixels

from ..conftest import HELD_OUT, fake_token_states, settings

CPU = torch.device("cpu")


def test_a_query_is_regenerated_from_what_is_kept(tiny):
    files = tiny.query("report-01")
    arrays, record = read_arrays(files["tensors"]), read_json(files["record"])
    assert record["prompt"] == HELD_OUT["report"][1]
    assert (record["query"], record["source"], record["sampler_steps"]) == ("report-01", "pool", 3)
    np.testing.assert_array_equal(arrays["prompt"], fake_token_states([record["prompt"]])[0])
    latent = regenerate(tiny, load_unet(tiny, CPU), arrays["initial_noise"], arrays["prompt"])
    np.testing.assert_array_equal(latent, arrays["latent"])
    np.testing.assert_array_equal(read_image(files["image"]), to_pixels(latent[None], 2)[0])
    assert np.abs(latent).max() <= 1


def test_queries_do_not_depend_on_which_are_made_before(tiny):
    before = {query: read_arrays(tiny.query(query)["tensors"]) for query in ("report-00", "report-01")}
    assert not np.array_equal(before["report-00"]["initial_noise"], before["report-01"]["initial_noise"])
    for query in ("report-01", "report-00"):
        Path(tiny.query(query)["record"]).unlink()
        synthesize(tiny, query, "cpu")
        for name, array in read_arrays(tiny.query(query)["tensors"]).items():
            np.testing.assert_array_equal(array, before[query][name])


def test_a_users_image_is_resized_and_has_no_initial_noise(tiny):
    files = tiny.query("mine")
    arrays, record = read_arrays(files["tensors"]), read_json(files["record"])
    assert "initial_noise" not in arrays
    assert (record["source"], record["file"], record["prompt"]) == ("file", "mine.png", "my own")
    resized = Image.open("mine.png").resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(read_image(files["image"]), np.asarray(resized))
    np.testing.assert_array_equal(arrays["latent"], to_latents(np.asarray(resized)[None], 2)[0])


def test_a_users_image_of_the_right_size_is_taken_as_it_is(tiny):
    pixels = np.random.default_rng(2).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
    write_image("mine.png", pixels)
    synthesize(tiny, "mine", "cpu")
    np.testing.assert_array_equal(read_image(tiny.query("mine")["image"]), pixels)


def test_a_users_image_is_on_white_and_upright_whatever_the_data(tiny):
    pixels = np.random.default_rng(2).integers(0, 256, size=(16, 16, 4), dtype=np.uint8)
    pixels[..., 3], pixels[:4, ..., 3] = 255, 0
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save("mine.png", exif=exif)
    synthesize(tiny, "mine", "cpu")
    expected = pixels[..., :3].copy()
    expected[:4] = 255
    np.testing.assert_array_equal(read_image(tiny.query("mine")["image"]), np.rot90(expected, -1))


def test_beside_own_data_a_users_image_is_read_as_they_are(tiny):
    """A training image given as a query is that training image: upright, cropped, not squeezed."""
    pixels = np.random.default_rng(2).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save("mine.png", exif=exif)
    prepare = {"dataset": "folder", "path": ".", "size": 16}
    synthesize(replace(tiny, config=settings(prepare=prepare)), "mine", "cpu")
    upright = squared(Image.fromarray(np.rot90(pixels, -1)), 16)
    np.testing.assert_array_equal(read_arrays(tiny.query("mine")["tensors"])["latent"], to_latents(upright[None], 2)[0])
    Image.fromarray(pixels).save("mine.png")
    Path("mine.png").write_text("no image")
    with pytest.raises(UserError, match=r"mine.png is missing or no image that can be read: put the picture"):
        synthesize(replace(tiny, config=settings(prepare=prepare)), "mine", "cpu")


@pytest.mark.parametrize("content", [None, b"", b"no image", "cut short"])
def test_an_unreadable_user_image_is_one_sentence(tiny, content, tmp_path):
    if content == "cut short":
        content = (tmp_path / "mine.png").read_bytes()[:700]
    (tmp_path / "mine.png").unlink()
    if content is not None:
        (tmp_path / "mine.png").write_bytes(content)
    with pytest.raises(UserError, match=r"^mine.png is .* under synthesize.queries\.$") as caught:
        synthesize(tiny, "mine", "cpu")
    assert "delete" not in str(caught.value)  # nothing rebuilds a user's file


def test_guidance_uses_the_empty_caption(tiny):
    arrays = read_arrays(tiny.query("report-00")["tensors"])
    empty = np.array(read_array(tiny.captions)[-1])
    np.testing.assert_array_equal(empty, fake_token_states([""])[0])
    guided = tiny.config.synthesize.model_copy(update={"guidance": 0.0})
    layout = type(tiny)("tiny", tiny.config.model_copy(update={"synthesize": guided}))
    unet = load_unet(tiny, CPU)
    free = regenerate(layout, unet, arrays["initial_noise"], arrays["prompt"])
    np.testing.assert_allclose(free, regenerate(tiny, unet, arrays["initial_noise"], empty), atol=1e-5)


def test_the_record_says_what_made_the_query(tiny):
    made_by = read_json(tiny.query("report-00")["record"])["made_by"]
    assert made_by["config"]["seed"] == 5
    assert made_by["inputs"].keys() == {"weights"}
    with np.load(tiny.query("report-00")["tensors"]) as content:
        assert json.loads(str(content["provenance"])) == made_by
