"""The vocabulary that every room shares.

Shapes: B batch, D dimension, Q queries, G gallery, K neighbours, N items, A attributes, b bits,
C channels, H height, W width. Scores are similarities: the larger, the more similar (inner
product, negative squared distance, negative Hamming distance).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypedDict

import torch
from torch import Tensor, nn

Fit = Literal["square", "longest"]  # what of an image is seen: its centre square, or the whole at its longest side

LONGEST = 2.0**48  # inner products and squared distances of such vectors stay below 2^100 in float32
SHORTEST = 2.0**-48  # and their squares above what float32 rounds to 0
_CHECKED = 2**14  # rows at a time, in float64


class Encoder(Protocol):
    """What describes images: a torch module, of any family, as a catalog keeps it.

    bits: width of the codes whose real values `embed` gives, None for L2-normalised descriptors. dimension: columns
    of what `embed` gives. input_size: side in pixels (by `fit`) to which files are best decoded. provenance: plain
    facts about the weights, for every result; whoever loads the tensors sets it.

    An encoder whose descriptors have several parts has `parts` too, and one that can say which places of an image a
    similarity comes from `explains` and `heat_map`: ask simsearch.models.parts.parts_of and can_explain.
    """

    provenance: dict[str, str]

    @property
    def bits(self) -> int | None: ...

    @property
    def dimension(self) -> int: ...

    @property
    def input_size(self) -> int: ...

    @property
    def fit(self) -> Fit: ...

    def embed(self, image: Tensor) -> Tensor:
        """Descriptors or real-valued codes (B, dimension) of images (B, 3, H, W), uint8 or float in 0..255."""
        ...

    def identity(self) -> dict[str, object]:
        """What decides the descriptors besides the tensors, as plain values."""
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
    """Which vectors (N, D) float32 can compare, bool (N,): of norm 0, or within 2^-48 to 2^48 (4e-15 to 3e14).

    The squares of others overflow or vanish: scores become infinite, equal or 0 without a word. NaN and infinity
    compare with nothing.
    """
    norm = _norms(vectors)
    return (norm == 0) | ((norm >= SHORTEST) & (norm <= LONGEST))


def check_vectors(name: str, vectors: Tensor) -> None:
    """Raises ValueError for vectors (N, D) that are not all `comparable`, naming the first rows that are not."""
    bad = (~comparable(vectors)).nonzero()[:5, 0]
    if len(bad) == 0:
        return
    norm = _norms(vectors[bad])
    if not norm.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinity, first in rows {bad[~norm.isfinite()].tolist()}")
    raise ValueError(
        f"{name} have a norm of {float(norm[0]):.4g} in row {int(bad[0])}: float32 compares norms of {SHORTEST:.0e} to "
        f"{LONGEST:.0e}; scale or normalise them"
    )


def _norms(vectors: Tensor) -> Tensor:
    blocks = vectors.detach().split(_CHECKED)
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks])


class Batch(TypedDict):
    """What every loader yields.

    image: uint8 or float (B, C, H, W). label: int64 (B,) or (B, A). index: int64 (B,), the item's
    row in the whole collection, by which doubles and self matches are found.
    """

    image: Tensor
    label: Tensor
    index: Tensor


@dataclass(frozen=True)
class Descriptors:
    """Vectors of N images with the labels and the collection rows that they belong to.

    vectors: float32 (N, D), or uint8 (N, ceil(bits / 8)) packed codes when `bits` is given, unused bits 0.
    label: int64 (N,), -1 where unknown. index: int64 (N,), unique collection rows. group: int64
    (N,) or None; items of one group are junk to each other (-1: no group).

    Raises ValueError for a wrong shape or dtype, for vectors that `check_vectors` refuses, and for doubled rows.
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
                raise ValueError(f"codes of {self.bits} bits have bits set beyond: they would count in every distance")
        for name in ("label", "index", "group"):
            value = getattr(self, name)
            if value is not None and (value.shape != (n,) or value.dtype != torch.int64):
                raise ValueError(f"{name} must be int64 ({n},), got {value.dtype} {tuple(value.shape)}")
        if len(torch.unique(self.index)) != n:
            raise ValueError("index holds a collection row twice: drop doubles first")

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class SearchResult:
    """The K best items of an index for each of Q queries, best first.

    ids: int64 (Q, K), positions in the order of addition, -1 where an approximate index found
    fewer than K. scores: float32 (Q, K), -inf beside an id of -1.

    Raises ValueError where the two disagree or a row is not sorted best first.
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
    """Which rows of a collection search which, and what counts.

    name: as reports print it (`10k-50k`, `10k-50k/val`). query, gallery: int64 rows of the
    collection, (Q,) and (G,). attribute: items that share its value are relevant to each other.
    junk: an attribute whose sharing takes an item out of the ranking, neither right nor wrong
    (same work when artists are sought), or None. exclude_self: take the query's own row out.
    fingerprint: 16 hex digits over data, rows and rules. Numbers of different fingerprints do not
    compare. index_order: codes are also measured with ties broken by gallery order, as the DSH release does.
    unit: what is a draw by chance, as reports print it: `query`, or an attribute (artist, work) whose images are
    none of each other. units: int64 (N,), equal for the rows of the whole collection that are of one unit, or None
    where each row is one. No value depends on the unit, nor does the fingerprint: intervals and tests do.
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
        """The unit of each query, int64 (Q,)."""
        return self.query if self.units is None else self.units[self.query]


@dataclass(frozen=True)
class Part:
    """Columns start..stop of a descriptor that describe one side of an image, such as its style.

    weight: the square of the norm that they have, so that the inner product of two descriptors is the sum of
    weight * cosine over parts; the weights of all parts sum to 1.
    """

    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class HeatMap:
    """What each place of an image adds to the inner product of its descriptor with another vector.

    values: float32 (h, w), a grid of equal cells over the whole image. rest: what comes from no place.
    values.sum() + rest is the inner product.
    """

    values: Tensor
    rest: float
