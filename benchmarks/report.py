"""What a benchmark found: readings with targets, as a table and as JSON."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

COMPARE = {">=": float.__ge__, "<=": float.__le__}


@dataclass(frozen=True)
class Reading:
    """One measured figure.

    Attributes:
        value: in ``unit``.
        unit: of the value and its spread; ``x`` is a ratio, candidate over reference.
        target: such as ``>= 1.7``; None where nothing was promised.
        spread: lower and upper quartile over the repeats.
        details: whatever else a reader needs to judge the value.
    """

    value: float
    unit: str = "x"
    target: str | None = None
    spread: tuple[float, float] | None = None
    details: dict = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        relation, bound = self.target.split()
        return COMPARE[relation](float(self.value), float(bound))


def ratio(reference: Sequence[float], candidate: Sequence[float], target: str | None = None, **details) -> Reading:
    """Candidate over reference, the median of interleaved pairs, with its quartiles.

    Args:
        reference: rates of the repeats, units per second.
        candidate: rates of the repeats that followed each of them.
        target: of the ratio.
        details: added to the two median rates.
    """
    pairs = [new / old for old, new in zip(reference, candidate, strict=True)]
    rates = {"reference_per_s": statistics.median(reference), "candidate_per_s": statistics.median(candidate)}
    return Reading(statistics.median(pairs), "x", target, quartiles(pairs), rates | details)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; of a single value, twice that value."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def machine() -> dict:
    """What the figures were measured on."""
    import torch

    from benchmarks.workers import cores, devices
    from forgetrace.diffusion.device import processor_name

    processors = {device: processor_name(torch.device(device)) for device in devices()}
    packages = {name: version(name) for name in ("torch", "diffusers")}
    return {"processors": processors, "cores": cores(), "system": platform.platform(), "packages": packages}


def as_json(readings: Mapping[str, Reading], failed: Mapping[str, str], machine: Mapping) -> dict:
    """``{"targets": {name: {value, target, met, spread, …}}, "failed": {bench: why}, "machine": {…}}``."""
    targets = {name: asdict(reading) | {"met": reading.met} for name, reading in readings.items()}
    return {"targets": targets, "failed": dict(failed), "machine": dict(machine)}


def lines(readings: Mapping[str, Reading]) -> list[str]:
    """A table: name, value with spread, target, verdict; the details below each row."""
    rows = []
    for name, reading in readings.items():
        spread = "{:.4g} to {:.4g}".format(*reading.spread) if reading.spread else ""
        verdict = {True: "met", False: "MISSED", None: ""}[reading.met]
        rows.append(
            f"{name:<26}{reading.value:>9.4g} {reading.unit:<6} {spread:<18}{reading.target or '':<10}{verdict}"
        )
        rows += [f"    {key}: {_short(value)}" for key, value in reading.details.items()]
    return rows


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
