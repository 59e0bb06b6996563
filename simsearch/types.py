"""The vocabulary that all modules share.

Shapes: B batch, D dimension, Q queries, G gallery, K neighbours, N items, A attributes, b bits, C channels, H height, W
width. Scores are similarities: larger means more similar (inner product, negative squared distance, negative Hamming
distance).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

Fit = Literal["square", "longest"]  # the centre square, or the whole image scaled by its longest side

LONGEST = 2.0**48  # inner products and squared distances of such vectors stay below 2^100 in float32
SHORTEST = 2.0**-48  # and their squares above what float32 rounds to 0
_CHECKED = 2**14  # rows at a time, in float64


class Encoder(Protocol):
    """A torch module of any family that describes images, as a catalog stores it.

    An encoder whose descriptors have several parts also has `parts`. An encoder that can attribute a similarity to
    regions of an image also has `explains` and `heat_map`. Use `parts_of` and `can_explain` to find out.

    Attributes:
        provenance: Plain facts about the weights, which accompany every result. Whoever loads the tensors sets them.
    """

    provenance: dict[str, str]

    @property
    def bits(self) -> int | None:
        """Number of bits of the codes whose real values `embed` returns. None for L2-normalised descriptors."""
        ...

    @property
    def dimension(self) -> int:
        """Number of columns that `embed` returns."""
        ...

    @property
    def input_size(self) -> int:
        """Side in pixels, by `fit`, at which files are best decoded."""
        ...

    @property
    def fit(self) -> Fit:
        """The part of an image that the encoder sees."""
        ...

    def embed(self, image: Tensor) -> Tensor:
        """Descriptors or real-valued codes, (B, dimension).

        Args:
            image: (B, 3, H, W), uint8, or float in 0..255.
        """
        ...

    def identity(self) -> dict[str, object]:
        """Plain values that, together with the tensors, determine the descriptors."""
        ...

    # What every torch module has

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def to(self, device: torch.device) -> Self: ...


def comparable(vectors: Tensor) -> Tensor:
    """bool (N,), which vectors float32 can compare: those with a norm of 0, or of 2^-48 to 2^48 (4e-15 to 3e14).

    The squares of other vectors overflow or vanish, and scores silently become infinite, equal or 0. Vectors with NaN
    or infinity cannot be compared.

    Args:
        vectors: float32 (N, D).
    """
    norm = _norms(vectors)
    return (norm == 0) | ((norm >= SHORTEST) & (norm <= LONGEST))


def check_vectors(name: str, vectors: Tensor) -> None:
    """Checks that all vectors are `comparable`.

    Args:
        name: Name of the vectors, for the message.
        vectors: float32 (N, D).

    Raises:
        ValueError: If some are not. The error names the first such rows.
    """
    bad = (~comparable(vectors)).nonzero()[:5, 0]
    if len(bad) == 0:
        return
    norm = _norms(vectors[bad])
    if not norm.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinity, first in rows {bad[~norm.isfinite()].tolist()}")
    raise ValueError(
        f"{name} have a norm of {float(norm[0]):.4g} in row {int(bad[0])}: float32 compares norms of {SHORTEST:.0e} to "
        f"{LONGEST:.0e}: scale or normalise them"
    )


def _norms(vectors: Tensor) -> Tensor:
    blocks = vectors.detach().split(_CHECKED)
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks])


class Batch(TypedDict):
    """A batch of a loader.

    Attributes:
        image: uint8 or float (B, C, H, W).
        label: int64 (B,) or (B, A).
        index: int64 (B,), the item's row in the whole collection. It identifies duplicates and self matches.
    """

    image: Tensor
    label: Tensor
    index: Tensor


@dataclass(frozen=True)
class Descriptors:
    """Vectors of N images with their labels and their rows in the collection.

    Attributes:
        vectors: float32 (N, D), or packed codes uint8 (N, ceil(bits / 8)) if `bits` is given. Unused bits are 0.
        label: int64 (N,), -1 where unknown.
        index: int64 (N,), unique rows of the collection.
        bits: Number of bits of a code, or None.
        group: int64 (N,) or None. Items of one group are junk to each other; -1 means no group.

    Raises:
        ValueError: If a shape or dtype is wrong, if `check_vectors` refuses the vectors, or if a row occurs twice.
    """

    vectors: Tensor
    label: Tensor
    index: Tensor
    bits: int | None = None
    group: Tensor | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2:
            raise ValueError(f"descriptors must be (N, D), got shape {tuple(self.vectors.shape)}")
        n = len(self.vectors)
        if self.bits is None:
            if self.vectors.dtype != torch.float32:
                raise ValueError(f"float descriptors must be float32, got {self.vectors.dtype}")
            check_vectors("descriptors", self.vectors)
        else:
            if self.bits < 1:
                raise ValueError(f"codes need at least 1 bit, got {self.bits}")
            if self.vectors.dtype != torch.uint8 or self.vectors.shape[1] != -(-self.bits // 8):
                raise ValueError(
                    f"codes of {self.bits} bits must be uint8 (N, {-(-self.bits // 8)}), "
                    f"got {self.vectors.dtype} {tuple(self.vectors.shape)}"
                )
            if self.bits % 8 and (self.vectors[:, -1] >> self.bits % 8).any():
                raise ValueError(
                    f"codes of {self.bits} bits have further bits set, which would count in every distance: set "
                    "them to 0"
                )
        for name in ("label", "index", "group"):
            value = getattr(self, name)
            if value is not None and (value.shape != (n,) or value.dtype != torch.int64):
                raise ValueError(f"{name} must be int64 ({n},), got {value.dtype} {tuple(value.shape)}")
        if len(torch.unique(self.index)) != n:
            raise ValueError("index holds a collection row twice: drop duplicates first")

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class SearchResult:
    """The K best items of an index for each of Q queries, best first.

    Attributes:
        ids: int64 (Q, K), positions in the order of addition. -1 where an approximate index found fewer than K items.
        scores: float32 (Q, K), -inf where the id is -1.

    Raises:
        ValueError: If ids and scores disagree, or if a row is not sorted best first.
    """

    ids: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        if self.ids.shape != self.scores.shape or self.ids.ndim != 2:
            raise ValueError(
                f"ids and scores must both be (Q, K), got {tuple(self.ids.shape)} and {tuple(self.scores.shape)}"
            )
        if self.ids.dtype != torch.int64 or self.scores.dtype != torch.float32:
            raise ValueError(f"ids must be int64 and scores float32, got {self.ids.dtype} and {self.scores.dtype}")
        if ((self.ids < 0) != self.scores.isneginf()).any() or (self.ids < -1).any():
            raise ValueError("an id of -1 and a score of -inf go together, and no other id is negative")
        if not (self.scores[:, 1:] <= self.scores[:, :-1]).all() or self.scores.isnan().any():
            raise ValueError("scores must be sorted best first, without NaN")


@dataclass(frozen=True)
class RetrievalTask:
    """The queries and the gallery of a retrieval task, and the definition of relevance.

    Attributes:
        name: Name in reports (`10k-50k`, `10k-50k/val`).
        query: int64 (Q,), rows of the collection.
        gallery: int64 (G,), rows of the collection.
        attribute: Items with the same value of this attribute are relevant to each other.
        junk: Items that share this attribute with the query are removed from its ranking, neither right nor wrong (such
            as the same work when artists are sought). None removes no item.
        exclude_self: Remove the query's own row from its ranking.
        fingerprint: 16 hex digits over data, rows and rules. Results with different fingerprints cannot be compared.
        index_order: Also evaluate codes with ties broken by gallery order, as the DSH release does.
        unit: The sampling unit in reports: `query`, or an attribute (artist, work) whose values are the independent
            draws.
        units: int64 (N,), equal for rows of the whole collection that belong to one unit. None if each row is a unit.
            The unit affects intervals and tests, but neither a value nor the fingerprint.
    """

    name: str
    query: Tensor
    gallery: Tensor
    attribute: str
    junk: str | None
    exclude_self: bool
    fingerprint: str
    index_order: bool = False
    unit: str = "query"
    units: Tensor | None = None

    @property
    def query_units(self) -> Tensor:
        """int64 (Q,), the unit of each query."""
        return self.query if self.units is None else self.units[self.query]


@dataclass(frozen=True)
class Part:
    """Columns start..stop-1 of a descriptor that describe one aspect of an image, such as its style.

    Attributes:
        start: First column.
        stop: Past-the-end column.
        weight: Squared norm of the columns. The inner product of two descriptors is the sum of weight * cosine over the
            parts, and the weights of all parts sum to 1.
    """

    start: int
    stop: int
    weight: float


def parts_of(encoder: Encoder) -> dict[str, Part]:
    """The parts of an encoder's descriptors by name, in column order. Without parts, all columns are `content`.

    Args:
        encoder: The encoder.
    """
    parts = getattr(encoder, "parts", None)
    return {"content": Part(0, encoder.dimension, 1.0)} if parts is None else dict(parts)


def can_explain(encoder: Encoder | nn.Module) -> bool:
    """Whether an encoder has `heat_map(image, vector)`: its descriptors, or a part of them, are sums over regions.

    Args:
        encoder: The encoder.
    """
    return bool(getattr(encoder, "explains", False))


@dataclass(frozen=True)
class LocalFeatures:
    """Features of points of one image.

    Attributes:
        points: float32 (n, 2), x and y in pixels of the described image.
        descriptors: int8 (n, d). Euclidean distances compare them.
        size: Width and height of the described image in pixels.
        mirrored: True if the image was mirrored left to right before it was described.
    """

    points: np.ndarray
    descriptors: np.ndarray
    size: tuple[int, int]
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.points)


class LocalDescriber(Protocol):
    """Describes images by local features.

    Attributes:
        dimension: Number of bytes in a descriptor.
        software: Name and version of the library that describes, whose versions may differ in what they find.
    """

    dimension: int
    software: str

    def describe(self, image: Tensor, *, side: int, most: int) -> LocalFeatures:
        """The local features of an image, strongest first.

        Args:
            image: uint8 (3, H, W).
            side: Longest side in pixels. A larger image is scaled down to it, a smaller one is left as it is.
            most: Largest number of features.
        """
        ...


@dataclass(frozen=True)
class HeatMap:
    """The contribution of each region of an image to the inner product of its descriptor with another vector.

    The inner product is values.sum() + rest.

    Attributes:
        values: float32 (h, w), a grid of equal cells over the whole image.
        rest: The contribution that belongs to no region.
    """

    values: Tensor
    rest: float
