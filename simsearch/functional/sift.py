"""RootSIFT features of an image in 32 bytes each."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from scipy.fft import dctn
from torch import Tensor

from simsearch.functional.resize import resize_longest
from simsearch.types import LocalFeatures

cv2.setNumThreads(1)  # its threads do not survive a fork, and images are described in processes that are forked

# A SIFT descriptor has 4 x 4 cells of 8 orientations. Of its 128 coefficients (cosine transform over the cells, Fourier
# transform over the orientations), these have the most variance over the paintings of the study of photographs, without
# the mean, which hardly varies. Place in the cosine transform (2), then in the Fourier transform (`_fourier`).
_KEPT = (
    *((0, 0, f) for f in (1, 2, 3, 4, 5)),
    *((0, 1, f) for f in (0, 1, 2, 3, 4)),
    *((0, 2, f) for f in (1, 2, 3)),
    *((0, 3, f) for f in (1, 2)),
    *((1, 0, f) for f in (0, 1, 2, 3, 4)),
    *((1, 1, f) for f in (1, 2, 3, 4)),
    *((1, 2, f) for f in (1, 2)),
    *((2, 0, f) for f in (1, 2)),
    *((2, 1, f) for f in (1, 2)),
    *((2, 3, f) for f in (1,)),
    *((3, 0, f) for f in (2,)),
)
_CANDIDATES = 4  # features that are described for one that is kept
_SCALE = 256.0  # of a coefficient; those beyond half of the descriptor's norm are cut


class Sift:
    """Describes images by SIFT features (Lowe, IJCV 2004) as RootSIFT (Arandjelović and Zisserman, CVPR 2012).

    Of the 128 coefficients of a descriptor, 32 are kept, in a byte each. A fixed transform chooses them, so that
    features of any two images compare.

    Args:
        contrast: The least contrast of a feature (OpenCV's contrastThreshold).

    Raises:
        ValueError: If `contrast` is negative.
    """

    dimension = len(_KEPT)
    software = f"OpenCV {cv2.__version__}"

    def __init__(self, contrast: float = 0.02) -> None:
        if contrast < 0:
            raise ValueError(f"contrast must be at least 0, got {contrast}")
        self.contrast = contrast

    def describe(self, image: Tensor, *, side: int, most: int) -> LocalFeatures:
        """The local features of an image, from all over it (`spread_out`), strongest first.

        Args:
            image: uint8 (3, H, W).
            side: Longest side in pixels. A larger image is scaled down to it, a smaller one is left as it is.
            most: Largest number of features.

        Raises:
            ValueError: If the image has another dtype or shape, or a number is below 1.

        Example:
            >>> image = torch.randint(256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            >>> found = Sift().describe(image, side=128, most=20)
            >>> found.points.shape, found.descriptors.shape, found.size
            ((20, 2), (20, 32), (128, 96))
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
        if min(side, most) < 1:
            raise ValueError(f"side and most must be at least 1, got {side} and {most}")
        if max(image.shape[1:]) > side:
            image = resize_longest(image, side)
        grey = cv2.cvtColor(image.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
        detector = cv2.SIFT.create(nfeatures=_CANDIDATES * most, contrastThreshold=self.contrast)
        keypoints, found = detector.detectAndCompute(grey, None)
        size = (grey.shape[1], grey.shape[0])
        if found is None:
            return LocalFeatures(np.zeros((0, 2), np.float32), np.zeros((0, self.dimension), np.int8), size)
        points = np.array([keypoint.pt for keypoint in keypoints], np.float32)
        order = spread_out(points / size, np.array([keypoint.response for keypoint in keypoints]))[:most]
        return LocalFeatures(points[order], compact(found[order]), size)


def spread_out(places: np.ndarray, strength: np.ndarray, cells: int = 6) -> np.ndarray:
    """The order of features, int64 (n,), in which the first of them lie all over the image.

    The strongest feature of each cell comes first, then the second of each cell, and so on; among those of one rank,
    the strongest. One busy picture on a wall then does not take all features from the others.

    Args:
        places: (n, 2), x and y as fractions of the image's width and height.
        strength: (n,).
        cells: The image has cells x cells cells.

    Example:
        >>> spread_out(np.array([[0.1, 0.1], [0.1, 0.1], [0.9, 0.9]]), np.array([3.0, 2.0, 1.0]))
        array([0, 2, 1])
    """
    column, row = np.clip((places * cells).astype(np.int64), 0, cells - 1).T
    cell = row * cells + column
    by_cell = np.lexsort((-strength, cell))
    starts = np.searchsorted(cell[by_cell], cell[by_cell])
    rank = np.empty(len(cell), np.int64)
    rank[by_cell] = np.arange(len(cell)) - starts
    return np.lexsort((-strength, rank))


def compact(descriptors: np.ndarray) -> np.ndarray:
    """SIFT descriptors as RootSIFT in 32 coefficients, int8 (n, 32).

    Squared distances of the coefficients, divided by 256², are those of the RootSIFT descriptors less what the other
    coefficients add.

    Args:
        descriptors: float32 (n, 128), non-negative, as OpenCV orders them: 4 x 4 cells of 8 orientations.

    Example:
        >>> compact(np.ones((1, 128), np.float32)).any()  # no cell and no orientation stands out
        np.False_
    """
    root = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9)).reshape(-1, 4, 4, 8)
    coefficients = dctn(root, axes=(1, 2), norm="ortho") @ _fourier(8).T
    rows, columns, frequencies = np.array(_KEPT).T
    kept = coefficients[:, rows, columns, frequencies]
    return np.clip(np.round(_SCALE * kept), -127, 127).astype(np.int8)


def _fourier(n: int) -> np.ndarray:
    """The orthonormal real Fourier basis (n, n) of a circle of n points: constant, then cosine and sine by pairs."""
    angle = 2 * np.pi * np.arange(n) / n
    waves = [f(k * angle) * np.sqrt(2 / n) for k in range(1, n // 2) for f in (np.cos, np.sin)]
    return np.stack([np.full(n, n**-0.5), *waves, np.cos(n // 2 * angle) * n**-0.5]).astype(np.float32)
