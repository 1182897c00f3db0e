import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_arrays, read_json, read_table, read_tensors
from forgetrace.attribution.registry import check_methods
from forgetrace.attribution.scan import scan
from forgetrace.attribution.score import score
from forgetrace.counterfactual.retrain import retrain
from forgetrace.curvature.fit import fit
from forgetrace.diffusion.base import train_base
from forgetrace.diffusion.given import given_scheduler, given_unet
from forgetrace.diffusion.lora import merge_lora
from forgetrace.diffusion.model import build_unet, initial_unet, load_scheduler, load_unet
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.diffusion.training import Training, training_key
from forgetrace.encoding.encode import encode
from forgetrace.evaluation.tables import evaluate
from forgetrace.figures.catalogue import draw, names
from forgetrace.layout import Layout
from forgetrace.unlearning.quality import regenerate_unlearned
from forgetrace.unlearning.variants import unlearn_query

from ..conftest import IMAGES, parse_config, write_data
from ..pipelines import CHANNELS, WIDTH, save_pipeline

CPU = "cpu"
RECIPE = {"steps": 3, "batch_size": 4, "warmup_steps": 0, "precision": "fp32", "snapshots": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture
def folder(saved, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved, "pipeline"))


def experiment(train: dict, **sections) -> Layout:
    encoders = {"image_encoder": "autoencoder-kl", "text_encoder": "clip", "pipeline": "pipeline"}
    content = {
        "seed": 5,
        "encode": encoders,
        "train": train,
        "synthesize": {"queries": [{"pool": "report", "count": 2}], "sampler_steps": 3, "guidance": 2.0},
        "fit": {"draws": 40, "chunk": 7},
        "unlearn": {"unlearn": {"step_size": 1e-3, "draws": 16, "weights": "cross-attn-kv"}},
        "scan": {"timesteps": 3},
        "score": {"methods": {"unlearn": {"attributor": "unlearning"}, "text": {}, "random": {}}},
        "evaluate": {"bootstrap": 50, "timestep_stride": 100, "others": 2},
        "figures": {"top": 3},
        **sections,
    }
    return Layout("tiny", parse_config(content, "config/tiny.yaml"))


def encoded(layout: Layout) -> Layout:
    write_data(layout)
    encode(layout)
    return layout


@torch.no_grad()
def test_a_given_model_is_theta0_as_it_is(folder):
    layout = encoded(experiment({"pretrained": "pipeline"}))
    train_base(layout, CPU)
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    own, generator = load_unet(layout, torch.device(CPU)), torch.Generator().manual_seed(0)
    inputs = torch.randn(2, CHANNELS, 4, 4, generator=generator), torch.tensor([3, 700])
    captions = torch.randn(2, 12, WIDTH, generator=generator)
    assert torch.equal(own(*inputs, captions).sample, theirs(*inputs, captions).sample)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # the file says scaled_linear
    torch.testing.assert_close(load_scheduler(layout).betas, betas)
    assert load_scheduler(layout).config.prediction_type == "epsilon"
    assert layout.snapshots == []
    assert read_table(layout.curve).empty
    assert read_json(layout.recipe)["given"] == "pipeline"


def test_all_but_the_counterfactual_works_with_a_given_model(folder):
    layout = encoded(experiment({"pretrained": "pipeline"}))
    train_base(layout, CPU)
    fit(layout, "diagonal", CPU)
    scan(layout, device=CPU)
    for query in layout.config.queries():
        synthesize(layout, query, CPU)
        unlearn_query(layout, "unlearn", query, CPU)
        scan(layout, "unlearn", query, CPU)
        for method in layout.config.score.methods:
            score(layout, method, query, CPU)
    assert read_arrays(layout.query("report-00")["tensors"])["latent"].shape == (CHANNELS, 4, 4)
    losses = read_json(layout.unlearned("unlearn", "report-00")["losses"])
    assert losses["after"]["query"] > losses["before"]["query"]
    assert len(read_table(layout.score("unlearn", "report-01"))) == IMAGES
    regenerate_unlearned(layout, "unlearn", CPU)
    evaluate(layout, lambda images: images.reshape(len(images), -1).astype(float))
    assert layout.tables() == ["unlearning"]
    assert set(read_table(layout.table("unlearning"))["metric"]) == {"loss", "delta_mse", "similarity", "ssim"}
    assert names(layout) == ["attribution-report-00", "attribution-report-01", "unlearning"]
    for name in names(layout):
        draw(layout, name)
    assert layout.config.judged_queries() == layout.shared_models() == []


def test_training_starts_from_the_parent(folder):
    layout = encoded(experiment({"parent": "pipeline", **RECIPE, "learning_rate": 1e-12}))
    train_base(layout, CPU)
    parent = given_unet("pipeline", "train.parent").state_dict()
    for name, weight in read_tensors(layout.weights).items():
        torch.testing.assert_close(weight, parent[name], atol=1e-6, rtol=0)
    fresh = build_unet(layout.config.train, (CHANNELS, 4, 4), WIDTH, 0)
    assert fresh.config.items() <= given_unet("pipeline", "train.parent").config.items()
    assert not torch.equal(fresh.conv_in.weight, parent["conv_in.weight"])
    start = initial_unet(layout.config.train, (CHANNELS, 4, 4), WIDTH, 7)
    assert start.training
    assert all(weight.requires_grad for weight in start.parameters())


def test_leave_k_out_models_start_from_the_parent_of_a_given_model(folder):
    """And not from θ0, which has seen the images that are left out."""
    shutil.copytree(folder, "parent")
    given_unet("pipeline", "x").apply(another).save_pretrained("parent/unet")
    train = {"pretrained": "pipeline", "parent": "parent", **RECIPE, "learning_rate": 1e-3}
    layout = encoded(experiment(train, retrain={"k": [5], "random_draws": 1, "seeds": 0}))
    train_base(layout, CPU)
    assert len(layout.shared_models()) == 2
    retrain(layout, [("random", 5, "draw0")], CPU)
    trained, theta0 = read_tensors(layout.retrained("random", 5, "draw0")), read_tensors(layout.weights)
    parent = given_unet("parent", "x").state_dict()
    moved = max((trained[name] - parent[name]).abs().max().item() for name in parent)
    assert 0 < moved < 0.02  # three steps of at most 1e-3 away
    assert max((trained[name] - theta0[name]).abs().max().item() for name in theta0) > 0.05


@torch.no_grad()
def another(module: torch.nn.Module) -> None:
    """Weights a tenth away."""
    for weight in module.parameters(recurse=False):
        weight += 0.1


def test_another_parent_is_another_training(folder):
    layout = encoded(experiment({"parent": "pipeline", **RECIPE}))
    training = Training("any", 0, np.zeros(IMAGES, dtype=bool))
    before = training_key(layout, training, "fp32")
    moved = Path("elsewhere")
    shutil.copytree(folder, moved)
    same = experiment({"parent": "elsewhere", **RECIPE})
    assert training_key(same, training, "fp32") == before  # where it lies does not matter
    config = json.loads((moved / "scheduler/scheduler_config.json").read_text())
    (moved / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    assert training_key(same, training, "fp32") != before


def test_any_sampler_gives_its_schedule(folder):
    from diffusers import PNDMScheduler

    PNDMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.03, prediction_type="v_prediction"
    ).save_pretrained(folder / "scheduler")
    scheduler = given_scheduler("pipeline", "train.pretrained")
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.03, 1000))
    assert scheduler.config.prediction_type == "v_prediction"


def damaged(folder: Path, **changes) -> None:
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_models_that_do_not_fit_are_one_sentence(folder):
    layout = encoded(experiment({"pretrained": "pipeline", "timesteps": 500}))
    with pytest.raises(UserError, match=r"has a schedule of 1000 timesteps, the experiment's are 500: change train.t"):
        train_base(layout, CPU)
    layout = experiment({"pretrained": "pipeline"}, encode={"factor": 2})
    write_data(layout)
    encode(layout)
    with pytest.raises(UserError, match=r"takes latents of 4 channels, the experiment's are 12: change encode"):
        train_base(layout, CPU)
    damaged(folder, class_embed_type="timestep")
    with pytest.raises(UserError, match=r"train.pretrained: this UNet is also conditioned by 'class_embed_type'"):
        given_unet("pipeline", "train.pretrained")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks weights in unet/"):
        given_unet("pipeline", "train.pretrained")
    with pytest.raises(UserError, match=r"name a folder with unet/, scheduler/ in train.parent"):
        given_unet("nobody/nothing", "train.parent")


@pytest.mark.parametrize(
    ("train", "sections", "sentence"),
    [
        ({"pretrained": "x", "channels": [8, 16]}, {}, "channels has no effect with pretrained"),
        ({"pretrained": "x", "steps": 10}, {}, "steps has no effect with pretrained"),
        ({"parent": "x", "schedule": "linear"}, {}, "schedule has no effect with parent"),
        ({"parent": "x", "lora": "y"}, {}, "lora needs pretrained, and cannot be retrained"),
        ({"pretrained": "x"}, {"retrain": {"methods": ["text"]}}, "retrain.methods: models without some images cannot"),
        ({"pretrained": "x"}, {"retrain": {"subsets": 3}}, "retrain.subsets: .* name what .* in train.parent"),
        (
            {"pretrained": "x", "parent": "y", "steps": 200},
            {"retrain": {"pools": 1}},
            "retrain.pools: .*train.batch_size, train.learning_rate missing; or remove the key",
        ),
        ({"pretrained": "x", "lora": "y"}, {"retrain": {"subsets": 3}}, "no recipe here trains LoRA weights"),
    ],
)
def test_what_cannot_be_is_refused(train, sections, sentence):
    with pytest.raises(UserError, match=sentence):
        experiment(train, **sections)


@pytest.mark.parametrize(
    ("train", "trains"),
    [
        ({}, True),
        ({"parent": "x"}, True),
        ({"pretrained": "x"}, False),
        ({"pretrained": "x", "parent": "y"}, False),
        ({"pretrained": "x", "parent": "y", "steps": 200, "learning_rate": 1e-4}, False),
        ({"pretrained": "x", "parent": "y", "steps": 200, "learning_rate": 1e-4, "batch_size": 8}, True),
        ({"pretrained": "x", "lora": "y"}, False),
    ],
)
def test_leave_k_out_models_need_the_parent_and_the_recipe(train, trains):
    config = experiment(train).config
    assert config.train.trains == trains
    assert bool(config.judged_queries()) == trains


def test_methods_that_watch_training_are_refused():
    layout = experiment({"pretrained": "x"}, score={"methods": {"tracin": {}}})
    with pytest.raises(UserError, match=r"score.methods.tracin needs snapshots of θ0's training"):
        check_methods(layout.config)


def save_lora(target: str, seed: int = 0, **text) -> torch.nn.Module:
    """A LoRA of the pipeline's K and V with invented weights; returns the UNet with it, as peft runs it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    unet = given_unet("pipeline", "train.pretrained")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_k", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        target,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        **text,
    )
    return unet.eval()


@torch.no_grad()
def test_lora_weights_are_merged_with_their_scale(folder):
    adapted = save_lora("lora")
    layout = encoded(experiment({"pretrained": "pipeline", "lora": "lora"}))
    train_base(layout, CPU)
    own, plain = load_unet(layout, torch.device(CPU)), given_unet("pipeline", "train.pretrained")
    assert own.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(2, CHANNELS, 4, 4), torch.tensor([3, 700]), torch.randn(2, 12, WIDTH)
    merged, expected, without = (model(*inputs).sample for model in (own, adapted, plain))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert (merged - without).abs().max() > 0.01


def test_lora_files_that_do_not_fit_are_one_sentence(folder, monkeypatch):
    with pytest.raises(UserError, match=r"train.lora: there is no nowhere;"):
        merge_lora(given_unet("pipeline", "k"), "nowhere")
    save_lora("lora")
    from safetensors.torch import load_file, save_file

    file = Path("lora/pytorch_lora_weights.safetensors")
    weights = load_file(file)
    renamed = {name.replace("down_blocks.1", "down_blocks.7"): weight for name, weight in weights.items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"is of another model|are the model's"):
        merge_lora(given_unet("pipeline", "k"), "lora")
    extra = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
    save_file(weights | extra, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"changes more than the UNet \(text_encoder"):
        merge_lora(given_unet("pipeline", "k"), "lora")
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"pytorch_lora_weights.safetensors cannot be read"):
        merge_lora(given_unet("pipeline", "k"), "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the package peft"):
        merge_lora(given_unet("pipeline", "k"), "lora")


def scheduled(folder: Path, **changes) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_schedule_that_ends_in_pure_noise_does_so_here(folder):
    scheduled(folder, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert given_scheduler("pipeline", "k").alphas_cumprod[-1] == 0


def test_schedules_and_blocks_of_other_kinds_are_refused(folder):
    scheduled(folder, prediction_type="sample")
    with pytest.raises(UserError, match=r"is none of a diffusion model that predicts ε or v"):
        given_scheduler("pipeline", "k")
    scheduled(folder, prediction_type="epsilon", beta_schedule=None)
    with pytest.raises(UserError, match=r"k: the scheduler DDIMScheduler is none"):
        given_scheduler("pipeline", "k")
    damaged(folder, down_block_types=["DownBlock2D", "SimpleCrossAttnDownBlock2D"])
    with pytest.raises(UserError, match=r"blocks of the kind SimpleCrossAttnDownBlock2D, which forgetrace does not"):
        given_unet("pipeline", "k")


def test_a_parent_that_cannot_be_is_refused_before_hours_of_training(folder):
    layout = encoded(experiment({"pretrained": "pipeline", "parent": "other", **RECIPE, "learning_rate": 1e-3}))
    shutil.copytree(folder, "other")
    train_base(layout, CPU)
    scheduled(Path("other"), prediction_type="v_prediction")
    with pytest.raises(UserError, match=r"train.parent: other has another noise schedule or prediction"):
        train_base(layout, CPU)
    shutil.rmtree("other")
    save_pipeline(Path("other"), channels=(8, 8))
    with pytest.raises(UserError, match=r"train.parent: other has another architecture"):
        train_base(layout, CPU)


def test_nothing_is_trained_where_nobody_says_from_what(folder):
    layout = encoded(experiment({"pretrained": "pipeline"}))
    with pytest.raises(UserError, match=r"No model can be trained here"):
        retrain(layout, [("random", 5, "draw0")], CPU)
