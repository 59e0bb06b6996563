"""The `simsearch` program: finds the command and runs it."""

from __future__ import annotations

import importlib
import os
import re
import sys

from simsearch import usage

COMMANDS = {
    "art": "turn a folder of paintings into a recommender in the browser, in one command",
    "train": "fit a model (frozen: its whitening), measure it, leave a run directory with a catalog",
    "evaluate": "measure a run's checkpoint again, also under another protocol or index",
    "progress": "show the state of a sweep's trials, live, on this machine or on a cluster",
    "index": "make a catalog of a folder or manifest of images with a run's encoder, or of shards",
    "extract": "describe many images into shards, by any number of processes; index makes a catalog of them",
    "search": "find images in a catalog that are similar to an image or a folder of images",
    "recommend": "find artworks like some images or items, with filters, negatives, weights and diversity",
    "calibrate": "set the thresholds below which a catalog says no, at a stated rate of false matches",
    "serve": "offer one or more catalogs by an HTTP API and a web page",
    "assess": "measure a run on an art collection: artist, style, period, work, open set, as a recommender",
    "export": "write a catalog's encoder as ONNX files and check that it finds the same neighbours",
    "instance": "measure a run's encoder on a benchmark with easy, hard and junk items (Revisited Oxford / Paris)",
    "photographs": "measure what a catalog answers to photographs whose works are known, and to others",
    "compare": "rank runs in a table and on a page, with paired tests against a baseline",
    "reproduce": "train and measure a row of a study again, and compare it with the value that the study states",
    "catalog add": "add images to a catalog, describing only what is new or has changed",
    "catalog remove": "remove items from a catalog by their ids or paths",
    "catalog push": "bring PostgreSQL or Milvus to a catalog's present version, to search there",
    "catalog compact": "merge the segments of a catalog into one, without what was removed",
    "catalog info": "show what a catalog holds, and whether its calibration still stands",
    "catalog export": "write ids, vectors and attributes of a catalog's items as Parquet files",
    "catalog verify": "compare each file of a catalog with its digest",
    "catalog migrate": "bring a catalog of an earlier version to the present format",
    "data ingest": "check, clean and decode a collection of images from anywhere; leaves a report",
    "data audit": "list near-duplicates between queries and gallery or training images",
    "data export": "write images of a collection as files with a manifest",
    "data convert": "turn a ground truth of Revisited Oxford / Paris (.pkl) into JSON, executing nothing in it",
}

# Keys whose values are text as it is typed, paths above all.
TEXTS = {
    *("against", "baseline", "catalog", "folder", "figure", "gnd", "id", "image", "images", "names", "out", "outside"),
    *("photographs", "region", "root", "row", "run", "run_dir", "run_root", "runs", "shards", "unlike"),
    *("uploads_folder", "where", "without"),
}
TEXTS_OF = {"reproduce": {"rows"}}  # a number for other commands
_IN_GROUPS = re.compile(r"(.*\.)?backbone\.weights|.+\.(factory|root|source|uri)|model\.(.+\.)?start")
# A list of texts too, or a mapping to them.
SEVERAL = {"catalog", "id", "image", "names", "region", "root", "runs", "unlike"}
_QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1|\\).)*\1""", re.DOTALL)
_PART = re.compile(r"""(?:\s*(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")\s*(?=,|$))|[^,]+""", re.DOTALL)
_SWEPT = re.compile(r".*,.*|\w+\(.*\)", re.DOTALL)

USAGE = """usage: simsearch COMMAND [key=value ...]

{commands}

Each command is composed by Hydra from conf/: see what there is to set and with which values by
  simsearch COMMAND --help          what it does, its keys, their meaning and defaults, examples
  simsearch COMMAND --cfg job       the whole config, after your overrides
  simsearch train -m seed=0,1,2     a sweep over values
Completion of commands, groups, keys, values and paths in bash (zsh, fish):
  eval "$(simsearch -sc install=bash)"
A traceback instead of a one-line error: SIMSEARCH_DEBUG=1."""


def main() -> None:
    """Runs the command that the arguments name. Exits with status 2 if there is no such command."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["-sc"] or arguments[:1] == ["--shell-completion"]:
        complete(arguments)
        return
    if arguments[:1] == ["--version"]:
        from simsearch import __version__

        print(__version__)
        return
    asks = bool({"-h", "--help", "help"} & set(arguments)) or not arguments
    arguments = [argument for argument in arguments if argument not in ("-h", "--help", "help")]
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    if not arguments or (asks and name not in COMMANDS):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {n:<{width}}  {t}" for n, t in COMMANDS.items())))
        return
    if name not in COMMANDS:
        raise SystemExit(_no_command(arguments))
    rest = usage.spelled(name, arguments[words:])
    if asks:
        print(usage.help_page(name, rest))
        return
    if found := usage.mistake(name, rest):
        print(f"simsearch {name}: {found}", file=sys.stderr)
        raise SystemExit(1)
    swept = bool({"-m", "--multirun"} & set(rest))
    typed = [quoted(_own_catalog(argument), name, swept=swept) for argument in rest]
    sys.argv = [f"simsearch {name}", *typed]
    run(name)


def quoted(argument: str, command: str = "", *, swept: bool = False) -> str:
    """The argument with its text in quotes, so that Hydra's grammar accepts any file name and id. `~` is expanded.

    Args:
        argument: An argument of the command line.
        command: Name of the command.
        swept: Commas separate the values of a sweep.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or not (name in TEXTS or name in TEXTS_OF.get(command, ()) or _IN_GROUPS.fullmatch(name)):
        return argument
    if value in ("", "null", "???") or _QUOTED.fullmatch(value) or "${" in value or (swept and _SWEPT.fullmatch(value)):
        return argument
    if name in SEVERAL and not os.path.exists(value):
        if value[0] + value[-1] == "{}":
            return argument
        if value[0] + value[-1] == "[]":
            return f"{key}=[{','.join(_literal(part.strip()) for part in _PART.findall(value[1:-1]))}]"
    return f"{key}={_literal(value)}"


def _literal(value: str) -> str:
    if _QUOTED.fullmatch(value) or value == "null":
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", os.path.expanduser(value))
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _own_catalog(argument: str) -> str:
    """`catalog=<run>`, with the run replaced by the catalog in it."""
    key, _, value = argument.partition("=")
    inner = os.path.join(os.path.expanduser(value), "catalog")
    taken = key == "catalog" and value and not os.path.isfile(os.path.join(os.path.dirname(inner), "catalog.json"))
    return f"catalog={inner}" if taken and os.path.isfile(os.path.join(inner, "catalog.json")) else argument


def _no_command(arguments: list[str]) -> int:
    """Prints that the first words are no command, and suggests one. Returns the exit status."""
    below = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if below:  # `simsearch data`
        typed = " ".join(arguments[:2])
        print(f"simsearch: {typed!r} is not a command: there are {', '.join(below)}", file=sys.stderr)
        return 2
    if "=" in arguments[0] or arguments[0].startswith("-"):
        hint = ": the command comes first, as in `simsearch train seed=1`"
    else:
        ends = {name.split()[-1]: name for name in COMMANDS}
        hint = f": did you mean {ends[arguments[0]]}?" if arguments[0] in ends else ""
        for typed in (" ".join(arguments[:2]), arguments[0]):
            hint = hint or usage.suggest(typed, list(COMMANDS))
    print(f"simsearch: no command {arguments[0]!r}{hint or ': there are ' + ', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def run(name: str) -> None:
    """Imports and runs one command. Other commands are not imported, which keeps `--help` fast.

    Args:
        name: Name of the command.
    """
    try:
        command = importlib.import_module(f"simsearch.commands.{name.replace(' ', '_')}")
    except ModuleNotFoundError as error:
        if os.environ.get("SIMSEARCH_DEBUG") == "1" or not usage.extra_of(error.name):
            raise
        print(f"simsearch {name}: {usage.missing(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    command.main()


def complete(arguments: list[str]) -> None:
    """Answers a shell's request: a script to install, or the possible words at the cursor in COMP_LINE.

    Args:
        arguments: The arguments of the program. The last one says what the shell asks for.
    """
    action, _, shell = arguments[-1].partition("=")
    if action == "query":
        print("\n".join(usage.completions(list(COMMANDS), os.environ.get("COMP_LINE", ""))))
    elif shell in usage.SCRIPTS:
        print(usage.SCRIPTS[shell])
    else:
        print(f"simsearch: completion is there for {', '.join(usage.SCRIPTS)}: -sc install=bash", file=sys.stderr)
        raise SystemExit(2)


def program() -> None:
    """Runs `main`. Ctrl-C is one line; nothing is said if the reader of the output closes it early (`| head`)."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # Python ends by the signal, as a shell's loop expects
        if os.environ.get("SIMSEARCH_DEBUG") != "1":
            name = sys.argv[0] if sys.argv[0].startswith("simsearch ") else "simsearch"
            sys.excepthook = lambda *_: print(f"{name}: interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


if __name__ == "__main__":
    program()
