"""The recommender: examples and counter-examples in, items of a catalog out, explained, filtered and diverse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from simsearch.functional.codes import pack_codes, unpack_codes
from simsearch.functional.diversity import mmr
from simsearch.functional.feedback import contributions, query_weights, reweight, reweight_both, rocchio, unit_parts
from simsearch.functional.open_set import agreeing, stand_out
from simsearch.functional.ranking import inner_products
from simsearch.search.catalog import Catalog
from simsearch.search.filters import Attributes, Condition
from simsearch.search.names import Names
from simsearch.types import SearchResult

WORK_ATTRIBUTES = ("work", "group_id")
SAME_WORK, SIMILAR, NONE, UNCALIBRATED = "same work", "similar", "none", "uncalibrated"
_SHORTLIST = 100
_HUB_NEIGHBOURS = 10
_DROPPED = 1000  # so many items that may not be answered are taken out of a longer list, more by a mask
# How much of a query's background counts against the same work, and for what is similar: of 0, .25, .5, .75 and 1 the
# one that finds most photographs of works at the same rate (experiments/2026-11-23-art-recommender).
_BACKGROUND = 0.5
_BLOCK = 2**14  # stored vectors that are read together
# What says nothing when two items share it: files, identities, links, and what else an artist brings along.
_TELLS_NOTHING = re.compile(
    r"(^|_)(id|path|file|filename|title|work|group|slug|birth|death|url|link|hash|sha1|sha256|md5|phash|width|height"
    r"|license|licence|source|split|reason)$",
    re.IGNORECASE,
)


def sameness(cosines: Tensor, background: Tensor) -> Tensor:
    """What the thresholds of "same work" are of: cosines (..., Q) less a part of the queries' background (Q,)."""
    return cosines - _BACKGROUND * background.clamp(min=-1)


def similarity(cosines: Tensor, background: Tensor) -> Tensor:
    """What the thresholds of "similar" are of: cosines (..., Q) and a part of the queries' background (Q,)."""
    return cosines + _BACKGROUND * background.clamp(min=-1)


def exceeds(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Which items, bool (K,), enough of the examples are near to; values (K, M), thresholds as `thresholds_at` has."""
    needed, of = agreeing(values.shape[1], len(thresholds))
    return values.topk(needed, dim=1).values[:, -1] > thresholds[of - 1]


def best_verdict(verdicts: Sequence[str]) -> str:
    """The verdict of an answer: the best of its items', "none" where it has none."""
    return min(verdicts, key=(SAME_WORK, SIMILAR, UNCALIBRATED, NONE).index, default=NONE)


@dataclass(frozen=True)
class Request:
    """What is asked of a catalog.

    like, unlike: descriptors as the catalog's index holds them (`engine.encode`, or `Recommender.vectors` of its
    items): float32 (M, D) and (U, D), or packed codes uint8. k: items wanted. weights: of the descriptor's parts, its
    own where None or not named. where: conditions that all hold. diversity: from 0 (by score alone) to 1.
    collapse: at most one item of a work, and none of the works of `exclude`. hubness: rank by the score less half an
    item's mean similarity to its nearest (CSLS), against items that are near to everything. exclude: positions of
    the query's own items.

    Raises ValueError for k < 1, diversity outside [0, 1] and no example.
    """

    like: Tensor
    unlike: Tensor | None = None
    k: int = 10
    weights: Mapping[str, float] | None = None
    where: tuple[Condition, ...] = ()
    diversity: float = 0.0
    collapse: bool = True
    hubness: bool = False
    exclude: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.k, Integral):
            raise ValueError(f"k must be a whole number, got {self.k}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity must lie in [0, 1] (0: by score alone), got {self.diversity}")
        if len(self.like) == 0:
            raise ValueError("no example: give at least one image or item to be like")


@dataclass(frozen=True)
class Recommendation:
    """What a catalog answers, best first; K is less than k where there is no more.

    ids: positions int64 (K,). scores: float32 (K,), inner products with the combined query: the weighted mean of the
    parts' cosines. parts: what each part adds to the score, (K,) each. verdicts: of each item, see
    `Recommender.verdicts`; an item whose score is negative is not "similar". verdict: the best of them, "none" where
    there is no item. candidates: how many items were searched, those that may be answered.
    """

    ids: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    verdicts: list[str]
    verdict: str
    candidates: int


class Recommender:
    """Answers requests to a catalog. Any number of threads may use it.

    Scores are computed from what the index stores, so that with a compressed index too they are the sums of their
    parts. A catalog of codes has one part, and cosine 1 - 2 d / bits for the Hamming distance d.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.parts = catalog.parts
        self.attributes = Attributes(catalog.items)
        self.work_attribute = next((n for n in WORK_ATTRIBUTES if n in self.attributes.names), None)

    @cached_property
    def works(self) -> np.ndarray:
        """The work of each item, int64 (N,): equal numbers are one work; an item without a known one is its own."""
        own = np.arange(len(self.catalog), dtype=np.int64)
        if self.work_attribute is None:
            return own
        codes = self.attributes.column(self.work_attribute).codes
        return np.where(codes >= 0, codes.astype(np.int64), own + len(own))

    @cached_property
    def largest_work(self) -> int:
        """How many items the work with most of them has."""
        return int(np.unique(self.works, return_counts=True)[1].max())

    @cached_property
    def telling(self) -> list[str]:
        """The attributes that are worth naming where two items share them: artist, style, period, ..."""
        names = [n for n in self.attributes.names if not _TELLS_NOTHING.search(n)]
        counts = {name: len(self.attributes.column(name).values) for name in names}
        return [name for name in names if 1 < counts[name] <= max(2, len(self.catalog) // 2)]

    @cached_property
    def names(self) -> Names:
        """What the items are called."""
        return Names(self.catalog.items)

    def position(self, name: str | int) -> int:
        """The position of the item of that id or path, as in `Names.find`. Raises ValueError where there is none."""
        found = self.names.find(str(name))
        if found is None:
            hint = f", or position:{name} for the item at that place" if re.fullmatch(r"[0-9]+", str(name)) else ""
            raise ValueError(
                f"no item {str(name)!r} in the catalog {self.catalog.folder}: give an id or path as it has it{hint}"
            )
        return found

    def vectors(self, ids: Sequence[int] | Tensor) -> Tensor:
        """What the index stores of these items, for a request: float32 (M, D), or packed codes uint8."""
        return self.catalog.index.rows(torch.as_tensor(ids, dtype=torch.int64))

    def as_queries(self, vectors: Tensor) -> Tensor:
        """Descriptors as the index holds them, as queries float32 (Q, D) of the catalog's weights, each by itself.

        Every part has its length again, which a compressed index does not keep. Codes become + or - 1 / sqrt(bits).
        Raises ValueError for descriptors of another width.
        """
        width = (self.catalog.index.bits or 0) // 8 or self.catalog.index.dimension
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(
                f"descriptors of {vectors.shape[-1]} columns do not compare with the {width} of the catalog "
                f"{self.catalog.folder}: describe the images with its own encoder"
            )
        return unit_parts(self._stored(vectors), self.parts)

    def query(self, request: Request) -> Tensor:
        """The combined query of a request, float32 (D,): its inner product with a stored descriptor is the score.

        Codes are entries of + or - 1 / sqrt(bits). Raises ValueError for weights that do not fit the catalog.
        """
        weights = self._weights(request)
        like = self.as_queries(request.like)
        query = rocchio(like, None if request.unlike is None else self.as_queries(request.unlike), self.parts)
        if self.catalog.index.is_binary:  # where examples are at odds, the first decides
            return torch.where(query == 0, like[0], query).sign() * like.shape[1] ** -0.5
        return reweight(query, self.parts, weights)

    def search(self, queries: Tensor, k: int, among: Tensor | None = None) -> SearchResult:
        """The k items, or all, of largest inner product with queries float32 (Q, D), as `query` gives them.

        among: bool (N,), the items to search. Which items there are is the index's answer, their scores are exact
        for what it stores.
        """
        coded = pack_codes(queries) if self.catalog.index.is_binary else queries
        found = self.catalog.index.search(coded, min(k, len(self.catalog)), among)
        step = max(1, _BLOCK // found.ids.shape[1])
        parts = [self._rescored(*block) for block in zip(queries.split(step), found.ids.split(step), strict=True)]
        return SearchResult(torch.cat([ids for ids, _ in parts]), torch.cat([scores for _, scores in parts]))

    def recommend(self, request: Request) -> Recommendation:
        """The answer to a request.

        Raises ValueError for weights, filters, descriptors or positions that do not fit the catalog.
        """
        weights, query = self._weights(request), self.query(request)
        taken = self._taken(request)
        among = self.attributes.select(request.where) if request.where else None
        if among is None and len(taken) > _DROPPED:
            among = torch.ones(len(self.catalog), dtype=torch.bool)
        if among is not None:
            among[taken] = False
        candidates = len(self.catalog) - len(taken) if among is None else int(among.sum())
        ids, scores, rows = self._shortlist(request, query, among, taken, candidates)

        ranked = scores
        if request.hubness and len(ids):
            ranked = scores - 0.5 * self._hubness(ids, reweight(rows, self.parts, weights))
        chosen = mmr(ranked, reweight_both(rows, self.parts, weights), request.k, 1 - request.diversity)
        of_parts = {name: self._exact(part) for name, part in contributions(query, rows[chosen], self.parts).items()}
        total, of_parts = _bounded(sum(of_parts.values(), torch.zeros(len(chosen))), of_parts)
        verdicts = [
            NONE if verdict == SIMILAR and score < 0 else verdict
            for verdict, score in zip(self.verdicts(ids[chosen], request.like, taken), total.tolist(), strict=True)
        ]
        return Recommendation(ids[chosen], total, of_parts, verdicts, best_verdict(verdicts), candidates)

    def verdicts(self, ids: Tensor, like: Tensor, taken: Tensor | None = None) -> list[str]:
        """What the catalog's calibration says of items: "same work", "similar", "none" or "uncalibrated".

        ids: positions int64 (K,). like: the examples as `Request` has them. taken: positions int64 of the examples' own
        items. An item is judged by its cosine to a plain example, beside the example's background in the whole catalog
        (`stand_out`): what is similar counts for more in a dense one, and its cosine must exceed what images from
        outside get; the same work must be similar, where that is calibrated, and stand out against the background. Of
        several examples enough must agree (`agreeing`). All of this is of the catalog's own weights, whatever weights
        and filters a request has.
        """
        calibration = self.catalog.calibration
        if calibration is None or not len(ids):
            return [UNCALIBRATED] * len(ids)
        queries = self.as_queries(like)
        cosines = self._exact(self._stored(self.vectors(ids)) @ queries.T)
        _, background = self.stand_out(queries, calibration["neighbours"], torch.empty(0) if taken is None else taken)
        same = exceeds(sameness(cosines, background), calibration["same_work"])
        if calibration["similar"] is None:
            return [SAME_WORK if one else UNCALIBRATED for one in same.tolist()]
        near = similarity(cosines, background).masked_fill(cosines <= calibration["floor"], -torch.inf)
        close = exceeds(near, calibration["similar"])
        kinds = {(True, True): SAME_WORK, (False, True): SIMILAR}
        return [kinds.get(one, NONE) for one in zip(same.tolist(), close.tolist(), strict=True)]

    def agreeing(self, examples: int) -> dict[str, int]:
        """Of so many examples, how many an item must be near to for each verdict that the calibration knows."""
        calibration = self.catalog.calibration or {}
        known = {SAME_WORK: calibration.get("same_work"), SIMILAR: calibration.get("similar")}
        return {verdict: agreeing(examples, len(values))[0] for verdict, values in known.items() if values}

    def stand_out(self, queries: Tensor, neighbours: int, taken: Tensor) -> tuple[Tensor, Tensor]:
        """The best score of queries float32 (Q, D) and their background, (Q,) both, without the items `taken` (T,)."""
        found = self.search(queries, neighbours + self.largest_work + len(taken))
        works = torch.from_numpy(self.works)[found.ids.clamp(min=0)]
        return stand_out(found.scores, works, torch.isin(found.ids, taken), neighbours)

    def shared(self, ids: Sequence[int] | Tensor, with_: Sequence[int]) -> list[dict[str, str]]:
        """Of each item, the telling attributes and values that it has in common with any of the items `with_`."""
        found: list[dict[str, str]] = [{} for _ in range(len(ids))]
        rows, others = np.asarray(ids, dtype=np.int64), np.asarray(with_, dtype=np.int64)
        for name in self.telling:
            column = self.attributes.column(name)
            known = set(column.codes[others].tolist()) - {-1}
            for place, code in enumerate(column.codes[rows].tolist()):
                if code in known:
                    found[place][name] = column.values[code]
        return found

    def consensus(self, ids: Sequence[int] | Tensor) -> dict[str, str]:
        """The telling attributes and values that more than half of these items, at least two, have in common."""
        rows, found = np.asarray(ids, dtype=np.int64), {}
        for name in self.telling:
            column = self.attributes.column(name)
            for code, count in Counter(column.codes[rows].tolist()).most_common(1):
                if code >= 0 and count > max(1, len(rows) / 2):
                    found[name] = column.values[code]
        return found

    def _weights(self, request: Request) -> dict[str, float]:
        if self.catalog.index.is_binary and set(request.weights or {}) - set(self.parts):
            raise ValueError(
                f"the catalog {self.catalog.folder} holds codes, which have no parts to weigh: leave weights out"
            )
        return query_weights(self.parts, request.weights)

    def _stored(self, vectors: Tensor) -> Tensor:
        """What an index stores as float32 (n, D): codes become + or - 1 / sqrt(bits)."""
        if not self.catalog.index.is_binary:
            return vectors
        bits = next(iter(self.parts.values())).stop
        return (2 * unpack_codes(vectors, bits) - 1) * bits**-0.5

    def _exact(self, products: Tensor) -> Tensor:
        """Inner products; of codes the multiple of 1 / bits that rounding left them near, so that ties tie."""
        if not self.catalog.index.is_binary:
            return products
        bits = next(iter(self.parts.values())).stop
        return (products * bits).round() / bits

    def _rescored(self, queries: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._stored(self.vectors(ids.clamp(min=0).flatten())).unflatten(0, ids.shape)
        products = [inner_products(query[None], own) for query, own in zip(queries, rows, strict=True)]
        scores = self._exact(torch.cat(products)).masked_fill(ids < 0, -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, order), scores.gather(1, order)

    def _taken(self, request: Request) -> Tensor:
        """Positions of the items that may not be answered: those of the query, and where works collapse, theirs."""
        given = np.asarray(request.exclude, dtype=np.int64)
        if len(given) and (given.min() < 0 or given.max() >= len(self.catalog)):
            raise ValueError(f"exclude must be positions 0 to {len(self.catalog) - 1}, got {given.tolist()}")
        if request.collapse and len(given):
            given = np.flatnonzero(np.isin(self.works, self.works[given]))
        return torch.from_numpy(np.unique(given))

    def _shortlist(
        self, request: Request, query: Tensor, among: Tensor | None, taken: Tensor, candidates: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids (S,), scores (S,) and vectors (S, D) of the best items, one a work where works collapse.

        It is deepened until it has k items or the catalog no more.
        """
        depth = min(max(_SHORTLIST, 10 * request.k), candidates)
        while True:
            found = self._nearest(query, depth, among, taken)
            ids, scores = found.ids[0], found.scores[0]
            if request.collapse:
                _, first = np.unique(self.works[ids], return_index=True)
                kept = torch.from_numpy(np.sort(first))
                if len(kept) < request.k and len(ids) == depth < candidates:
                    depth = min(4 * depth, candidates)
                    continue
                ids, scores = ids[kept], scores[kept]
            return ids, scores, self._stored(self.vectors(ids))

    def _nearest(self, query: Tensor, depth: int, among: Tensor | None, taken: Tensor) -> SearchResult:
        """The answer (1, S), S <= depth, to one query among the items that may be answered."""
        if depth == 0:
            return SearchResult(torch.empty((1, 0), dtype=torch.int64), torch.empty((1, 0)))
        found = self.search(query[None], depth + (len(taken) if among is None else 0), among)
        kept = found.ids[0] >= 0
        if among is None:
            kept &= ~torch.isin(found.ids[0], taken)
        return SearchResult(found.ids[:, kept][:, :depth], found.scores[:, kept][:, :depth])

    def _hubness(self, ids: Tensor, queries: Tensor) -> Tensor:
        """The mean score (S,) of items with their nearest others in the catalog; queries (S, D): they themselves."""
        found = self.search(queries, _HUB_NEIGHBOURS + 1)
        others = (found.ids != ids[:, None]) & (found.ids >= 0)
        others &= others.cumsum(1) <= _HUB_NEIGHBOURS
        return found.scores.masked_fill(~others, 0.0).sum(1) / others.sum(1).clamp(min=1)


def _bounded(scores: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores (K,) in [-1, 1], and parts that sum to them.

    No mean of cosines is out of there, but rounding, and lengths that a compressed index does not keep, lead out.
    """
    bounded = scores.clamp(-1, 1)
    scale = torch.where(scores == bounded, 1.0, bounded / scores)
    return bounded, {name: (part * scale).clamp(-1, 1) for name, part in parts.items()}
