import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from forgetrace.artifacts import read_arrays, read_json, write_array
from forgetrace.attribution import scan as module
from forgetrace.attribution.scan import scan, scan_losses, scan_noise, shard_rows
from forgetrace.config import Scan
from forgetrace.diffusion.inference import for_inference
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from ..conftest import IMAGES, in_child, settings

TIMESTEPS = 4
SOME = [0, 7, 13, 22, 39]


def fast_unet(layout: Layout) -> UNet2DConditionModel:
    return for_inference(load_unet(layout, torch.device("cpu")))


def scanned(
    layout: Layout, batch_size: int = 64, shards: int = 1, threads: int = 1, noise: str = "shared"
) -> np.ndarray:
    layout = replace(layout, config=settings(scan={"noise": noise}))
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    losses = np.full((len(encoded), TIMESTEPS), np.nan, dtype=np.float32)
    torch.set_num_threads(threads)
    for shard in np.array_split(np.arange(len(encoded)), shards):
        bank = scan_noise(layout, encoded, scheduler)
        scan_losses(fast_unet(layout), scheduler, encoded, bank, losses, batch_size, shard)
    return losses


def by_hand(layout: Layout, noise: str) -> np.ndarray:
    """Some of the images, one image and one timestep at a time."""
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    unet = load_unet(layout, torch.device("cpu"))
    timesteps = np.array([0, 25, 50, 75])
    bank = NoiseBank(5, "scan", timesteps, (12, 8, 8), shared=noise == "shared")
    losses = np.empty((len(SOME), TIMESTEPS))
    for row, i in enumerate(SOME):
        for j, timestep in enumerate(timesteps):
            epsilon = torch.from_numpy(bank.noise(encoded.image_ids[i], j))[None]
            latent = torch.from_numpy(np.array(encoded.latents[i]))[None]
            caption = encoded.captions[encoded.caption_rows[i]][None]
            with torch.no_grad():
                loss = example_losses(unet, scheduler, latent, caption, torch.tensor([timestep]), epsilon)
            losses[row, j] = loss.item()
    return losses


@pytest.mark.parametrize("noise", ["shared", "per-image"])
def test_the_scan_is_the_plain_loop_whatever_the_batches_shards_and_threads(tiny, noise):
    expected = by_hand(tiny, noise)
    ways = {
        "one batch": {"batch_size": IMAGES * TIMESTEPS},
        "batches of 7 images": {"batch_size": 7 * TIMESTEPS},
        "3 shards": {"shards": 3},
        "2 threads": {"threads": 2, "batch_size": IMAGES * TIMESTEPS},
    }
    if noise == "shared":
        ways["batches smaller than an image's timesteps"] = {"batch_size": 3}
    first = None
    for way, options in ways.items():
        losses = scanned(tiny, noise=noise, **options)
        np.testing.assert_allclose(losses[SOME], expected, rtol=1e-6, err_msg=way)
        first = losses if first is None else first
        np.testing.assert_allclose(losses, first, rtol=1e-6, err_msg=way)


def test_the_stage_writes_these_losses_and_removes_what_it_needed(tiny):
    result = read_arrays(tiny.base_scan)
    np.testing.assert_array_equal(result["losses"], scanned(tiny))
    assert result["losses"].dtype == np.float32
    assert result["timesteps"].tolist() == [0, 25, 50, 75]
    assert list(Path(tiny.checkpoints("scan")).iterdir()) == []


def test_unlearned_weights_are_scanned_with_the_same_noise(tiny):
    before, after = read_arrays(tiny.base_scan), read_arrays(tiny.scan("unlearn", "report-00"))
    assert not np.array_equal(before["losses"], after["losses"])
    os.replace(tiny.weights, tiny.unlearned("unlearn", "report-00")["weights"])
    os.link(tiny.unlearned("unlearn", "report-00")["weights"], tiny.weights)
    scan(tiny, "unlearn", "report-00", "cpu")
    np.testing.assert_array_equal(read_arrays(tiny.scan("unlearn", "report-00"))["losses"], before["losses"])


def test_one_noise_per_timestep_serves_all_images(tiny, monkeypatch):
    seen = []

    def spy(unet, scheduler, latents, captions, timesteps, noise):
        seen.append(noise.reshape(-1, TIMESTEPS, 12, 8, 8).numpy())
        return torch.zeros(len(timesteps))

    monkeypatch.setattr(module, "example_losses", spy)
    scanned(tiny)
    noise = np.concatenate(seen)
    assert len(noise) == IMAGES
    assert (noise == noise[0]).all()
    assert not np.array_equal(noise[0, 0], noise[0, 1])


def interrupt_after(monkeypatch, blocks: int, how) -> list[int]:
    """Let some blocks pass, then interrupt; the returned list fills with the images of each block."""
    losses, sizes = module.example_losses, []

    def interrupted(unet, scheduler, latents, *rest):
        if len(sizes) == blocks:
            how()
        sizes.append(len(latents) // TIMESTEPS)
        return losses(unet, scheduler, latents, *rest)

    monkeypatch.setattr(module, "example_losses", interrupted)
    return sizes


def test_a_killed_scan_continues_with_the_missing_images(tiny, monkeypatch):
    finished = read_arrays(tiny.base_scan)["losses"]
    Path(tiny.base_scan).unlink()

    def killed():
        interrupt_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        scan(tiny, device="cpu")

    assert in_child(killed) == signal.SIGKILL
    assert not Path(tiny.base_scan).exists()
    sizes = interrupt_after(monkeypatch, -1, None)
    scan(tiny, device="cpu")
    assert sizes == [8]  # 40 images in blocks of 16, two of them done
    np.testing.assert_array_equal(read_arrays(tiny.base_scan)["losses"], finished)


def test_a_scan_killed_at_its_start_leaves_nothing_that_looks_scanned(tiny, monkeypatch):
    finished = read_arrays(tiny.base_scan)["losses"]

    def killed():
        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        scan(tiny, device="cpu")

    assert in_child(killed) == signal.SIGKILL
    scan(tiny, device="cpu")
    np.testing.assert_array_equal(read_arrays(tiny.base_scan)["losses"], finished)


def test_only_rows_with_a_gap_are_scanned_again(tiny, monkeypatch):
    encoded, scheduler = load_encoded(tiny), load_scheduler(tiny)
    losses = read_arrays(tiny.base_scan)["losses"]
    finished = losses.copy()
    losses[[3, 17]], losses[29, 2] = np.nan, np.nan
    sizes = interrupt_after(monkeypatch, -1, None)
    scan_losses(fast_unet(tiny), scheduler, encoded, scan_noise(tiny, encoded, scheduler), losses, 64)
    assert sizes == [3]
    np.testing.assert_allclose(losses, finished, rtol=1e-6)


def test_another_scans_leftovers_are_not_continued(tiny, monkeypatch):
    """What is left of a scan of other weights has another name."""
    names = []
    monkeypatch.setattr(module, "resumable", lambda path, shape: names.append(path) or np.zeros(shape, np.float32))
    for variant, query in ((None, None), ("unlearn", "report-00"), ("unlearn", "mine")):
        with pytest.raises(FileNotFoundError):  # there is no file to remove at the end
            scan(tiny, variant, query, "cpu")
    with pytest.raises(FileNotFoundError):
        scan(replace(tiny, config=settings(scan={"noise": "per-image"})), device="cpu")
    assert len(set(names)) == 4


def test_a_leftover_of_another_shape_or_damaged_is_started_afresh(tiny, monkeypatch):
    finished = read_arrays(tiny.base_scan)["losses"]
    paths = []
    original = module.resumable
    monkeypatch.setattr(module, "resumable", lambda path, shape: paths.append(path) or original(path, shape))
    for damage in (b"", b"\x93NUMPY\x01", "shape"):
        if paths:
            if damage == "shape":
                write_array(paths[0], np.zeros((2, 2), np.float32))
            else:
                paths[0].write_bytes(damage)
        scan(tiny, device="cpu")
        np.testing.assert_array_equal(read_arrays(tiny.base_scan)["losses"], finished)


SHARDED = {"shards": 3, "batch_size": 16}  # ten batches of four images


def sharded(layout: Layout, **scan_settings) -> Layout:
    return replace(layout, config=settings(scan=SHARDED | scan_settings))


@pytest.mark.parametrize("model", [(None, None), ("unlearn", "report-00")])
@pytest.mark.parametrize("batch_size", [16, 3])
def test_shards_make_the_very_file_of_the_undivided_scan(tiny, monkeypatch, model, batch_size):
    layout = sharded(tiny, batch_size=batch_size)
    output = Path(layout.scan(*model) if model[0] else layout.base_scan)
    scan(replace(tiny, config=settings(scan={"batch_size": batch_size})), *model, "cpu")
    undivided = output.read_bytes()
    output.unlink()
    for shard in (2, 0, 1):
        scan(layout, *model, "cpu", shard)
        assert not output.exists()
    sizes = interrupt_after(monkeypatch, -1, None)
    scan(layout, *model, "cpu")
    assert sizes == [], "the shards had scanned it all"
    assert output.read_bytes() == undivided


@pytest.mark.parametrize("images", [1, 7, 40, 41])
@pytest.mark.parametrize("shards", [1, 2, 3, 12])
def test_shards_are_whole_batches_and_hold_every_image_once(images, shards):
    options = Scan(shards=shards, batch_size=16)
    parts = [shard_rows(images, TIMESTEPS, options, shard) for shard in range(shards)]
    assert np.concatenate(parts).tolist() == list(range(images))
    assert all(part[0] % 4 == 0 for part in parts if len(part))
    sizes = sorted(len(part) for part in parts)
    assert sizes[-1] - sizes[0] <= 2 * 4


def test_a_killed_shard_continues_with_its_missing_images(tiny, monkeypatch):
    layout = sharded(tiny)

    def killed():
        interrupt_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        scan(layout, device="cpu", shard=1)

    assert in_child(killed) == signal.SIGKILL
    sizes = interrupt_after(monkeypatch, -1, None)
    scan(layout, device="cpu", shard=1)
    assert sizes == [4] * (len(shard_rows(IMAGES, TIMESTEPS, layout.config.scan, 1)) // 4 - 2)
    assert [path.name for path in Path(layout.checkpoints("scan")).iterdir()] == ["base"]


def test_what_shards_lack_or_scanned_with_other_weights_is_scanned_again(tiny, monkeypatch):
    layout = sharded(tiny)
    for shard in range(3):
        scan(layout, "unlearn", "report-00", "cpu", shard)
    expected = read_arrays(tiny.scan("unlearn", "mine"))["losses"]
    ours, others = (Path(layout.scan_shard(layout.scan("unlearn", query), 0)) for query in ("mine", "report-00"))
    scan(layout, "unlearn", "mine", "cpu", 2)
    os.replace(others, ours)  # of other weights
    sizes = interrupt_after(monkeypatch, -1, None)
    scan(layout, "unlearn", "mine", "cpu")
    assert sum(sizes) == IMAGES - len(shard_rows(IMAGES, TIMESTEPS, layout.config.scan, 2))
    np.testing.assert_allclose(read_arrays(tiny.scan("unlearn", "mine"))["losses"], expected, rtol=1e-6)


def test_the_scan_records_what_made_it(tiny):
    import json

    with np.load(tiny.scan("unlearn", "report-00")) as content:
        made_by = json.loads(str(content["provenance"]))
    assert made_by["inputs"].keys() == {"base", "weights"}
    assert made_by["config"]["scan"]["timesteps"] == TIMESTEPS
    assert read_json(tiny.unlearned("unlearn", "report-00")["losses"])["made_by"]["inputs"].keys() == {
        "weights",
        "query",
    }
