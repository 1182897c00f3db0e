"""A region of a query's image as weights of its latent positions, and the files a region's query consists of.

A region is a query of its own: it shares image, latent, initial noise and prompt of the whole one, and its loss is the
mean over the latent positions inside (AbU's localised attribution, arXiv 2406.09408). A position that the region covers
in part counts by the share of its pixels that are inside.
"""

import json
from pathlib import Path

import numpy as np
import yaml

from forgetrace.artifacts import (
    UserError,
    provenance,
    read_arrays,
    read_image,
    read_json,
    write_arrays,
    write_image,
    write_json,
)
from forgetrace.config import Region
from forgetrace.datasets.images import read_own
from forgetrace.layout import Layout

THRESHOLD = 0.3  # confidence of a detected box
LATENT, PIXELS = "region", "region_pixels"  # arrays of a region's query


def synthesize_region(layout: Layout, query: str, device: str = "auto") -> None:
    """Write record, image and tensors of a query that is a region of another, which must be there.

    Raises:
        UserError: the region is empty or outside the image, a file of it is missing or wrong, or nothing is detected.
    """
    whole, name = layout.config.region(query)
    source, files = layout.query(whole), layout.query(query)
    image, arrays = read_image(source["image"]), read_arrays(source["tensors"])
    inside = pixels_of(layout, whole, name, image, device)
    weights = latent_weights(inside, arrays["latent"].shape[1:])
    record = {key: value for key, value in read_json(source["record"]).items() if key != "made_by"}
    record |= {"query": query, "region": name, "whole": whole, "box": bounding_box(inside)}
    region = layout.config.synthesize.regions[name]
    inputs = source | {path: path for path in region_files(region)}
    made_by = provenance({"region": region.model_dump(mode="json")}, inputs)
    write_image(files["image"], image)
    write_arrays(files["tensors"], arrays | {LATENT: weights, PIXELS: inside}, made_by)
    write_json(files["record"], record | {"made_by": made_by})


def region_files(region: Region) -> list[str]:
    """The user's files that say where a region is."""
    return [path for path in (region.mask, region.file) if path]


def pixels_of(layout: Layout, whole: str, name: str, image: np.ndarray, device: str = "auto") -> np.ndarray:
    """Which pixels of a query's image (height, width, 3), uint8, are inside the region; (height, width), bool.

    Raises:
        UserError: as :func:`synthesize_region`.
    """
    settings = layout.config.synthesize
    region, place = settings.regions[name], f"synthesize.regions.{name}"
    if region.mask:
        return pixels_of_mask(region.mask, image.shape[:2], place)
    if region.boxes:
        return pixels_of_boxes(region.boxes, image.shape[:2], place)
    if region.file:
        boxes = boxes_of_file(region.file, whole, name, layout.config.whole_queries())
        return pixels_of_boxes(boxes, image.shape[:2], f"{region.file}: {whole}")
    from forgetrace.diffusion.device import pick_device
    from forgetrace.encoding.grounding import detect

    threshold = THRESHOLD if settings.detector_threshold is None else settings.detector_threshold
    boxes = detect(image, region.phrase, settings.detector, threshold, pick_device(device))
    if not boxes:
        raise UserError(
            f"{place}: {settings.detector} finds no “{region.phrase}” in the image of {whole} with a confidence of "
            f"{threshold:g}; lower synthesize.detector_threshold, name the region's queries, or give boxes."
        )
    return pixels_of_boxes(boxes, image.shape[:2], place)


def pixels_of_boxes(boxes: list, size: tuple[int, int], place: str) -> np.ndarray:
    """The union of boxes x0, y0, x1, y1 (x1 and y1 exclusive) in an image of (height, width); bool.

    Raises:
        UserError: a box is empty or reaches outside the image; ``place`` says whose it is.
    """
    inside, (height, width) = np.zeros(size, dtype=bool), size
    for x0, y0, x1, y1 in boxes:
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(
                f"{place}: the box [{x0}, {y0}, {x1}, {y1}] is empty or reaches outside the image, {width} wide and "
                f"{height} high: give 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}."
            )
        inside[y0:y1, x0:x1] = True
    return inside


def pixels_of_mask(path: str, size: tuple[int, int], place: str) -> np.ndarray:
    """What is brighter than half in a mask image, and opaque; (height, width), bool.

    Raises:
        UserError: the image is missing, of another size, or nothing in it is bright.
    """
    try:
        mask = np.asarray(read_own(path, ground="black"))
    except UserError as error:
        raise UserError(f"{place}.mask: {error}") from None
    if mask.shape[:2] != tuple(size):
        raise UserError(
            f"{place}.mask: {path} has {mask.shape[1]}x{mask.shape[0]} pixels, the query's image {size[1]}x{size[0]}: "
            "give a mask of that size."
        )
    inside = mask.mean(axis=2) > 127.5
    if not inside.any():
        raise UserError(f"{place}.mask: {path} is empty, no pixel is brighter than half: paint the region white.")
    return inside


def boxes_of_file(path: str, whole: str, name: str, queries: list[str]) -> list:
    """The boxes that a JSON or YAML file has for a region of a query.

    Raises:
        UserError: the file cannot be read, names an unknown query, or has no or a wrong box for this one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"synthesize.regions.{name}.file: cannot read {path} ({error.strerror}).") from None
    except (ValueError, yaml.YAMLError):
        raise UserError(f"synthesize.regions.{name}.file: {path} is not valid JSON or YAML.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold boxes by query, such as report-00: [0, 0, 16, 16].")
    if unknown := [str(key) for key in content if key not in queries]:
        raise UserError(f"{path}: there is no query '{unknown[0]}' (there are {', '.join(queries)}).")
    boxes = content.get(whole)
    boxes = boxes.get(name) if isinstance(boxes, dict) else boxes
    if not boxes:
        raise UserError(
            f"{path} has no box for the region {name} of {whole}: add one, or list the region's queries in "
            f"synthesize.regions.{name}.queries."
        )
    boxes = boxes if isinstance(boxes, list) and isinstance(boxes[0], list) else [boxes]
    for box in boxes:
        if not (isinstance(box, list) and len(box) == 4 and all(type(edge) is int for edge in box)):
            raise UserError(f"{path}: {whole}: {box} is no box; give four whole numbers [x0, y0, x1, y1].")
    return boxes


def latent_weights(inside: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The share of each latent position's pixels that are inside.

    Args:
        inside: (height, width), bool.
        size: (H, W) of a latent, which divide height and width.

    Returns:
        (H, W), float32, in [0, 1].

    Raises:
        UserError: no pixel is inside.
    """
    (height, width), (rows, columns) = inside.shape, size
    if height % rows or width % columns:
        raise UserError(f"An image of {width}x{height} pixels has no region on a latent of {columns}x{rows} positions.")
    if not inside.any():
        raise UserError("The region is empty: no pixel of the image is inside.")
    blocks = inside.reshape(rows, height // rows, columns, width // columns)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def bounding_box(inside: np.ndarray) -> list[int]:
    """x0, y0, x1, y1 of the smallest box around a mask (height, width) that is not empty."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def region_of(layout: Layout, query: str) -> np.ndarray | None:
    """Which pixels a query is about, (height, width), bool; None of a whole image."""
    if not layout.config.region(query):
        return None
    return read_arrays(layout.query(query)["tensors"])[PIXELS]
