import numpy as np
import pytest
import torch

from forgetrace.diffusion import activations
from forgetrace.diffusion.activations import channel_statistics, middle_up_block, moments
from forgetrace.diffusion.inference import for_inference
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.encoding.store import load_encoded


def test_moments_by_hand():
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [2.0, 2.0]]]])
    torch.testing.assert_close(moments(maps), torch.tensor([[4.0, 2.0, 5**0.5, 0.0]]))


@pytest.fixture
def parts(tiny):
    encoded = load_encoded(tiny)
    bank = NoiseBank(5, "unet-features", np.full(3, 2), tuple(encoded.latents.shape[1:]))
    latents = torch.from_numpy(encoded.latents)[:9]
    return load_unet(tiny, torch.device("cpu")), load_scheduler(tiny), latents, encoded.captions[-1], bank


@pytest.mark.parametrize("block", [0, 1])
@torch.no_grad()
def test_statistics_are_those_of_a_plain_loop(parts, block):
    unet, scheduler, latents, caption, bank = parts
    seen = []
    handle = unet.up_blocks[block].register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = []
    for latent in latents:
        for draw in range(3):
            noise, t = torch.from_numpy(bank.noise("", draw))[None], torch.tensor([2])
            unet(scheduler.add_noise(latent[None], noise, t), t, encoder_hidden_states=caption[None])
        mean = sum(seen) / 3
        seen.clear()
        channels = mean[0].reshape(mean.shape[1], -1).numpy()
        expected.append(np.concatenate([channels.mean(axis=1), channels.std(axis=1)]))
    handle.remove()
    found = channel_statistics(for_inference(unet), scheduler, latents, caption, bank, block)
    assert found.shape == (9, 2 * (16, 8)[block])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_the_batch_changes_nothing_and_the_hook_is_gone(parts, monkeypatch):
    unet, scheduler, latents, caption, bank = parts
    for_inference(unet)
    whole = channel_statistics(unet, scheduler, latents, caption, bank, 0)
    monkeypatch.setattr(activations, "BATCH", 8)  # two images with three noises
    np.testing.assert_allclose(channel_statistics(unet, scheduler, latents, caption, bank, 0), whole, atol=1e-5)
    np.testing.assert_allclose(
        channel_statistics(unet, scheduler, latents[4:5], caption, bank, 0)[0], whole[4], atol=1e-5
    )
    assert not unet.up_blocks[0]._forward_hooks


def test_the_block_is_the_papers_for_four_and_the_first_for_two(parts):
    unet = parts[0]
    assert middle_up_block(unet) == 0
    unet.up_blocks = torch.nn.ModuleList([torch.nn.Identity() for _ in range(4)])
    assert middle_up_block(unet) == 1
