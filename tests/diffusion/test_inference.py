import numpy as np
import pytest
import torch
from diffusers.models.activations import GEGLU

from forgetrace.diffusion.inference import DirectLinear, SplitGEGLU, for_inference
from forgetrace.diffusion.model import load_unet

CPU = torch.device("cpu")


def examples(captions: int, each: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    count = captions * each
    latents = torch.randn(count, 12, 8, 8, generator=random)
    timesteps = torch.randint(100, (count,), generator=random)
    return latents, timesteps, torch.randn(captions, 9, 16, generator=random)


@pytest.mark.parametrize(("captions", "each"), [(1, 1), (7, 1), (1, 7), (3, 5)])
def test_the_exchanged_model_is_the_same_function(tiny, captions, each):
    latents, timesteps, states = examples(captions, each)
    plain, fast = load_unet(tiny, CPU), for_inference(load_unet(tiny, CPU))
    with torch.no_grad():
        expected = plain(latents, timesteps, states.repeat_interleave(each, dim=0)).sample
        found = fast(latents, timesteps, states).sample
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_layer_was_exchanged_and_weights_keep_their_names(tiny):
    plain, fast = load_unet(tiny, CPU), for_inference(load_unet(tiny, CPU))
    assert plain.state_dict().keys() == fast.state_dict().keys()
    kept = [name for name, module in fast.named_modules() if type(module) in (GEGLU, torch.nn.Linear)]
    assert all(name.endswith("ff.net.0.proj") for name in kept)  # what the split GEGLU multiplies with
    assert {DirectLinear, SplitGEGLU} <= {type(module) for module in fast.modules()}


def test_exchanging_twice_changes_nothing(tiny):
    latents, timesteps, states = examples(2, 3)
    once = for_inference(load_unet(tiny, CPU))
    with torch.no_grad():
        expected = once(latents, timesteps, states).sample
        found = for_inference(once)(latents, timesteps, states).sample
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4)])
def test_a_direct_linear_layer_is_a_linear_layer(bias, shape):
    linear, inputs = torch.nn.Linear(4, 6, bias=bias), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(DirectLinear(linear)(inputs), linear(inputs))


def test_a_split_geglu_is_a_geglu_and_leaves_its_inputs_alone():
    whole, inputs = GEGLU(4, 6), torch.randn(2, 3, 4)
    before = inputs.clone()
    with torch.no_grad():
        torch.testing.assert_close(SplitGEGLU(whole.proj)(inputs), whole(inputs))
    assert torch.equal(inputs, before)
