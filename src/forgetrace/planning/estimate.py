"""``forgetrace plan``: hours, memory and disk of every stage, from its work and what a unit costs here."""

import os
import time
from collections.abc import Mapping
from datetime import timedelta

from forgetrace.artifacts import UserError
from forgetrace.attribution.registry import together
from forgetrace.encoding.check import check_data
from forgetrace.layout import Layout
from forgetrace.planning.calibrate import Unit, calibrate
from forgetrace.planning.work import Work, count

SMALL, LISTED, RANKED, DRAWN = 4096, 300, 21, 200_000  # bytes: small file, image in a list, in a ranking, figure
NOTES = """\
Wall time on {cores} cores: {wall}, if, after data and encoding, the base model is trained with random and seed
retrainings beside it, all else then fills the cores or lasts as long as one query's chain of jobs, and figures follow.
On a GPU, jobs take turns. Snakemake's own seconds are not counted. Memory is that of one job.
Finished results would be reused and are not subtracted.{uncounted}
Measured on {device} in {took:.0f} s, by one process:{rates}"""


def job_seconds(work: Work, units: Mapping[str, Unit]) -> float:
    """Seconds of one job of a stage; 0 where it has none."""
    own = [(units[unit], number) for unit, number in work.units.items() if number]
    return sum(unit.first + number / work.jobs * unit.each for unit, number in own)


def wall_seconds(stages: Mapping[str, Work], seconds: Mapping[str, float], shared: int, cores: int) -> float:
    """Seconds of the schedule in ``NOTES``, given a job's ``seconds`` and ``shared`` retrainings that need no score."""
    spent = {stage: work.jobs * seconds[stage] * min(work.threads, cores) for stage, work in stages.items()}
    threads, ordered = min(stages["train"].threads, cores), ("prepare", "encode", "train", "evaluate")
    beside = min((cores - threads) * seconds["train"], shared * seconds["retrain"] * threads)
    rest = sum(spent[stage] for stage in stages if stage not in (*ordered, "figures")) - beside
    chain = sum(seconds[stage] for stage in ("fit", "unlearn", "scan", "score", "retrain"))
    return sum(seconds[stage] for stage in ordered) + max(chain, rest / cores) + spent["figures"] / cores


def disk(layout: Layout, stages: Mapping[str, Work], facts: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each stage's files; ``facts`` as :func:`calibrate` finds them."""
    config, weights, shared = layout.config, facts["weights"], len(layout.shared_models())
    orientations, scans = 1 + config.encode.flips, 1 + len(config.unlearn) * len(config.queries())
    others = max(0, shared - 1)  # retrainings that all queries share: θ0 is one of the models
    draws = config.scan.narrowing.most if config.scan.narrowing else config.scan.timesteps
    own, jobs = stages["retrain"].trainings - others, {stage: work.jobs for stage, work in stages.items()}
    return {stage: 3 * SMALL * number for stage, number in jobs.items()} | {
        "prepare": facts["pictures"] * (LISTED if config.prepare.path else SMALL),
        "encode": facts["images"] * orientations * facts["latent"] + facts["captions"] * facts["states"],
        "train": weights * (1 + len(config.train.snapshot_steps())),
        "fit": facts["fitted"],
        "unlearn": facts["changed"] * len(config.queries()),
        "scan": scans * facts["images"] * orientations * draws * 4,
        "score": jobs["score"] * facts["images"] * RANKED,
        "retrain": (others + own * config.retrain.keep_weights) * weights + own * 3 * SMALL,
        "measure": jobs["measure"] * shared * 3 * SMALL,
        "figures": jobs["figures"] * DRAWN,
    }


def plan(layout: Layout, cores: int | None, device: str) -> str:
    """The estimate as text, for jobs that share ``cores`` (None: all of them) and a device as ``pick_device`` names it.

    Raises:
        UserError: what the config or the device asks for cannot work here, or takes encoded data as given.
    """
    if layout.config.encode.given:
        raise UserError(
            "forgetrace plan times the encoders, none of which runs with encode.given: it cannot plan this."
        )
    check_data(layout)
    begun, (units, facts) = time.perf_counter(), calibrate(layout, device)
    took, cores = time.perf_counter() - begun, cores or os.cpu_count() or 1
    stages = count(layout, facts["images"], facts["captions"], facts["views"])
    seconds = {stage: job_seconds(work, units) for stage, work in stages.items()}
    shared = len(layout.shared_models()) - 1
    if layout.config.retrain.stack > 1:
        shared = min(shared, 1)  # one job makes them all
    wall = wall_seconds(stages, seconds, shared, cores if facts["device"] == "cpu" else 1)
    rates = "".join(f"\n  {name}: {1000 * unit.each:.3g} ms" for name, unit in units.items())
    methods = ", ".join(together(layout))
    uncounted = methods and f"\nWhat these methods compute of the training images is not counted: {methods}."
    notes = NOTES.format(
        uncounted=uncounted, cores=cores, wall=clock(wall), device=facts["device"], took=took, rates=rates
    )
    return f"{table(layout, stages, seconds, units, facts)}\n\n{notes}"


def table(layout: Layout, stages: Mapping[str, Work], seconds: Mapping[str, float], units: dict, facts: dict) -> str:
    """One row per stage and one of sums; memory is that of one job, times are those of jobs one after another."""
    import pandas as pd  # here, because the memory of stages without it was measured in this process

    rows = pd.DataFrame(index=list(stages))
    rows["jobs"] = [work.jobs for work in stages.values()]
    rows["trainings"] = [work.trainings for work in stages.values()]
    rows["evaluations"] = [float(work.evaluations(layout.config.train.batch_size)) for work in stages.values()]
    rows["CPU"] = rows["jobs"] * pd.Series(seconds) * [work.threads for work in stages.values()]
    if facts["device"] != "cpu":
        rows["GPU"] = rows["jobs"] * pd.Series(seconds) * (rows["evaluations"] > 0)
    rows["MB memory"] = [max(units[unit].memory for unit in work.units) / 1e6 for work in stages.values()]
    rows["MB disk"] = pd.Series(disk(layout, stages, facts)) / 1e6
    rows.loc["all"] = rows.sum()
    rows.loc["all", "MB memory"] = rows["MB memory"][:-1].max()
    return rows.to_string(formatters={"CPU": clock, "GPU": clock}, float_format="{:,.0f}".format)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:03:20."""
    return str(timedelta(seconds=round(seconds)))
