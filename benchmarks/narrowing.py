"""``python -m benchmarks.narrowing QUERY ...``: what a narrowed scan finds against two full scans of 100 draws.

The references are independent of each other and of the narrowed scan: each has its own (t, ε). What is asked:
does a narrowed scan agree with a reference as well as another reference does, and how well does a plain scan of
few draws? Writes ``narrowing.csv`` and ``draws.csv``, a row per query, for the queries whose references are
there. A reference takes 100 evaluations per image and model; finished ones are kept in ``benchmarks/references``, and
one command per core, with different queries, may run side by side.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from forgetrace.artifacts import fingerprint, read_array, sha256_of, stage_versions, write_array
from forgetrace.attribution.narrowing import balanced_means, narrow
from forgetrace.attribution.scan import scan_losses, scan_noise
from forgetrace.config import Narrowing
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.inference import for_inference
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank, even_timesteps
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout, load_layout

REFERENCES, DRAWS, TOPS = ("reference A", "reference B"), 100, (200, 20)
BASE = "base"


class Scans:
    """Losses of θ0 and of the model that unlearned a query, under any bank of noise; kept once finished."""

    def __init__(self, layout: Layout, variant: str, folder: Path):
        self.layout, self.variant, self.folder = layout, variant, folder
        self.encoded, self.scheduler = load_encoded(layout), load_scheduler(layout)
        self.device = pick_device("auto")
        self.common = [sha256_of(layout.weights), sha256_of(layout.latents)]  # of every name; read in full, so once

    def bank(self, purpose: str) -> NoiseBank:
        """A reference's noise."""
        seed, length = self.layout.config.seed, self.scheduler.config.num_train_timesteps
        timesteps = even_timesteps(seed, purpose, DRAWS, length)
        return NoiseBank(seed, purpose, timesteps, tuple(self.encoded.latents.shape[1:]))

    def weights(self, model: str) -> str:
        """The weights of θ0, or those that unlearned a query."""
        return self.layout.weights if model == BASE else self.layout.unlearned(self.variant, model)["weights"]

    def file(self, model: str, bank: NoiseBank) -> Path:
        """Where a model's losses (N, T) under a bank are kept; the name says what they hang on."""
        base, latents = self.common
        made_of = [base, sha256_of(self.weights(model)), latents]
        key = fingerprint([*made_of, bank.seed, bank.purpose, bank.timesteps.tolist(), stage_versions("scan")])
        return self.folder / f"{model}-{key[:16]}.npy"

    def judgeable(self, query: str) -> bool:
        """Whether a query's references are there."""
        files = [self.file(query, self.bank(purpose)) for purpose in REFERENCES if Path(self.weights(query)).exists()]
        return bool(files) and all(path.exists() for path in files)

    def full(self, model: str, bank: NoiseBank) -> np.ndarray:
        """Losses of all images under all draws, (N, T)."""
        path = self.file(model, bank)
        if not path.exists():
            losses = self.empty(bank)
            self.scanner(model, bank, losses)(np.arange(len(losses)), None)
            write_array(path, losses)
        return read_array(path)

    def empty(self, bank: NoiseBank) -> np.ndarray:
        """Nothing scanned yet."""
        return np.full((len(self.encoded), len(bank.timesteps)), np.nan, dtype=np.float32)

    def scanner(self, model: str, bank: NoiseBank, losses: np.ndarray):
        """The function that fills in losses of given images and draws."""
        unet = for_inference(load_unet(self.layout, self.device, changed=self.weights(model)))
        batch = self.layout.config.scan.batch_size

        def evaluate(rows: np.ndarray, draws: np.ndarray | None) -> None:
            scan_losses(unet, self.scheduler, self.encoded, bank, losses, batch, rows, draws)

        return evaluate


def narrowed_scores(scans: Scans, query: str, settings: Narrowing) -> tuple[np.ndarray, float]:
    """Scores (N,) of a narrowed scan as the stage makes it, and its evaluations per image."""
    config = scans.layout.config
    config = config.model_copy(update={"scan": config.scan.model_copy(update={"narrowing": settings})})
    bank = scan_noise(replace(scans.layout, config=config), scans.encoded, scans.scheduler)
    before, after = scans.full(BASE, bank), scans.empty(bank)
    narrow(settings, before, after, scans.scanner(query, bank, after))
    return balanced_means(after.astype(float) - before), float((~np.isnan(after)).sum() / len(after))


def increases(scans: Scans, query: str) -> list[np.ndarray]:
    """Both references' loss increases, (N, DRAWS) each."""
    banks = [scans.bank(purpose) for purpose in REFERENCES]
    return [scans.full(query, bank).astype(float) - scans.full(BASE, bank) for bank in banks]


def overlap(scores: np.ndarray, others: np.ndarray, count: int) -> float:
    """Share of the top ``count`` that two scores (N,) have in common."""
    tops = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (scores, others)]
    return len(tops[0] & tops[1]) / count


def judged(scans: Scans, query: str, settings: Narrowing) -> dict:
    """A row of ``narrowing.csv``: mean overlaps with the references, and those of the references."""
    references = [values.mean(axis=1) for values in increases(scans, query)]
    scores, evaluations = narrowed_scores(scans, query, settings)
    row = {"query": query, "evaluations_per_image": evaluations}
    for top in TOPS:
        row[f"overlap{top}"] = np.mean([overlap(scores, reference, top) for reference in references])
        row[f"reference_overlap{top}"] = overlap(*references, top)
    return row


def noise_of_plain_scans(scans: Scans, query: str) -> Iterator[dict]:
    """Rows of ``draws.csv``: overlap of the first draws of one reference with all of the other, both ways."""
    both = increases(scans, query)
    for draws in (5, 10, 20, 50, DRAWS):
        pairs = [(some[:, :draws].mean(axis=1), other.mean(axis=1)) for some, other in (both, both[::-1])]
        yield {"query": query, "draws": draws} | {
            f"overlap{top}": np.mean([overlap(*pair, top) for pair in pairs]) for top in TOPS
        }


def main() -> None:
    """Make what is missing for the named queries, then both tables for all queries with references."""
    parser = argparse.ArgumentParser(prog="benchmarks.narrowing", description=__doc__)
    parser.add_argument("queries", nargs="*", metavar="query")
    parser.add_argument("--config", default="config/digits-benchmark.yaml")
    parser.add_argument("--variant", default="unlearn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks"), help="where the tables go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layout = load_layout(options.config)
    scans = Scans(layout, options.variant, Path("benchmarks", "references"))
    for query in options.queries:
        increases(scans, query)
    present = [query for query in layout.config.queries() if scans.judgeable(query)]
    rows = [judged(scans, query, Narrowing()) for query in present]
    pd.DataFrame(rows).round(4).to_csv(options.folder / "narrowing.csv", index=False)
    noise = [row for query in present for row in noise_of_plain_scans(scans, query)]
    pd.DataFrame(noise).round(4).to_csv(options.folder / "draws.csv", index=False)
    print(pd.DataFrame(rows).mean(numeric_only=True).round(3).to_string())


if __name__ == "__main__":
    main()
