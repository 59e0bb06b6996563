"""Calibration: score thresholds above which an answer is a match.

The thresholds are chosen from the scores of queries that have no match, and hold for new queries. What is promised is a
rate of queries, of which each comes from a thing of its own: one image of a work that is not in the catalog ("the same
work"), one image from outside ("similar"). Works are the units of chance, since images of one work are no independent
queries. `calibrate` takes any scores, one for each unit, higher for a better match.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsearch.functional.open_set import (
    false_match_curve,
    least_rate,
    least_share,
    pairs_once,
    stand_out,
    thresholds_at,
)
from simsearch.search.catalog import verifying
from simsearch.search.engine import Engine
from simsearch.search.verdicts import sameness, similarity
from simsearch.types import LocalFeatures

_BLOCK = 256  # queries that are searched together


@dataclass(frozen=True)
class Threshold:
    """The thresholds of one kind of match, and the effect of the first threshold on held-out queries.

    Attributes:
        values: Thresholds that queries without a match exceed at the rates `rate`, `rate` / 2, `rate` / 3, ... (see
            `thresholds_at`).
        rate: Promised rate of false matches, in [0, 1].
        units: Number of independent draws that the thresholds were chosen from.
        false: Number of false matches among the held-out queries without a match.
        of: Number of held-out queries without a match.
        per_unit: Number of these queries that count as one independent draw.
        found: Number of held-out matches that exceed the first threshold.
        matches: Number of held-out queries with a match.
        coverage: With the certainty of the promise, the first threshold finds at least this share of the matches of new
            queries.
    """

    values: list[float]
    rate: float
    units: int
    false: int
    of: int
    per_unit: int
    found: int
    matches: int
    coverage: float


@dataclass(frozen=True)
class Likeness:
    """How similar queries are to a collection.

    Attributes:
        top: (Q,), the best cosine of each query.
        background: (Q,), the mean cosine to the query's neighbours, which the best cosine is compared with.
    """

    top: Tensor
    background: Tensor

    @property
    def sameness(self) -> Tensor:
        """(Q,), the values that the thresholds of "same work" apply to."""
        return sameness(self.top, self.background)

    @property
    def similarity(self) -> Tensor:
        """(Q,), the values that the thresholds of "similar" apply to."""
        return similarity(self.top, self.background)

    def similar(self, threshold: Threshold, floor: float) -> Tensor:
        """bool (Q,), which queries find something similar, as `Engine.verdicts` decides it.

        Args:
            threshold: The thresholds of "similar".
            floor: The cosine that a similar item must exceed.
        """
        return (self.similarity > threshold.values[0]) & (self.top > floor)


def neighbours_of(count: int) -> int:
    """The number of neighbours that a background averages over: a twentieth of the items, at most 20.

    Args:
        count: Number of items in the catalog.
    """
    return min(20, max(1, count // 20))


def image_a_work(works: np.ndarray, at_most: int, seed: int) -> Tensor:
    """One random image of each of at most `at_most` random works: ascending rows, int64 (n,).

    Images of one work are not independent queries. This choice is distributed as a new image of a new work is.

    Args:
        works: (N,), the work of each image: numbers or texts.
        at_most: Largest number of works.
        seed: Seed of the random choice.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(works))
    _, first = np.unique(works[order], return_index=True)
    if len(first) > at_most:  # each work as likely as another, whatever its number of images
        first = random.choice(first, at_most, replace=False)
    return torch.from_numpy(np.sort(order[first]))


def leave_work_out(
    engine: Engine, positions: Tensor, neighbours: int, vectors: Tensor | None = None
) -> tuple[Likeness, Likeness]:
    """Compares items with the catalog without their own work, and with the catalog without themselves.

    A match is an answer whose first item is another image of the same work. The best cosines of matches are -inf if the
    first item is something else, and NaN for a work with one item. Works of more than about a hundred items make this
    slow.

    Args:
        engine: The engine of the catalog.
        positions: int64 (Q,), positions of the items.
        neighbours: Number of neighbours that a background averages over.
        vectors: Descriptors of the items as queries have them. Needed if the index does not store them exactly.

    Returns:
        The likeness of the items and the rest of the catalog, and that of the items and their matches.
    """
    works = torch.from_numpy(engine.works)
    _, work, sizes = works.unique(return_inverse=True, return_counts=True)
    depth = 2 * int(sizes.max()) + neighbours  # enough are left without the own work and the leader's
    tops, backgrounds, matches, behinds = [], [], [], []
    for block in torch.arange(len(positions)).split(_BLOCK):
        at = positions[block]
        found = engine.search(engine.as_queries(engine.vectors(at) if vectors is None else vectors[block]), depth)
        of = work[found.ids.clamp(min=0)]
        own, itself = of == work[at][:, None], found.ids == at[:, None]
        top, background = stand_out(found.scores, of, own, neighbours)
        tops.append(top)
        backgrounds.append(background)
        best, behind = stand_out(found.scores, of, itself, neighbours)
        led = own.gather(1, itself.to(torch.uint8).argsort(dim=1, stable=True))[:, 0]
        matches.append(best.masked_fill(~led, -torch.inf).masked_fill(sizes[work[at]] == 1, torch.nan))
        behinds.append(behind)
    return Likeness(torch.cat(tops), torch.cat(backgrounds)), Likeness(torch.cat(matches), torch.cat(behinds))


def verify_without_work(
    engine: Engine, positions: Tensor, local: Iterable[Sequence[LocalFeatures] | None], vectors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The evidence of verification for items as queries: without their own work, and of their matches, (Q,) each.

    The evidence is the largest number of inliers of a verified item, 0 if no item is verified. A match is an answer
    whose first verified item is another image of the same work. The evidence of matches is -inf if there is none, and
    NaN for a work with one item. The best items by cosine are compared, as many as a search compares for the image and
    its regions.

    Args:
        engine: The engine of a catalog with local features.
        positions: int64 (Q,), positions of the items.
        local: The local features of each item as a query. None if they are unknown: the evidence is NaN.
        vectors: Descriptors of the items as queries have them. Needed if the index does not store them exactly.
    """
    works = torch.from_numpy(engine.works)
    _, work, sizes = works.unique(return_inverse=True, return_counts=True)
    verification = engine.catalog.verification
    assert verification is not None
    depth = verification.top + verification.regions * verification.region_top + int(sizes.max())
    deep = Engine(verifying(engine.catalog, top=depth, regions=0))
    strangers, matches = [], []
    for row, (position, features) in enumerate(zip(positions.tolist(), local, strict=True)):
        if features is None:
            strangers.append(math.nan)
            matches.append(math.nan)
            continue
        query = engine.as_queries(engine.vectors([position]) if vectors is None else vectors[row : row + 1])
        ids = engine.search(query, depth).ids[0]
        ids = ids[(ids >= 0) & (ids != position)]
        order, found = deep.verified(ids, features)
        own = (work[order] == work[position]).tolist()
        evidence = [0.0 if match is None else float(match.inliers) for match in found]
        strangers.append(max((one for one, same in zip(evidence, own, strict=True) if not same), default=0.0))
        leads = bool(evidence) and evidence[0] > 0 and own[0]
        matches.append(math.nan if sizes[work[position]] == 1 else evidence[0] if leads else -math.inf)
    return torch.tensor(strangers, dtype=torch.float64), torch.tensor(matches, dtype=torch.float64)


def halves(names: Sequence[str]) -> Tensor:
    """bool (n,), which names belong to the calibrating half. Each name is assigned by its own stable hash.

    Args:
        names: n names.
    """
    digests = (hashlib.blake2b(name.encode(), digest_size=1).digest()[0] for name in names)
    return torch.tensor([digest < 128 for digest in digests], dtype=torch.bool)


def promised(rate: float, scores: int, certainty: float, *, paired: bool) -> tuple[float, int]:
    """The rate that the scores of a calibrating half can promise, and the number of independent units among them.

    Args:
        rate: The rate that is asked for. If it is too low for so few scores, the lowest possible rate is returned.
        scores: Number of scores in the calibrating half.
        certainty: Probability that the promise holds, in (0, 1).
        paired: True if the scores are between pairs of the draws (see `pairs_once`).
    """
    units = scores // 2 if paired else scores
    return max(rate, least_rate(units, certainty)), units


def calibrate(
    match: Tensor,
    no_match: Tensor,
    of_match: Tensor,
    of_no_match: Tensor,
    rate: float,
    certainty: float,
    *,
    paired: bool,
) -> Threshold:
    """The thresholds of one kind of match, and their effect on the held-out half.

    The rate is `rate`, or the lowest rate that the calibrating half can promise.

    Args:
        match: (M,), scores of independent draws (works or outside images) with a match.
        no_match: (N,), scores of independent draws without a match.
        of_match: bool (M,), which of `match` belong to the calibrating half.
        of_no_match: bool (N,), which of `no_match` belong to the calibrating half.
        rate: Wanted rate of false matches, in [0, 1].
        certainty: Probability that the promise holds, in (0, 1).
        paired: True if the scores are between pairs of the draws (see `pairs_once`).

    Raises:
        ValueError: If the calibrating half has too few queries without a match.
    """
    known = no_match[of_no_match]
    rate, units = promised(rate, len(known), certainty, paired=paired)
    if not units:
        raise ValueError(
            f"{len(known)} queries without a match in the calibrating half are too few for any rate: give more images"
        )
    values = thresholds_at(pairs_once(known) if paired else known, rate, certainty)
    held, matches = no_match[~of_no_match], match[~of_match]
    found = int((matches > values[0]).sum())
    return Threshold(
        values=values,
        rate=rate,
        units=units,
        false=int((held > values[0]).sum()),
        of=len(held),
        per_unit=2 if paired else 1,
        found=found,
        matches=len(matches),
        coverage=least_share(found, len(matches), certainty),
    )


def curve(match: Tensor, no_match: Tensor) -> np.ndarray:
    """Threshold, recall, false-match rate and precision as rows, float64 (T, 4), ascending in the threshold.

    Args:
        match: (M,), scores of queries with a match.
        no_match: (N,), scores of queries without a match.
    """
    rows = torch.stack(false_match_curve(match, no_match), dim=1)
    return rows[torch.isfinite(rows).all(1)].numpy()


def wilson(count: float, of: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion, within [0, 1]. (0, 1) if `of` is 0.

    Args:
        count: Number of successes.
        of: Number of trials.
        z: Normal quantile of the interval.

    Source:
        Wilson: Probable inference, the law of succession, and statistical inference. JASA 1927.
    """
    if of == 0:
        return 0.0, 1.0
    share, spread = count / of, z * z / of
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, centre - half), min(1.0, centre + half)
