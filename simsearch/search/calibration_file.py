"""The file of a catalog's calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simsearch.files import read_json, write_json
from simsearch.search.errors import CatalogError
from simsearch.text import warn


def write_calibration(folder: Path, calibration: Mapping[str, Any]) -> None:
    """Writes the catalog's calibration.json atomically. `read_catalog` reads it.

    The calibration has these entries:

    - `catalog`: fingerprint of the catalog that the calibration belongs to; another catalog refuses it.
    - `items`, `next_id`, `changed`: number of its items then, the id that the next one got, and how often the image of
      an item had changed (see simsearch.search.drift).
    - `same_work`, `similar`: thresholds, as `thresholds_at` returns them (see `Engine.verdicts`). `similar` is None if
      it was not calibrated.
    - `verified`: thresholds of the number of inliers, by which an item is the same work where it is verified by local
      features. Missing if they were not calibrated.
    - `floor`: the cosine that a similar item must exceed.
    - `neighbours`: number of neighbours that a background averages over.
    - `rate`: the promised rate of false matches of each kind; `of`: what it is a rate of. `asked`: the requested rate.
    - `certainty`: the probability with which each promise holds.
    - `weights`: weights of the descriptor's parts.
    - `units`: number of independent draws behind the thresholds.
    - `held_out`: what the first threshold does to held-out queries. `coverage`: the share of true matches that it
      finds, at least, with the certainty.
    - `photographs`: what is found, false and unknown of photographs whose works are known, if any.

    Only the thresholds, `floor` and `neighbours` are needed; calibrations of earlier versions have fewer entries.

    Args:
        folder: The catalog's folder.
        calibration: The entries above.
    """
    write_json(folder / "calibration.json", calibration)


def read_calibration(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The entries that `write_calibration` wrote. None if there are none, or if an earlier method made them.

    Args:
        folder: The catalog's folder.
        fingerprint: The catalog's fingerprint.

    Raises:
        CatalogError: If the file is damaged, or belongs to another catalog.
    """
    path = folder / "calibration.json"
    try:
        calibration = read_json(path)
        if isinstance(calibration.get("same_work"), (int, float)):
            warn(
                f"note: {path} was made by an earlier method, which counted images of one work as independent and kept "
                "its rate less often than stated: it is not used. simsearch calibrate makes it anew"
            )
            return None
        kinds = ["same_work"] if calibration["similar"] is None else ["same_work", "similar"]
        kinds += ["verified"] if "verified" in calibration else []
        if not all(len(calibration[kind]) and [float(value) for value in calibration[kind]] for kind in kinds):
            raise ValueError("no threshold")
        if "similar" in kinds:
            float(calibration["floor"])
        if int(calibration["neighbours"]) < 1:
            raise ValueError("neighbours")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CatalogError(
            f"{path} is damaged or was written by another version ({error!r}): delete it, or calibrate again"
        ) from error
    if calibration.get("catalog", fingerprint) != fingerprint:  # older ones do not say
        raise CatalogError(f"{path} belongs to another catalog, whose scores differ: delete it, or calibrate again")
    return calibration


def calibrated_for(folder: Path) -> str | None:
    """The fingerprint of the catalog that the calibration in `folder` belongs to.

    Args:
        folder: The catalog's folder.

    Returns:
        The fingerprint, None if there is no calibration, or "" if the calibration does not say.
    """
    try:
        return str(read_json(folder / "calibration.json").get("catalog", ""))
    except (OSError, ValueError):
        return "" if (folder / "calibration.json").exists() else None
