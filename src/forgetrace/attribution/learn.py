"""The ``learn`` stage: features learned on some customised models, chosen on others, judged on those of the tables.

Train, validation and test models are of different concepts. Validation decides when to stop (mean average precision of
the exemplars among all candidates) and what similarities are worth as probabilities.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from forgetrace.artifacts import provenance, read_image, read_json, read_table, write_json, write_table, write_tensors
from forgetrace.attribution.asked import manners_of
from forgetrace.attribution.calibration import Calibration, calibrate
from forgetrace.attribution.candidates import exemplar_ids
from forgetrace.attribution.heads import Heads, learning
from forgetrace.attribution.image_features import EncodedImages
from forgetrace.attribution.ranking import rank
from forgetrace.attribution.retrieve import RANKS
from forgetrace.config import LEARNED, PLAIN
from forgetrace.datasets import concepts
from forgetrace.diffusion.device import pick_device
from forgetrace.encoding.images import load_encoder
from forgetrace.layout import Layout

PROBABILITIES = ["model", "query", "image_id", "probability", "exemplar"]


@dataclass(frozen=True)
class Model:
    """A customised model by the features of its images.

    Attributes:
        name: its concept.
        queries: names of the q images it generated.
        exemplars: features, (n, width).
        generated: features of the queries, (q, width).
        asked: which of the queries ask for the concept; the others are controls.
    """

    name: str
    queries: list[str]
    exemplars: torch.Tensor
    generated: torch.Tensor
    asked: list[bool]

    def of_concept(self) -> "Model":
        """The same without controls."""
        queries = [query for query, asked in zip(self.queries, self.asked, strict=True) if asked]
        return replace(self, queries=queries, generated=self.generated[self.asked], asked=[True] * len(queries))


def learn(layout: Layout, device: str = "auto") -> None:
    """Write every file of ``layout.learned``.

    Raises:
        UserError: an image or a record of a customised model is missing, or the base set's features are.
    """
    config, files, settings = layout.config, layout.learned, layout.config.learn
    concepts.check_learnable(config.customize, config.seed, settings.kinds)
    parts = concepts.names(config.customize, config.seed)
    encoder = load_encoder(settings.encoder, pick_device(device))
    used = {
        part: [name for name in own if part == "test" or name.partition("-")[0] in settings.kinds]
        for part, own in parts.items()
    }
    models = {part: [read_model(layout, name, encoder) for name in own] for part, own in used.items()}
    about = {part: [model.of_concept() for model in own] for part, own in models.items()}
    ids = read_table(layout.index)["image_id"].tolist()
    base = torch.from_numpy(np.array(EncodedImages(layout, settings.encoder).kept()))
    heads, curve = fit_heads(layout, about, base, ids)
    made_by = provenance(config.digest_of("seed", "learn"), {"base": layout.encode_manifest})
    found = [(s, np.arange(len(s)) >= len(base)) for model in about["validation"] for s in similar(heads, model, base)]
    calibration, divergence = calibrate(found)
    write_tensors(files["heads"], heads.state_dict(), made_by)
    write_table(files["curve"], curve)
    write_json(
        files["calibration"],
        {
            "sharpness": calibration.sharpness,
            "cutoff": calibration.cutoff,
            "divergence": divergence,
            "made_by": made_by,
        },
    )
    write_table(files["probabilities"], probabilities(heads, calibration, about["test"], base, ids), made_by)
    write_table(files["ranks"], ranks(heads, models["test"], base, ids), made_by)


def read_model(layout: Layout, name: str, encoder) -> Model:
    """The features of a model's exemplars and generated images."""
    record = read_json(layout.customized(name)["record"])
    manners = manners_of(record)
    queries = list(manners)
    images = [f"exemplar-{i:02d}" for i in range(len(record["exemplars"]))] + queries
    features = encoder(np.stack([read_image(layout.customized_image(name, image)) for image in images]))
    exemplars, generated = torch.from_numpy(features.astype(np.float32)).split(
        [len(images) - len(queries), len(queries)]
    )
    asked = [manner != PLAIN for manner in manners.values()]
    return Model(name, queries, exemplars, generated, asked)


def similar(heads: Heads, model: Model, base: torch.Tensor) -> np.ndarray:
    """Similarity of each query to every candidate, the base set first; (q, N + n), float64."""
    return heads.similarities(model.generated, torch.cat([base, model.exemplars]))


def fit_heads(
    layout: Layout, models: dict[str, list[Model]], base: torch.Tensor, ids: list[str]
) -> tuple[Heads, pd.DataFrame]:
    """The heads at the step that is best on validation models, and the curve: step, ap."""
    settings, heads, rows = layout.config.learn, Heads(base.shape[1]), []
    pairs = [(model.exemplars, model.generated) for model in models["train"]]
    best, kept = -1.0, {}
    for step in learning(heads, pairs, settings, layout.config.seed):
        found = ranks(heads, models["validation"], base, ids)
        of_queries = [precision(own["rank"]) for _, own in found.groupby("query")]
        rows.append((step, float(np.mean(of_queries))))
        if rows[-1][1] > best:
            best, kept = rows[-1][1], {name: value.clone() for name, value in heads.state_dict().items()}
    heads.load_state_dict(kept)
    return heads, pd.DataFrame(rows, columns=["step", "ap"])


def precision(found: pd.Series) -> float:
    """Average precision of exemplars at the given ranks."""
    return float((np.arange(1, len(found) + 1) / np.sort(found)).mean())


def ranks(heads: Heads, models: list[Model], base: torch.Tensor, ids: list[str]) -> pd.DataFrame:
    """Where the exemplars of each query's model come, as every method's table has it."""
    rows = []
    for model in models:
        own = exemplar_ids(model.name, len(model.exemplars))
        for query, scores in zip(model.queries, similar(heads, model, base), strict=True):
            table = rank([*ids, *own], scores).set_index("image_id").loc[own]
            rows += [(model.name, query, LEARNED, *row) for row in table[["score", "rank"]].itertuples()]
    return pd.DataFrame(rows, columns=RANKS)


def probabilities(
    heads: Heads, calibration: Calibration, models: list[Model], base: torch.Tensor, ids: list[str]
) -> pd.DataFrame:
    """Of each query the exemplars and all candidates with a probability above 0."""
    tables = []
    for model in models:
        own = exemplar_ids(model.name, len(model.exemplars))
        for query, scores in zip(model.queries, similar(heads, model, base), strict=True):
            found, exemplar = calibration.probabilities(scores), np.arange(len(scores)) >= len(base)
            table = pd.DataFrame({"image_id": [*ids, *own], "probability": found, "exemplar": exemplar})
            tables.append(table[(found > 0) | exemplar].assign(model=model.name, query=query)[PROBABILITIES])
    return pd.concat(tables, ignore_index=True)
