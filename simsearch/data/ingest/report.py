"""What an ingest found, as plain values, and as a page for a person."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from simsearch.data.ingest.grouping import SameWork
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
LONG = 6.0  # longest side by shortest
_EXAMPLES, _TOP, _LISTED = 5, 8, 50


def summarise(listing: Listing, files: Files, kept: Kept, same: SameWork, size: int) -> dict[str, Any]:
    """Counts and examples of all that an ingest took, changed and refused; plain values for JSON.

    same: what near-duplicates say. size: longest side of the decoded images.
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
            "groups": suspicious_groups(kept, same),
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


def suspicious_groups(kept: Kept, same: SameWork) -> list[list[str]]:
    """The paths of each group that was too large to be believed, the largest group first."""
    path = dict(zip(kept.places, kept.columns["path"], strict=True))
    groups = ([str(path[place]) for place in group if place in path] for group in same.suspicious)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group))


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
        "least_correlation": round(same.least, 3),
        "largest": [[paths[p] for p in m] for m in several[:_EXAMPLES]],
        "of_two_artists": [
            {"artists": sorted({str(artists[p]) for p in m if artists[p] is not None}), "paths": [paths[p] for p in m]}
            for m in two
        ][:_LISTED],
        "of_two_artists_count": len(two),
    }


def markdown(report: Mapping[str, Any], title: str) -> str:
    """The report as a page of Markdown."""
    refused = sum(entry["count"] for entry in report["rejected"].values())
    works, sides = report["works"], report["sides"]
    lines = [
        f"# Ingest of {shown(title)}",
        "",
        f"{report['accepted']:,} images taken, {refused:,} refused of {report['listed']:,} listed; "
        f"{works['count']:,} works. Pictures: contact-sheet.png; all that was refused: rejected.csv.",
        "",
    ]
    lines += [f"- {shown(note)}" for note in report["notes"]]
    lines += [f"- {count} entries of the folder left out: {reason}" for reason, count in report["skipped"].items()]
    lines += ["", "## Refused", ""]
    if report["rejected"]:
        lines += _table(
            ("reason", "count", "meaning", "examples"),
            [
                (reason, entry["count"], entry["meaning"], "; ".join(_example(e) for e in entry["examples"][:3]))
                for reason, entry in report["rejected"].items()
            ],
        )
    else:
        lines += ["Nothing."]
    lines += ["", "## Attributes", ""]
    total = max(1, report["accepted"])
    lines += _table(
        ("attribute", "known", "distinct", "most frequent"),
        [
            (
                shown(name),
                f"{about['known']:,} ({about['known'] / total:.0%})",
                f"{about['distinct']:,}",
                ", ".join(f"{_short(value)} ({count})" for value, count in list(about["top"].items())[:5]),
            )
            for name, about in report["attributes"].items()
        ],
    )
    lines += ["", "## Sizes of the files' images, in pixels", ""]
    lines += _table(
        ("", "least", "5 %", "median", "95 %", "most"),
        [
            ("longest side", *sides["longest"]),
            ("shortest side", *sides["shortest"]),
            ("longest : shortest", *sides["ratio"]),
        ],
    )
    lines += ["", f"{sides['smaller_than_size']:,} are smaller than the {sides['size']} pixels of the shards."]
    lines += ["", "## Works", ""]
    found = ", ".join(f"{count:,} {name}" for name, count in works["pairs"].items())
    lines += [
        f"{works['with_several_images']:,} works have several images ({works['images_in_them']:,} in all; works by "
        f"number of images: {', '.join(f'{k}: {n}' for k, n in works['sizes'].items()) or 'none'}). "
        f"Pairs of files, equal ones among them, that correlate by {works['least_correlation']} or more: {found}.",
    ]
    if works["of_two_artists_count"]:
        lines += ["", f"{works['of_two_artists_count']} works have images under more than one artist:", ""]
        lines += [
            f"- {shown(' / '.join(w['artists']))}: {shown(', '.join(w['paths'][:4]))}"
            for w in works["of_two_artists"][:20]
        ]
    lines += ["", "## Spellings that became one", ""]
    merges = [
        f"- {shown(name)}: **{shown(kept)}** from "
        + ", ".join(f"{shown(value)} ({count})" for value, count in others.items())
        for name, values in report["merges"].items()
        for kept, others in values.items()
    ]
    lines += merges[:_LISTED] or ["None."]
    lines += [f"- and {len(merges) - _LISTED} more (report.json)"] * (len(merges) > _LISTED)
    lines += [
        f"- {shown(name)}: {count} values that say unknown are empty" for name, count in report["unknown"].items()
    ]
    if report["years_without_a_year_count"]:
        some = ", ".join(_short(text) for text in list(report["years_without_a_year"])[:10])
        lines += [f"- {report['years_without_a_year_count']} years could not be read: {some}"]
    lines += ["", "## Suspicious, and taken all the same", ""]
    suspicious = report["suspicious"]
    odd = [
        f"- {len(group)} images that are like one work and too many to be tied: {shown(', '.join(group[:4]))}, ... "
        f"(suspicious.csv). They are works of their own until you say otherwise, by near.largest={len(group)}"
        for group in suspicious["groups"][:20]
    ]
    odd += [
        f"- {shown(one['path'])}: one colour over the lowest {one['share']:.0%} (cut off and filled up?)"
        for one in suspicious["band_below"][:20]
    ]
    odd += [f"- {shown(one['path'])}: {one['ratio']} times as long as wide" for one in suspicious["very_long"][:20]]
    more = sum(max(0, len(suspicious[kind]) - 20) for kind in ("groups", "band_below", "very_long"))
    return "\n".join([*lines, *(odd or ["Nothing."]), *([f"- and {more} more (report.json)"] * bool(more)), ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:]]


def _example(example: Mapping[str, str]) -> str:
    detail = f" ({example['detail']})" if example["detail"] else ""
    return f"{_short(example['path'], 60)}{_short(detail, 80)}"


def _short(text: str, length: int = 40) -> str:
    return shown(text if len(text) <= length else f"{text[: length - 1]}…")
