"""How many lists an IVF index visits where only some of its items are selected."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import faiss
import numpy as np

from simsearch.index.selection import Selection

_SAMPLE = 2**14  # items whose lists are known
_WIDER = 4  # times more lists, where those that were counted do not hold enough
_ENOUGH = 0.5  # of the wanted items: lists are not equally long
_CELLS = 2**22  # lists of all queries that are counted together


def lists_of_some(ivf: Any) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced items of the lists, int64 (m,), ascending, and the list that each lies in, int64 (m,).

    Args:
        ivf: FAISS's own IVF index of floats.
    """
    inverted = ivf.invlists
    sizes = np.array([inverted.list_size(number) for number in range(ivf.nlist)])
    ends = sizes.cumsum()
    slots = np.arange(0, ends[-1], max(1, ends[-1] // _SAMPLE))
    lists = np.searchsorted(ends, slots, side="right")
    items = np.empty(len(slots), np.int64)
    cuts = np.flatnonzero(np.diff(lists, prepend=-1, append=-1))
    for start, stop in pairwise(cuts):
        number = int(lists[start])
        ids = inverted.get_ids(number)
        try:
            offsets = slots[start:stop] - (ends[number] - sizes[number])
            items[start:stop] = faiss.rev_swig_ptr(ids, int(sizes[number]))[offsets]
        finally:
            inverted.release_ids(number, ids)
    order = items.argsort()
    return items[order], lists[order]


def enough_lists(
    ivf: Any, queries: np.ndarray, among: Selection, some: tuple[np.ndarray, np.ndarray], wanted: float, first: int
) -> np.ndarray:
    """The number of lists that each query visits to meet enough selected items, int64 (Q,), at least `first`.

    What is selected may lie far from a query, as paintings of another style do. Then the nearest lists hold few of it,
    and as many as a filter at random needs are too few.

    Args:
        ivf: FAISS's own IVF index of floats.
        queries: float32 (Q, D), as the IVF index compares them.
        among: The selected items.
        some: `lists_of_some` of the index.
        wanted: Number of selected items to meet. Half of them are enough, since lists are not equally long.
        first: Number of lists to begin with.
    """
    items, lists = some
    held = np.append(np.bincount(lists[among.holds(items)], minlength=ivf.nlist), 0)  # a graph finds -1 for no list
    enough = _ENOUGH * min(wanted * len(items) / among.total, held.sum())
    visits = np.full(len(queries), min(first, ivf.nlist))
    left = np.arange(len(queries))
    width = int(min(first, ivf.nlist))
    while width < ivf.nlist and len(left):
        met = [
            held[ivf.quantizer.search(part, width)[1]].sum(1)
            for part in np.array_split(queries[left], -(-len(left) * width // _CELLS))
        ]
        left = left[np.concatenate(met) < enough]
        width = min(_WIDER * width, ivf.nlist)
        visits[left] = width
    return visits
