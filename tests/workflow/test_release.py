"""The config that ``forgetrace import-release`` writes, as Snakemake plans it."""

import pytest

from ..release.published import write_abu
from .conftest import copy_of

pytest.importorskip("pycocotools", reason="an extra: pip install pycocotools")


def test_an_imported_release_can_be_planned(checkout, tmp_path):
    checkout = copy_of(checkout, tmp_path)  # encodes, where others want nothing to have run
    folder = checkout.folder
    write_abu(folder / "mscoco")
    forgetrace = (checkout.environment["PATH"].partition(":")[0] + "/python", "-m", "forgetrace.cli")
    done = checkout(*forgetrace, "import-release", "mscoco", "--to", "given")
    assert "83 images" in done.stdout
    planned = checkout.planned("--configfile", "config/given.yaml")
    once = {"prepare": 1, "encode": 1, "train": 1, "fit": 1, "scan_base": 1, "evaluate": 1}
    assert planned == once | dict.fromkeys(("synthesize", "unlearn", "scan", "score", "figure_attribution"), 2)
    jobs = {
        job.partition(":")[0]: job.partition("output:")[0]
        for job in checkout("snakemake", "-n", "--configfile", "config/given.yaml").stdout.split("\nrule ")
    }
    # What is given is an input like any other; changing it runs what reads it again.
    assert "given/encoded/captions.npy" in jobs["encode"]
    assert "given/fit/fisher.safetensors" in jobs["fit"]
    assert "given/unet/config.json" in jobs["train"]
    assert "given/queries/sample/images/00" in jobs["synthesize"]
    # Links to what is given count as made when the job made them.
    encoded = ("--configfile", "config/given.yaml", "--cores", "1", "all_encode")
    checkout("snakemake", "--quiet", "all", *encoded)
    assert checkout.planned(*encoded) == {}
    # An import that writes latents or token states anew writes their hashes anew.
    with open(folder / "given/encoded/manifest.json", "a", encoding="utf-8") as manifest:
        manifest.write("\n")
    assert checkout.planned(*encoded).get("encode") == 1
    (folder / "given/fit/fisher.safetensors").unlink()
    refused = checkout("snakemake", "-n", "--configfile", "config/given.yaml", check=False)
    assert refused.returncode != 0
    assert "fit.given: given/fit/fisher.safetensors is missing" in refused.stderr + refused.stdout
