"""The scan with the published noise against a plain loop of the published scan."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_arrays, write_arrays
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.scan import scan, scan_noise
from forgetrace.datasets.prepare import prepare
from forgetrace.diffusion.base import train_base
from forgetrace.diffusion.release_noise import ReleaseNoise, device_kind
from forgetrace.encoding.encode import encode
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from .conftest import imported
from .published import CAPTIONS, IMAGES, SHAPE, captions_of, states_of, unet

CPU = "cpu"
TIMESTEPS = 4
ROWS = 2 * IMAGES


@pytest.fixture
def layout(abu) -> Layout:
    layout = imported(abu, scan={"timesteps": TIMESTEPS, "batch_size": 500})
    prepare(layout.config.prepare, layout.data)
    encode(layout)
    train_base(layout, CPU)
    return layout


@torch.no_grad()
def plain_losses(latents: np.ndarray) -> np.ndarray:
    """Losses (2N, captions, timesteps), as they are published to have been computed."""
    model, timesteps = unet().eval(), torch.arange(TIMESTEPS) * 1000 // TIMESTEPS
    kept = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)  # of the signal's variance
    losses = torch.empty(ROWS, CAPTIONS, TIMESTEPS)
    for b, start in enumerate(range(0, ROWS, 80)):
        images = range(start, min(start + 80, ROWS))
        stream = torch.Generator().manual_seed(b)
        noise = torch.randn((len(images) * CAPTIONS * TIMESTEPS, *SHAPE), generator=stream)
        position = 0
        for image in images:
            for number, caption in enumerate(captions_of(image % IMAGES)[:CAPTIONS]):
                state = torch.from_numpy(states_of(caption).astype(np.float16).astype(np.float32))[None]
                for i, timestep in enumerate(timesteps):
                    epsilon = noise[position]
                    noisy = kept[timestep].sqrt() * torch.from_numpy(latents[image])
                    noisy = noisy + (1 - kept[timestep]).sqrt() * epsilon
                    predicted = model(noisy[None], timestep, state).sample[0]
                    losses[image, number, i] = (predicted - epsilon).square().mean()
                    position += 1
    return losses.numpy()


def test_the_scan_is_the_published_loop_whatever_its_batches_and_shards(layout):
    latents = np.load("mscoco/coco17_train_latents.npy")
    expected = plain_losses(latents).mean(axis=1)
    scan(layout, device=CPU)
    found = read_arrays(layout.base_scan)
    np.testing.assert_allclose(found["losses"], expected, atol=1e-5, rtol=0)
    assert found["timesteps"].tolist() == [0, 250, 500, 750]
    assert found["drawn_on"].tolist() == [CPU]
    settings = layout.config.scan.model_copy(update={"shards": 3, "batch_size": 30})
    sharded = replace(layout, config=layout.config.model_copy(update={"scan": settings}))
    for shard in (2, 0, 1):
        scan(sharded, shard=shard, device=CPU)
    part = layout.scan_shard(layout.base_scan, 1)
    scan(sharded, device=CPU)
    np.testing.assert_allclose(read_arrays(layout.base_scan)["losses"], expected, atol=1e-5, rtol=0)
    assert read_arrays(layout.base_scan)["drawn_on"].tolist() == [CPU]
    # A part that was scanned on a GPU has other noise.
    write_arrays(part, read_arrays(part) | {"drawn_on": np.array(["cuda"])}, {})
    with pytest.raises(UserError, match=r"scanned on cpu and cuda, whose generators draw other noise with scan.noise"):
        scan(sharded, device=CPU)


def test_scans_with_noise_of_different_devices_are_not_compared(layout):
    losses = np.zeros((ROWS, TIMESTEPS), dtype=np.float32)
    arrays = {"losses": losses, "timesteps": np.arange(TIMESTEPS)}
    query = "sample-000"
    write_arrays(layout.scan("unlearn", query), arrays | {"drawn_on": np.array(["cuda"])}, {})
    for other in ({"drawn_on": np.array(["cpu"])}, {}):
        write_arrays(layout.base_scan, arrays | other, {})
        with pytest.raises(UserError, match=r"have noise that was drawn on different kinds of devices"):
            attributor(layout, "unlearn").scores(query)
    write_arrays(layout.base_scan, arrays | {"drawn_on": np.array(["cuda"])}, {})
    assert attributor(layout, "unlearn").scores(query).tolist() == [0] * IMAGES


def test_noise_is_that_of_the_published_batch_whatever_is_asked_for():
    timesteps = np.arange(20) * 50
    bank = ReleaseNoise(timesteps, (2, 3, 3), 250, 5, torch.device(CPU))
    whole = []
    for batch, images in enumerate((80, 80, 80, 10)):
        stream = torch.Generator().manual_seed(batch)
        whole.append(torch.randn((images * 5 * 20, 2, 3, 3), generator=stream))
    expected = torch.cat(whole).unflatten(0, (250, 5, 20))
    rows = np.array([249, 0, 79, 80, 81, 159, 160, 240, 3])
    draws = np.stack([np.random.default_rng(row).permutation(20)[:7] for row in rows])
    for number in (4, 0):
        found = bank.of(rows, draws, number).unflatten(0, draws.shape)
        for i, row in enumerate(rows):
            assert torch.equal(found[i], expected[row, number][torch.from_numpy(draws[i])])
    bank.of(rows[:1], draws[:1], 0)
    assert len(bank._drawn) == 1  # what is not asked for is not kept


def test_gpus_of_other_sizes_draw_other_noise(monkeypatch):
    found = SimpleNamespace(multi_processor_count=108, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert device_kind(torch.device("cuda", 1)) == "cuda-108x2048"
    assert device_kind(torch.device(CPU)) == CPU


def test_images_with_different_numbers_of_captions_have_no_such_noise(layout):
    encoded = load_encoded(layout)
    starts = np.concatenate([encoded.starts[:-1], [encoded.starts[-1] - 1]])
    from forgetrace.diffusion.model import load_scheduler

    with pytest.raises(UserError, match=r"these have 4 to 5: choose per-image or shared"):
        scan_noise(layout, replace(encoded, starts=starts), load_scheduler(layout))
