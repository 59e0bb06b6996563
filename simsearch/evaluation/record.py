"""What a measurement leaves in a folder: metrics.json, and per_query.parquet for the test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simsearch.evaluation.evaluator import Intervals, Numbers
from simsearch.files import digests, replacing, write_json


def plain_intervals(intervals: Intervals) -> dict[str, list[float]]:
    """The intervals as JSON holds them: those with two finite ends.

    Args:
        intervals: Name -> lower and upper end.

    Example:
        >>> plain_intervals({"mAP": [0.4, 0.6], "P@1": [float("nan"), float("nan")]})
        {'mAP': [0.4, 0.6]}
    """
    return {name: list(ends) for name, ends in intervals.items() if all(map(math.isfinite, ends))}


def plain_metrics(metrics: Numbers) -> dict[str, float | None]:
    """The metrics as JSON holds them: None for a metric without a value.

    Args:
        metrics: Name -> value, NaN where there is none.

    Example:
        >>> plain_metrics({"mAP": 0.5, "P@1": float("nan")})
        {'mAP': 0.5, 'P@1': None}
    """
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def write_record(
    folder: Path, stages: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Any] | None = None
) -> None:
    """Writes metrics.json, and per_query.parquet for the test, each atomically.

    Args:
        folder: Folder to write to.
        stages: Content of metrics.json. That of a stage has at least protocol, fingerprint, unit and model.
        columns: The columns of per_query.parquet, of the stage `test`. None writes no such file.
    """
    if columns is not None:
        about = stages["test"]
        meta = {key: about[key] for key in ("protocol", "fingerprint", "unit")} | {"model": json.dumps(about["model"])}
        with replacing(folder / "per_query.parquet") as temporary:
            pq.write_table(pa.table(dict(columns)).replace_schema_metadata(meta), temporary)
        stages = {**stages, "test": {**about, "sha256": digests(folder, ["per_query.parquet"])}}
    write_json(folder / "metrics.json", dict(stages))
