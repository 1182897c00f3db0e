import subprocess
import sys

import pytest

from forgetrace.artifacts import UserError
from forgetrace.attribution.registry import ATTRIBUTORS, attributor, check_methods, describe
from forgetrace.config import parse_config
from forgetrace.layout import Layout


def config(methods: dict, **sections):
    return parse_config({"score": {"methods": methods}, **sections}, "config/x.yaml")


def test_every_method_says_in_a_line_what_it_is():
    assert {"unlearning", "pixel", "pixel-l2", "text", "random"} <= set(ATTRIBUTORS)
    for name, kind in ATTRIBUTORS.items():
        assert kind.summary.strip()
        assert "\n" not in kind.summary
        assert f"{name}: {kind.summary}" in describe().splitlines()


def test_an_unknown_attributor_is_named_with_the_choices():
    with pytest.raises(UserError, match=r"score.methods.mine: 'mine' is no attribution method; choose one of .*pixel"):
        check_methods(config({"mine": {}}))
    with pytest.raises(UserError, match=r"score.methods.mine: 'voodoo' is no attribution method"):
        check_methods(config({"mine": {"attributor": "voodoo"}}))


def test_an_unlearning_method_needs_its_variant():
    with pytest.raises(UserError, match=r"score.methods.u: the section 'unlearn' has no variant 'u' \(it has none\)"):
        check_methods(config({"u": {"attributor": "unlearning"}}))
    variants = {"v": {"step_size": 0.1}}
    with pytest.raises(UserError, match=r"no variant 'w' \(it has v\)"):
        check_methods(config({"u": {"attributor": "unlearning", "variant": "w"}}, unlearn=variants))
    check_methods(config({"u": {"attributor": "unlearning", "variant": "v"}, "random": {}}, unlearn=variants))


@pytest.mark.parametrize("option", [{"variant": "v"}, {"score": "skew"}, {"score": "difference"}])
@pytest.mark.parametrize("name", ["pixel", "pixel-l2", "text", "random"])
def test_an_option_that_would_be_ignored_is_named(name, option):
    methods = {name: option, "u": {"attributor": "unlearning", "variant": "v", "score": "skew"}}
    with pytest.raises(UserError, match=rf"^score.methods.{name}.{next(iter(option))}: '{name}' has no such option"):
        check_methods(config(methods, unlearn={"v": {"step_size": 0.1}}))


@pytest.mark.parametrize("name", ["base", "seed", "half", "ceiling", "shared", "pools"])
def test_names_of_the_evaluations_own_models_are_reserved(name):
    with pytest.raises(UserError, match=f"'{name}' names models of the evaluation"):
        check_methods(config({name: {"attributor": "pixel"}}))


def test_a_method_is_its_attributor_under_a_name_of_the_users():
    layout = Layout("x", config({"nearest": {"attributor": "pixel-l2"}, "random": {}}))
    assert type(attributor(layout, "nearest")) is ATTRIBUTORS["pixel-l2"]
    with pytest.raises(UserError, match=r"score.methods has no 'pixel' \(it has nearest, random\)"):
        attributor(layout, "pixel")


def test_listing_methods_and_their_inputs_imports_no_torch():
    """Snakemake asks while it builds the DAG."""
    program = """
import sys
from forgetrace.attribution.registry import ATTRIBUTORS, inputs
from forgetrace.config import parse_config
from forgetrace.layout import Layout
methods = {"u": {"attributor": "unlearning"}, **{name: {} for name in ATTRIBUTORS if name != "unlearning"}}
methods["image-features"] = {"encoder": "some/model"}
methods["ensemble"] = {"methods": ["pixel", "text"]}
config = parse_config({"score": {"methods": methods}, "unlearn": {"u": {"step_size": 1}}}, "x.yaml")
for method in methods:
    assert inputs(Layout("x", config), method, "report-00")
heavy = {"torch", "diffusers", "transformers", "accelerate", "scipy", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
