"""Parts of a photograph that may show a work: quadrilaterals, as frames have, and a small grid. No network needed."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from simsearch.functional.resize import resize_longest

_SIDE = 400  # pixels at which quadrilaterals are sought
_LEAST, _MOST = 0.02, 0.95  # of the photograph's area
_OVERLAP = 0.8  # intersection over union above which two quadrilaterals are one
_GRID = ((0.2, 0.1, 0.8, 0.9), (0.0, 0.1, 0.55, 0.9), (0.45, 0.1, 1.0, 0.9))  # the middle, and two works side by side


def proposals(image: Tensor, most: int = 8) -> list[np.ndarray]:
    """Quadrilaterals that may hold a work, float32 (4, 2) each: corners clockwise from the top left, as fractions.

    Contours of edges, and of what differs from the wall, are approximated by convex quadrilaterals. The largest come
    first, each once; parts of a grid follow.

    Args:
        image: uint8 (3, H, W).
        most: Largest number of quadrilaterals, 1 or more.

    Raises:
        ValueError: If the image has another dtype or shape, or `most` is below 1.

    Example:
        >>> image = torch.full((3, 90, 120), 200, dtype=torch.uint8)
        >>> image[:, 30:60, 40:90] = 40  # a dark picture on a bright wall
        >>> proposals(image)[0].astype(float).round(1).tolist()[0]
        [0.3, 0.3]
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    small = resize_longest(image, _SIDE) if max(image.shape[1:]) > _SIDE else image
    pixels = small.permute(1, 2, 0).contiguous().numpy()
    height, width = pixels.shape[:2]
    found = [quad for mask in _masks(pixels) for quad in _quadrilaterals(mask)]
    found.sort(key=cv2.contourArea, reverse=True)
    kept: list[np.ndarray] = []
    for quad in found:
        if all(_overlap(quad, other) < _OVERLAP for other in kept):
            kept.append(quad)
    grid = [np.array([[x, y], [u, y], [u, v], [x, v]], np.float32) for x, y, u, v in _GRID]
    own = [(quad / (width, height)).astype(np.float32) for quad in kept[: max(0, most - len(grid))]]
    return [*own, *grid][:most]


def rectified(image: Tensor, corners: np.ndarray) -> Tensor:
    """The part of an image in a quadrilateral as if seen from the front, uint8 (3, h, w).

    Args:
        image: uint8 (3, H, W).
        corners: float32 (4, 2), clockwise from the top left, as fractions of the image's width and height.
    """
    height, width = image.shape[1:]
    from_ = (np.asarray(corners) * (width, height)).astype(np.float32)
    lengths = np.linalg.norm(np.roll(from_, -1, axis=0) - from_, axis=1)
    across, down = (max(1, round(float(side))) for side in (lengths[[0, 2]].max(), lengths[[1, 3]].max()))
    to = np.array([[0, 0], [across, 0], [across, down], [0, down]], np.float32)
    turned = cv2.warpPerspective(
        image.permute(1, 2, 0).contiguous().numpy(), cv2.getPerspectiveTransform(from_, to), (across, down)
    )
    return torch.from_numpy(turned).permute(2, 0, 1).contiguous()


def _masks(pixels: np.ndarray) -> list[np.ndarray]:
    """Images (H, W) whose contours may be frames: edges at two thresholds, and what differs from the wall."""
    lab = cv2.GaussianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB), (0, 0), 1.5)
    kernel = np.ones((3, 3), np.uint8)
    masks = []
    for low in (20, 50):
        edges = np.max([cv2.Canny(lab[..., channel], low, 2.5 * low) for channel in range(3)], axis=0)
        masks.append(cv2.dilate(edges, kernel))
    border = np.concatenate([lab[:8].reshape(-1, 3), lab[:, :8].reshape(-1, 3), lab[:, -8:].reshape(-1, 3)])
    gap = np.linalg.norm(lab.astype(np.float32) - np.median(border, axis=0), axis=2)
    scaled = np.clip(gap * 2, 0, 255).astype(np.uint8)
    _, differs = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    masks.append(cv2.morphologyEx(differs, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8)))
    return masks


def _quadrilaterals(mask: np.ndarray) -> list[np.ndarray]:
    """Convex quadrilaterals float32 (4, 2) in pixels that fill a good part of a contour's hull."""
    total = mask.shape[0] * mask.shape[1]
    found = []
    for contour in cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0]:
        hull = cv2.convexHull(contour)
        area = cv2.contourArea(hull)
        if not _LEAST <= area / total <= _MOST:
            continue
        quad = next(
            (
                approximated
                for share in (0.02, 0.04, 0.06)
                if len(approximated := cv2.approxPolyDP(hull, share * cv2.arcLength(hull, True), True)) == 4
            ),
            None,
        )
        corners = cv2.boxPoints(cv2.minAreaRect(hull)) if quad is None else quad[:, 0].astype(np.float32)
        if area >= 0.7 * cv2.contourArea(corners):
            found.append(_ordered(corners))
    return found


def _ordered(corners: np.ndarray) -> np.ndarray:
    """Corners (4, 2), clockwise from the top left."""
    angles = np.arctan2(*(corners - corners.mean(axis=0)).T[::-1])
    turned = corners[np.argsort(angles)]
    return np.roll(turned, -int(np.argmin(turned.sum(axis=1))), axis=0).astype(np.float32)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two convex quadrilaterals."""
    common = cv2.intersectConvexConvex(a, b)[0]
    return common / (cv2.contourArea(a) + cv2.contourArea(b) - common)
