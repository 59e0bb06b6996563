"""The evaluator of geometric verification: the best items of each query, compared with it image by image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from simsearch.data.process_pool import MEMORY, SECONDS, Failure, bounded_map
from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.evaluation.instance import pooled_precision
from simsearch.functional.geometry import Verifier
from simsearch.functional.ragged import Ragged
from simsearch.functional.ranking import find_junk, mean_name, measure_ranking
from simsearch.functional.reranking import nearest, unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.functional.significance import paired_interval, paired_permutation
from simsearch.types import LocalFeatures, RetrievalTask, SearchResult

T = TypeVar("T")
R = TypeVar("R")

_TESTED = ("AP", "R@1")


@dataclass(frozen=True)
class Verified:
    """Evaluates rankings whose first items are verified by geometry, beside the same rankings without.

    The ranking is by cosine (codes as vectors of +1 and -1). Of each query's first `verifier.top` items, junk left out,
    those that are verified come first, most inliers ahead and equal ones by cosine. The others stay in their order.

    - `verify/AP`, `verify/R@1` and the other values of `measure_ranking`, of each query.
    - `verify/accepted`, whether an item of the query is verified, and `verify/accepted_wrong`, whether that is so and
      the first one is not relevant. Every query has these values.
    - `verify/mAP_gain` and `verify/R@1_gain`: the mean difference that verification makes, with its interval over the
      sampling units, and the p-value of the paired sign-flip test, `verify/mAP_p` and `verify/R@1_p`.
    - `verify/GAP`: the GAP of the first items of all queries, where those without a relevant item are distractors, and
      `verify/microAP`: the average precision of all pairs of a query and one of its first `top` items together, of all
      relevant pairs. `verify/GAP_without` and `verify/microAP_without` order by cosine alone. With verification, any
      verified pair stands before all others, by inliers and then by cosine; the others follow by cosine.
    - `verify/features_ms`, `verify/matching_ms` and `verify/fitting_ms`: milliseconds of one core (processor time)
      that a query takes, the mean over queries, and their sum `verify/ms_per_query`. `verify/items_s`: seconds to
      describe the items.

    The images are those of the collection. A larger one than the verifier asks for is scaled down, a smaller one stays
    as it is. Each item is described once; the features of all that stand among the first of a query are in memory.

    Attributes:
        verifier: What verifies.
        images: The images of the collection: uint8 (N, 3, H, W) or Ragged.
        ks: Cutoffs k, 1 or more.
        workers: Number of processes; at least one is used.

    Source:
        Philbin, Chum, Isard, Sivic, Zisserman: Object retrieval with large vocabularies and fast spatial matching.
        CVPR 2007. microAP: Douze et al.: The 2021 image similarity dataset and challenge.
    """

    verifier: Verifier
    images: Tensor | Ragged
    ks: Sequence[int] = (1, 10, 100)
    workers: int = 0

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of a task.

        Args:
            query: The queries of the task, in one process.
            gallery: The gallery of the task, in one process.
            task: The task.
        """
        query, gallery = (side.with_vectors(unit_vectors(side.whole.vectors, side.bits)) for side in (query, gallery))
        junk = find_junk(query, gallery.own, exclude_self=task.exclude_self)
        found = nearest(query.own.vectors, gallery.own.vectors, self.verifier.top, junk)
        inliers, costs = self.inliers(query.index, gallery.index[found.ids.clamp(min=0)].masked_fill(found.ids < 0, -1))
        level = levels(inliers, found.scores)
        verified = inliers > 0

        rank = partial(measure_ranking, query, gallery, ks=sorted({1, *self.ks}), exclude_self=task.exclude_self)
        without, per_query = rank(), rank(ahead=_ahead(found.ids, level, verified))
        relevant = per_query.pop("relevant")
        units = query_units(query, task)
        metrics, intervals = _gains(without, per_query, units)

        right = (gallery.label[found.ids.clamp(min=0)] == query.label[:, None]) & (query.label >= 0)[:, None]
        right &= found.ids >= 0
        scores = level.double().masked_fill(found.ids < 0, -torch.inf)
        metrics |= {f"{name}_without": value for name, value in _pooled(found.scores, right, relevant).items()}
        metrics |= _pooled(scores, right, relevant)
        first = right.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        per_query |= {"accepted": verified.any(1).double(), "accepted_wrong": (verified.any(1) & ~first).double()}
        own = Measured.of(per_query, units)
        return Measured(
            _named({**own.metrics, **metrics, **costs}),
            units,
            _named({**own.intervals, **intervals}),
            _named(per_query),
        )

    def inliers(self, queries: Tensor, items: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The inliers of the verified matches, int64 (Q, M), 0 where an item is not verified, and what they cost.

        Args:
            queries: int64 (Q,), collection rows.
            items: int64 (Q, M), collection rows, -1 where there is none.
        """
        rows = items[items >= 0].unique().tolist()
        start = time.perf_counter()
        described = self._map(partial(_item, self.verifier, self.images), rows, rows, "items")
        known = dict(zip(rows, described, strict=True))
        costs = {"items_s": time.perf_counter() - start}

        compare = partial(_compare, self.verifier, self.images, known)
        first = ([item for item in of if item >= 0] for of in items.tolist())
        pairs = list(zip(queries.tolist(), first, strict=True))
        inliers, seconds = torch.zeros_like(items), torch.zeros(len(items), 3, dtype=torch.float64)
        for place, (counts, took) in enumerate(self._map(compare, pairs, queries.tolist(), "queries")):
            inliers[place, items[place] >= 0] = torch.tensor(counts, dtype=torch.int64)
            seconds[place] = torch.tensor(took)
        parts = 1e3 * seconds.mean(0)
        costs |= dict(zip(("features_ms", "matching_ms", "fitting_ms"), parts.tolist(), strict=True))
        return inliers, costs | {"ms_per_query": float(parts.sum())}

    def _map(self, function: Callable[[T], R], todo: Sequence[T], rows: Sequence[int], name: str) -> Iterator[R]:
        """function(one) for each of `todo`, which is about the image at the collection row of the same place."""
        results = bounded_map(function, todo, workers=max(1, self.workers), seconds=SECONDS, memory=MEMORY)
        shown = tqdm(results, total=len(todo), desc=f"verify: {name}", unit="img", leave=False)
        for row, result in zip(rows, shown, strict=True):
            if isinstance(result, Failure):
                raise ValueError(
                    f"the image at row {row} of the collection cannot be verified ({result.reason}: {result.detail}): "
                    "leave verify= out, or give a smaller verify.query_side and verify.item_side"
                )
            yield result


def levels(inliers: Tensor, scores: Tensor) -> Tensor:
    """The rank of each pair by inliers and then by score, int64 (Q, M): 0 for the least, and equal for equal pairs.

    Args:
        inliers: int64 (Q, M), 0 for a pair that is not verified.
        scores: float32 (Q, M).

    Example:
        >>> levels(torch.tensor([[0, 12, 0]]), torch.tensor([[0.75, 0.5, 0.75]]))
        tensor([[0, 1, 0]])
    """
    both = torch.stack([inliers.double(), scores.double()], dim=2)
    return both.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view_as(inliers)


def _item(verifier: Verifier, images: Tensor | Ragged, row: int) -> LocalFeatures:
    return verifier.item(images[row])


def _compare(
    verifier: Verifier, images: Tensor | Ragged, known: Mapping[int, LocalFeatures], pair: tuple[int, Sequence[int]]
) -> tuple[list[int], tuple[float, float, float]]:
    """The inliers of a query's items, and the seconds of one core that features, matching and fitting took."""
    row, rows = pair
    items = [known[item] for item in rows]
    times = [time.thread_time()]
    queries = verifier.query(images[row])
    times.append(time.thread_time())
    pairs = verifier.pair(queries, items)
    times.append(time.thread_time())
    matches = verifier.fit(queries, items, pairs)
    times.append(time.thread_time())
    features, matching, fitting = (after - before for before, after in pairwise(times))
    return [0 if match is None else match.inliers for match in matches], (features, matching, fitting)


def _ahead(ids: Tensor, level: Tensor, verified: Tensor) -> SearchResult:
    """The verified items (Q, M), highest level first."""
    scores = level.float().masked_fill(~verified, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return SearchResult(ids.gather(1, order).masked_fill(scores.isneginf(), -1), scores)


def _gains(
    without: Mapping[str, Tensor], with_: Mapping[str, Tensor], units: Tensor
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Differences with their intervals, and p-values. NaN where no query has a relevant item."""
    metrics, intervals = {}, {}
    for name in _TESTED:
        if with_[name].isnan().all():
            continue
        gain, *ends = paired_interval(with_[name], without[name], units)
        metrics[f"{mean_name(name)}_gain"], intervals[f"{mean_name(name)}_gain"] = gain, (ends[0], ends[1])
        metrics[f"{mean_name(name)}_p"] = paired_permutation(with_[name], without[name], units)
    return metrics, intervals


def _pooled(scores: Tensor, right: Tensor, relevant: Tensor) -> dict[str, float]:
    values = pooled_precision(scores, right, relevant)
    return {name: values[name] for name in ("GAP", "microAP")}


def _named(values: Mapping[str, T]) -> dict[str, T]:
    return {f"verify/{name}": value for name, value in values.items()}
