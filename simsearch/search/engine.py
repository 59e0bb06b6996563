"""The search engine: ranks the items of a catalog for examples, counter-examples and filters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.functional.codes import pack_codes, unpack_codes
from simsearch.functional.diversity import mmr
from simsearch.functional.feedback import contributions, query_weights, reweight, reweight_both, rocchio, unit_parts
from simsearch.functional.geometry import Match, shown
from simsearch.functional.open_set import agreeing, stand_out
from simsearch.functional.ranking import Junk, inner_products
from simsearch.functional.reranking import RerankedGallery, Reranker, nearest, unit_vectors
from simsearch.index.selection import Selection
from simsearch.search.catalog import Catalog
from simsearch.search.errors import CatalogError
from simsearch.search.filters import Attributes, Filtered
from simsearch.search.items import rows_at
from simsearch.search.names import Names
from simsearch.search.request import Hit, Recommendation, Regions, Request
from simsearch.search.verdicts import (
    NONE,
    SAME_WORK,
    SIMILAR,
    UNCALIBRATED,
    best_verdict,
    exceeds,
    exceeds_inliers,
    sameness,
    similarity,
)
from simsearch.types import LocalFeatures, SearchResult

WORK_ATTRIBUTES = ("work", "group_id")
_SHORTLIST = 100
_HUB_NEIGHBOURS = 10
_DROPPED = 1000  # up to this many excluded items are removed from a longer list; more are excluded by a mask
_FILLS = 0.5  # share of a query from which a verified item leaves no room for others
_BLOCK = 2**14  # stored vectors that are read together
# Sharing these attributes says nothing: files, identities, links, and facts that follow from the artist.
_TELLS_NOTHING = re.compile(
    r"(^|_)(id|path|file|filename|title|work|group|slug|birth|death|url|link|hash|sha1|sha256|md5|phash|width|height"
    r"|license|licence|source|split|reason)$",
    re.IGNORECASE,
)


class Engine:
    """Searches a catalog by vectors, items and filters. Several threads may use it at once.

    `recommend` answers requests. Its scores are computed from the vectors that the index stores; with a compressed
    index, too, a score is the sum of its parts. A catalog of codes has one part; the cosine of two codes is 1 - 2 d /
    bits for the Hamming distance d. `nearest` returns what the index itself finds.

    With `rerank`, all stored vectors are read into memory as float32 and each query is compared with all of them. This
    is exact for every kind of index, at the cost of a full pass.

    Args:
        catalog: The catalog to search.
        rerank: The re-ranking method, or None.
    """

    def __init__(self, catalog: Catalog, rerank: Reranker | None = None) -> None:
        self.catalog = catalog
        self.parts = catalog.parts
        self._bits = next(iter(self.parts.values())).stop if catalog.index.is_binary else None
        self._reranked: RerankedGallery | None = None
        if rerank is not None:
            self._reranked = rerank.fit(unit_vectors(catalog.index.reconstruct(), self._bits))
        self.attributes = Attributes(catalog.items)
        self.work_attribute = next((n for n in WORK_ATTRIBUTES if n in self.attributes.names), None)

    @cached_property
    def works(self) -> np.ndarray:
        """int64 (N,), the work of each item.

        Equal numbers mean the same work. An item of unknown work has its own number.
        """
        own = np.arange(len(self.catalog), dtype=np.int64)
        if self.work_attribute is None:
            return own
        codes = self.attributes.column(self.work_attribute).codes
        return np.where(codes >= 0, codes.astype(np.int64), own + len(own))

    @cached_property
    def largest_work(self) -> int:
        """The number of items in the largest work."""
        return int(np.unique(self.works, return_counts=True)[1].max())

    @cached_property
    def telling(self) -> list[str]:
        """The attributes that are worth naming if two items share them: artist, style, period, ..."""
        names = [n for n in self.attributes.names if not _TELLS_NOTHING.search(n)]
        counts = {name: len(self.attributes.column(name).distinct) for name in names}
        return [name for name in names if 1 < counts[name] <= max(2, len(self.catalog) // 2)]

    @property
    def names(self) -> Names:
        """The names of the items."""
        return self.catalog.names

    def position(self, name: str | int) -> int:
        """The position of an item by id or path, as in `Names.find`.

        Args:
            name: The item's id or path.

        Raises:
            ValueError: If the catalog has no such item, or none any more.
        """
        return self.catalog.position(str(name))

    def vectors(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The stored vectors of some items, ready for a request: float32 (M, D), or packed codes uint8.

        Args:
            ids: Positions of the items.
        """
        return self.catalog.index.rows(torch.as_tensor(ids, dtype=torch.int64))

    def as_queries(self, vectors: Tensor) -> Tensor:
        """Turns descriptors into one query each, float32 (Q, D), with the catalog's weights.

        Each part is rescaled to its proper length, which a compressed index does not preserve. The bits of codes become
        ± 1 / sqrt(bits).

        Args:
            vectors: Q descriptors as the index stores them.

        Raises:
            ValueError: If the descriptors have another width than the catalog's.
        """
        width = (self.catalog.index.bits or 0) // 8 or self.catalog.index.dimension
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(
                f"descriptors of {vectors.shape[-1]} columns do not compare with the {width} of the catalog "
                f"{self.catalog.folder}: describe the images with its own encoder"
            )
        return unit_parts(self._stored(vectors), self.parts)

    def query(self, request: Request) -> Tensor:
        """The combined query of a request, float32 (D,). Its inner product with a stored descriptor is the score.

        The entries of one code are ± 1 / sqrt(bits), those of several together are not.

        Args:
            request: The request.

        Raises:
            ValueError: If the weights do not fit the catalog.
        """
        weights = self._weights(request)
        unlike = None if request.unlike is None else self.as_queries(request.unlike)
        return reweight(rocchio(self.as_queries(request.like), unlike, self.parts), self.parts, weights)

    def search(self, queries: Tensor, k: int, among: Selection | None = None) -> SearchResult:
        """The k items with the largest inner products.

        The index decides which items are found. The scores are exact for the stored vectors.

        Args:
            queries: float32 (Q, D), as `query` returns them.
            k: Number of items. If there are fewer, all are returned.
            among: The items to search. None searches all.
        """
        coded = pack_codes(queries) if self.catalog.index.is_binary else queries
        found = self.catalog.index.search(coded, min(k, len(self.catalog)), among)
        step = max(1, _BLOCK // found.ids.shape[1])
        parts = [self._rescored(*block) for block in zip(queries.split(step), found.ids.split(step), strict=True)]
        return SearchResult(torch.cat([ids for ids, _ in parts]), torch.cat([scores for _, scores in parts]))

    def nearest(self, vectors: Tensor, k: int) -> SearchResult:
        """The k most similar items for each descriptor.

        Scores of float descriptors are cosines; scores of codes are negative Hamming distances. With re-ranking, scores
        are the method's own: inner products of its vectors, or the values that order its shortlist.

        Args:
            vectors: (B, width), descriptors as `encode` returns them.
            k: Number of items, 1 or more. If there are fewer, all are returned.

        Raises:
            ValueError: If `k` is below 1, or larger than the re-ranking shortlist.
        """
        if not isinstance(k, Integral):
            raise ValueError(f"k must be a whole number, got {k}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if self._reranked is not None:
            return self._reranked.search(unit_vectors(vectors, self._bits), k)
        found = self.catalog.index.search(vectors, min(k, len(self.catalog)))
        if self.catalog.index.metric != "ip":
            return found
        # Rounding, and lengths that a compressed index does not keep, lead out of what a cosine can be.
        return SearchResult(found.ids, torch.where(found.ids < 0, found.scores, found.scores.clamp(-1, 1)))

    def scores(self, vector: Tensor, ids: Tensor) -> Tensor:
        """The scores (K,) of some items for a descriptor, as `nearest` returns them without re-ranking.

        Args:
            vector: (width,), a descriptor as `encode` returns it.
            ids: int64 (K,), positions of the items.
        """
        stored = self.vectors(ids)
        if self._bits is not None:
            return -(unpack_codes(stored, self._bits) != unpack_codes(vector[None], self._bits)).sum(1).float()
        if self.catalog.index.metric != "ip":
            return -(stored - vector).square().sum(1)
        return inner_products(vector[None], stored)[0].clamp(-1, 1)

    def recommend(self, request: Request) -> Recommendation:
        """The answer to a request. Re-ranking changes the order of the items, not their scores.

        Args:
            request: The request.

        Raises:
            ValueError: If weights, filters, descriptors or positions do not fit the catalog.
        """
        weights, query = self._weights(request), self.query(request)
        if self._reranked is not None and weights != self._weights(replace(request, weights=None)):
            raise ValueError(
                "weights= and rerank= do not go together: a re-ranker compares items by the catalog's own weights; "
                "leave one of them out"
            )
        taken = self._taken(request)
        among = Filtered(self.attributes.selection(request.where), request.where) if request.where else None
        if among is None and len(taken) > _DROPPED:
            among = Filtered(Selection.everything(len(self.catalog)))
        if among is not None:
            among = among.without(taken.numpy())
        candidates = len(self.catalog) - len(taken) if among is None else len(among)
        ids, scores, rows, matches = self._shortlist(request, query, among, taken, candidates)
        if request.min_score is not None:
            near = self._exact(rows @ query, query).clamp(-1, 1) >= request.min_score
            ids, scores, rows = ids[near], scores[near], rows[near]
            matches = [match for match, one in zip(matches, near.tolist(), strict=True) if one]

        ranked = scores
        if request.hubness and len(ids):
            ranked = scores - 0.5 * self._hubness(ids, reweight(rows, self.parts, weights))
        verified = min(request.k, sum(match is not None for match in matches))  # these come first
        chosen = torch.arange(verified)
        if verified < request.k:
            rest = reweight_both(rows[verified:], self.parts, weights)
            shown = reweight_both(rows[:verified], self.parts, weights)
            others = mmr(ranked[verified:], rest, request.k - verified, 1 - request.diversity, shown)
            chosen = torch.cat([chosen, others + verified])
        matches = [matches[place] for place in chosen.tolist()]
        of_parts = contributions(query, rows[chosen], self.parts)
        of_parts = {name: self._exact(part, query) for name, part in of_parts.items()}
        total, of_parts = _bounded(sum(of_parts.values(), torch.zeros(len(chosen))), of_parts)
        judged = self.verdicts(ids[chosen], request.like, taken, matches if request.local else None)
        floor = max(0.0, (self.catalog.calibration or {}).get("floor") or 0.0)
        verdicts = [
            NONE if verdict == SIMILAR and score <= floor else verdict
            for verdict, score in zip(judged, total.tolist(), strict=True)
        ]
        return Recommendation(ids[chosen], total, of_parts, verdicts, best_verdict(verdicts), candidates, matches)

    def verified(
        self,
        ids: Tensor,
        local: Sequence[LocalFeatures],
        regions: Regions | None = None,
        *,
        among: Selection | None = None,
        taken: Tensor | None = None,
    ) -> tuple[Tensor, list[Match | None]]:
        """Items and their matches after verification: int64 (S,), verified items first, the others in their order.

        The first items, as many as the catalog's `verification` says, are compared with the query. If none of them
        fills half of the query, the nearest items of its regions are compared too. Those that are verified join the
        items. Verified items are ordered by their inliers.

        Args:
            ids: int64 (S,), positions of the items, best first.
            local: The local features of the query.
            regions: The descriptors of the query's regions, when they are needed.
            among: The items to search by regions. None searches all.
            taken: int64 (T,), positions of items to leave out.

        Raises:
            CatalogError: If the catalog has no local features, or damaged ones.
        """
        return _verified_first(ids, self._matches(ids, local, regions, among, taken))

    def _matches(
        self,
        ids: Tensor,
        local: Sequence[LocalFeatures],
        regions: Regions | None,
        among: Selection | None,
        taken: Tensor | None,
    ) -> dict[int, Match]:
        """The match of each verified item, by position. The arguments are those of `verified`."""
        verification = self.catalog.verification
        if verification is None:
            raise CatalogError(
                f"the catalog {self.catalog.folder} has no local features to verify matches by: make it again with "
                "verify=sift"
            )

        def compare(positions: list[int]) -> dict[int, Match]:
            found = verification.verify(local, self.catalog.local_features(positions))
            return {place: match for place, match in zip(positions, found, strict=True) if match is not None}

        first = ids[: verification.top].tolist()
        matches = compare(first)
        if regions is not None and not any(shown(match) >= _FILLS for match in matches.values()):
            others = self._of_regions(regions(), among, torch.empty(0) if taken is None else taken)
            matches |= compare([position for position in others if position not in set(first)])
        return matches

    def _of_regions(self, vectors: Tensor, among: Selection | None, taken: Tensor) -> list[int]:
        """Positions of the nearest permitted items of each region, each once, the nearest of all regions first."""
        assert self.catalog.verification is not None
        if not len(vectors):
            return []
        top = self.catalog.verification.region_top
        found = self.search(self.as_queries(vectors), top + (len(taken) if among is None else 0), among)
        kept = [row[(row >= 0) & ~torch.isin(row, taken)][:top].tolist() for row in found.ids]
        by_rank = (position for rank in zip_longest(*kept) for position in rank if position is not None)
        return list(dict.fromkeys(by_rank))

    def verdicts(
        self,
        ids: Tensor,
        like: Tensor,
        taken: Tensor | None = None,
        matches: Sequence[Match | None] | None = None,
    ) -> list[str]:
        """The verdict on each item by the catalog's calibration.

        The verdicts are:

        - "same work": the item is similar (if that is calibrated), and its cosine stands out against the example's
          background.
        - "similar": the cosine exceeds the threshold for the example's background and the scores of unrelated images.
        - "none": neither.
        - "uncalibrated": the catalog has no calibration, or "similar" is not calibrated and the item is not the same
          work.

        An item is judged by its cosine to each single example, compared with that example's background in the whole
        catalog (`stand_out`): in a dense neighbourhood a similar item counts for more. If there are several examples,
        enough of them must agree (`agreeing`). Verdicts always use the catalog's own weights, whatever weights and
        filters a request has.

        Args:
            ids: int64 (K,), positions of the items.
            like: The examples, as in `Request`.
            taken: int64, positions of items that are examples themselves.
            matches: The matches of the items, if they were verified. Then an item is the same work if its match has
                more inliers than calibrated, or has any match if that is not calibrated.
        """
        calibration = self.catalog.calibration
        if matches is not None:
            unverified = UNCALIBRATED if calibration is None or calibration["similar"] is None else SIMILAR
            by_cosine = self.verdicts(ids, like, taken)
            others = [unverified if verdict == SAME_WORK else verdict for verdict in by_cosine]
            enough = exceeds_inliers(matches, (calibration or {}).get("verified"), len(like))
            return [SAME_WORK if one else verdict for one, verdict in zip(enough, others, strict=True)]
        if calibration is None or not len(ids):
            return [UNCALIBRATED] * len(ids)
        queries = self.as_queries(like)
        cosines = self._exact(self._stored(self.vectors(ids)) @ queries.T, queries)
        _, background = self.stand_out(queries, calibration["neighbours"], torch.empty(0) if taken is None else taken)
        same = exceeds(sameness(cosines, background), calibration["same_work"])
        if calibration["similar"] is None:
            return [SAME_WORK if one else UNCALIBRATED for one in same.tolist()]
        near = similarity(cosines, background).masked_fill(cosines <= calibration["floor"], -torch.inf)
        close = exceeds(near, calibration["similar"])
        kinds = {(True, True): SAME_WORK, (False, True): SIMILAR}
        return [kinds.get(one, NONE) for one in zip(same.tolist(), close.tolist(), strict=True)]

    def agreeing(self, examples: int, verified: bool = False) -> dict[str, int]:
        """For each verdict that an item can get by calibration, the number of examples that it must be close to.

        Args:
            examples: Number of examples in the query.
            verified: Whether items are verified. Then an item is the same work by its match with one example, if the
                catalog has a threshold for the best of so many matches, and else never.
        """
        calibration = self.catalog.calibration or {}
        known = {SAME_WORK: calibration.get("same_work"), SIMILAR: calibration.get("similar")}
        found = {verdict: agreeing(examples, len(values))[0] for verdict, values in known.items() if values}
        if verified:
            found.pop(SAME_WORK, None)
            inliers = calibration.get("verified")
            if inliers is None or agreeing(examples, len(inliers))[0] == 1:
                return {SAME_WORK: 1} | found
        return found

    def stand_out(self, queries: Tensor, neighbours: int, taken: Tensor) -> tuple[Tensor, Tensor]:
        """The best score of each query and its background, (Q,) each.

        Args:
            queries: float32 (Q, D).
            neighbours: Number of neighbours that a background averages over.
            taken: int64 (T,), positions of items to leave out.
        """
        found = self.search(queries, neighbours + self.largest_work + len(taken))
        works = torch.from_numpy(self.works)[found.ids.clamp(min=0)]
        return stand_out(found.scores, works, torch.isin(found.ids, taken), neighbours)

    def hits(self, found: Recommendation, examples: Sequence[int], kept: Sequence[int] | None = None) -> list[Hit]:
        """The items of an answer with their names and attributes.

        Args:
            found: The answer.
            examples: Positions of the items that the query named. `shared` compares the attributes with theirs.
            kept: Places in the answer to return. None returns all.
        """
        kept = range(len(found.ids)) if kept is None else kept
        ids = found.ids[list(kept)].tolist()
        matches = [found.matches[place] for place in kept]
        rows = rows_at(self.catalog.items, ids)
        return [
            Hit(
                rank=place + 1,
                id=name,
                score=float(found.scores[place]),
                verdict=found.verdicts[place],
                parts={part: float(values[place]) for part, values in found.parts.items()},
                shared=common,
                attributes=row,
                inliers=None if match is None else match.inliers,
                outline=None if match is None else match.outline.tolist(),
            )
            for place, name, row, common, match in zip(
                kept, self.names.of(ids), rows, self.shared(ids, examples), matches, strict=True
            )
        ]

    def shared(self, ids: Sequence[int] | Tensor, with_: Sequence[int]) -> list[dict[str, str]]:
        """For each item, the telling attributes and values that it has in common with any of the items in `with_`.

        Args:
            ids: Positions of the items.
            with_: Positions of the items to compare with.
        """
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
        """The telling attributes and values that more than half of the items, and at least two, have in common.

        Args:
            ids: Positions of the items.
        """
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
                f"the catalog {self.catalog.folder} holds codes, whose parts cannot be weighted: leave weights out"
            )
        return query_weights(self.parts, request.weights)

    def _stored(self, vectors: Tensor) -> Tensor:
        """Stored vectors as float32 (n, D). The bits of codes become ± 1 / sqrt(bits)."""
        if self._bits is None:
            return vectors
        return (2 * unpack_codes(vectors, self._bits) - 1) * self._bits**-0.5

    def _exact(self, products: Tensor, queries: Tensor) -> Tensor:
        """Inner products of stored vectors with one query or several.

        Those of two codes are rounded to multiples of 1 / bits, so that equal distances get equal scores.
        """
        if self._bits is None or not _are_codes(queries):
            return products
        return (products * self._bits).round() / self._bits

    def _rescored(self, queries: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._stored(self.vectors(ids.clamp(min=0).flatten())).unflatten(0, ids.shape)
        pairs = zip(queries, rows, strict=True)
        products = [self._exact(inner_products(query[None], own), query) for query, own in pairs]
        scores = torch.cat(products).masked_fill(ids < 0, -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, order), scores.gather(1, order)

    def _taken(self, request: Request) -> Tensor:
        """Positions of the items that must not be returned.

        These are the query's own items and, if works collapse, their works.
        """
        given = np.asarray(request.exclude, dtype=np.int64)
        if len(given) and (given.min() < 0 or given.max() >= len(self.catalog)):
            raise ValueError(f"exclude must hold positions from 0 to {len(self.catalog) - 1}, got {given.tolist()}")
        if request.collapse and len(given):
            given = np.flatnonzero(np.isin(self.works, self.works[given]))
        return torch.from_numpy(np.unique(given))

    def _shortlist(
        self, request: Request, query: Tensor, among: Selection | None, taken: Tensor, candidates: int
    ) -> tuple[Tensor, Tensor, Tensor, list[Match | None]]:
        """ids (S,), scores (S,), vectors (S, D) and matches of the best items, one per work if works collapse.

        The search goes deeper, and where the index has no more to give, through all its lists, until there are k items
        or the catalog is exhausted.
        """
        top = self.catalog.verification.top if request.local and self.catalog.verification else 0
        depth = min(max(_SHORTLIST, 10 * request.k, top), candidates)
        verified: dict[int, Match] | None = None  # does not depend on the depth
        while True:
            found = self._nearest(query, request.like, depth, among, taken)
            ids, scores = found.ids[0], found.scores[0]
            matches: list[Match | None] = [None] * len(ids)
            if request.local:
                before = dict(zip(ids.tolist(), scores.tolist(), strict=True))
                if verified is None:
                    verified = self._matches(ids, request.local, request.regions, among, taken)
                ids, matches = _verified_first(ids, verified)
                # For those that regions brought.
                own = self._exact(self._stored(self.vectors(ids)) @ query, query).tolist()
                scores = torch.tensor([before.get(i, score) for i, score in zip(ids.tolist(), own, strict=True)])
            kept = torch.arange(len(ids))
            if request.collapse:
                _, first = np.unique(self.works[ids], return_index=True)
                kept = torch.from_numpy(np.sort(first))
            if len(kept) < request.k:
                if len(found.ids[0]) == depth < candidates:
                    depth = min(4 * depth, candidates)
                    continue
                if len(found.ids[0]) < depth and among is None:
                    among = Filtered(Selection.everything(len(self.catalog))).without(taken.numpy())
                    continue
            ids, scores = ids[kept], scores[kept]
            matches = [matches[place] for place in kept.tolist()]
            return ids, scores, self._stored(self.vectors(ids)), matches

    def _nearest(self, query: Tensor, like: Tensor, depth: int, among: Selection | None, taken: Tensor) -> SearchResult:
        """The best S <= depth items for one query among the permitted items, as a result of shape (1, S).

        An index of codes compares with codes only. If the query is none, the nearest items of each example `like` are
        compared with it too.
        """
        if depth == 0:
            return SearchResult(torch.empty((1, 0), dtype=torch.int64), torch.empty((1, 0)))
        if self._reranked is not None:
            return self._nearest_reranked(query, depth, among, taken)
        wanted = depth + (len(taken) if among is None else 0)
        found = self.search(query[None], wanted, among)
        if self._bits is not None and not _are_codes(query):
            others = self.search(self.as_queries(like), wanted, among).ids
            ids = torch.cat([found.ids.flatten(), others.flatten()]).unique()
            found = SearchResult(*self._rescored(query[None], ids[None]))
        kept = found.ids[0] >= 0
        if among is None:
            kept &= ~torch.isin(found.ids[0], taken)
        return SearchResult(found.ids[:, kept][:, :depth], found.scores[:, kept][:, :depth])

    def _nearest_reranked(self, query: Tensor, depth: int, among: Selection | None, taken: Tensor) -> SearchResult:
        """The result of `_nearest` in the order of the re-ranker, which ranks only the permitted items.

        What it knows of an item's neighbours is over the whole catalog. The ranking goes on behind its shortlist, if it
        has one.

        The first item gets the best cosine of all items, the second item the second best, and so on. Later steps
        (diversity, hubness) compare with cosines, whatever scale the re-ranker's own scores have.
        """
        assert self._reranked is not None
        left_out = taken if among is None else torch.from_numpy((~among).positions)
        junk = Junk(torch.zeros_like(left_out), left_out)
        wanted, ahead = self._reranked.rerank(F.normalize(query[None], dim=1), junk)
        ids = torch.empty(0, dtype=torch.int64) if ahead is None else ahead.ids[0]
        if len(ids) < depth:
            rest = nearest(wanted, self._reranked.vectors, depth, junk).ids[0]
            ids = torch.cat([ids, rest[~torch.isin(rest, ids)]])
        ids = ids[ids >= 0][:depth]
        scores = self._exact(self._stored(self.vectors(ids)) @ query, query).sort(descending=True).values
        return SearchResult(ids[None], scores[None])

    def _hubness(self, ids: Tensor, queries: Tensor) -> Tensor:
        """The mean score (S,) of each item with its nearest other items. `queries` (S, D) are the items as queries."""
        found = self.search(queries, _HUB_NEIGHBOURS + 1)
        others = (found.ids != ids[:, None]) & (found.ids >= 0)
        others &= others.cumsum(1) <= _HUB_NEIGHBOURS
        return found.scores.masked_fill(~others, 0.0).sum(1) / others.sum(1).clamp(min=1)


def _are_codes(queries: Tensor) -> bool:
    """Whether all entries of a query (D,), or of each query (Q, D), differ in their signs only."""
    return bool((queries.abs() == queries[..., :1].abs()).all())


def _verified_first(ids: Tensor, matches: Mapping[int, Match]) -> tuple[Tensor, list[Match | None]]:
    """Verified items, most inliers first, then the other `ids` (S,) in their order; and the match of each or None."""
    ahead = sorted(matches, key=lambda position: -matches[position].inliers)
    order = ahead + [position for position in ids.tolist() if position not in matches]
    return torch.tensor(order, dtype=torch.int64), [matches.get(position) for position in order]


def _bounded(scores: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores (K,) clipped to [-1, 1], and parts that sum to them.

    A mean of cosines lies in this range, but rounding, and lengths that a compressed index does not preserve, can leave
    it.
    """
    bounded = scores.clamp(-1, 1)
    scale = torch.where(scores == bounded, 1.0, bounded / scores)
    return bounded, {name: (part * scale).clamp(-1, 1) for name, part in parts.items()}
