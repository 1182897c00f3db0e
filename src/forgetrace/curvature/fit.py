"""The ``fit`` stage: what unlearning needs once per model."""

from forgetrace.artifacts import provenance, write_json, write_tensors
from forgetrace.curvature.diagonal import fisher_report, fit_fisher
from forgetrace.curvature.ekfac import ekfac_report, fit_ekfac
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

CURVATURES = {"diagonal": (fit_fisher, fisher_report), "ekfac": (fit_ekfac, ekfac_report)}


def fit(layout: Layout, curvature: str, device: str = "auto") -> None:
    """Write a Fisher information and its report.

    Args:
        layout: an experiment whose ``train`` stage is done.
        curvature: ``diagonal`` or ``ekfac``.
        device: where to compute.
    """
    config, encoded = layout.config, load_encoded(layout)
    unet = load_unet(layout, pick_device(device))
    settings, (estimate, report) = config.fit, CURVATURES[curvature]
    fisher = estimate(unet, load_scheduler(layout), encoded, settings.draws, settings.chunk, config.seed)
    made_by = provenance(config.digest_of("seed", "fit"), {"weights": layout.weights})
    tensors, summary = layout.fitted(curvature)
    write_tensors(tensors, fisher, made_by)
    write_json(summary, report(fisher, settings.draws) | {"made_by": made_by})
