"""Whether a calibration still stands for a catalog whose items have changed since."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simsearch.search.calibration import image_a_work, leave_work_out
from simsearch.search.catalog import MOST_CHANGED, Catalog, arrivals, turnover
from simsearch.search.engine import Engine

LEAST_P = 0.01  # level of the test on their scores
_SAMPLE = 500  # works of either kind whose scores are compared
_LEAST = 8  # works without which the scores are not compared


@dataclass(frozen=True)
class Standing:
    """What has changed in a catalog since it was calibrated.

    Attributes:
        folder: The catalog's folder.
        came: Number of items that were added since.
        went: Number of items that were removed since.
        share: Their share of all items, then and now.
        p: Probability of scores as different as those of the new items and of the others are, if both are draws from
            one distribution (two-sample Kolmogorov-Smirnov test). None if there are too few of either.
    """

    folder: Path
    came: int
    went: int
    share: float
    p: float | None

    @property
    def stands(self) -> bool:
        """Whether few items changed, and new items score like the others."""
        return self.share <= MOST_CHANGED and (self.p is None or self.p >= LEAST_P)

    def __str__(self) -> str:
        changed = f"{self.came} items came and {self.went} went since, {100 * self.share:.3g} % of all"
        scores = "" if self.p is None else f"; the scores of new items differ from the others' with p = {self.p:.2g}"
        if self.stands:
            return f"stands ({changed}{scores})"
        again = f"simsearch calibrate {shlex.quote(f'catalog={self.folder}')} ..."
        return f"no longer stands for the collection ({changed}{scores}): {again}"


def standing(catalog: Catalog, seed: int = 0) -> Standing | None:
    """What has changed in a catalog since it was calibrated. None if it is not calibrated.

    The scores are those that the thresholds of "same work" are compared with: each item against the catalog without its
    own work, one item of each work.

    Args:
        catalog: The catalog, read with its calibration.
        seed: Seed of the random choice of items.
    """
    if (calibration := catalog.calibration) is None:
        return None
    came, went, share = turnover(catalog, calibration)
    p, new = None, arrivals(catalog, calibration)
    if min(new.sum(), (~new).sum()) >= _LEAST:
        from scipy.stats import ks_2samp  # a second that searches need not wait

        engine = Engine(catalog)
        scores = []
        for chosen in (np.flatnonzero(new), np.flatnonzero(~new)):
            at = chosen[image_a_work(engine.works[chosen], _SAMPLE, seed).numpy()]
            own, _ = leave_work_out(engine, torch.from_numpy(at), int(calibration["neighbours"]))
            scores.append(own.sameness[torch.isfinite(own.sameness)].numpy())
        if min(map(len, scores)) >= _LEAST:
            p = float(ks_2samp(*scores).pvalue)
    return Standing(catalog.folder, came, went, share, p)
