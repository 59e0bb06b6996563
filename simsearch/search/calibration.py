"""From which score on an answer is a match: scores of queries that have none, and thresholds that hold for new ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsearch.functional.open_set import false_match_curve, least_rate, pairs_once, stand_out, thresholds_at
from simsearch.search.engine import Engine
from simsearch.search.verdicts import sameness, similarity

_BLOCK = 256  # queries that are searched together


@dataclass(frozen=True)
class Threshold:
    """Thresholds of one kind of match and what the first does to queries that it was not chosen by.

    values: what 1, 2, ... queries without a match may exceed at `rate` (`thresholds_at`). units: how many independent
    draws they were chosen by. false, of: false matches among held-out queries without a match, `per_unit` of which
    count as one draw. found, matches: matches that exceed it among held-out queries with one.
    """

    values: list[float]
    rate: float
    units: int
    false: int
    of: int
    per_unit: int
    found: int
    matches: int


@dataclass(frozen=True)
class Likeness:
    """How queries and a collection are alike: the best cosine and the background that it stands out against, (Q,)."""

    top: Tensor
    background: Tensor

    @property
    def sameness(self) -> Tensor:
        """What the thresholds of "same work" are of, (Q,)."""
        return sameness(self.top, self.background)

    @property
    def similarity(self) -> Tensor:
        """What those of "similar" are of, (Q,)."""
        return similarity(self.top, self.background)


def neighbours_of(count: int) -> int:
    """How many neighbours a background is a mean of in a catalog of `count` items: a twentieth, at most 20."""
    return min(20, max(1, count // 20))


def image_a_work(engine: Engine, at_most: int, seed: int) -> Tensor:
    """Rising positions int64 (n,) of one image, by chance, of each of at most so many works, by chance.

    Images of one work are no independent queries; such a choice is what a new image of a new work is drawn as.
    """
    order = np.random.default_rng(seed).permutation(len(engine.works))
    _, first = np.unique(engine.works[order], return_index=True)
    return torch.from_numpy(np.sort(order[np.sort(first)[:at_most]]))


def leave_work_out(
    engine: Engine, positions: Tensor, neighbours: int, vectors: Tensor | None = None
) -> tuple[Likeness, Tensor]:
    """How items and their catalog without their own work are alike, and what a match with that work exceeds, (Q,).

    positions: int64 (Q,). vectors: their descriptors as queries have them, where the index does not keep them exactly.
    A match is an answer led by another item of the same work; -inf where it is led by something else, NaN for a work
    of one item. Works of more than some hundred items make this slow.
    """
    works = torch.from_numpy(engine.works)
    _, work, sizes = works.unique(return_inverse=True, return_counts=True)
    depth = 2 * int(sizes.max()) + neighbours  # so many are left without the own work and the leader's
    tops, backgrounds, matches = [], [], []
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
        match = torch.where(led, sameness(best, behind), -torch.inf)
        matches.append(match.masked_fill(sizes[work[at]] == 1, torch.nan))
    return Likeness(torch.cat(tops), torch.cat(backgrounds)), torch.cat(matches)


def halves(names: Sequence[str]) -> Tensor:
    """Which names belong to the calibrating half, bool (n,): by a stable hash, whatever else there is."""
    digests = (hashlib.blake2b(name.encode(), digest_size=1).digest()[0] for name in names)
    return torch.tensor([digest < 128 for digest in digests], dtype=torch.bool)


def promised(rate: float, scores: int, certainty: float, *, paired: bool) -> tuple[float, int]:
    """The rate that so many scores of a calibrating half can promise, `rate` or the least, and their units."""
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
    """The thresholds of one kind of match at `rate` or the least that can be promised, and what they do to the rest.

    match: (M,), no_match: (N,), scores of independent draws (works, images from outside); of_match, of_no_match: bool,
    which belong to the calibrating half. paired: the scores are between the draws themselves, see `pairs_once`.

    Raises ValueError where there is no query without a match.
    """
    known = no_match[of_no_match]
    rate, units = promised(rate, len(known), certainty, paired=paired)
    if not units:
        raise ValueError(
            f"{len(known)} queries without a match in the calibrating half are too few for any rate: give more images"
        )
    values = thresholds_at(pairs_once(known) if paired else known, rate, certainty)
    held, matches = no_match[~of_no_match], match[~of_match]
    return Threshold(
        values=values,
        rate=rate,
        units=units,
        false=int((held > values[0]).sum()),
        of=len(held),
        per_unit=2 if paired else 1,
        found=int((matches > values[0]).sum()),
        matches=len(matches),
    )


def curve(match: Tensor, no_match: Tensor) -> np.ndarray:
    """Rows of threshold, recall, false-match rate and precision, float64 (T, 4), rising in the threshold."""
    rows = torch.stack(false_match_curve(match, no_match), dim=1)
    return rows[torch.isfinite(rows).all(1)].numpy()


def wilson(count: float, of: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's score, in [0, 1]; (0, 1) of nothing.

    Wilson: Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    if of == 0:
        return 0.0, 1.0
    share, spread = count / of, z * z / of
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, centre - half), min(1.0, centre + half)
