"""Measures of the descriptors of an art collection: by attribute, with grades, as an open set, as a recommender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.data.collection import Collection
from simsearch.functional.codes import pack_codes
from simsearch.functional.diversity import mmr
from simsearch.functional.ndcg import COLUMNS, count_levels, graded_relevance, ndcg_graded
from simsearch.functional.open_set import global_average_precision
from simsearch.functional.ranking import find_junk, mean_name, measure_ranking
from simsearch.functional.recommendation import (
    coverage,
    exposure,
    gini,
    intra_list_diversity,
    long_tail_share,
    novelty,
)
from simsearch.functional.reranking import csls_gallery, nearest, unit_vectors
from simsearch.functional.significance import mean_interval
from simsearch.types import Descriptors, RetrievalTask

K = 10
SHORTLIST = 100


@dataclass(frozen=True)
class Measured:
    """Some metrics under one protocol.

    Attributes:
        protocol: The name of the task.
        fingerprint: The fingerprint of the task. Numbers of different fingerprints cannot be compared.
        values: Name -> mean over queries.
        index: int64 (Q,), collection rows of the queries.
        unit: The name of the sampling unit, such as artist.
        units: int64 (Q,), the unit of each query.
        intervals: Name -> (low, high), 95% over sampling units, for the metrics that have an interval.
        per_query: Name -> float64 (Q,), NaN where a query has no value.
    """

    protocol: str
    fingerprint: str
    values: dict[str, float]
    index: Tensor
    unit: str
    units: Tensor
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_query: dict[str, Tensor] = field(default_factory=dict)


def part_descriptors(
    vectors: Tensor, bits: int | None, task: RetrievalTask, rows: Tensor, of: Collection
) -> Descriptors:
    """The descriptors of some collection rows under a task.

    Args:
        vectors: float32 (N, D), or real-valued codes (N, bits), of the whole collection.
        bits: Width of the codes, None for float vectors.
        task: The task, which says which attributes are labels and junk groups.
        rows: int64 (n,), collection rows.
        of: The collection.
    """
    group = None if task.junk is None else of.column(task.junk)[rows]
    kept = vectors[rows] if bits is None else pack_codes(vectors[rows])
    return Descriptors(kept, of.column(task.attribute)[rows], rows, bits=bits, group=group)


def measure_task(vectors: Tensor, bits: int | None, collection: Collection, task: RetrievalTask) -> Measured:
    """The mAP, P@k, R@k and the other metrics of full rankings under a task.

    Args:
        vectors: float32 (N, D), or real-valued codes (N, bits), of the whole collection.
        bits: Width of the codes, None for float vectors.
        collection: The collection.
        task: The task.
    """
    query, gallery = (part_descriptors(vectors, bits, task, rows, collection) for rows in (task.query, task.gallery))
    per_query = measure_ranking(query, gallery, ks=(1, K, 100), exclude_self=task.exclude_self)
    del per_query["relevant"]
    return _measured(task, {mean_name(name): values for name, values in per_query.items()})


def measure_graded(vectors: Tensor, bits: int | None, collection: Collection, task: RetrievalTask) -> Measured:
    """The NDCG@10 with grades on the task's gallery: 3 same work, 2 same artist, 1 same style and period, 0 otherwise.

    Args:
        vectors: float32 (N, D), or real-valued codes (N, bits), of the whole collection.
        bits: Width of the codes, None for float vectors.
        collection: The collection.
        task: The task. Its junk counts as any other item here.
    """
    columns = torch.stack([_known(collection, name) for name in COLUMNS], dim=1)
    ids = lists(vectors, bits, collection, replace(task, junk=None))
    level = graded_relevance(columns[task.query][:, None], columns[task.gallery][ids.clamp(min=0)]).masked_fill(
        ids < 0, 0
    )
    counts = count_levels(columns[task.query], columns[task.gallery], exclude_self=task.exclude_self)
    return _measured(task, {f"NDCG@{K}_graded": ndcg_graded(level, counts)})


def measure_open_set(
    vectors: Tensor, bits: int | None, collection: Collection, task: RetrievalTask, outside: Tensor | None = None
) -> Measured:
    """The GAP, the GAP- and the accuracy of the nearest item, as in the Met benchmark.

    They are measured on the gallery of an instance task.

    All gallery images are queries, each without itself. An image is a distractor where its work has no other image.
    GAP- leaves the distractors out.

    Args:
        vectors: float32 (N, D), or real-valued codes (N, bits), of the whole collection.
        bits: Width of the codes, None for float vectors.
        collection: The collection.
        task: The task.
        outside: Floating point (M, D), descriptors of images from elsewhere, which are distractors too, or None.
    """
    label = collection.column(task.attribute)[task.gallery]
    whole = replace(task, query=task.gallery, junk=None)
    gallery = part_descriptors(vectors, bits, whole, task.gallery, collection)
    junk = find_junk(gallery, gallery, exclude_self=True)
    unit = unit_vectors(gallery.vectors, bits)
    found = nearest(unit, unit, 1, junk)
    correct = label[found.ids[:, 0]] == label
    sizes = label.unique(return_inverse=True, return_counts=True)
    has_match = sizes[2][sizes[1]] > 1
    confidence, right, positives = found.scores[:, 0], correct & has_match, int(has_match.sum())
    values = {
        "GAP-": global_average_precision(confidence[has_match], right[has_match], positives),
        "GAP": global_average_precision(confidence, right, positives),
        "accuracy": float(right[has_match].double().mean()),
    }
    if outside is not None:
        other = nearest(unit_vectors(outside if bits is None else pack_codes(outside), bits), unit, 1)
        everything = torch.cat([confidence, other.scores[:, 0]])
        none = torch.zeros(len(other.ids), dtype=torch.bool)
        values["GAP_outside"] = global_average_precision(everything, torch.cat([right, none]), positives)
        values["outside"] = float(len(none))
    return Measured(task.name, task.fingerprint, values, task.gallery, whole.unit, whole.query_units)


def lists(
    vectors: Tensor,
    bits: int | None,
    collection: Collection,
    task: RetrievalTask,
    *,
    diversity: float = 0.0,
    hubness: bool = False,
) -> Tensor:
    """The gallery positions of each query's 10 recommendations, int64 (Q, 10), without junk and the query itself.

    Args:
        vectors: float32 (N, D), or real-valued codes (N, bits), of the whole collection.
        bits: Width of the codes, None for float vectors.
        collection: The collection.
        task: The task.
        diversity: 1 - lambda of MMR over the 100 nearest items, in [0, 1]. 0 leaves MMR out.
        hubness: Correct for hubs by CSLS.

    Returns:
        Positions in the task's gallery, -1 where a list is shorter.
    """
    query, gallery = (part_descriptors(vectors, bits, task, rows, collection) for rows in (task.query, task.gallery))
    junk = find_junk(query, gallery, exclude_self=task.exclude_self)
    asked, searched = unit_vectors(query.vectors, bits), unit_vectors(gallery.vectors, bits)
    if hubness:
        asked, searched = F.pad(asked, (0, 1), value=1.0), csls_gallery(searched, K)
    if not diversity:
        return nearest(asked, searched, K, junk).ids
    found = nearest(asked, searched, SHORTLIST, junk)
    chosen = torch.full((len(found.ids), K), -1, dtype=torch.int64)
    for row, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
        ids, scores = ids[ids >= 0], scores[ids >= 0]
        order = mmr(scores, searched[ids], K, 1 - diversity)
        chosen[row, : len(order)] = ids[order]
    return chosen


def most_changed(ours: Tensor, theirs: Tensor, count: int) -> Tensor:
    """The positions of the queries that gain most and that lose most, int64 (2 * count or fewer,), from gain to loss.

    Args:
        ours: Floating point (Q,), average precision, NaN where a query has none.
        theirs: Floating point (Q,), average precision of another system for the same queries.
        count: Number of queries at each end.
    """
    change = ours - theirs
    known = change.isnan().logical_not().nonzero()[:, 0]
    order = known[change[known].argsort(descending=True, stable=True)]
    return order if len(order) <= 2 * count else torch.cat([order[:count], order[-count:]])


def random_lists(collection: Collection, task: RetrievalTask, seed: int = 0) -> Tensor:
    """10 random gallery positions for each query, int64 (Q, 10), without junk and the query itself.

    Args:
        collection: The collection.
        task: The task.
        seed: Seed of the random choice.
    """
    noise = torch.randn(len(collection), 32, generator=torch.Generator().manual_seed(seed))
    return lists(F.normalize(noise, dim=1), None, collection, task)


def popular_lists(collection: Collection, task: RetrievalTask, popularity: Tensor) -> Tensor:
    """The 10 most popular gallery positions for each query, int64 (Q, 10), without junk and the query itself.

    Args:
        collection: The collection.
        task: The task.
        popularity: (G,), of gallery items. Of equally popular items the first comes first.

    Returns:
        Positions in the task's gallery, -1 where a list is shorter.
    """
    order = popularity.argsort(descending=True, stable=True)
    nothing = torch.zeros(len(collection), 1)
    query, gallery = (part_descriptors(nothing, None, task, rows, collection) for rows in (task.query, task.gallery))
    junk = find_junk(query, gallery, exclude_self=task.exclude_self)
    ids = torch.full((len(query), K), -1, dtype=torch.int64)
    for q in range(len(query)):
        columns = junk.block(q, q + 1)[1]
        first = order[: K + len(columns)]
        kept = first[~torch.isin(first, columns)][:K]
        ids[q, : len(kept)] = kept
    return ids


def measure_lists(
    ids: Tensor, space: Tensor, collection: Collection, task: RetrievalTask, popularity: Tensor
) -> Measured:
    """The P@10, coverage, Gini coefficient, long-tail share, diversity and novelty of recommendation lists.

    Args:
        ids: int64 (Q, 10), gallery positions, -1 for no item.
        space: Floating point (N, D), descriptors of the collection in which diversity is measured. Use the same for all
            lists that are compared.
        collection: The collection.
        task: The task.
        popularity: (G,), of gallery items.
    """
    counts = exposure(ids, len(task.gallery))
    label = collection.column(task.attribute)
    right = (label[task.gallery][ids.clamp(min=0)] == label[task.query][:, None]) & (ids >= 0)
    per_query = {
        f"P@{K}": right.double().mean(1),
        "diversity": intra_list_diversity(ids, space[task.gallery]),
        "novelty": novelty(ids, popularity),
    }
    shares = {"coverage": coverage(counts), "gini": gini(counts), "long_tail": long_tail_share(counts, popularity)}
    measured = _measured(task, per_query)
    return replace(measured, values=measured.values | shares)


def artist_popularity(collection: Collection, task: RetrievalTask) -> Tensor:
    """The number of gallery images by the artist of each gallery image, int64 (G,); 1 where the artist is unknown.

    Args:
        collection: The collection.
        task: The task.
    """
    artist = _known(collection, "artist")[task.gallery]
    names, place, counts = artist.unique(return_inverse=True, return_counts=True)
    return torch.where(names[place] < 0, 1, counts[place])


def _known(collection: Collection, attribute: str) -> Tensor:
    """The labels int64 (N,) of an attribute, all unknown (-1) where the collection lacks it."""
    if attribute in collection.attributes:
        return collection.column(attribute)
    return torch.full((len(collection),), -1, dtype=torch.int64)


def _measured(task: RetrievalTask, per_query: Mapping[str, Tensor]) -> Measured:
    units = task.query_units
    bounds = mean_interval(torch.stack(list(per_query.values()), dim=1), units).tolist()
    return Measured(
        task.name,
        task.fingerprint,
        {name: float(values.nanmean()) for name, values in per_query.items()},
        task.query,
        task.unit,
        units,
        {name: (low, high) for name, (low, high) in zip(per_query, bounds, strict=True)},
        dict(per_query),
    )
