# The experiment behind this run: its validated config, its paths, what each stage's results hang on.

import json
import os
import re
import sys
from pathlib import Path

import yaml
from snakemake.utils import min_version, validate

from forgetrace.artifacts import UserError
from forgetrace.attribution import registry
from forgetrace.config import HALF_SET, RANDOM, SEED_SET, load_config
from forgetrace.datasets import concepts
from forgetrace.datasets.registry import source_files
from forgetrace.diffusion.regions import region_files
from forgetrace.encoding import given, pipeline
from forgetrace.encoding.check import check_data
from forgetrace.figures import catalogue
from forgetrace.layout import Layout

min_version("9.27")


if not workflow.configfiles:

    configfile: "config/digits.yaml"


# Keys that say how a stage computes, not what: a change of them runs nothing again, but for what keep_weights asks for.
MECHANICS = {
    ("train", "checkpoint_every"),
    ("fit", "chunk"),
    ("scan", "batch_size"),
    ("scan", "shards"),
    ("retrain", "keep_weights"),
    ("retrain", "stack"),
}
TRAINING_FIRST, SCORES_NEXT = (
    100,
    50,
)  # priorities; retrainings fill the cores that are left


def load_experiment():
    """The one config file of this run and the layout of its experiment."""
    files = [os.path.relpath(path) for path in workflow.configfiles]
    if len(files) != 1:
        raise UserError("Give one experiment: --configfile config/<experiment>.yaml.")
    experiment = load_config(files[0])
    if config != yaml.safe_load(Path(files[0]).read_text(encoding="utf-8")):
        raise UserError(
            f"Set values in {files[0]} instead of with --config: every job reads the file."
        )
    registry.check_methods(experiment)
    layout = Layout(Path(files[0]).stem, experiment)
    check_data(layout)
    return files[0], layout


try:
    CONFIG_FILE, layout = load_experiment()
except UserError as error:
    sys.exit(str(error))
# As it was read: YAML's own 8e-5 is text until then.
validate(
    layout.config.model_dump(mode="json", exclude_unset=True),
    "../schemas/config.schema.yaml",
    set_default=False,
)

VERSIONS = yaml.safe_load(
    Path(workflow.basedir, "workflow", "versions.yaml").read_text()
)
QUERIES = layout.config.queries()
JUDGED_QUERIES = layout.config.judged_queries()
# Queries that are a region of another one.
REGIONS = [query for query in QUERIES if layout.config.region(query)]
# Images from elsewhere: nobody can generate them again.
OWN_IMAGES = [query for query in QUERIES if not layout.config.generates(query)]
METHODS = list(layout.config.score.methods)  # in the order that figures have
JUDGED = [method for method in layout.config.retrain.methods if method != RANDOM]
TOGETHER = registry.together(layout)
FEATURES = registry.all_features(layout)
ENCODED = layout.encoded
MODEL = layout.model_files
# What a release gives in place of what a stage would compute; nothing in most experiments.
GIVEN_ENCODED = (
    list(given.encoded_files(layout.config.encode.given).values())
    if layout.config.encode.given
    else []
)
# The files of a checkpoint that trainings start from, where it is a folder.
PARENT = pipeline.local_files(layout.config.train.parent, ["unet", "scheduler"])


# What was made of images and masks of one's own while they were read without their orientation and transparency.
READ_ANEW = {"read": "upright, transparent parts apart"}


def one_of(names):
    """The wildcard constraint that admits these names; none where the list is empty."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    query=one_of(QUERIES),
    variant=one_of(layout.config.unlearn),
    method=one_of(layout.config.score.methods),
    k=r"\d+",
    shard=r"\d+",
    draw=r"draw\d+",
    features=one_of(FEATURES),


def log_file(stage, *names):
    return os.path.join("logs", layout.name, stage, *names) + ".log"


def benchmark_file(stage, *names):
    return layout.timing(stage, *names)


def shaped_by(stages, *keys, **more):
    """What a job's results hang on beside its input files, as text Snakemake compares between runs.

    Args:
        stages: the stages whose code runs in the job; their versions count.
        keys: sections of the config, or (section, key) where the job reads one key alone.
        more: anything else by name.
    """
    settings = layout.config.model_dump(mode="json")
    for section, key in MECHANICS:
        settings[section].pop(key, None)
    values = {}
    for key in keys:
        path = (key,) if isinstance(key, str) else key
        value = settings
        for part in path:
            value = value[part]
        values["/".join(path)] = value
    versions = {stage: VERSIONS[stage] for stage in stages.split()}
    return json.dumps({"versions": versions, "config": values, **more}, sort_keys=True)


def own_image(query):
    """The files behind a query from elsewhere: the user's image, a release's; none where it is generated."""
    if published := layout.config.given_query(query):
        entry, number = published
        files = given.query_files(entry.given, entry.name)
        return [*files.values(), given.query_image(entry.given, entry.name, number)]
    own = layout.config.image_query(query)
    return [own.image] if own else []


def settings_of_region(query):
    """What the config says of the region that a query is."""
    return layout.config.synthesize.regions[layout.config.region(query)[1]]


def given_fisher(curvature):
    """The file of a release that a curvature is taken from; none where it is estimated."""
    folder = layout.config.fit.given
    return [given.fitted_file(folder, curvature)] if folder else []


def measured(model, query):
    """What a model says of a query; a user's own image cannot be regenerated."""
    files = layout.measure(*model, query)
    return [files["losses"]] if query in OWN_IMAGES else list(files.values())


def measures(query):
    """What every model says of a query."""
    return [
        path
        for model in layout.measured_models(query)
        for path in measured(model, query)
    ]


MEASURED_AT_ONCE = [layout.losses(*model) for model in layout.asked_at_once()]


REGENERATED = list(layout.config.unlearn) if layout.config.evaluate.others else []


def shards(scan):
    """The parts a scan is put together from; none where one job makes it all."""
    count = layout.config.scan.shards
    return [layout.scan_shard(scan, shard) for shard in range(count) if count > 1]


def scores(query):
    """The score tables of every method for a query."""
    return [layout.score(method, query) for method in layout.config.score.methods]


def fitted(variant):
    """The file with the curvature a variant steps by and its report; none where it has none."""
    return layout.fitted(layout.config.unlearn[variant].curvature)


# Customised models by what they are for; none in most experiments.
CONCEPTS = (
    concepts.names(layout.config.customize, layout.config.seed)
    if layout.config.customize
    else {"test": [], "validation": [], "train": []}
)
MODELS = [model for part in CONCEPTS.values() for model in part]


def given_for(model):
    """Files of one's own that a customised model is made from."""
    return concepts.given_files(layout.config.customize, model)


def ranking_inputs():
    """What the methods need of the base set once: its curvatures and features, which all customised models share."""
    features = registry.methods_features(layout)
    images = [layout.features(name) for name in features if name.startswith("image-")]
    return sorted(layout.all_fitted()) + images


# With retrain.stack, one job makes all models of a set.
STACKED = layout.retraining_sets() if layout.config.retrain.stack > 1 else {}


def told(models):
    """What is kept of trained models."""
    kept = []
    for model in models:
        if model in layout.shared_models():
            kept.append(layout.retrained(*model))
            continue
        at_once = model in layout.asked_at_once()
        kept += [layout.losses(*model)] if at_once else measured(model, model[2])
        if layout.config.retrain.keep_weights:
            kept.append(layout.retrained(*model))
    return kept
