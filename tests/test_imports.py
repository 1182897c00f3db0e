"""Jobs import what they need of diffusers; each test is a process of its own, because imports last."""

import json
import subprocess
import sys

import pytest

from forgetrace.imports import AS_A_JOB

UNET = """
import torch
from diffusers import UNet2DConditionModel
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=8, attention_head_dim=4,
)
made = unet(torch.ones(1, 3, 8, 8), torch.tensor([3]), torch.ones(1, 2, 8)).sample
"""


def run(*lines: str) -> str:
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_unet_is_the_same_and_what_nothing_needs_is_not_imported():
    hashed = f"{UNET}import hashlib; print(hashlib.sha256(made.detach().numpy().tobytes()).hexdigest())"
    company = "import sys; print(sorted({'peft', 'transformers', 'sympy', 'torch._dynamo'} & set(sys.modules)))"
    lean = run(AS_A_JOB, hashed, company).splitlines()
    whole = run(hashed, company).splitlines()
    assert lean[0] == whole[0]
    assert lean[1] == "[]"
    assert "torch._dynamo" in whole[1]  # or the module has become useless


def test_what_was_left_out_is_there_for_who_asks_for_it():
    """Text encoders are of transformers, optimisers ask for the compiler."""
    said = run(
        AS_A_JOB,
        UNET,
        "import diffusers, transformers, torch._dynamo",
        "optimizer = torch.optim.AdamW(unet.parameters()); made.sum().backward(); optimizer.step()",
        "config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)",
        "states = transformers.BertModel(config)(torch.tensor([[1, 2]])).last_hidden_state",
        "print(tuple(states.shape), torch._dynamo.__file__ is not None, diffusers.__spec__.loader.__class__.__name__)",
    )
    assert said == "(1, 2, 8) True SourceFileLoader"


@pytest.mark.parametrize("broken", ["USED += ('NothingOfThisName',)", "_disable = None"])
def test_a_diffusers_that_asks_for_more_is_imported_whole(broken):
    said = run(
        f"import forgetrace.imports as imports; imports.{broken}",
        "imports.lean_diffusers()",
        UNET,
        "from diffusers import StableDiffusionPipeline; print(StableDiffusionPipeline.__module__, tuple(made.shape))",
    )
    assert said == "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion (1, 3, 8, 8)"


TRAINED, MERGED = {}, {"pretrained": "a", "lora": "b"}


@pytest.mark.parametrize(("train", "lean"), [(TRAINED, "True"), (MERGED, "False")])
def test_only_experiments_with_a_lora_need_all_of_it(tmp_path, train, lean):
    encode = {"image_encoder": "autoencoder-kl", "text_encoder": "clip", "pipeline": "p"} if train else {}
    sections = {"synthesize": {"queries": [{"pool": "report", "count": 1}]}, "score": {"methods": {"random": {}}}}
    sections |= {"encode": encode, "train": train, "retrain": {"methods": []}}
    (tmp_path / "own.yaml").write_text(json.dumps(sections))
    said = run(
        "from pathlib import Path; import sys; from forgetrace import cli",
        f"cli._experiment(Path({str(tmp_path / 'own.yaml')!r}))",
        "print(any(type(finder).__module__ == 'forgetrace.imports' for finder in sys.meta_path))",
    )
    assert said == lean
