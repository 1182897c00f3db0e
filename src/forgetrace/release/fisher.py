"""Published Fisher information in the format of the ``fit`` stage."""

from collections.abc import Mapping
from pathlib import Path

import torch

from forgetrace.artifacts import UserError, read_tensors
from forgetrace.diffusion.subsets import select
from forgetrace.release.model import load_saved
from forgetrace.release.source import EKFAC, Release

NEEDED = "cross-attn-kv"  # the weights both projects unlearn
AGAIN = "take both from one release, or download it again"
PASSES = 5  # of AbU's Fisher information over all latents, one draw each


def read_fisher(release: Release, weights: Mapping[str, torch.Size], latents: int) -> tuple[dict, int]:
    """The Fisher information of a release and how many draws it is the mean of.

    Args:
        release: its files.
        weights: shapes of the model's weights by name.
        latents: 2N.

    Raises:
        UserError: it is of another model, or says nothing of the weights that are unlearned; names the file.
    """
    if release.curvature == "diagonal":
        return read_diagonal(release.fisher[0], weights), PASSES * latents
    return read_ekfac(release.fisher, weights)


def read_diagonal(path: Path, weights: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """AbU's ``fisher_info.pt``: by weight name, of its shape, float64.

    Raises:
        UserError: as :func:`read_fisher`.
    """
    fisher = load_saved(path)
    for name, value in fisher.items():
        if weights.get(name) != value.shape:
            expected = "no such weight" if name not in weights else f"shape {tuple(weights[name])}"
            raise UserError(f"{path} holds {name} of shape {tuple(value.shape)}, the model has {expected}: {AGAIN}.")
        if not value.is_floating_point() or not bool((value >= 0).all()) or bool(value.isinf().any()):
            raise UserError(f"{path} holds entries of {name} that are no mean squares, such as NaN: {AGAIN}.")
    _require(path, [name for name in select(weights, NEEDED) if name not in fisher])
    return {name: value.double() for name, value in fisher.items()}


def read_ekfac(paths: list[Path], weights: Mapping[str, torch.Size]) -> tuple[dict[str, torch.Tensor], int]:
    """FastGDA's ``ekfac_fisher/``: factors of the linear layers as :mod:`forgetrace.curvature.ekfac` keeps them.

    Both put eigenvectors in columns and a bias behind the inputs. Convolutions are left out: of their inputs, the two
    have other orders.

    Raises:
        UserError: as :func:`read_fisher`.
    """
    activations, gradients, lambdas, counts = (read_tensors(path) for path in paths)
    file, factors, draws = dict(zip(EKFAC, paths, strict=True)), {}, []
    for layer, total in lambdas.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None:
            raise UserError(f"{file['lambda_matrix']} holds {layer}, which is no layer of the model: {AGAIN}.")
        if len(weight) != 2:
            continue
        rows, columns = weight[0], weight[1] + (f"{layer}.bias" in weights)
        for part, tensors, shape in (
            ("activation_eigenvectors", activations, (columns, columns)),
            ("gradient_eigenvectors", gradients, (rows, rows)),
            ("lambda_matrix", lambdas, (rows, columns)),
            ("num_lambda_processed", counts, None),
        ):
            if layer not in tensors:
                raise UserError(f"{file[part]} lacks {layer}, which lambda_matrix has: {AGAIN}.")
            if shape and tuple(tensors[layer].shape) != shape:
                found = tuple(tensors[layer].shape)
                raise UserError(f"{file[part]} holds {layer} of shape {found}, expected {shape}: {AGAIN}.")
            if not bool(tensors[layer].isfinite().all()):
                raise UserError(f"{file[part]} holds NaN or infinity for {layer}: {AGAIN}.")
        count = int(counts[layer].flatten()[0])
        if count < 1:
            raise UserError(f"{file['num_lambda_processed']} counts {count} examples of {layer}: {AGAIN}.")
        draws.append(count)
        factors[f"{layer}.Q_A"], factors[f"{layer}.Q_G"] = activations[layer].float(), gradients[layer].float()
        factors[f"{layer}.Lambda"] = total.double() / count
    layers = [name.removesuffix(".weight") for name in select(weights, NEEDED)]
    _require(paths[2], [layer for layer in layers if f"{layer}.Lambda" not in factors])
    return factors, min(draws)


def _require(path: Path, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the weights {NEEDED} that are to be unlearned, such as {missing[0]}: "
            f"{AGAIN}."
        )
