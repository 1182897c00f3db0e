"""A customised model as an experiment of its own: its exemplars stand beside the base set as training images.

Every attribution method then serves it as it is. The files are made from those of the base experiment and of the
customised model when they are needed, below the folder of checkpoints, and removed when all methods have ranked; what
the base set has in common with other models (Fisher information, features of an image encoder) is taken over.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_array,
    read_arrays,
    read_image,
    read_json,
    read_table,
    read_tensors,
    sha256_of,
    stage_versions,
    write_array_in_parts,
    write_arrays,
    write_image,
    write_json,
    write_table,
    write_tensors,
)
from forgetrace.attribution.image_features import EncodedImages
from forgetrace.attribution.registry import all_features
from forgetrace.config import Config, ImageQuery
from forgetrace.datasets.concepts import names, of_concept, query_manners
from forgetrace.datasets.images import images_folder
from forgetrace.layout import Layout
from forgetrace.unlearning.sweep import Subject
from forgetrace.unlearning.variants import read_query

AT_ONCE = 2**10  # rows of a base file in memory


@dataclass(frozen=True)
class Candidates(Layout):
    """Files of the experiment in which a customised model's exemplars are training images.

    Attributes:
        base: the experiment the model was customised in.
        concept: the model's name.
    """

    base: Layout
    concept: str

    @property
    def root(self) -> str:
        """Folder of what is needed until all methods have ranked."""
        return self.base.checkpoints(f"retrieve/{self.concept}")

    @property
    def architecture(self) -> str:
        """That of θ0."""
        return self.base.architecture

    @property
    def scheduler(self) -> str:
        """That of θ0."""
        return self.base.scheduler

    def fitted(self, curvature: str) -> list[str]:
        """The base model's curvature (AbU's setting for customised models)."""
        return self.base.fitted(curvature)

    def score(self, method: str, query: str) -> str:
        """Kept when all else is removed."""
        return self.base.retrieved(self.concept, method, query)

    def asking(self, queries: list[str]) -> "Candidates":
        """The same with some of its queries."""
        kept = [query for query in self.config.synthesize.queries if query.name in queries]
        synthesize = self.config.synthesize.model_copy(update={"queries": kept})
        return replace(self, config=self.config.model_copy(update={"synthesize": synthesize}))


def candidates(layout: Layout, model: str, methods: list[str]) -> Candidates:
    """Make the files of a customised model's experiment.

    Args:
        layout: the experiment; the model was customised in it.
        model: its name.
        methods: of the experiment's, those that will rank.
    """
    files = layout.customized(model)
    record = read_json(files["record"])
    own = Candidates(layout.name, _config(layout, record, methods), layout, model)
    key = fingerprint(
        [
            provenance({}, files | {"base": layout.encode_manifest, "weights": layout.weights}),
            own.config.model_dump(mode="json"),
            # What is found half-done was made with these too.
            stage_versions("fit", "unlearn", "scan", "score"),
            [sha256_of(path) for path in _curvatures(own)],
        ]
    )
    _clear_others(own, key)
    _write_encoded(own, read_arrays(files["exemplars"]), record)
    # Without where it is from: scores hang on this file's hash, and the model is the same when images are added to it.
    write_tensors(own.weights, read_tensors(layout.weights) | read_tensors(files["weights"]), {})
    arrays = read_arrays(files["queries"])
    for i, query in enumerate(entry["query"] for entry in record["queries"]):
        if query not in own.config.queries():
            continue
        own_files = own.query(query)
        tensors = {"latent": arrays["latents"][i], "prompt": arrays["prompts"][i]}
        if "initial_noise" in arrays:  # unknown of images that were given
            tensors["initial_noise"] = arrays["initial_noise"][i]
        write_arrays(own_files["tensors"], tensors, {})
        write_image(own_files["image"], read_image(layout.customized_image(model, query)))
        write_json(own_files["record"], record["queries"][i])
    for features in all_features(own).values():
        if isinstance(features, EncodedImages):
            _write_features(own, features)
        else:
            features.fit()
    return own


def validation_images(layout: Layout, count: int) -> list[tuple[str, str]]:
    """So many images of validation models to choose settings on, as (model, query), spread over models and prompts.

    Raises:
        UserError: the config has no validation models, or fewer images of them.
    """
    settings = layout.config.customize
    models = names(settings, layout.config.seed)["validation"]
    made = [of_concept(query_manners(settings, model)) for model in models]
    # In rounds over the models, each with another prompt than its neighbours.
    images = [
        (models[i], own[(turn + i) % len(own)])
        for turn in range(max(map(len, made), default=0))
        for i, own in enumerate(made)
        if turn < len(own)
    ]
    if count > len(images):
        raise UserError(
            f"--queries {count}: validation models make {len(images)} images; lower it, or have more of these models."
        )
    step = max(1, len(models) // count)  # fewer images than models: of all kinds
    return images[: count * step : step]


def validation_subjects(layout: Layout, count: int) -> list[Subject]:
    """The images of :func:`validation_images`, each in the experiment of its own model.

    Their experiments are left in place; :func:`discard` removes one.
    """
    subjects = []
    for model, query in validation_images(layout, count):
        own = candidates(layout, model, [])
        subjects.append(Subject(own, read_query(own, query)))
    return subjects


def discard(own: Candidates) -> None:
    """Remove what only the ranking needed."""
    shutil.rmtree(own.root, ignore_errors=True)


def exemplar_ids(model: str, count: int) -> list[str]:
    """Image ids of a model's exemplars among its candidates."""
    return [f"{model}-exemplar-{i:02d}" for i in range(count)]


def exemplar_files(layout: Layout, model: str, count: int) -> list[str]:
    """Their files, relative to the base set's folder as those of all images are."""
    images = [layout.customized_image(model, f"exemplar-{i:02d}") for i in range(count)]
    # Of links what they lead to: from a folder behind one, '..' leads elsewhere.
    folder = os.path.realpath(images_folder(layout))
    return [Path(os.path.relpath(os.path.realpath(image), folder)).as_posix() for image in images]


def _config(layout: Layout, record: dict, methods: list[str]) -> Config:
    """The experiment's config with the model's queries and some of the methods."""
    config = layout.config
    listed = [(entry["query"], entry["prompt"]) for entry in record["queries"]]
    queries = [
        ImageQuery(name=name, image=layout.customized_image(record["model"], name), prompt=prompt)
        for name, prompt in listed
    ]
    return config.model_copy(
        update={
            "synthesize": config.synthesize.model_copy(update={"queries": queries}),
            "score": config.score.model_copy(
                update={"methods": {name: config.score.methods[name] for name in methods}}
            ),
            "learn": None,  # from images of many models, not of this one
        }
    )


def _curvatures(own: Candidates) -> list[str]:
    """Those there are of the ones its methods weigh by."""
    return [path for kind in own.config.curvatures() for path in own.fitted(kind)[:1] if Path(path).exists()]


def _clear_others(own: Candidates, key: str) -> None:
    """Start anew where an interrupted run was of another model, config or data."""
    marker = Path(own.root, "key")
    if not marker.exists() or marker.read_text() != key:
        shutil.rmtree(own.root, ignore_errors=True)
        marker.parent.mkdir(parents=True)
        marker.write_text(key)


def _write_encoded(own: Candidates, exemplars: dict[str, np.ndarray], record: dict) -> None:
    """Latents, captions and index of the base set and behind them the exemplars."""
    base, count = own.base, len(record["exemplars"])
    index = read_table(base.index)
    latents, captions = read_array(base.latents, mmap=True), read_array(base.captions, mmap=True)
    orientations = len(latents) // len(index)
    parts = []
    for i in range(orientations):
        parts += [*_parts(latents[i * len(index) : (i + 1) * len(index)])]
        parts += [exemplars["latents"][i * count : (i + 1) * count]]
    rows = len(latents) + orientations * count
    write_array_in_parts(own.latents, (rows, *latents.shape[1:]), parts, str(latents.dtype))
    # The empty caption stays the last.
    states = chain(_parts(captions[:-1]), [exemplars["states"], captions[-1:]])
    write_array_in_parts(own.captions, (len(captions) + count, *captions.shape[1:]), states, str(captions.dtype))
    caption_rows = list(range(len(captions) - 1, len(captions) - 1 + count))
    more = pd.DataFrame(
        {
            "image_id": exemplar_ids(own.concept, count),
            "file_name": exemplar_files(base, own.concept, count),
            "caption": record["exemplars"],
            "caption_row": caption_rows,
        }
    )
    if "caption_rows" in index:
        more["caption_rows"] = [[row] for row in caption_rows]
    write_table(own.index, pd.concat([index, more], ignore_index=True))
    written = {"latents": own.latents, "captions": own.captions, "index": own.index}
    hashes = {role: sha256_of(path) for role, path in written.items()}
    manifest = read_json(base.encode_manifest)
    changed = {"images": len(index) + count, "source": fingerprint([manifest["source"], hashes]), "sha256": hashes}
    write_json(own.encode_manifest, manifest | changed)


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """A memory-mapped array, so many rows at a time."""
    for start in range(0, len(array), AT_ONCE):
        yield array[start : start + AT_ONCE]


def _write_features(own: Candidates, features: EncodedImages) -> None:
    """What an image encoder makes of the base set, which all models share, and of the exemplars."""
    kept = EncodedImages(own.base, features.encoder).kept()
    more = features.of_training_images(first=len(kept))
    shape = (len(kept) + len(more), kept.shape[1])
    write_array_in_parts(own.features(features.name), shape, chain(_parts(kept), [more]))
    write_json(own.features_record(features.name), features.made_by())
