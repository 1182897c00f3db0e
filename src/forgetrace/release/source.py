"""The folders that AttributeByUnlearning and FastGDA publish: which files they have, by what they are.

Neither says what it is; they are told apart by the names of their files.
"""

from dataclasses import dataclass
from pathlib import Path

from forgetrace.artifacts import UserError
from forgetrace.datasets import coco

CAPTIONS = coco.CAPTIONS  # of every image, the first five
EKFAC = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")


@dataclass(frozen=True)
class QueryFiles:
    """A set of Q published queries.

    Attributes:
        name: what their names begin with in an experiment.
        latents: array (Q, C, H, W).
        prompts: array (Q, 1, tokens, width), token states.
        images: folder of ``<number>.png``.
        texts: a prompt per line; None where the prompts are not published.
    """

    name: str
    latents: Path
    prompts: Path
    images: Path
    texts: Path | None = None

    def image(self, number: int) -> Path | None:
        """The image of a query, None where it is missing."""
        names = (f"{number}.png", f"{number:06d}.png")
        return next((self.images / name for name in names if (self.images / name).is_file()), None)

    def files(self) -> list[Path]:
        """All that must be there beside the images."""
        return [path for path in (self.latents, self.prompts, self.texts) if path]


@dataclass(frozen=True)
class Release:
    """Files of a release.

    Attributes:
        kind: the project it is of.
        data: folder of COCO's annotations and images.
        latents: array (2N, C, H, W), unflipped before flipped.
        captions: array (N, 5, tokens, width), token states.
        model: state dict of the UNet.
        curvature: what its Fisher information is, ``diagonal`` or ``ekfac``.
        fisher: the files of that.
        queries: sets of queries, one at least.
    """

    kind: str
    data: Path
    latents: Path
    captions: Path
    model: Path
    curvature: str
    fisher: list[Path]
    queries: list[QueryFiles]

    @property
    def annotations(self) -> Path:
        """The list of the images with their captions."""
        return self.data / coco.FILES[0]

    def files(self) -> list[Path]:
        """Every file a conversion reads, images excepted."""
        own = [self.annotations, self.latents, self.captions, self.model, *self.fisher]
        return own + [path for queries in self.queries for path in queries.files()]


def recognise(folder: Path) -> Release:
    """The release in a folder.

    Raises:
        UserError: it is neither, or files are missing; names all of them.
    """
    layouts = {"fastgda": folder / "trainset", "abu": folder / "coco17_train_latents.npy"}
    found = [kind for kind, mark in layouts.items() if mark.exists()]
    if len(found) != 1:
        marks = " and ".join(str(mark) for mark in layouts.values())
        raise UserError(
            f"{folder} is no release that forgetrace knows, which holds either trainset/ (FastGDA's data/coco) or "
            f"coco17_train_latents.npy (AttributeByUnlearning's data/mscoco), and there is "
            f"{'neither' if not found else f'both {marks}'}: name the folder of one of them."
        )
    release = {"fastgda": _fastgda, "abu": _abu}[found[0]](folder)
    if missing := [path for path in release.files() if not path.is_file()]:
        raise UserError(
            f"{folder} looks like {release.kind}'s release, but lacks {', '.join(map(str, missing))}: download what is "
            "missing to where it stands there, then run again."
        )
    return release


def _abu(folder: Path) -> Release:
    sampled = QueryFiles(
        "sample",
        folder / "coco17_sample_latents.npy",
        folder / "coco17_sample_text_embeddings.npy",
        folder / "sample",
        folder / "sample_caption.txt",
    )
    generated = QueryFiles("sample", folder / "latents.npy", folder / "text_embeddings.npy", folder / "images")
    return Release(
        kind="AttributeByUnlearning",
        data=folder,
        latents=folder / "coco17_train_latents.npy",
        captions=folder / "coco17_train_text_embeddings.npy",
        model=folder / "model.bin",
        curvature="diagonal",
        fisher=[folder / "fisher_info.pt"],
        queries=[generated if generated.latents.exists() and not sampled.latents.exists() else sampled],
    )


def _fastgda(folder: Path) -> Release:
    data, sets = folder / "trainset", []
    for name in ("test", "train"):
        place = folder / f"query_{name}"
        if place.is_dir() or (name == "test" and not (folder / "query_train").is_dir()):
            sets.append(QueryFiles(name, place / "latents.npy", place / "text_embeddings.npy", place / "images"))
    return Release(
        kind="FastGDA",
        data=data,
        latents=data / "latents.npy",
        captions=data / "text_embeddings.npy",
        model=folder / "model.bin",
        curvature="ekfac",
        fisher=[folder / "ekfac_fisher" / f"{part}.safetensors" for part in EKFAC],
        queries=sets,
    )
