from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_array, read_arrays, read_image, read_tensors
from forgetrace.cli import unlearn as command
from forgetrace.diffusion import synthesis
from forgetrace.diffusion.model import load_unet
from forgetrace.diffusion.synthesis import regenerate
from forgetrace.encoding.latents import to_pixels
from forgetrace.unlearning import quality
from forgetrace.unlearning.variants import unlearn_query

from ..conftest import settings

CPU = "cpu"
VARIANT = {"unlearn": {"step_size": 3e-3, "draws": 32}}  # a step that shows


def looking(layout, others: int = 3, count: int = 2):
    """The tiny experiment with two generated queries, unlearned, and a user's image that cannot be generated."""
    queries = [{"pool": "report", "count": count}, {"name": "mine", "image": "mine.png", "prompt": "my own"}]
    config = settings(synthesize={"queries": queries}, evaluate={"others": others})
    return replace(layout, config=config.model_copy(update={"unlearn": settings(unlearn=VARIANT).unlearn}))


@pytest.fixture
def layout(tiny):
    layout = looking(tiny)
    for query in ("report-00", "report-01"):
        unlearn_query(layout, "unlearn", query, CPU)
    return layout


def test_targets_and_others_are_what_one_sampling_each_gives(layout):
    quality.regenerate_unlearned(layout, "unlearn", CPU)
    found = read_arrays(layout.regenerated("unlearn"))
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes == {
        "targets": (2, 16, 16, 3),
        "targets_unlearned": (2, 16, 16, 3),
        "others": (3, 16, 16, 3),
        "others_unlearned": (2, 3, 16, 16, 3),
    }
    theta0, forgotten = load_unet(layout, CPU), load_unet(layout, CPU)

    def picture(unet, noise, prompt):
        return to_pixels(regenerate(layout, unet, noise, prompt)[None], 2)[0].astype(int)

    noise, prompts = quality.others_noise(layout), quality.others_prompts(layout)
    for i, query in enumerate(("report-00", "report-01")):
        own = read_arrays(layout.query(query)["tensors"])
        weights = read_tensors(layout.unlearned("unlearn", query)["weights"])
        forgotten.load_state_dict(theta0.state_dict() | weights)
        np.testing.assert_allclose(found["targets"][i], read_image(layout.query(query)["image"]), atol=1)
        after = picture(forgotten, own["initial_noise"], own["prompt"])
        np.testing.assert_allclose(found["targets_unlearned"][i], after, atol=1)
        assert np.abs(after - found["targets"][i]).max() > 3
        for j in range(3):
            np.testing.assert_allclose(found["others"][j], picture(theta0, noise[j], prompts[j]), atol=1)
            np.testing.assert_allclose(
                found["others_unlearned"][i, j], picture(forgotten, noise[j], prompts[j]), atol=1
            )


def test_batches_do_not_matter(layout, monkeypatch):
    quality.regenerate_unlearned(layout, "unlearn", CPU)
    at_once = read_arrays(layout.regenerated("unlearn"))
    monkeypatch.setattr(synthesis, "NUMBERS", 2 * 12 * 8 * 8)
    quality.regenerate_unlearned(layout, "unlearn", CPU)
    for name, array in read_arrays(layout.regenerated("unlearn")).items():
        np.testing.assert_allclose(array.astype(int), at_once[name], atol=1)


def test_more_others_leave_the_first_as_they_are(layout):
    few, many = (looking(layout, others) for others in (3, 8))
    assert np.array_equal(quality.others_noise(many)[:3], quality.others_noise(few))
    prompts = quality.others_prompts(many)
    assert np.array_equal(prompts[:3], quality.others_prompts(few))
    # Six captions: no two alike before all have had their turn, and never the empty one.
    assert len(np.unique(prompts[:6], axis=0)) == 6
    assert np.array_equal(prompts[6:], prompts[:2])
    assert not (prompts == read_array(layout.captions)[-1]).all(axis=(1, 2)).any()


def test_what_must_be_there_is_named(layout, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text("unlearn: {unlearn: {step_size: 1.0e-4}}\nscore: {methods: {random: {}}}\n")
    with pytest.raises(UserError, match=r"Give --query, or set evaluate.others"):
        command(config, "unlearn")
    own = [{"name": "mine", "image": "mine.png", "prompt": "my own"}]
    with pytest.raises(UserError, match=r"evaluate.others: there is no unlearning variant, or no generated query"):
        settings(synthesize={"queries": own}, evaluate={"others": 3})
    Path(layout.unlearned("unlearn", "report-01")["weights"]).unlink()
    with pytest.raises(UserError, match=r"unlearn/report-01.safetensors"):
        quality.regenerate_unlearned(layout, "unlearn", CPU)
    assert not Path(layout.regenerated("unlearn")).exists()
