"""The `simsearch` program: finds the command and hands over to it."""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "train": "fit a model (frozen: its whitening), measure it, leave a run directory with a catalog",
    "evaluate": "measure a run's checkpoint again, also under another protocol or index",
    "progress": "how the trials of a sweep stand, live, on this machine or on a cluster",
    "index": "make a catalog of a folder or manifest of images with a run's encoder, or of shards",
    "extract": "describe many images by any number of processes into shards, to make a catalog of with index",
    "search": "find images in a catalog that are similar to an image or a folder of images",
    "recommend": "similar artworks by images or items, with filters, negatives, weights and diversity",
    "calibrate": "thresholds by which a catalog says no, at a stated rate of false matches",
    "serve": "an HTTP API and a web page on one or more catalogs",
    "assess": "measure a run on an art collection: artist, style, period, work, open set, as a recommender",
    "export": "a catalog's encoder as ONNX files, checked to give the same neighbours",
    "instance": "measure a run's encoder on a benchmark with easy, hard and junk items (Revisited Oxford / Paris)",
    "compare": "rank runs in a table and on a page, with paired tests against a baseline",
    "reproduce": "train and measure a study's row anew, beside the value that the study states",
    "data ingest": "check, clean and decode a collection of images from anywhere; leaves a report",
    "data audit": "list near-duplicates between queries and gallery or training images",
    "data export": "write images of a collection as files with a manifest",
    "data convert": "turn a ground truth of Revisited Oxford / Paris (.pkl) into JSON, executing nothing in it",
}

# Keys whose values are paths.
PATHS = (
    "gnd",
    "model.start",
    "image",
    "unlike",
    "outside",
    "where",
    "id",
    "images",
    "catalog",
    "out",
    "root",
    "run",
    "runs",
    "baseline",
    "shards",
    "run_dir",
    "run_root",
    "folder",
    "rows",
    "figure",
    "without",
    "data.root",
    "data.source",
    "backbone.weights",
)

USAGE = """usage: simsearch COMMAND [key=value ...]

{commands}

Each command is composed by Hydra from conf/: see what there is to set and with which values by
  simsearch COMMAND --help          groups and keys
  simsearch COMMAND --cfg job       the whole config, after your overrides
  simsearch train -m seed=0,1,2     a sweep over values
Completion of commands, groups and keys in bash:
  eval "$(simsearch -sc install=bash)"
A traceback instead of a one-line error: SIMSEARCH_DEBUG=1."""


def main() -> None:
    """Runs the command that the arguments name. Exits with 2 for an unknown one."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["-sc"] or arguments[:1] == ["--shell-completion"]:
        complete(arguments)
        return
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {n:<{width}}  {t}" for n, t in COMMANDS.items())))
        return
    if arguments[0] == "--version":
        from simsearch import __version__

        print(__version__)
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        print(f"simsearch: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    rest = arguments[words:]
    if not {"-m", "--multirun"} & set(rest):  # a comma separates the values of a sweep
        rest = [quoted(argument) for argument in rest]
    sys.argv = [f"simsearch {name}", *rest]
    run(name)


def quoted(argument: str) -> str:
    """The argument with a path's value quoted, so that Hydra's grammar takes any file name, `~` expanded."""
    key, equals, value = argument.partition("=")
    if not equals or key not in PATHS or value in ("", "null", "???") or value[0] in "'\"" or "${" in value:
        return argument
    if key in ("runs", "catalog", "root", "image", "unlike", "id") and value[0] in "[{":  # several
        return argument
    escaped = os.path.expanduser(value).replace("'", "\\'")
    return f"{key}='{escaped}'"


def run(name: str) -> None:
    """Imports and runs one command; importing only it keeps `--help` fast."""
    importlib.import_module(f"simsearch.commands.{name.replace(' ', '_')}").main()


def complete(arguments: list[str]) -> None:
    """Hydra's shell completion, for the command that the line being typed names."""
    action = arguments[-1]
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    typed = words[1:] if words else []
    name = next((n for n in COMMANDS if typed[: len(n.split())] == n.split()), None)
    if action.startswith("query=") and name is None:
        start = " ".join(typed)
        print(" ".join(n.split()[-1] for n in COMMANDS if n.startswith(start)))
        return
    if name is not None:
        # Hydra completes the words after the program's name: take the command out.
        rest = line.split(None, 1 + len(name.split()))
        os.environ["COMP_LINE"] = f"{words[0]} {rest[-1] if len(rest) > 1 + len(name.split()) else ''}"
    sys.argv = ["simsearch", "-sc", action]
    run(name or "train")


if __name__ == "__main__":
    main()
