"""The scores of what a store found, from vectors that the store has no part in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simsearch.functional.codes import unpack_codes
from simsearch.functional.ranking import inner_products
from simsearch.types import SearchResult


def scored(
    queries: Tensor, positions: Tensor, rows: Callable[[Tensor], Tensor], metric: str, bits: int | None
) -> SearchResult:
    """What was found with its scores, best first, equal scores in the order of the positions.

    Args:
        queries: float32 (Q, D) or codes uint8 (Q, bits / 8).
        positions: int64 (Q, k), positions of the found items; -1 where there are fewer.
        rows: Returns the vectors of items by position, int64 (n,).
        metric: "ip" or "l2" for vectors, "hamming" for codes.
        bits: Width of the codes, None for vectors.

    Example:
        >>> items = torch.tensor([[1.0], [3.0], [2.0]])
        >>> scored(torch.ones(1, 1), torch.tensor([[0, 2, -1]]), items.__getitem__, "ip", None)
        SearchResult(ids=tensor([[ 2,  0, -1]]), scores=tensor([[2., 1., -inf]]))
    """
    none = torch.iinfo(torch.int64).max  # behind all others
    positions = positions.masked_fill(positions < 0, none).sort(dim=1).values
    scores = torch.full(positions.shape, -torch.inf)
    for row, query in enumerate(queries):
        count = int((positions[row] < none).sum())
        scores[row, :count] = _compared(query, rows(positions[row, :count]), metric, bits)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return SearchResult(positions.masked_fill(positions == none, -1).gather(1, order), scores.gather(1, order))


def _compared(query: Tensor, rows: Tensor, metric: str, bits: int | None) -> Tensor:
    """The scores (n,) of items for a query."""
    if bits is not None:
        return 0.0 - (unpack_codes(rows, bits) != unpack_codes(query[None], bits)).sum(1)
    if metric == "l2":
        return 0.0 - (rows - query).square().sum(1)
    return inner_products(query[None], rows)[0] if len(rows) else torch.empty(0)
