"""How an index searches where only some of its items are selected: lists, candidates, or all that is selected."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import faiss
import numpy as np

from simsearch.index.parts import parts_of
from simsearch.index.selection import Selection

# Searching n selected of N items (measured in experiments/2026-11-23-art-recommender/filters.py): an IVF index visits
# _MORE_LISTS N / n times its lists, an HNSW graph keeps _MORE_KEPT N / n times its candidates. Where these are so many
# that they cost more than _KEPT_ROWS rows each, or where there are no more than _FEW items, all of them are compared.
_MORE_LISTS, _MORE_KEPT, _KEPT_ROWS, _FEW = 4, 16, 5, 1000
# Nanoseconds, for flat and IVF indexes: each query tests each visited item and compares each selected one that it
# visits; instead, the selected rows can be decoded once, and each is compared with all queries at once. Fast-scan tests
# an item for a group of queries together: a query alone pays for the group.
_TEST, _COMPARE, _DECODE, _COMPARE_ROWS, _GROUP = 2, 100, 300, 4, 8
_FAST_SCAN = (faiss.IndexFastScan, faiss.IndexIVFFastScan)
_FAR_CANDIDATES = 4  # times more candidates are refined for a query from which the selected items lie far
_SAMPLE = 2**14  # items whose lists are known
_WIDER = 4  # times more lists, where those that were counted do not hold enough
_ENOUGH = 0.5  # of the wanted items: lists are not equally long
_CELLS = 2**22  # lists of all queries that are counted together


def visits_of_each(
    index: Any,
    queries: np.ndarray,
    among: Selection,
    sampled: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    all_lists: bool = False,
) -> tuple[np.ndarray | None, float]:
    """How many lists each query visits, or candidates it keeps, int64 (Q,), and how many a filter at random needs.

    None, where all selected items are to be compared.

    Args:
        index: FAISS's own index, with items.
        queries: float32 (Q, D) or codes uint8 (Q, bits / 8).
        among: The selected items.
        sampled: Gives `lists_of_some` of an IVF index.
        all_lists: True to visit all lists.
    """
    if len(among) <= _FEW:
        return None, 0
    parts = list(parts_of(index))
    total, wider = among.total, among.total / len(among)
    rows = len(among) * (_DECODE + _COMPARE_ROWS * len(queries))
    test = _TEST + _GROUP / max(1, len(queries)) * any(isinstance(part, _FAST_SCAN) for part in parts)
    visited = test * total + _COMPARE * len(among)  # by a query that visits all
    for part in parts:
        if isinstance(part, faiss.VectorTransform):
            queries = part.apply(queries)
        if hasattr(part, "hnsw"):
            kept = math.ceil(_MORE_KEPT * wider * part.hnsw.efSearch)
            return None if all_lists or len(among) <= _KEPT_ROWS * kept else np.full(len(queries), kept), kept
        if isinstance(part, faiss.IndexIVF):
            usual = min(part.nlist, math.ceil(_MORE_LISTS * wider * part.nprobe))
            first = part.nlist if all_lists else usual
            if rows <= len(queries) * visited * first / part.nlist:
                return None, usual
            wanted = _MORE_LISTS * part.nprobe * total / part.nlist
            visits = enough_lists(part, queries, among, sampled(part), wanted, first)
            return None if rows <= visited * visits.sum() / part.nlist else visits, usual
    return None if rows <= len(queries) * visited else np.ones(len(queries), np.int64), 1


def keeping(index: Any, k: int) -> Any:
    """FAISS's search parameters with which a graph keeps as many candidates as it finds items. None if it does anyway.

    With fewer candidates FAISS ends the walk early and fills the answer with what it happened to meet.

    Args:
        index: FAISS's own index, with items.
        k: Number of items that are wanted.
    """
    api: Any = faiss  # the stubs know nothing of what FAISS's Python layer adds
    wanted, refined = k, None
    for part in parts_of(index):
        if isinstance(part, faiss.IndexRefine):
            refined = part.k_factor
            wanted = int(k * refined)
        if isinstance(part, faiss.IndexIVF):  # a graph behind it finds lists
            return None
        if hasattr(part, "hnsw"):
            if part.hnsw.efSearch >= wanted:
                return None
            parameters = api.SearchParametersHNSW(efSearch=wanted)
            if refined is None:
                return parameters
            return api.IndexRefineSearchParameters(k_factor=refined, base_index_params=parameters)
    return None


def selecting(index: Any, k: int, among: Selection, visited: int, far: bool) -> Any:
    """FAISS's search parameters that select items and visit some lists, or keep some candidates.

    Similarities to what lies far from a query are so alike that codes order them badly: more is refined.

    Args:
        index: FAISS's own index, with items.
        k: Number of items that are wanted: a graph keeps as many candidates or more.
        among: The selected items.
        visited: Number of lists, or of candidates of a graph.
        far: Whether the selected items lie far from the queries.
    """
    api: Any = faiss  # the stubs know nothing of what FAISS's Python layer adds
    sel = api.IDSelectorBitmap(among.bitmap)
    parameters, refined = None, None
    for part in parts_of(index):
        if isinstance(part, faiss.IndexRefine):
            refined = part.k_factor * (_FAR_CANDIDATES if far else 1)
        if isinstance(part, faiss.IndexIVF):
            parameters = api.SearchParametersIVF(sel=sel, nprobe=visited)
            break
        if hasattr(part, "hnsw"):
            parameters = api.SearchParametersHNSW(sel=sel, efSearch=max(visited, int(k * (refined or 1))))
            break
    parameters = parameters or api.SearchParameters(sel=sel)
    if refined is not None:
        return api.IndexRefineSearchParameters(k_factor=refined, base_index_params=parameters)
    return parameters


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
