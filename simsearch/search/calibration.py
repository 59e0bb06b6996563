"""From which score on an answer is a match: scores of queries that have none, and thresholds that hold for new ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsearch.functional.open_set import (
    false_match_curve,
    familiarity,
    least_scores,
    threshold_at,
)
from simsearch.search.recommender import Recommender

_BLOCK = 256  # queries that are searched together


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it did to queries that it was not chosen by.

    negatives: how many scores it was chosen by. false, of: false matches among held-out queries without a match.
    found, matches: matches that exceed it among held-out queries with one.
    """

    value: float
    negatives: int
    false: int
    of: int
    found: int
    matches: int


@dataclass(frozen=True)
class Likeness:
    """Scores of queries, (Q,) each, of which verdicts are made.

    top: the best. familiar: `familiarity`, how much they look like the collection as a whole.
    """

    top: Tensor
    familiar: Tensor

    def at_home(self, same_work: float) -> Tensor:
        """What the threshold of "similar" is of, (Q,): familiarity; inf for copies, which are at home anywhere."""
        return self.familiar.masked_fill(self.top > same_work, torch.inf)


def neighbours_of(count: int) -> int:
    """How many neighbours familiarity is a mean of in a catalog of `count` items: a twentieth, at most 20."""
    return min(20, max(1, count // 20))


def likeness(scores: Tensor, neighbours: int) -> Likeness:
    """That of queries by their scores (Q, K), best first, K >= 1."""
    return Likeness(scores[:, 0], familiarity(scores, neighbours))


def leave_work_out(recommender: Recommender, positions: Tensor, neighbours: int) -> tuple[Likeness, Tensor]:
    """How items and their catalog without their own work are alike, and the score (Q,) of a match with that work.

    positions: int64 (Q,). A match is an answer led by another item of the same work; -inf where it is led by
    something else, NaN for a work of one item. Works of more than some hundred items make this slow.
    """
    works = torch.from_numpy(recommender.works)
    _, work, sizes = works.unique(return_inverse=True, return_counts=True)
    depth = int(sizes.max()) + neighbours  # so many are left without the own work
    without, match = [], []
    for block in positions.split(_BLOCK):
        found = recommender.search(recommender.as_queries(recommender.vectors(block)), depth)
        ids = found.ids.clamp(min=0)
        own = (work[ids] == work[block][:, None]) & (found.ids >= 0)
        itself = found.ids == block[:, None]
        without.append(_without(found.scores, own)[:, :neighbours])
        others = _without(found.scores, itself)
        led = _without(own.float(), itself)[:, 0] == 1
        scores = torch.where(led, others[:, 0], -torch.inf)
        match.append(scores.masked_fill(sizes[work[block]] == 1, torch.nan))
    return likeness(torch.cat(without), neighbours), torch.cat(match)


def _without(values: Tensor, taken: Tensor) -> Tensor:
    """values (Q, K) with those `taken` moved behind the others as -inf, the order kept."""
    order = taken.to(torch.uint8).argsort(dim=1, stable=True)
    return values.masked_fill(taken, -torch.inf).gather(1, order)


def halves(names: Sequence[str]) -> Tensor:
    """Which names belong to the calibrating half, bool (n,): by a stable hash, whatever else there is."""
    digests = (hashlib.blake2b(name.encode(), digest_size=1).digest()[0] for name in names)
    return torch.tensor([digest < 128 for digest in digests], dtype=torch.bool)


def calibrate(
    match: Tensor, no_match: Tensor, of_match: Tensor, of_no_match: Tensor, rate: float, certainty: float
) -> Threshold:
    """The threshold of one kind of match, and what it does to the held-out halves.

    match: (M,), no_match: (N,), scores; of_match, of_no_match: bool, which belong to the calibrating half.

    Raises ValueError where there are too few queries without a match to promise the rate, and where more of them
    than that have a score of inf.
    """
    known = no_match[of_no_match]
    value = threshold_at(known, rate, certainty)
    if math.isinf(value):
        if len(known) >= least_scores(rate, certainty):
            raise ValueError(
                f"more than {rate} of {len(known)} images from outside are works of the collection: give others"
            )
        raise ValueError(
            f"{len(known)} queries without a match cannot promise a rate of {rate} with a certainty of {certainty}: it "
            f"takes {least_scores(rate, certainty)} in the calibrating half. Give more images, or raise rate"
        )
    held, matches = no_match[~of_no_match], match[~of_match]
    return Threshold(
        value=value,
        negatives=len(known),
        false=int((held > value).sum()),
        of=len(held),
        found=int((matches > value).sum()),
        matches=len(matches),
    )


def curve(match: Tensor, no_match: Tensor) -> np.ndarray:
    """Rows of threshold, recall, false-match rate and precision, float64 (T, 4), rising in the threshold."""
    rows = torch.stack(false_match_curve(match, no_match), dim=1)
    return rows[torch.isfinite(rows).all(1)].numpy()


def wilson(count: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's score, in [0, 1]; (0, 1) of nothing.

    Wilson: Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    if of == 0:
        return 0.0, 1.0
    share, spread = count / of, z * z / of
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, centre - half), min(1.0, centre + half)
