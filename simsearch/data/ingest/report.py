"""The report of an ingest, as plain values and as a Markdown page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simsearch.data.ingest.grouping import INLIERS, SameWork
from simsearch.data.ingest.pipeline import REASONS as INGEST_REASONS
from simsearch.data.ingest.pipeline import Files, Kept, rejections
from simsearch.data.ingest.source import Listing
from simsearch.data.manifest import REASONS as MANIFEST_REASONS
from simsearch.data.tables import REASONS as TABLE_REASONS
from simsearch.images import REASONS as IMAGE_REASONS
from simsearch.text import markdown as shown
from simsearch.text import printable

EXPLAINED = {**IMAGE_REASONS, **TABLE_REASONS, **MANIFEST_REASONS, **INGEST_REASONS}
SUSPICIOUS_BAND = 0.15
LONG = 6.0  # longest side divided by shortest
_EXAMPLES, _TOP, _LISTED = 5, 8, 50


def summarise(listing: Listing, files: Files, kept: Kept, same: SameWork, size: int) -> dict[str, Any]:
    """Counts and examples of everything that an ingest accepted, changed and refused, as plain values for JSON.

    Args:
        listing: The listed files.
        files: The decoded files.
        kept: The accepted images.
        same: The result of the search for near-duplicates.
        size: Longest side of the decoded images, in pixels.
    """
    rejected = rejections(listing, files, kept)
    by_reason = Counter(one.reason for one in rejected)
    places = list(kept.places)
    sides = files.sides[places]
    longest, shortest = sides.amax(1), sides.amin(1)
    paths = kept.columns["path"]
    bands = sorted(zip(files.band[places].tolist(), paths, strict=True), reverse=True)
    ratio = (longest.double() / shortest.double()).tolist()
    return {
        "listed": len(listing.paths) + len(listing.rejected),
        "accepted": len(places),
        "rejected": {
            reason: {
                "count": count,
                "meaning": EXPLAINED[reason],
                "examples": [
                    {"path": printable(one.path), "detail": one.detail} for one in rejected if one.reason == reason
                ][:_EXAMPLES],
            }
            for reason, count in by_reason.most_common()
        },
        "skipped": dict(listing.skipped),
        "notes": [*listing.notes, *kept.notes],
        "attributes": {name: _coverage(values) for name, values in _described(kept).items()},
        "merges": kept.cleaned.merges,
        "unknown": kept.cleaned.unknown,
        "years_without_a_year": dict(list(kept.cleaned.unparsed.items())[:_LISTED]),
        "years_without_a_year_count": sum(kept.cleaned.unparsed.values()),
        "sides": {
            "longest": _spread(longest),
            "shortest": _spread(shortest),
            "ratio": [round(value, 2) for value in _quantiles(torch.tensor(ratio))],
            "smaller_than_size": int((longest < size).sum()),
            "size": size,
        },
        "works": _works(kept, same),
        "suspicious": {
            "groups": accepted_groups(kept, same.suspicious),
            "weak": accepted_groups(kept, same.weak),
            "band_below": [
                {"path": path, "share": round(share, 2)} for share, path in bands if share >= SUSPICIOUS_BAND
            ],
            "very_long": [
                {"path": path, "ratio": round(r, 1)} for r, path in zip(ratio, paths, strict=True) if r >= LONG
            ],
        },
    }  # fmt: skip


def _described(kept: Kept) -> dict[str, Sequence[str | None]]:
    return {name: values for name, values in kept.columns.items() if name not in ("path", "sha256", "width", "height")}


def _coverage(values: Sequence[str | None]) -> dict[str, Any]:
    counts = Counter(value for value in values if value is not None)
    top = counts.most_common(_TOP) if counts and max(counts.values()) > 1 else []
    return {"known": sum(counts.values()), "distinct": len(counts), "top": dict(top)}


def _quantiles(values: torch.Tensor) -> list[float]:
    at = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0]).mul(len(values) - 1).round().long()
    return values.sort().values[at].tolist()


def _spread(values: torch.Tensor) -> list[int]:
    return [int(value) for value in _quantiles(values)]


def accepted_groups(kept: Kept, groups: Sequence[Sequence[int]]) -> list[list[str]]:
    """The paths of the accepted images of each group that has two of them, the largest group first.

    Args:
        kept: The accepted images.
        groups: Positions of files, for each group.
    """
    path = dict(zip(kept.places, kept.columns["path"], strict=True))
    accepted = ([str(path[place]) for place in group if place in path] for group in groups)
    return sorted((group for group in accepted if len(group) > 1), key=lambda group: (-len(group), group))


def _works(kept: Kept, same: SameWork) -> dict[str, Any]:
    members = defaultdict(list)
    for position, work in enumerate(kept.columns["work"]):
        members[work].append(position)
    several = sorted((m for m in members.values() if len(m) > 1), key=lambda m: (-len(m), m[0]))
    artists = kept.columns.get("artist", (None,) * len(kept.places))
    paths = kept.columns["path"]
    two = [m for m in several if len({artists[p] for p in m if artists[p] is not None}) > 1]
    return {
        "count": len(members),
        "with_several_images": len(several),
        "images_in_them": sum(map(len, several)),
        "sizes": dict(sorted(Counter(map(len, several)).items())),
        "pairs": dict(same.counts),
        "least_inliers": INLIERS if same.verified else None,
        "largest": [[paths[p] for p in m] for m in several[:_EXAMPLES]],
        "of_two_artists": [
            {"artists": sorted({str(artists[p]) for p in m if artists[p] is not None}), "paths": [paths[p] for p in m]}
            for m in two
        ][:_LISTED],
        "of_two_artists_count": len(two),
    }


def markdown(report: Mapping[str, Any], title: str) -> str:
    """The report as a page of Markdown.

    Args:
        report: The result of `summarise`.
        title: Title of the page.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"number": "{:,}".format, "short": _short}
    merges = [(name, *pair) for name, values in report["merges"].items() for pair in values.items()]
    return templates.get_template("report.md.j2").render(report=report, title=title, merges=merges, listed=_LISTED)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
