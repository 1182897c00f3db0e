"""An experiment as one validated object; nothing here imports torch.

``config/<experiment>.yaml`` holds one section per stage. The JSON schema Snakemake validates against
and the key tables of ``config/README.md`` are generated from these models (``forgetrace schema``),
so a key is described once, in the module of its section; what is used elsewhere is named here.
"""

from forgetrace.config.base import (
    BUNDLED,
    CEILING,
    HALF_SET,
    LEARNED,
    MANNERS,
    NAME,
    NEW_TOKEN,
    PLAIN,
    RANDOM,
    SEED_SET,
    STEP,
    Box,
    Name,
    Positive,
    Section,
    Share,
    Subset,
)
from forgetrace.config.concepts import GivenConcept, read_concepts
from forgetrace.config.customized import Costly, Counts, Customize, Learn, PromptSet, Retrieve
from forgetrace.config.data import Encode, Prepare
from forgetrace.config.experiment import Config, load_config, parse_config, quoted
from forgetrace.config.proof import Evaluate, Figures, Retrain
from forgetrace.config.queries import GivenQueries, ImageQuery, PoolQueries, Region, Synthesize
from forgetrace.config.scores import PROCEDURES, Fit, Method, Narrowing, Scan, Score, Variant
from forgetrace.config.training import ARCHITECTURE, NEEDED, RECIPE, Train

__all__ = [
    "ARCHITECTURE",
    "BUNDLED",
    "CEILING",
    "HALF_SET",
    "LEARNED",
    "MANNERS",
    "NAME",
    "NEEDED",
    "NEW_TOKEN",
    "PLAIN",
    "PROCEDURES",
    "RANDOM",
    "RECIPE",
    "SEED_SET",
    "STEP",
    "Box",
    "Config",
    "Costly",
    "Counts",
    "Customize",
    "Encode",
    "Evaluate",
    "Figures",
    "Fit",
    "GivenConcept",
    "GivenQueries",
    "ImageQuery",
    "Learn",
    "Method",
    "Name",
    "Narrowing",
    "PoolQueries",
    "Positive",
    "Prepare",
    "PromptSet",
    "Region",
    "Retrain",
    "Retrieve",
    "Scan",
    "Score",
    "Section",
    "Share",
    "Subset",
    "Synthesize",
    "Train",
    "Variant",
    "load_config",
    "parse_config",
    "quoted",
    "read_concepts",
]
