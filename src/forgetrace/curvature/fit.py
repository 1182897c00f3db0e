"""The ``fit`` stage: what unlearning needs once per model."""

from forgetrace.artifacts import provenance, write_json, write_tensors
from forgetrace.curvature.diagonal import fisher_report, fit_fisher
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout


def fit(layout: Layout, device: str = "auto") -> None:
    """Write the diagonal Fisher information and its report."""
    config, encoded = layout.config, load_encoded(layout)
    unet = load_unet(layout, pick_device(device))
    settings = config.fit
    fisher = fit_fisher(unet, load_scheduler(layout), encoded, settings.draws, settings.chunk, config.seed)
    made_by = provenance(config.digest_of("seed", "fit"), {"weights": layout.weights})
    write_tensors(layout.fisher, fisher, made_by)
    write_json(layout.fisher_report, fisher_report(fisher, settings.draws) | {"made_by": made_by})
