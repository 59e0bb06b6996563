"""Lenient reader for user-supplied folders and tables: bad rows are reported and skipped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from simsearch.data.manifest import EXCLUDE, _below, list_table, walk
from simsearch.data.tables import (
    ENDINGS,
    Column,
    Rejected,
    Table,
    plain_name,
    plain_names,
    read_table,
    table_images,
)
from simsearch.files import replacing
from simsearch.text import printable

_IN_FOLDER = {
    "linked folder": "linked-folder",
    "name not UTF-8": "name-not-utf8",
    "link out of the root": "path-leaves-root",
    "unreadable folder": "unreadable-folder",
    "unsupported": "unsupported",
}
# The folders of WikiArt's collection, with files artist_title.jpg.
_WIKIART = {
    "abstract_expressionism",
    "action_painting",
    "analytical_cubism",
    "art_nouveau_modern",
    "baroque",
    "color_field_painting",
    "contemporary_realism",
    "cubism",
    "early_renaissance",
    "expressionism",
    "fauvism",
    "high_renaissance",
    "impressionism",
    "mannerism_late_renaissance",
    "minimalism",
    "naive_art_primitivism",
    "new_realism",
    "northern_renaissance",
    "pointillism",
    "pop_art",
    "post_impressionism",
    "realism",
    "rococo",
    "romanticism",
    "surrealism",
    "symbolism",
    "synthetic_cubism",
    "ukiyo_e",
}
_PICTURES = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"), (b"BM", ".bmp"))
_ENDINGS = (*_PICTURES, (b"II*\0", ".tif"), (b"MM\0*", ".tif"))
_MOST = 0.8  # fraction of the files whose folder and name must look like WikiArt's


@dataclass(frozen=True)
class Listing:
    """N image files under one folder, each once, with the attributes of each.

    Attributes:
        root: The folder.
        paths: Relative POSIX paths.
        attributes: For each name N values, None if unknown.
        rejected: Listed images that are not used, one entry each.
        skipped: Number of folder entries left out without an entry each, by reason.
        notes: Remarks for the user on how the source was read.
    """

    root: Path
    paths: tuple[str, ...]
    attributes: dict[str, Column]
    rejected: tuple[Rejected, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_listing(
    source: Path, root: Path | None = None, exclude: Sequence[str] = EXCLUDE, *, unpacked: Path | None = None
) -> Listing:
    """The images that a folder or a table (.csv, .tsv, .txt, .parquet) lists.

    In a folder, the first folder below it is the attribute "artist" and the file's name "title". If it is laid out like
    WikiArt (style/artist_title.jpg), all three are read. Tables are read by `list_table`; column names become lower
    case with underscores. Images inside a table, as Hugging Face writes them, are first written into the folder
    `unpacked`.

    Args:
        source: The folder or table.
        root: Folder that paths are relative to. None for the folder itself, or the folder of the table.
        exclude: Patterns of files and folders to leave out, as in `walk`.
        unpacked: Folder for images inside a table. None does not unpack them.

    Raises:
        FileNotFoundError: If the source or the root is missing.
        ValueError: If no image remains, or a table has no column of paths or cannot be read at all.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder, a .csv or a .parquet")
    root = root or (source if source.is_dir() else source.parent)
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder: give the folder that the paths are relative to")
    if source.is_dir():
        listing = _from_folder(source, root, exclude)
    elif source.suffix.lower() in ENDINGS and unpacked is not None and (table := read_table(source)).images:
        listing = _unpacked(source, table, unpacked)
    elif source.suffix.lower() in ENDINGS:
        listed = list_table(source, root)
        attributes, renamed = plain_names(listed.attributes)
        listing = Listing(root, listed.paths, attributes, listed.rejected, notes=(*listed.notes, *renamed))
    else:
        raise ValueError(f"{source} is neither a folder nor a table: give a folder, a .csv or a .parquet")
    if not listing.paths:
        reasons = Counter(one.reason for one in listing.rejected) + Counter(listing.skipped)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "it is empty"
        raise ValueError(f"{source} lists no image that could be taken ({why})")
    return listing


# ------------------------------------------------------------------------------------------- folders


def _from_folder(source: Path, root: Path, exclude: Sequence[str]) -> Listing:
    prefix = PurePosixPath(_below(source, root))
    found, rejected, skipped = [], [], Counter[str]()
    for path, reason in walk(source, root, exclude):
        if reason is None:
            found.append(path)
        elif reason in _IN_FOLDER:
            detail = f"{PurePosixPath(path).suffix} is not supported: convert it" if reason == "unsupported" else ""
            rejected.append(Rejected(printable(path), _IN_FOLDER[reason], detail))
        else:
            skipped[reason] += 1
    found.sort()
    rejected.sort(key=lambda one: one.path)
    attributes, notes = _by_name([PurePosixPath(path) for path in found])
    paths = tuple(str(prefix / path) for path in found)
    return Listing(root, paths, attributes, tuple(rejected), dict(skipped), notes)


def _by_name(paths: Sequence[PurePosixPath]) -> tuple[dict[str, Column], tuple[str, ...]]:
    """Attributes from the names of folders and files, and remarks on how these were read."""
    titles = tuple(_words(path.stem) for path in paths)
    if not any(len(path.parts) > 1 for path in paths):
        return {"title": titles}, ()
    folders = tuple(_words(path.parts[0]) if len(path.parts) > 1 else None for path in paths)
    matches = [re.fullmatch(r"([^_]+)_(.+)", path.stem) for path in paths]
    alike = [
        m is not None and len(p.parts) > 1 and plain_name(p.parts[0].replace("-", "_")) in _WIKIART
        for p, m in zip(paths, matches, strict=True)
    ]
    if sum(alike) < _MOST * len(paths):
        return {"artist": folders, "title": titles}, ()
    pairs = zip(matches, alike, strict=True)
    artists = tuple(_words(m[1]) if m and good else None for m, good in pairs)
    titles = tuple(_words(m[2]) if m and good else title for m, good, title in zip(matches, alike, titles, strict=True))
    note = "folders and file names were read as in WikiArt: style/artist_title"
    return {"artist": artists, "style": folders, "title": titles}, (note,)


def _words(name: str) -> str:
    """The name of a file or folder as words: underscores become spaces, and so do hyphens if nothing else separates."""
    words = name.replace("_", " ")
    return words if " " in words.strip() else words.replace("-", " ")


# ----------------------------------------------------------------------------------- images within tables


def _unpacked(source: Path, table: Table, folder: Path) -> Listing:
    """The images inside a table, each written into a file of its own, once."""
    assert table.images is not None
    paths, titles, rows, rejected = [], [], [], []
    for row, (content, said) in enumerate(table_images(source, table.images)):
        if content is None:
            rejected.append(Rejected(printable(said or ""), "path-empty", f"row {row + 1} has no image"))
            continue
        path = folder / f"{row // 1000:04d}" / f"{row:07d}{_ending(content)}"
        if not path.is_file() or path.read_bytes() != content:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        paths.append(path.relative_to(folder).as_posix())
        titles.append(_words(PurePosixPath(said).stem) if said else None)
        rows.append(row)
    attributes, renamed = plain_names(table.columns)
    attributes = {name: tuple(column[row] for row in rows) for name, column in attributes.items()}
    if "title" not in attributes and any(titles):
        attributes["title"] = tuple(titles)
    notes = (*table.notes, *renamed, f"images were unpacked from the column {table.images!r}")
    return Listing(folder, tuple(paths), attributes, (*table.rejected, *rejected), notes=notes)


def _ending(content: bytes) -> str:
    return next((ending for start, ending in _ENDINGS if content.startswith(start)), ".img")
