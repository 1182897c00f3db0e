import logging
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from forgetrace.artifacts import UserError, read_json, read_tensors
from forgetrace.config import Train
from forgetrace.diffusion import training as module
from forgetrace.diffusion.base import train_base
from forgetrace.diffusion.draws import draw_step
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import build_scheduler, build_unet
from forgetrace.diffusion.training import Training, learning_rate, train
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from ..conftest import IMAGES, in_child, settings

NONE = np.zeros(IMAGES, dtype=bool)
CHECKPOINT = "results/tiny/checkpoints/base/last.pt"


def with_recipe(layout: Layout, **recipe) -> Layout:
    return replace(layout, config=settings(train=recipe))


def run(layout: Layout, removed=NONE, seed=5, name="base", snapshots=()):
    return train(layout, load_encoded(layout), Training(name, seed, removed), "cpu", snapshots)


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def kill_after(step: int):
    """Die as if by ``kill -9`` right after a step."""
    run_step = module._Loop.run_step

    def deadly(loop):
        run_step(loop)
        if loop.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return deadly


def run_until(monkeypatch, layout: Layout, step: int, **options) -> None:
    """Train and interrupt right after a step, as Ctrl-C does."""
    run_step = module._Loop.run_step

    def failing(loop):
        run_step(loop)
        if loop.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "run_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(layout, **options)


@pytest.mark.parametrize("step", [1, 5, 7])
def test_a_killed_training_resumes_to_the_same_bits(tiny, monkeypatch, step):
    finished = read_tensors(tiny.weights)
    outputs = [tiny.weights, tiny.recipe, tiny.curve, *tiny.snapshots]
    before = {path: Path(path).read_bytes() for path in outputs}

    def killed():
        monkeypatch.setattr(module._Loop, "run_step", kill_after(step))
        train_base(tiny, "cpu")

    # Snakemake removes a job's outputs before it runs it, also before it runs it again.
    def remove_outputs():
        for path in outputs:
            if os.path.exists(path):
                os.remove(path)

    remove_outputs()
    assert in_child(killed) == signal.SIGKILL
    assert not os.path.exists(tiny.weights)
    assert not os.path.exists(tiny.recipe)
    remove_outputs()
    steps_run = []
    run_step = module._Loop.run_step
    monkeypatch.setattr(module._Loop, "run_step", lambda loop: (steps_run.append(loop.step), run_step(loop)))
    train_base(tiny, "cpu")

    assert_equal(read_tensors(tiny.weights), finished)
    for path in outputs:
        assert Path(path).read_bytes() == before[path], path
    assert steps_run == list(range(step // 3 * 3, 8))
    assert not os.path.exists("results/tiny/checkpoints/base")


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tiny, monkeypatch):
    finished = read_tensors(tiny.weights)
    save = torch.save

    def half_a_file(state, out):
        if state["step"] == 6:
            out.write(b"PK\x03\x04 half of it")
            out.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, out)

    def killed():
        monkeypatch.setattr(torch, "save", half_a_file)
        run(tiny)

    assert in_child(killed) == signal.SIGKILL
    assert torch.load(CHECKPOINT)["step"] == 3
    assert_equal(run(tiny)[0], finished)


def test_without_its_earlier_snapshots_a_checkpoint_is_not_resumed_from(tiny, monkeypatch, caplog):
    run_until(monkeypatch, tiny, 7, snapshots=[4, 8])
    os.remove("results/tiny/checkpoints/base/step-000004.safetensors")
    _, curve, _ = run(tiny, snapshots=[4, 8])
    assert "lacks earlier snapshots" in caplog.text
    assert os.path.exists("results/tiny/checkpoints/base/step-000004.safetensors")
    assert len(curve) == 8


def test_training_is_deterministic_and_saved_as_diffusers_reads_it(tiny):
    from diffusers import DDPMScheduler, UNet2DConditionModel

    saved = UNet2DConditionModel.from_pretrained(tiny.model, subfolder="unet", local_files_only=True)
    weights, curve, record = run(tiny)
    assert_equal(weights, dict(saved.state_dict()))
    assert DDPMScheduler.from_pretrained(tiny.model, subfolder="scheduler").config.prediction_type == "v_prediction"
    assert record == {name: read_json(tiny.recipe)[name] for name in record}
    assert record["processes"] == 1
    assert record["removed"] == 0
    written = pd.read_csv(tiny.curve)
    np.testing.assert_allclose(written["loss"], curve["loss"], rtol=1e-5)
    assert written["step"].tolist() == list(range(1, 9))


@pytest.mark.parametrize("change", ["seed", "removed"])
def test_seed_and_removed_images_change_the_weights(tiny, change):
    removed = NONE.copy()
    removed[: IMAGES // 2] = change == "removed"
    weights, _, record = run(tiny, removed, seed=6 if change == "seed" else 5, name="other")
    base = read_tensors(tiny.weights)
    assert any(not torch.equal(weights[name], base[name]) for name in base)
    assert record["key"] != read_json(tiny.recipe)["key"]


def test_snapshots_are_the_raw_weights_with_their_step(tiny):
    import json

    from safetensors import safe_open

    assert [path.rsplit("/", 1)[1] for path in tiny.snapshots] == ["step-000004.safetensors", "step-000008.safetensors"]
    for path, step in zip(tiny.snapshots, [4, 8], strict=True):
        with safe_open(path, "pt") as content:
            made_by = json.loads(content.metadata()["provenance"])
        assert made_by["step"] == step
    last, average = read_tensors(tiny.snapshots[1]), read_tensors(tiny.weights)
    assert any(not torch.equal(last[name], average[name]) for name in average)


def test_three_steps_by_hand(tiny):
    """AdamW with decoupled decay, clipped gradients, EMA with diffusers' warm-up (1 + n) / (10 + n)."""
    recipe = settings(train={"steps": 3, "gradient_clip": 0.05, "ema_decay": 0.15}).train
    layout, encoded = with_recipe(tiny, steps=3, gradient_clip=0.05, ema_decay=0.15), load_encoded(tiny)
    removed = NONE.copy()
    removed[::3] = True
    unet, scheduler = build_unet(recipe, (12, 8, 8), 16, seed=5), build_scheduler(recipe)
    weights = list(unet.parameters())
    average = [weight.detach().clone() for weight in weights]
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    losses = []
    for step in range(3):
        draw = draw_step(5, step, removed, 8, 100, (12, 8, 8), 0.1)
        rows = encoded.caption_rows[draw.rows].clone()
        rows[torch.from_numpy(draw.dropped)] = encoded.empty_row
        noise, timesteps = torch.from_numpy(draw.noise), torch.from_numpy(draw.timesteps)
        latents = torch.from_numpy(np.array(encoded.latents[draw.rows]))
        loss = example_losses(unet, scheduler, latents, encoded.captions[rows], timesteps, noise).mean()
        gradients = torch.autograd.grad(loss, weights)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        assert norm > 0.05  # so that the clipping matters
        rate = learning_rate(recipe, step)
        decay = [0.0, 2 / 11, 3 / 12][step]
        with torch.no_grad():
            for i, gradient in enumerate(gradients):
                gradient = gradient * 0.05 / (norm + 1e-6)
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient.square()
                moment, scale = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.999 ** (step + 1))
                weights[i].mul_(1 - rate * 0.01)
                weights[i].sub_(rate * moment / (scale.sqrt() + 1e-8))
                average[i] += (1 - min(decay, 0.15)) * (weights[i] - average[i])
        losses.append(loss.item())
    found, curve, _ = run(layout, removed, name="by-hand")
    np.testing.assert_allclose(curve["loss"], losses, rtol=1e-4)
    for (name, _), expected in zip(unet.named_parameters(), average, strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-5, msg=name)


@pytest.fixture
def another_precision():
    """To be called before a training in one: what accelerate is set up with holds for a process."""
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state()


def test_half_precision_trains_the_same_model_but_for_rounding(tiny, another_precision):
    """Wrong gradients, which a compiled training once had, end at a loss that seeds do not explain."""
    losses, weights = {}, {}
    for name, changes in {"fp32": {}, "bf16": {"precision": "bf16"}, "other": {}}.items():
        layout = with_recipe(tiny, steps=60, warmup_steps=5, learning_rate=4e-3, checkpoint_every=60, **changes)
        another_precision()
        weights[name], curve, record = run(layout, seed=6 if name == "other" else 5, name=name)
        assert record["precision"] == ("bf16" if name == "bf16" else "fp32")
        losses[name] = curve["loss"].to_numpy()
    start, end = losses["fp32"][:10].mean(), losses["fp32"][-20:].mean()
    assert end < 0.8 * start
    # The same images, timesteps and noise: step by step, not on average alone.
    np.testing.assert_allclose(losses["bf16"][:10], losses["fp32"][:10], rtol=0.01)
    assert abs(losses["bf16"][-20:].mean() - end) < abs(losses["other"][-20:].mean() - end) + 0.02 * start
    assert all(weight.dtype == torch.float32 for weight in weights["bf16"].values())
    assert any(not torch.equal(weights["bf16"][name], weight) for name, weight in weights["fp32"].items())


def test_learning_rate_closed_form():
    recipe = Train(learning_rate=2.0, warmup_steps=4, steps=12)
    expected = [0.5, 1.0, 1.5, 2.0, *(1 + math.cos(math.pi * i / 8) for i in range(8))]
    assert [learning_rate(recipe, step) for step in range(12)] == pytest.approx(expected)
    assert learning_rate(recipe, 12) == pytest.approx(0)
    assert learning_rate(Train(learning_rate=2.0, warmup_steps=0, steps=4), 0) == 2.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"not a checkpoint", "is damaged"),
        ({"key": "another", "step": 3}, "is of another training"),
        ([1, 2], "is damaged"),
        ({"weights": {}}, "is damaged"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_ignored_with_a_warning(tiny, caplog, content, message):
    os.makedirs(os.path.dirname(CHECKPOINT))
    if isinstance(content, bytes):
        Path(CHECKPOINT).write_bytes(content)
    else:
        torch.save(content, CHECKPOINT)
    layout = with_recipe(tiny, steps=3)
    weights, curve, _ = run(layout)
    assert message in caplog.text
    assert len(curve) == 3
    assert_equal(weights, run(layout, name="fresh")[0])


def test_a_truncated_checkpoint_is_ignored(tiny, monkeypatch, caplog):
    run_until(monkeypatch, tiny, 4)
    whole = Path(CHECKPOINT).read_bytes()
    Path(CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    assert_equal(run(tiny)[0], read_tensors(tiny.weights))
    assert "is damaged" in caplog.text


def test_a_checkpoint_of_another_recipe_is_not_resumed_from(tiny, monkeypatch, caplog):
    run_until(monkeypatch, tiny, 4)
    other = with_recipe(tiny, learning_rate=1e-4)
    caplog.set_level(logging.WARNING)
    weights = run(other)[0]
    assert "is of another training" in caplog.text
    assert_equal(weights, run(other, name="fresh")[0])


def test_a_diverged_training_is_one_sentence(tiny, monkeypatch):
    monkeypatch.setattr(module, "example_losses", lambda unet, *rest: next(unet.parameters()).sum().reshape(1) / 0)
    with pytest.raises(UserError, match=r"The training base diverged at step 1 \(loss .*\): lower train.learning_rate"):
        run(tiny)


def test_the_batch_must_divide_between_processes(tiny, monkeypatch):
    monkeypatch.setattr(module.Accelerator, "num_processes", 3)
    with pytest.raises(UserError, match="batch_size = 8 cannot be split evenly between 3 processes"):
        run(tiny)


def test_two_processes_train_the_same_weights_and_one_of_them_writes(tiny):
    """As ``torchrun --nproc-per-node 2`` starts them; the halves of a batch are averaged."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    single, curve = read_tensors(tiny.weights), pd.read_csv(tiny.curve)
    for path in (tiny.weights, tiny.curve, tiny.recipe, *tiny.snapshots):
        os.remove(path)

    def process(rank: int):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
        )  # fmt: skip
        if rank:
            for name in ("write_tensors", "write_table", "write_json", "save_architecture"):
                setattr(__import__("forgetrace.diffusion.base", fromlist=["x"]), name, None)
            module.write_tensors = module.atomic = None
        train_base(tiny, "cpu")
        assert module.Accelerator(cpu=True).num_processes == 2

    second = os.fork()
    if second == 0:
        try:
            process(1)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert in_child(lambda: process(0)) == 0
    assert os.waitpid(second, 0)[1] == 0
    assert read_json(tiny.recipe)["processes"] == 2
    for name, weight in read_tensors(tiny.weights).items():
        torch.testing.assert_close(weight, single[name], rtol=1e-3, atol=1e-4, msg=name)
    np.testing.assert_allclose(pd.read_csv(tiny.curve)["loss"], curve["loss"], rtol=1e-4)
