"""Works of a catalog: those that a name stands for, and those that answer a photograph, one item of each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from simsearch.search.engine import Engine
from simsearch.search.request import Regions, Request
from simsearch.search.verdicts import SAME_WORK
from simsearch.types import LocalFeatures


def works_named(engine: Engine, names: Iterable[str]) -> dict[str, int]:
    """The numbers of works, as in `Engine.works`, by their names. A name that the catalog lacks is left out.

    A name is a value of the catalog's column of works, or else the id or path of an item of the work.

    Args:
        engine: The engine of the catalog.
        names: The names.

    Raises:
        ValueError: If several items have a name as their id.
    """
    values: dict[str, int] = {}
    if engine.work_attribute is not None:
        column = engine.catalog.items[engine.work_attribute].cast("string").to_pylist()
        values = {value: work for value, work in zip(column, engine.works.tolist(), strict=True) if value}
    found = {}
    for name in dict.fromkeys(names):
        if name in values:
            found[name] = values[name]
        elif (item := engine.names.find(name)) is not None:
            found[name] = int(engine.works[item])
    return found


def ask(
    engine: Engine, vector: Tensor, local: tuple[LocalFeatures, ...], k: int, regions: Regions | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The answer to one photograph, one item of each work, best first.

    The confidence of a verified item is its number of inliers, which exceeds every cosine. That of another item is its
    score, or that of an item before it if that is lower: re-ranking may put an item before one that scores higher.

    Args:
        engine: The engine of the catalog.
        vector: The descriptor of the photograph, as `Request.like` has it, (width,).
        local: The local features of the photograph. Nothing is verified without.
        k: Number of works.
        regions: The descriptors of the photograph's regions.

    Returns:
        Positions of the items int64 (K,), their confidence float64 (K,), and whether they are called the same work,
        bool (K,), or None if nothing decides that: the catalog is not calibrated, and nothing is verified.
    """
    answer = engine.recommend(Request(vector[None], k=k, local=local, regions=regions))
    found = zip(answer.scores.tolist(), answer.matches, strict=True)
    confidence = torch.tensor([s if m is None else float(m.inliers) for s, m in found], dtype=torch.float64)
    if len(confidence):
        confidence = confidence.cummin(0).values
    accepted = torch.tensor([said == SAME_WORK for said in answer.verdicts], dtype=torch.bool)
    decided = engine.catalog.calibration is not None or bool(local)
    return answer.ids, confidence, accepted if decided else None
