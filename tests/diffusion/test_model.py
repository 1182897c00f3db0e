import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_tensors, write_tensors
from forgetrace.diffusion.device import native_bf16, pick_device, resolve_precision
from forgetrace.diffusion.model import build_scheduler, build_unet, load_scheduler, load_unet, load_weights

from ..conftest import settings

CPU = torch.device("cpu")


def unet_of(seed: int = 0, **recipe):
    return build_unet(settings(train=recipe).train, (12, 8, 8), 16, seed)


def test_equal_seeds_give_equal_weights_and_leave_the_global_stream_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second, other = unet_of(3), unet_of(3), unet_of(4)
    assert torch.equal(torch.rand(3), expected)
    weights = [torch.cat([weight.flatten() for weight in unet.parameters()]) for unet in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_cross_attention_is_where_the_recipe_says():
    names = [name for name, _ in unet_of(cross_attention=[True, False]).named_parameters()]
    attending = {name.split(".attn2")[0].split(".attentions")[0] for name in names if "attn2" in name}
    assert attending == {"down_blocks.0", "mid_block", "up_blocks.1"}


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [("squaredcos_cap_v2", "v_prediction"), ("linear", "epsilon"), ("scaled_linear", "epsilon")],
)
def test_the_scheduler_follows_the_recipe(schedule, prediction):
    scheduler = build_scheduler(settings(train={"schedule": schedule, "prediction": prediction}).train)
    assert scheduler.config.num_train_timesteps == 100
    assert scheduler.config.prediction_type == prediction
    assert scheduler.config.beta_schedule == schedule
    assert not scheduler.config.clip_sample


def test_a_loaded_model_is_frozen_and_complete(tiny):
    unet = load_unet(tiny, CPU)
    saved = read_tensors(tiny.weights)
    assert not unet.training
    assert not any(weight.requires_grad for weight in unet.parameters())
    assert all(torch.equal(weight, saved[name]) for name, weight in unet.state_dict().items())
    assert load_scheduler(tiny).config.num_train_timesteps == 100


def test_some_weights_are_laid_over_the_rest(tiny):
    name = next(name for name in read_tensors(tiny.weights) if ".attn2.to_k." in name)
    write_tensors("some.safetensors", {name: torch.ones_like(read_tensors(tiny.weights)[name])}, {})
    base = load_unet(tiny, CPU).state_dict()
    changed = load_unet(tiny, CPU, changed="some.safetensors").state_dict()
    assert [key for key in base if not torch.equal(base[key], changed[key])] == [name]


def test_other_weights_than_the_base_models_must_be_complete(tiny):
    """Those of a shared retraining: missing ones would silently be θ0's."""
    weights = {name: weight + 1 for name, weight in read_tensors(tiny.weights).items()}
    write_tensors("all.safetensors", weights, {})
    loaded = load_unet(tiny, CPU, "all.safetensors").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    weights.popitem()
    write_tensors("all.safetensors", weights, {})
    with pytest.raises(UserError, match=r"^all.safetensors belongs to another architecture .* 1 are missing"):
        load_unet(tiny, CPU, "all.safetensors")


@pytest.mark.parametrize("recipe", [{"channels": [16, 16]}, {"layers_per_block": 2}, {"cross_attention": [True, True]}])
def test_weights_of_another_architecture_are_refused(tiny, recipe):
    write_tensors("other.safetensors", unet_of(**recipe).state_dict(), {})
    with pytest.raises(UserError, match=r"^other.safetensors belongs to another architecture .*: delete it"):
        load_weights(load_unet(tiny, CPU), "other.safetensors")
    write_tensors(tiny.weights, unet_of(**recipe).state_dict(), {})
    with pytest.raises(UserError, match="another architecture"):
        load_unet(tiny, CPU)


def test_missing_weights_are_refused_unless_partial(tiny):
    some = dict(list(read_tensors(tiny.weights).items())[:3])
    write_tensors("some.safetensors", some, {})
    unet = load_unet(tiny, CPU)
    with pytest.raises(UserError, match=f"{len(unet.state_dict()) - 3} are missing"):
        load_weights(unet, "some.safetensors")
    load_weights(unet, "some.safetensors", partial=True)


def test_a_refused_file_changes_nothing(tiny):
    unet = load_unet(tiny, CPU)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    name, first = next(iter(before.items()))
    write_tensors("bad.safetensors", {name: first + 1, "foreign.weight": torch.zeros(2)}, {})
    with pytest.raises(UserError, match=r"such as foreign.weight"):
        load_weights(unet, "bad.safetensors", partial=True)
    assert all(torch.equal(weight, before[key]) for key, weight in unet.state_dict().items())


def test_devices_and_precisions(monkeypatch):
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "warp-drive"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            pick_device(name)
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    assert resolve_precision("auto", CPU) == ("bf16" if native_bf16(CPU) else "fp32")


def test_the_model_reads_the_caption(tiny):
    unet, source = load_unet(tiny, CPU), np.random.default_rng(0)
    latents = torch.from_numpy(source.standard_normal((1, 12, 8, 8), dtype=np.float32))
    captions = torch.from_numpy(source.standard_normal((2, 5, 16), dtype=np.float32))
    one, two = (unet(latents, torch.tensor([5]), caption[None]).sample for caption in captions)
    assert not torch.allclose(one, two, atol=1e-6)
