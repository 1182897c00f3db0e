"""What was measured apart, because it takes long: the whole pipeline, and narrowing the scan."""

import json

from benchmarks.report import Reading
from benchmarks.settings import Settings
from forgetrace.artifacts import read_json, read_table

NARROWING = {"overlap200": "reference_overlap200", "overlap20": "reference_overlap20"}


def pipeline(settings: Settings) -> dict[str, Reading]:
    """The last ``python -m benchmarks.pipeline``, where there was one."""
    path = settings.folder / "pipeline.json"
    if not path.exists():
        return {}
    found = read_json(path)
    how = {"measured": found["when"], "on": json.dumps(found["machine"]["processors"]), "cores": found["cores"]}
    return {
        "pipeline": Reading(found["seconds"] / 60, "min", "<= 25", None, how),
        "pipeline-outside": Reading(found["outside"], "", "<= 0.1", None, {"definition": found["definition"]}),
    }


def narrowing(settings: Settings) -> dict[str, Reading]:
    """Evaluations per image and agreement with the full scan, from ``narrowing.csv`` where there is one."""
    path = settings.folder / "narrowing.csv"
    if not path.exists():
        return {}
    table = read_table(path)
    means, how = table.mean(numeric_only=True), {"queries": len(table)}
    readings = {"narrowing-evaluations": Reading(float(means["evaluations_per_image"]), "/image", "<= 12.5", None, how)}
    for column, reference in NARROWING.items():
        target = f">= {means[reference] - 0.02:.4f}"
        readings[f"narrowing-{column}"] = Reading(float(means[column]), "", target, None, how)
    return readings
