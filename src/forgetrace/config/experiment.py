"""A whole config, read from its file and checked."""

import re
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator

from forgetrace.artifacts import UserError
from forgetrace.config.base import LEARNED, Name, Section, unused
from forgetrace.config.customized import Customize, Learn, Retrieve
from forgetrace.config.data import Encode, Prepare
from forgetrace.config.proof import Evaluate, Figures, Retrain
from forgetrace.config.queries import GivenQueries, ImageQuery, PoolQueries, Synthesize
from forgetrace.config.scores import Fit, Scan, Score, Variant
from forgetrace.config.training import Train


class Config(Section):
    """One experiment."""

    seed: int = Field(0, ge=0, description="Seed every random number of the experiment derives from.")
    prepare: Prepare = Prepare()
    encode: Encode = Encode()
    train: Train = Train()
    synthesize: Synthesize = Synthesize()
    fit: Fit = Fit()
    unlearn: dict[Name, Variant] = Field({}, description="Unlearning variants by name.")
    scan: Scan = Scan()
    score: Score
    retrain: Retrain = Retrain()
    evaluate: Evaluate = Evaluate()
    figures: Figures = Figures()
    # Younger than finished results, which hang on none of these.
    customize: Customize | None = Field(None, exclude_if=unused)
    retrieve: Retrieve | None = Field(None, exclude_if=unused)
    learn: Learn | None = Field(None, exclude_if=unused)

    @model_validator(mode="after")
    def _customised(self):
        if not self.customize:
            if asked := [key for key in ("retrieve", "learn") if getattr(self, key)]:
                raise ValueError(f"{asked[0]}: there are no customised models; give the section customize or remove it")
            return self
        for method in self.retrieve.costly.methods if self.retrieve else []:
            if method not in self.score.methods:
                raise ValueError(f"retrieve.costly.methods: '{method}' is not one of score.methods")
        if self.learn:
            if LEARNED in self.score.methods:
                raise ValueError(f"score.methods.{LEARNED}: the name belongs to the section learn; choose another")
            for part in () if self.customize.given else ("train", "validation"):
                counts = sum(getattr(getattr(self.customize, f"{kind}s"), part) for kind in self.learn.kinds)
                if counts < 2:
                    raise ValueError(f"learn: needs two {part} models at least, of the kinds {self.learn.kinds}")
        if self.retrain.methods or self.retrain.subsets or self.retrain.pools:
            raise ValueError("retrain: customised models are judged by their exemplars; remove its keys")
        return self

    @property
    def leaves_out(self) -> bool:
        """Whether models are trained without some images: not where none can be, nor beside customised ones."""
        return self.train.trains and not self.customize

    @model_validator(mode="after")
    def _step_sizes(self):
        unknown = self.train.pretrained and "learning_rate" not in self.train.model_fields_set
        for name, variant in self.unlearn.items():
            if variant.step_size is None:
                if unknown:
                    raise ValueError(
                        f"unlearn.{name}.step_size: it is a tenth of the learning rate θ0 was trained with, which "
                        "nobody knows of train.pretrained; give step_size"
                    )
                rate = self.train.learning_rate / 10  # MUCS, section 4
                self.unlearn[name] = variant.model_copy(update={"step_size": rate})
        return self

    @model_validator(mode="after")
    def _coherent(self):
        if not self.train.trains and (
            asked := [k for k in ("methods", "subsets", "pools") if getattr(self.retrain, k)]
        ):
            raise ValueError(
                f"retrain.{asked[0]}: models without some images cannot be trained: {self.train.lacks}; or remove the "
                "key"
            )
        for method in self.retrain.methods:
            if method not in self.score.methods:
                raise ValueError(f"retrain.methods: '{method}' is not one of score.methods")
        if self.evaluate.reference and self.evaluate.reference not in self.score.methods:
            raise ValueError(f"evaluate.reference: '{self.evaluate.reference}' is not one of score.methods")
        for key in ("methods", "k", "pooled_k"):
            values = getattr(self.retrain, key)
            if len(set(values)) != len(values):
                raise ValueError(f"retrain.{key}: an entry occurs twice")
        for key, count in (
            ("scan.timesteps", 0 if self.scan.narrowing else self.scan.timesteps),
            ("synthesize.sampler_steps", self.synthesize.sampler_steps),
        ):
            if count > self.train.timesteps:
                raise ValueError(f"{key}: {count} is more than train.timesteps = {self.train.timesteps}")
        narrowing = self.scan.narrowing
        if narrowing and self.encode.flips:
            raise ValueError("scan.narrowing: not with encode.flips, whose images have two scores each; remove one")
        for key in ("k", "pooled_k") if narrowing else ():
            if missing := [k for k in getattr(self.retrain, key) if k not in narrowing.tops]:
                raise ValueError(f"scan.narrowing.tops: {missing[0]} of retrain.{key} is not among them")
        names = self.queries()
        if bool(names) == bool(self.customize):
            raise ValueError(
                "'synthesize.queries': " + ("give none ([]), customize names its own" if names else "give one at least")
            )
        self._check_given()
        self._check_regions()
        if self.evaluate.others and not (self.unlearn and self.forgotten_queries()):
            raise ValueError("evaluate.others: there is no unlearning variant, or no generated query, to look at")
        self._check_judged(names)
        if self.retrain.pools > len(self.judged_images()):
            raise ValueError(f"retrain.pools: only {len(self.judged_images())} query images are judged")
        if bool(self.retrain.pools) != bool(self.retrain.pooled_k):
            raise ValueError("retrain.pools and retrain.pooled_k go together")
        if taken := [name for name in names if re.fullmatch(r"(draw|pool)\d+", name)]:
            raise ValueError(f"synthesize.queries: the name '{taken[0]}' belongs to models of the evaluation")
        if len(set(names)) != len(names):
            raise ValueError("synthesize.queries: two queries have the same name")
        for pool in self.synthesize.queries:
            if not isinstance(pool, PoolQueries):
                continue
            size = getattr(self.prepare, f"{pool.pool}_captions")
            if pool.count > size:
                raise ValueError(
                    f"synthesize.queries: the pool '{pool.pool}' has only {size} captions, not {pool.count}"
                )
        return self

    def _check_judged(self, names: list[str]) -> None:
        """Refuse more queries to judge than there are, unknown ones, and one twice."""
        asked = self.retrain.queries
        if not isinstance(asked, list):
            if (asked or 0) > len(names):
                raise ValueError(f"retrain.queries: the experiment has only {len(names)}")
            return
        _refuse_unknown("retrain.queries", asked, names)
        if len(set(asked)) != len(asked):
            raise ValueError("retrain.queries: a query occurs twice")

    def _check_regions(self) -> None:
        """Refuse regions of unknown queries, and precision where nothing tells what is in a region."""
        for name, region in self.synthesize.regions.items():
            _refuse_unknown(f"synthesize.regions.{name}.queries", region.queries or [], self.whole_queries())
        if self.evaluate.precision_k and (
            self.prepare.dataset != "digit-pairs" or set(self.synthesize.regions) != {"left", "right"}
        ):
            raise ValueError(
                "evaluate.precision_k: only the dataset digit-pairs says what is in which part of an image, for the "
                "regions left and right; remove the key"
            )

    def _check_given(self) -> None:
        """Refuse what published latents and token states cannot serve."""
        if not self.encode.given:
            return
        if self.prepare.tuning_captions or self.prepare.report_captions:
            raise ValueError(
                "encode.given: all images are in it, none can be held out; set prepare.tuning_captions and "
                "prepare.report_captions to 0"
            )
        if self.encode.pipeline:
            return
        own = next((entry.name for entry in self.synthesize.queries if isinstance(entry, ImageQuery)), None)
        empty = "the state of the empty caption is not in encode.given"
        for refused, what in (
            (own, f"synthesize.queries: the image '{own}' cannot be encoded with encode.given alone"),
            (self.synthesize.guidance != 1, f"synthesize.guidance: {empty}; leave guidance at 1"),
            (self.evaluate.others, f"evaluate.others: nothing can be generated, {empty}"),
            (self.train.trains and self.train.caption_dropout, f"train.caption_dropout: {empty}; set it to 0"),
        ):
            if refused:
                raise ValueError(f"{what}, or name the Stable Diffusion pipeline it was made with in encode.pipeline")

    def queries(self) -> list[str]:
        """Names of all queries, in the order of the config; those of its regions follow a query."""
        return [name for whole in self.whole_queries() for name in (whole, *self.regions_of(whole).values())]

    def whole_queries(self) -> list[str]:
        """Names of the queries that are whole images, in the order of the config."""
        return [name for entry in self.synthesize.queries for name in entry.names()]

    def regions_of(self, whole: str) -> dict[str, str]:
        """The queries that are regions of a whole image, by the region's name."""
        regions = self.synthesize.regions.items()
        return {name: f"{whole}-{name}" for name, region in regions if not region.queries or whole in region.queries}

    def region(self, query: str) -> tuple[str, str] | None:
        """The whole query and the name of the region that a query stands for; None of a whole image."""
        if not self.synthesize.regions or query in (wholes := self.whole_queries()):
            return None
        found = ((whole, name) for whole in wholes for name, own in self.regions_of(whole).items() if own == query)
        return next(found, None)

    def whole(self, query: str) -> str:
        """The query whose image a query is a region of; of a whole image, itself."""
        region = self.region(query)
        return region[0] if region else query

    def judged_queries(self) -> list[str]:
        """Names of the queries with leave-K-out models; none where no model can be trained."""
        if not self.leaves_out:
            return []
        asked = self.retrain.queries
        return asked if isinstance(asked, list) else self.queries()[:asked]

    def judged_images(self) -> list[str]:
        """The whole queries that judged queries are, or are regions of."""
        return list(dict.fromkeys(map(self.whole, self.judged_queries())))

    def origin(self, query: str) -> str:
        """Where a query is from: its caption pool (tuning or report), ``own`` for an image that was given."""
        return self.whole(query).rpartition("-")[0] if self.generates(query) else "own"

    def reported_queries(self) -> list[str]:
        """Names of the queries of the report pool, on which methods are compared; of all where there are none."""
        return [query for query in self.queries() if self.origin(query) == "report"] or self.queries()

    def forgotten_queries(self) -> list[str]:
        """Names of the reported queries that are generated again after unlearning; a given image cannot be."""
        return [query for query in self.reported_queries() if self.generates(query)]

    def curvatures(self) -> list[str]:
        """Those that variants step by and influence functions invert, in order of name."""
        methods = self.score.methods.items()
        inverted = {own.curvature or "diagonal" for name, own in methods if (own.attributor or name) == "influence"}
        return sorted(({variant.curvature for variant in self.unlearn.values()} | inverted) - {"none"})

    def image_query(self, name: str) -> ImageQuery | None:
        """The user's image behind a query, or None where the query is another kind's."""
        name = self.whole(name)
        own = (q for q in self.synthesize.queries if isinstance(q, ImageQuery) and q.name == name)
        return next(own, None)

    def given_query(self, name: str) -> tuple[GivenQueries, int] | None:
        """The published set a query is from and its number there, or None where it is another kind's."""
        name = self.whole(name)
        sets = (entry for entry in self.synthesize.queries if isinstance(entry, GivenQueries))
        return next(((entry, entry.names().index(name)) for entry in sets if name in entry.names()), None)

    def generates(self, name: str) -> bool:
        """Whether a query is generated here, so that its initial noise is known and it can be generated again."""
        return not self.image_query(name) and not self.given_query(name)

    def digest_of(self, *sections: str) -> dict:
        """The named sections as plain data: what an output records of the config that made it."""
        plain = self.model_dump(mode="json")
        return {section: plain[section] for section in sections}


def load_config(path: str | Path) -> Config:
    """Read and validate ``config/<experiment>.yaml``.

    Raises:
        UserError: the file is missing, is no YAML mapping, or a key or value is wrong; the
            message names file and key.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read the config {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        where = re.sub(r"\s+", " ", str(error))
        raise UserError(f"{path} is not valid YAML: {where}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as 'train:' and 'score:', see config/README.md.")
    return parse_config(content, path)


def parse_config(content: dict, path: str | Path) -> Config:
    """Validate an already parsed config; ``path`` is only named in errors.

    Raises:
        UserError: one sentence per wrong key or value.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        lines = "; ".join(_sentence(problem) for problem in error.errors())
        raise UserError(f"{path}: {lines} (every key is explained in config/README.md).") from None


def _refuse_unknown(key: str, asked: list[str], known: list[str]) -> None:
    """Refuse queries that a key names and that are not among those it can name."""
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"{key}: there is no query '{unknown[0]}' (there are {', '.join(known)})")


def _sentence(problem: dict) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    message = problem["msg"].removeprefix("Value error, ")
    return f"'{key}': {message}" if key else message


def quoted(text: str) -> str:
    """Any text as YAML on one line, also within braces."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
