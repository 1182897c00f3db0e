"""The ``fit`` stage: what unlearning needs once per model, estimated or taken from a release."""

import torch

from forgetrace.artifacts import (
    UserError,
    provenance,
    read_tensors,
    read_tensors_provenance,
    write_json,
    write_tensors,
)
from forgetrace.curvature.diagonal import fisher_report, fit_fisher
from forgetrace.curvature.ekfac import ekfac_report, fit_ekfac
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.encoding.given import check_given, fitted_file
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

CURVATURES = {"diagonal": (fit_fisher, fisher_report), "ekfac": (fit_ekfac, ekfac_report)}


def fit(layout: Layout, curvature: str, device: str = "auto") -> None:
    """Write a Fisher information and its report.

    Args:
        layout: an experiment whose ``train`` stage is done.
        curvature: ``diagonal`` or ``ekfac``.
        device: where to compute.

    Raises:
        UserError: what ``fit.given`` names is missing, damaged or of another model.
    """
    if layout.config.fit.given:
        take(layout, curvature)
        return
    config, encoded = layout.config, load_encoded(layout)
    unet = load_unet(layout, pick_device(device))
    settings, (estimate, report) = config.fit, CURVATURES[curvature]
    fisher = estimate(unet, load_scheduler(layout), encoded, settings.draws, settings.chunk, config.seed)
    made_by = provenance(config.digest_of("seed", "fit"), {"weights": layout.weights})
    tensors, summary = layout.fitted(curvature)
    write_tensors(tensors, fisher, made_by)
    write_json(summary, report(fisher, settings.draws) | {"made_by": made_by})


def take(layout: Layout, curvature: str) -> None:
    """Write the Fisher information of ``fit.given``, for as many weights as it has.

    Raises:
        UserError: it is missing, damaged or of another model.
    """
    check_given(layout.config)
    path = fitted_file(layout.config.fit.given, curvature)
    fisher, made = read_tensors(path), read_tensors_provenance(path)
    weights = load_unet(layout, torch.device("cpu")).state_dict()
    expected = EXPECTED[curvature](weights)
    for name, value in fisher.items():
        if expected.get(name) != value.shape:
            raise UserError(
                f"fit.given: {path} holds '{name}' of shape {tuple(value.shape)}, which is none of the model "
                f"{layout.model}: give the Fisher information of the model that train.pretrained names."
            )
    made_by = provenance(layout.config.digest_of("fit"), {"weights": layout.weights, "given": path})
    tensors, summary = layout.fitted(curvature)
    write_tensors(tensors, fisher, made_by)
    write_json(summary, CURVATURES[curvature][1](fisher, made["draws"]) | {"made_by": made_by})


def _of_layers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Shapes of the factors of linear layers by name, as :mod:`forgetrace.curvature.ekfac` keeps them."""
    shapes = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and weight.ndim == 2:
            rows, columns = len(weight), weight.shape[1] + (f"{layer}.bias" in weights)
            sizes = {"Q_A": (columns, columns), "Q_G": (rows, rows), "Lambda": (rows, columns)}
            shapes |= {f"{layer}.{key}": torch.Size(size) for key, size in sizes.items()}
    return shapes


EXPECTED = {
    "diagonal": lambda weights: {name: weight.shape for name, weight in weights.items()},
    "ekfac": _of_layers,
}
