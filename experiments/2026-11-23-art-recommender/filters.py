"""Recall under selective filters: selecting inside the index against filtering what it found.

    OMP_NUM_THREADS=1 python experiments/2026-11-23-art-recommender/filters.py

Vectors around random centres, some more spread than others, as descriptors of classes lie; a filter takes items at
random ("random") or whole neighbourhoods first ("cluster": the answers lie where few queries look). Writes
filters.csv: recall@10 against exact search among the selected items, and milliseconds a query on one thread, for

    post        what the index finds, deepened to k / selectivity (at most 10,000), then filtered
    plain       FAISS's selector, the index's own nprobe or efSearch
    wider       the same with both raised, by 4 / selectivity and 16 / selectivity
    exact       the selected rows decoded and all compared
    ours        FaissIndex.search(among=), which chooses
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from unittest import mock

import faiss
import numpy as np
import torch
from torch import Tensor

from simsearch.index import faiss_index
from simsearch.index.faiss_index import FaissIndex

INDEXES = {
    "IVF256,Flat": {"nprobe": 16},
    "IVF256,PQ32": {"nprobe": 16},
    "HNSW32": {"ef_search": 64},
    "Flat": {},
}
SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)
K = 10


def clustered(count: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit vectors (N, D) around 500 centres, and the centre of each, (N,)."""
    centres = torch.randn(500, dimension, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(500, (count,), generator=generator)
    spread = 0.5 + torch.rand(count, 1, generator=generator)
    noise = torch.randn(count, dimension, generator=generator)
    return torch.nn.functional.normalize(centres[which] + spread * noise, dim=1), which


def filters(which: Tensor, selectivity: float) -> dict[str, Tensor]:
    """Masks bool (N,) of about that share of the items."""
    generator = torch.Generator().manual_seed(7)
    chance = torch.rand(len(which), generator=generator)
    count = round(selectivity * len(which))
    return {"random": _first(chance, count), "cluster": _first(which + chance, count)}


def _first(order: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order.argsort()[:count]] = True
    return mask


def post(index: FaissIndex, queries: Tensor, mask: Tensor) -> Tensor:
    """ids (Q, K) of the K best that pass the filter, of a longer answer; -1 where there are fewer."""
    depth = min(len(index), 10_000, math.ceil(K / float(mask.float().mean())))
    found = index.search(queries, depth).ids
    kept = (found >= 0) & mask[found.clamp(min=0)]
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :K]
    ids = found.gather(1, order).masked_fill(~kept.gather(1, order), -1)
    return torch.nn.functional.pad(ids, (0, K - ids.shape[1]), value=-1)


def plain(index: FaissIndex, queries: Tensor, mask: Tensor) -> Tensor:
    """ids (Q, K) by FAISS's own selector, at the index's own nprobe or efSearch."""
    sel = faiss.IDSelectorBitmap(np.packbits(mask.numpy(), bitorder="little"))
    if index.nprobe:
        parameters = faiss.SearchParametersIVF(sel=sel, nprobe=index.nprobe)
    elif index.ef_search:
        parameters = faiss.SearchParametersHNSW(sel=sel, efSearch=index.ef_search)
    else:
        parameters = faiss.SearchParameters(sel=sel)
    return torch.from_numpy(index._index.search(queries.numpy(), K, params=parameters)[1])


def wider(index: FaissIndex, queries: Tensor, mask: Tensor) -> Tensor:
    """ids (Q, K) by our rule without its exact comparison of few items."""
    with mock.patch.multiple(faiss_index, _FEW=0, _KEPT_ROWS=0, _DECODE=math.inf):
        return index.search(queries, K, mask).ids


def exact(index: FaissIndex, queries: Tensor, mask: Tensor) -> Tensor:
    """ids (Q, K) by comparing all selected rows."""
    return index._search_rows(queries.numpy(), K, mask.nonzero()[:, 0].numpy()).ids


def ours(index: FaissIndex, queries: Tensor, mask: Tensor) -> Tensor:
    """ids (Q, K) as the recommender gets them."""
    return index.search(queries, K, mask).ids


WAYS = (post, plain, wider, exact, ours)
SLOW = 0.05  # below this selectivity an HNSW graph that keeps so many candidates takes seconds a query


def recall(found: Tensor, exact: Tensor) -> float:
    """The share of the exact answers (Q, K) that were found."""
    return float((exact[:, :, None] == found[:, None, :]).any(2).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("filters.csv"))
    options = parser.parse_args()
    items, which = clustered(options.items, options.dimension, seed=1)
    queries, _ = clustered(options.queries, options.dimension, seed=2)
    rows = []
    for factory, settings in INDEXES.items():
        index = FaissIndex(factory, **settings)
        index.add(items)
        index.rows(torch.tensor([0]))  # the map is made once
        truth = FaissIndex("Flat")
        # against exact search in what the index stores: what a filter loses, not what compression does
        truth.add(index.reconstruct())
        for selectivity in SELECTIVITIES:
            for kind, mask in filters(which, selectivity).items():
                true = truth.search(queries, K, mask).ids
                for way in WAYS:
                    if way is wider and "HNSW" in factory and selectivity < SLOW:
                        continue
                    start = time.perf_counter()
                    found = torch.cat([way(index, query[None], mask) for query in queries])  # one by one, as they come
                    milliseconds = 1e3 * (time.perf_counter() - start) / len(queries)
                    score = round(recall(found, true), 4)
                    row = [factory, selectivity, kind, way.__name__, score, round(milliseconds, 3)]
                    rows.append(row)
                    print(*row)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "selectivity", "filter", "way", "recall@10", "ms_per_query"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
