from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_tensors, write_tensors
from forgetrace.attribution import output_shift, scan
from forgetrace.attribution.registry import attributor, check_methods
from forgetrace.config import parse_config
from forgetrace.diffusion.loss import predicted
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank, spaced_timesteps
from forgetrace.encoding.store import load_encoded
from forgetrace.evaluation.cost import needs
from forgetrace.layout import Layout

from ..conftest import settings

QUERIES = ["report-00", "mine"]
METHODS = {"shift": {"attributor": "output-shift", "variant": "unlearn", "timesteps": 3}, "random": {}}


@pytest.fixture
def layout(tiny) -> Layout:
    return with_(tiny)


def with_(tiny: Layout, **sections) -> Layout:
    """The tiny experiment with this method."""
    return replace(tiny, config=settings(score={"methods": METHODS}, retrain={"methods": []}, **sections))


def of(layout: Layout, queries: list[str] = QUERIES) -> dict[str, np.ndarray]:
    return attributor(layout, "shift", "cpu").scores_of(queries)


def moved_by(layout: Layout, query: str, step: float) -> None:
    """Unlearned weights that lie in a fixed direction of θ0, as far as this."""
    stream, weights = torch.Generator().manual_seed(1), read_tensors(layout.weights)
    there = {name: weight + step * torch.randn(weight.shape, generator=stream) for name, weight in weights.items()}
    write_tensors(layout.unlearned("unlearn", query)["weights"], there, {})


def test_scores_are_those_of_a_loop_over_images_and_draws(layout):
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    base = load_unet(layout, torch.device("cpu"))
    timesteps = spaced_timesteps(3, scheduler.config.num_train_timesteps)
    bank = NoiseBank(layout.config.seed, "scan", timesteps, tuple(encoded.latents.shape[1:]))
    found = of(layout)
    for query in QUERIES:
        after = load_unet(layout, torch.device("cpu"), changed=layout.unlearned("unlearn", query)["weights"])
        for row in (0, 17, 39):
            values = []
            for draw in range(3):
                example = (
                    encoded.batch(np.array([row])),
                    encoded.states(encoded.caption_rows[[row]]),
                    torch.tensor([timesteps[draw]]),
                    torch.from_numpy(bank.noise(encoded.image_ids[row], draw))[None],
                )
                first, second = (predicted(unet, scheduler, *example)[0] for unet in (base, after))
                values.append(float((second - first).square().mean()))
            assert found[query][row] == pytest.approx(np.mean(values), rel=1e-3)


def test_a_small_step_half_as_long_moves_predictions_half_as_far(layout):
    moved_by(layout, "report-00", 1e-3)
    whole = of(layout, ["report-00"])["report-00"]
    moved_by(layout, "report-00", 5e-4)
    half = of(layout, ["report-00"])["report-00"]
    np.testing.assert_allclose(whole / half, 4, rtol=0.1)


def test_weights_that_did_not_change_move_nothing(layout):
    moved_by(layout, "mine", 0.0)
    assert not of(layout, ["mine"])["mine"].any()


def test_queries_and_batches_do_not_depend_on_each_other(layout, tiny, monkeypatch):
    together = of(layout)
    for query in QUERIES:
        np.testing.assert_allclose(attributor(layout, "shift", "cpu").scores(query), together[query], rtol=1e-4)
    narrow = with_(tiny, scan={"batch_size": 7, "timesteps": 4})
    np.testing.assert_allclose(of(narrow)["mine"], together["mine"], rtol=1e-4)
    monkeypatch.setattr(output_shift, "HELD", 1)  # one model at a time
    np.testing.assert_allclose(of(layout)["mine"], together["mine"], rtol=1e-4)


def test_a_killed_pass_goes_on_where_it_was(tiny, monkeypatch):
    layout = with_(tiny, scan={"batch_size": 15, "timesteps": 4})  # five images
    whole, asked, real = of(layout), [], scan._with_caption

    def killed(*arguments):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(1)
        return real(*arguments)

    monkeypatch.setattr(scan, "_with_caption", killed)
    with pytest.raises(KeyboardInterrupt):
        of(layout)
    monkeypatch.setattr(scan, "_with_caption", lambda *given: asked.append(1) or real(*given))
    found = of(layout)
    assert len(asked) == 40 / 5
    np.testing.assert_array_equal(found["mine"], whole["mine"])
    assert not list(Path(layout.checkpoints("score")).glob("*.npy"))


def test_it_needs_the_unlearned_weights_and_no_scan(layout):
    files = needs(layout, "shift", "mine")
    assert layout.unlearned("unlearn", "mine")["weights"] in files
    assert layout.fisher in files
    assert not any("/scan/" in path for path in files)


def test_a_variant_that_is_not_there_is_told():
    config = parse_config({"score": {"methods": {"shift": {"attributor": "output-shift"}}}}, "x.yaml")
    with pytest.raises(UserError, match="has no variant 'shift'"):
        check_methods(config)
