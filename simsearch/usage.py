"""The arguments of commands, as conf/ defines them: help pages, completion and error messages. Loads no library.

A command's yaml begins with a description, examples (`# $ simsearch ...`) and groups. The comment beside a key is its
meaning; a comment such as `table | json` lists all possible values. A meaning is written once: a key without a comment
has the meaning that another yaml gives to the same parameter of the same `_target_`, or to the same dotted name.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path


def conf_folder() -> Path:
    """The folder of the configs: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(str(resources.files("simsearch")))
    installed = package / "conf"
    return installed if installed.is_dir() else package.resolve().parent / "conf"


CONF = conf_folder()
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
_OPTIONS = {"-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun"}
_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"}
_WITH_VALUE |= {"-i", "--info", "--experimental-rerun", "-sc", "--shell-completion"}


@dataclass(frozen=True)
class Key:
    """A key of a yaml.

    Attributes:
        name: Its dotted name.
        default: Its default as written in the yaml. "" for a section.
        meaning: Its meaning.
        target: The `_target_` of the section, if the key is a parameter of it, else "".
    """

    name: str
    default: str
    meaning: str
    target: str = ""

    @property
    def needed(self) -> bool:
        """Whether the user must set the key."""
        return self.default == "???"

    @property
    def handed_on(self) -> bool:
        """Whether the key is a section or passes on the value of another key, so that a user does not set it."""
        return self.default == "" or re.fullmatch(r"\$\{[\w.:,]+\}", self.default) is not None

    @property
    def choices(self) -> tuple[str, ...]:
        """All possible values if the meaning lists them. () for any value."""
        if self.default in ("true", "false"):
            return ("true", "false")
        parts = self.meaning.split(" | ")
        words = [re.match(r"[\w.-]+(?=$|[ :;(,])", part) for part in parts]
        return tuple(word[0] for word in words if word) if len(parts) > 1 and all(words) else ()


@dataclass(frozen=True)
class Page:
    """A yaml of conf/.

    Attributes:
        about: Its description.
        examples: Its examples.
        groups: The groups of its defaults list by name, with the chosen option ("null" for none), in their order.
        keys: Its keys.
        bases: Options of its own group that it is composed of, in their order. `_self_` stands for the yaml itself.
        overrides: The options that it chooses in other groups.
        everywhere: Whether its keys are full names, not names within its group.
    """

    about: str
    examples: tuple[str, ...]
    groups: Mapping[str, Key]
    keys: tuple[Key, ...]
    bases: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    everywhere: bool = False


@cache
def read_page(path: Path) -> Page:
    """The page of a yaml in the style of this project: block style, with a comment on the line that it describes.

    Keys without a comment have the meaning that another yaml of conf/ gives them.

    Args:
        path: The yaml.
    """
    page = _own_page(path)
    group, shared = _group_of(path), _meanings()
    keys = tuple(
        key if key.meaning or key.handed_on else replace(key, meaning=_meaning(key, group, shared)) for key in page.keys
    )
    return replace(page, keys=keys)


def _group_of(path: Path) -> str:
    """The prefix of the names of a yaml's keys. "" for a command, and for a yaml that sets keys of all groups."""
    if path.parent == CONF or _own_page(path).everywhere:
        return ""
    return path.parent.relative_to(CONF).as_posix() if path.is_relative_to(CONF) else path.parent.name


@cache
def _meanings() -> dict[tuple[str, str], str]:
    """The meanings that conf/ gives to parameters of a `_target_`, and to dotted names ("" as their target)."""
    found: dict[tuple[str, str], str] = {}
    train = CONF / "train.yaml"
    first = [train, *(CONF / group / f"{key.default}.yaml" for group, key in _own_page(train).groups.items())]
    for path in [*filter(Path.is_file, first), *sorted(CONF.rglob("*.yaml"))]:
        group = _group_of(path)
        for key in _own_page(path).keys:
            if key.meaning and key.target:
                found.setdefault((key.target, key.name.rpartition(".")[2]), key.meaning)
            if key.meaning and (group or path.stem == "train"):
                found.setdefault(("", f"{group}.{key.name}".lstrip(".")), key.meaning)
    return found


def _meaning(key: Key, group: str, shared: Mapping[tuple[str, str], str]) -> str:
    if key.target:
        return shared.get((key.target, key.name.rpartition(".")[2]), "")
    words = f"{group}.{key.name}".lstrip(".").split(".")
    names = (".".join(words[i:]) for i in range(max(len(words) - 1, 1)))
    return next((shared["", name] for name in names if ("", name) in shared), "")


@cache
def _own_page(path: Path) -> Page:
    """The page of a yaml with its own comments only."""
    about: list[str] = []
    examples: list[str] = []
    keys: list[Key] = []
    groups: dict[str, Key] = {}
    section: list[tuple[int, str]] = []
    targets: dict[str, str] = {}
    bases: list[str] = []
    overrides: dict[str, str] = {}
    above = ""  # a comment on lines of its own
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    for line in lines[:start]:
        if line.startswith("# @package"):
            continue
        (examples if line.startswith("# $ ") else about).append(line[4:] if line.startswith("# $ ") else line[2:])
    for line in lines[start:]:
        found = re.match(r"( *)(- )?(?:override )?([\w./@-]+):(?= |$)(.*)", line)
        if not found:
            if section == [(0, "defaults")] and (base := re.match(r" *- ([\w-]+)\s*(?:#.*)?$", line)):
                bases.append(base[1])
            above = line.strip()[2:] if line.strip().startswith("# ") else ""
            continue
        indent, dash, name, rest = len(found[1]), found[2], found[3], found[4]
        value, meaning = _split(rest)
        while section and section[-1][0] >= indent:
            section.pop()
        below = [name for _, name in section]
        if dash:
            if below == ["defaults"] and "override " not in line and "@" not in name:
                groups[name] = Key(name, value, meaning)
            elif below == ["defaults"] and "override " in line:
                overrides[name.lstrip("/").partition("@")[0]] = value
            continue
        section.append((indent, name))
        if name == "_target_":
            targets[".".join(below)] = value
        if name.startswith("_") or (below or [name])[0] in ("defaults", "hydra"):
            continue
        keys.append(Key(".".join([*below, name]), value, meaning or above))
        above = ""
    keys = [replace(key, target=targets.get(key.name.rpartition(".")[0], "")) for key in keys]
    everywhere = lines[:1] == ["# @package _global_"]
    return Page(" ".join(about), tuple(examples), groups, tuple(keys), tuple(bases), overrides, everywhere)


def _split(rest: str) -> tuple[str, str]:
    """A value and the comment after it."""
    found = re.match(r"""\s*((?:"[^"]*"|'[^']*'|[^#'"]|(?<! )#)*?)\s*(?:(?<= )#\s*(.*))?$""", rest)
    return (found[1], found[2] or "") if found else (rest.strip(), "")


def page_of(command: str) -> Page:
    """The page of a command.

    Args:
        command: Name of the command.
    """
    return read_page(CONF / f"{command.replace(' ', '_')}.yaml")


def folders(arguments: Sequence[str]) -> tuple[Path, ...]:
    """The folders where Hydra looks for options of groups, in order of precedence: conf/, then the user's own.

    The user's folders are those of --config-dir and hydra.searchpath. Python packages (pkg://) are not searched.

    Args:
        arguments: Arguments of the command line.

    Example:
        >>> folders(["--config-dir", "mine", "hydra.searchpath=[file:///shared/conf]"])[1:]
        (PosixPath('mine'), PosixPath('/shared/conf'))
    """
    own = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        key, _, value = argument.partition("=")
        if key in ("--config-dir", "-cd"):
            own.append(value or following)
        elif key.lstrip("+") == "hydra.searchpath":
            own += [part.strip(" '\"") for part in value.strip(" []").split(",")]
    paths = [text.removeprefix("file://") for text in own if "pkg://" not in text]
    return (CONF, *(Path(os.path.expanduser(path)) for path in paths if path))


def options_of(group: str, among: Sequence[Path] = (CONF,)) -> list[str]:
    """The names of a group's options, in order.

    Args:
        group: Name of the group.
        among: Folders to search.
    """
    return sorted({path.stem for folder in among for path in (folder / group).glob("*.yaml")})


def _option(group: str, name: str, among: Sequence[Path]) -> Path | None:
    """The yaml of a group's option. None if there is none."""
    files = (folder / group / f"{name}.yaml" for folder in among)
    return next((path for path in files if path.is_file()), None)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of overrides, without `+` and `~`."""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and not key.startswith("-"):
            yield key.lstrip("+~"), value


def _lineage(group: str, option: str, among: Sequence[Path]) -> list[Page]:
    """The pages that a group's option is composed of, its own among them. The later overrides the earlier."""
    if (path := _option(group, option, among)) is None:
        return []
    page = read_page(path)
    order = page.bases if "_self_" in page.bases else (*page.bases, "_self_")
    others = {name: [page] if name == "_self_" else _lineage(group, name, among) for name in order if name != option}
    return [one for pages in others.values() for one in pages]


def _overrides(group: str, option: str, among: Sequence[Path]) -> dict[str, str]:
    """The options that a group's option chooses in other groups."""
    if (path := _option(group, option, among)) is None:
        return {}
    page = read_page(path)
    found: dict[str, str] = {}
    for base in page.bases:
        found |= _overrides(group, base, among) if base not in ("_self_", option) else {}
    return {**found, **page.overrides}


def _listed(value: str) -> list[str]:
    """One option, or those of `[a,b]`."""
    return [part.strip() for part in value.strip(" []").split(",")]


def chosen_options(command: str, arguments: Sequence[str] = ()) -> dict[str, str]:
    """The option of each group of a command: the given one, else the one that another option chooses, else its own.

    Args:
        command: Name of the command.
        arguments: Arguments that choose options.

    Example:
        >>> chosen_options("train", ["model=dsh"])["trainer"]
        'training'
    """
    page, given, among = page_of(command), dict(_pairs(arguments)), folders(arguments)
    found: dict[str, str] = {}
    by_others: dict[str, str] = {}
    for group, key in reversed(list(page.groups.items())):  # as Hydra composes: who stands later in the list decides
        found[group] = given.get(group) or by_others.get(group, key.default)
        for option in _listed(found[group]):
            by_others = _overrides(group, option, among) | by_others
    return {group: found[group] for group in page.groups}


def keys_of(command: str, arguments: Sequence[str] = ()) -> dict[str, Key]:
    """All keys of a command and of the chosen options of its groups, by their dotted names.

    Args:
        command: Name of the command.
        arguments: Arguments that choose options.
    """
    keys = {key.name: key for key in page_of(command).keys}
    among = folders(arguments)
    for group, options in chosen_options(command, arguments).items():
        for page in (page for option in _listed(options) for page in _lineage(group, option, among)):
            for key in page.keys:
                name = key.name if page.everywhere else f"{group}.{key.name}"
                if key.default == "null":  # of a section, with all that was in it
                    keys = {other: one for other, one in keys.items() if not other.startswith(f"{name}.")}
                known = keys[name].meaning if name in keys else ""
                meaning = known or key.meaning if page.everywhere else key.meaning or known
                keys[name] = replace(key, name=name, meaning=meaning)
    return keys


BARE = {"art": "images"}  # the key of a command's first argument, which may come without it


def spelled(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of a command as key=value, including the first one: `simsearch art <folder>`.

    Args:
        command: Name of the command.
        arguments: Arguments of the command line.

    Example:
        >>> spelled("art", ["~/paintings", "port=0"])
        ['images=~/paintings', 'port=0']
    """
    first, *rest = arguments or [""]
    if command in BARE and first and "=" not in first and not first.startswith("-"):
        return [f"{BARE[command]}={first}", *rest]
    return list(arguments)


# ------------------------------------------------------------------------------------------------- help


def help_page(command: str, arguments: Sequence[str] = (), width: int | None = None) -> str:
    """The text of `simsearch COMMAND --help`: description, keys with their meanings, and examples.

    Args:
        command: Name of the command.
        arguments: Arguments that choose options of groups, whose keys are shown. Otherwise the command's own choices.
        width: Width of the terminal in columns, or None.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    page, keys = page_of(command), keys_of(command, arguments)
    options = chosen_options(command, arguments)
    needed = [key for key in page.keys if key.needed]
    bare = [f"[{BARE[command].upper()}]"] if command in BARE else []
    words = ["usage: simsearch", command, *bare, *(f"{key.name}=..." for key in needed), "[key=value ...]"]
    out = [_wrapped(" ".join(words), width), "", _wrapped(_sentence(page.about), width)]
    if page.examples:
        out += ["", "examples:", *(f"  {example}" for example in page.examples)]
    if needed:
        out += ["", "needed:", *_rows([(key.name, key.meaning) for key in needed], width)]
    own = [keys[key.name] for key in page.keys if not key.needed and _tells(key)]
    if own:
        out += ["", "keys, with their defaults:", *_rows([_row(key) for key in own], width)]
    if page.groups:
        out += ["", "groups (group=option), with their defaults:"]
        rows = []
        for name, key in page.groups.items():
            choices = " | ".join(options_of(name, folders(arguments)))
            rows.append((f"{name}={options[name]}", f"{key.meaning}: {choices}" if key.meaning else choices))
        out += _rows(rows, width)
    names = {key.name for key in page.keys}
    inner = [key for name, key in keys.items() if name not in names and _tells(key)]
    if inner:
        out += ["", "keys of the chosen options (others: group=option --help):"]
        out += _rows([_row(key) for key in inner], width)
    return "\n".join([*out, "", f"The whole config, after your values: simsearch {command} ... --cfg job"])


def _tells(key: Key) -> bool:
    """Whether a user sets this key: it is neither a section nor passes on the value of another key."""
    return bool(key.meaning) or not key.handed_on


def _sentence(about: str) -> str:
    text = about.partition(": ")[2] or about
    return text[:1].upper() + text[1:]


def _row(key: Key) -> tuple[str, str]:
    return (f"{key.name}={key.default}" if key.default else f"{key.name}:", key.meaning)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _rows(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Names in a column with their wrapped meanings beside them, or below a name that is too long for the column."""
    column = min(max(len(name) for name, _ in rows), max(width // 3, 12))
    out = []
    for name, meaning in rows:
        text = textwrap.wrap(meaning, max(width - column - 4, 20), break_on_hyphens=False) or [""]
        if len(name) > column:
            out.append(f"  {name}")
            name = ""
        else:
            text, first = text[1:], text[0]
            out.append(f"  {name:<{column}}  {first}".rstrip())
        out += [f"  {'':<{column}}  {line}" for line in text if line]
    return out


# ------------------------------------------------------------------------------------------- completion

SCRIPTS = {
    "bash": """_simsearch() {
    local IFS=$'\\n'
    COMPREPLY=($(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" simsearch -sc query=bash))
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[=/] ]] || compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -F _simsearch simsearch""",
    "fish": "complete -c simsearch -f -a '(env COMP_LINE=(commandline -cp) simsearch -sc query=fish)'",
}
SCRIPTS["zsh"] = "autoload -U +X bashcompinit && bashcompinit\n" + SCRIPTS["bash"]


def completions(commands: Sequence[str], line: str) -> list[str]:
    """The possible last words of a command line.

    Args:
        commands: Names of all commands.
        line: The command line up to the cursor.
    """
    words = line.split()[1:]
    typed = "" if line[-1:].isspace() or not words else words.pop()
    name = next((n for n in commands if words[: len(n.split())] == n.split()), None)
    if name is None:
        start = [*words, typed]
        fits = (n.split() for n in commands)
        known = {n[len(words)]: None for n in fits if n[: len(words)] == words and len(n) > len(words)}
        return [word for word in known if word.startswith(start[-1])]
    key, equals, value = typed.partition("=")
    page, keys = page_of(name), keys_of(name, words)
    if not equals:
        at_top = [key for key in keys if key in {k.name for k in page.keys}] + list(page.groups)
        names = [key for key in keys if keys[key].default] if "." in typed else [n for n in at_top if "." not in n]
        return [f"{n}=" for n in dict.fromkeys(names) if n.startswith(typed)]
    if key in page.groups:
        values = options_of(key, folders(words))
    elif key in keys and keys[key].choices:
        values = list(keys[key].choices)
    else:
        folder, _, head = value.rpartition("/")
        base = Path(os.path.expanduser(folder or ("/" if value.startswith("/") else ".")))
        there = sorted(base.iterdir()) if base.is_dir() else []
        shown = [p for p in there if head.startswith(".") or not p.name.startswith(".")]
        values = [f"{value[: len(value) - len(head)]}{p.name}{'/' if p.is_dir() else ''}" for p in shown]
    return [f"{key}={v}" for v in values if v.startswith(value)]


def known_keys(command: str) -> list[str]:
    """The dotted names of all keys of a command, for any options of its groups, and of the groups.

    Args:
        command: Name of the command.
    """
    return [*_all_keys(command), *page_of(command).groups]


def about_key(command: str, name: str) -> str:
    """How to set a key, and its meaning if conf/ states it.

    Args:
        command: Name of the command.
        name: Dotted name of the key.
    """
    meanings = [key.meaning for key in _all_keys(command).get(name, ()) if key.meaning] if command else []
    return f"give {name}=..." + (f", {meanings[0]}" if meanings else "")


# --------------------------------------------------------------------------------------------- mistakes


def suggest(word: str, known: Sequence[str]) -> str:
    """`: did you mean x?`, or "" if no known word is similar.

    Args:
        word: The unknown word.
        known: The known words.
    """
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1)
    return f": did you mean {lower[near[0]]}?" if near else ""


def mistake(command: str, arguments: Sequence[str]) -> str | None:
    """The error in the arguments of a command, in one line with a correction. None if none is found.

    Errors that depend on the composed config are left to Hydra.

    Args:
        command: Name of the command.
        arguments: Arguments of the command line.
    """
    arguments = list(arguments)
    page = page_of(command)
    swept = bool({"-m", "--multirun"} & set(arguments))
    among = folders(arguments)
    elsewhere = any("pkg://" in argument for argument in arguments)  # options that are not looked for
    skip = False
    for place, argument in enumerate(arguments):
        if skip or argument in _OPTIONS:
            skip = False
            continue
        if argument in _WITH_VALUE or argument.partition("=")[0] in _WITH_VALUE:
            skip = "=" not in argument
            continue
        if found := _no_override(command, page, argument, arguments[place + 1 :]):
            return found
        if argument.startswith("~"):
            continue
        key, _, value = argument.partition("=")
        if len(among) == 1 and not elsewhere and (found := _unknown(command, page, key)):
            return found  # the user's own yaml may add keys and groups
        if not (elsewhere and key in page.groups) and (found := _misfit(command, page, key, value, swept, among)):
            return found
    looks = any(argument.startswith(("-c", "--c", "-i", "--i", "--hydra-help")) for argument in arguments)
    given = {key for key, _ in _pairs(arguments)}
    for wanted in page.keys:
        if wanted.needed and wanted.name not in given and not looks:
            return f"needs {wanted.name}=..., {wanted.meaning}"
    return None


def _no_override(command: str, page: Page, argument: str, rest: Sequence[str]) -> str | None:
    """The error message for an argument that is not key=value. `rest` holds the arguments after it."""
    following = next((word.removeprefix("=") for word in rest if word != "="), "")
    bare = argument.lstrip("-").partition("=")
    name = bare[0].replace("-", "_")
    known = [key.name for key in page.keys if "." not in key.name] + list(page.groups)
    if argument.startswith("-"):
        if name in known:
            value = bare[2] or (following if following and not following.startswith("-") else "...")
            return f"{argument} is written without dashes: {name}={value}"
        hint = suggest(name, known) or f": see `simsearch {command} --help`"
        return f"there is no option {argument}{hint.replace('?', '=...?')}"
    if argument.startswith("~") or "=" in argument:
        key = argument.partition("=")[0]
        if not key or key != key.strip():
            return f"{argument!r}: write key=value without spaces around ="
        return None
    if not argument.strip():
        return "an argument is empty: write key=value"
    if argument in known or rest[:1] == ["="]:
        value = following if rest and rest[0][:1] == "=" else "..."
        return f"{argument!r} has no value: write {argument}={value or '...'}, without spaces around ="
    if re.fullmatch(r"\w+:.*", argument) and argument.partition(":")[0] in known:
        key, _, value = argument.partition(":")
        return f"{argument!r}: keys and values are joined by =, as in {key}={value or following or '...'}"
    likely = _key_for(argument, page)
    hint = f"did you mean {likely}={argument}?" if likely else f"see `simsearch {command} --help`"
    return f"{argument!r} is not of the form key=value: {hint}"


def _key_for(text: str, page: Page) -> str | None:
    """The key of the command that a bare value may be meant for."""
    known = [key.name for key in page.keys]
    path = Path(os.path.expanduser(text))
    wanted: list[str] = []
    if (path / "catalog.json").is_file():
        wanted = ["catalog"]
    elif (path / "config.yaml").is_file():
        wanted = ["run", "runs", "catalog", "run_dir"]
    elif path.suffix.lower() in _IMAGES:
        wanted = ["image", "images"]
    elif path.suffix.lower() in (".csv", ".parquet") or path.is_dir():
        wanted = ["images", "image", "source", "folder"]
    elif path.suffix.lower() in (".json", ".pkl"):
        wanted = ["gnd"]
    wanted += [key.name for key in page.keys if key.needed]
    return next((name for name in wanted if name in known), None)


def _unknown(command: str, page: Page, key: str) -> str | None:
    """The error message for a key that the command does not have."""
    first = re.split(r"[./@]", key)[0]
    own = {name.name for name in page.keys}
    groups = {re.split(r"[/@]", group)[0] for group in page.groups} | _placed(command)
    if key.startswith(("+", "hydra")) or "@" in key:
        return None
    if first in groups or key in own:
        return None
    if first in own:
        sections = {name.name for name in page.keys if not name.default}
        if first not in sections or any(name.startswith(f"{first}.") and key.startswith(name) for name in own):
            return None  # of a value that holds more, such as a mapping
        return f"there is no key {key}{suggest(key, sorted(own))}" + _where(command)
    if (CONF / first).is_dir():
        return f"{command} has no group {first}" + _where(command)
    hint = suggest(key, sorted(own | groups | set(keys_of(command)))) or _suggest_end(key, command)
    return f"there is no key {key}{hint}" + _where(command)


def _suggest_end(word: str, command: str) -> str:
    """As `suggest`, by the last part of a command's dotted names: `optimizer.lr` for `lr`."""
    known = [name for name, keys in _all_keys(command).items() if not all(key.handed_on for key in keys)]
    ends = {name.rpartition(".")[2]: name for name in sorted(known, key=lambda name: -name.count("."))}
    near = difflib.get_close_matches(word, [end for end, name in ends.items() if name.count(".") == 1], n=1)
    found = [ends[end] for end in (*near, word) if end in ends]
    return f": did you mean {found[0]}?" if found else ""


def _placed(command: str) -> set[str]:
    """The first words of entries that a defaults list places elsewhere (`protocol@protocols.artist`)."""
    text = (CONF / f"{command.replace(' ', '_')}.yaml").read_text(encoding="utf-8")
    return {found.split(".")[0] for found in re.findall(r"- [\w/]+@([\w.]+):", text)}


def _where(command: str) -> str:
    return f" (`simsearch {command} --help` lists them)"


def _misfit(
    command: str, page: Page, key: str, value: str, swept: bool, among: tuple[Path, ...] = (CONF,)
) -> str | None:
    """The error message for a value that is no option of its group, none of the key's choices, or of the wrong type."""
    plain = value.strip()
    if plain == "null":
        kinds = [_complaint(one, plain) for one in page.keys if one.name == key]
        return f"{key}=null: it must be {kinds[0]}" if any(kinds) else None
    if plain in ("", "???") or re.search(r"[\[({$]", plain) or key.startswith("+"):
        return None
    parts = [part.strip() for part in plain.split(",")] if swept else [plain]
    parts = [part[1:-1] if part[:1] in ("'", '"') and part[-1:] == part[:1] else part for part in parts]
    if key in page.groups:
        there = options_of(key, among)
        wrong = [part for part in parts if part != "null" and part not in there]
        if wrong:
            return f"{key}={wrong[0]} is not one of {', '.join(there)}{suggest(wrong[0], there)}"
        return None
    known = _all_keys(command, among).get(key, ())
    if not known or key.split(".")[0] in ("trainer", "logger"):
        return None
    for part in parts:
        if part == "null":
            continue
        complaints = [_complaint(one, part) for one in known]
        if all(complaints):
            return f"{key}={part}: it must be {complaints[0]}"
    return None


@cache
def _all_keys(command: str, among: tuple[Path, ...] = (CONF,)) -> dict[str, tuple[Key, ...]]:
    """The keys of a command by name, as each option of each group defines them."""
    page = page_of(command)
    found: dict[str, list[Key]] = {key.name: [key] for key in page.keys}
    for group in page.groups:
        for option in options_of(group, among):
            path = _option(group, option, among)
            for key in read_page(path).keys if path else ():
                if not read_page(path).everywhere:
                    found.setdefault(f"{group}.{key.name}", []).append(key)
                elif key.name not in found:
                    found[key.name] = [key]
    return {name: tuple(keys) for name, keys in found.items()}


_TIME = re.compile(r"second|minute|_ms$")


def _complaint(key: Key, value: str) -> str:
    """The rule that a value breaks. "" if the value is valid."""
    lower = value.lower()
    if key.default in ("true", "false"):
        return "" if lower in ("true", "false") else "true or false"
    if re.fullmatch(r"-?[\d_]+", key.default):
        words = re.findall(r"\b([a-z]+):", key.meaning)  # `auto: all GPUs`
        parts = r"(\.\d*)?" if _TIME.search(key.name + key.meaning) else ""
        whole = re.fullmatch(rf"[+-]?\d[\d_]*{parts}", value)
        return "" if whole or lower in words else f"a whole number, such as {key.default}"
    if re.fullmatch(r"-?[\d_]*\.\d*(e[+-]?\d+)?|-?\d+e[+-]?\d+", key.default):
        number = re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf", lower)
        return "" if number else f"a number, such as {key.default}"
    if key.choices and key.name != "device" and value not in key.choices:
        return f"one of {', '.join(key.choices)}{suggest(value, key.choices)}"
    return ""


def extra_of(module: str | None) -> str | None:
    """The extra of simsearch that installs a module, such as `train` for timm. None if there is none.

    Args:
        module: Name of the module, or None.
    """
    from importlib import metadata  # only where something is missing

    def same(name: str) -> str:
        return name.lower().replace("_", "-")

    try:
        needs = metadata.requires("simsearch") or ()
    except metadata.PackageNotFoundError:  # run from a folder
        return None
    parts = (re.match(r"""([\w.-]+).*extra == ["'](\w+)["']""", line) for line in needs)
    package = same((module or "").partition(".")[0])
    return next((found[2] for found in parts if found and same(found[1]) == package), None)


def missing(error: ModuleNotFoundError) -> str:
    """What to install for a missing module.

    Args:
        error: The import error.
    """
    extra = extra_of(error.name)
    return f"this needs {error.name}: pip install 'simsearch[{extra}]'" if extra else str(error)
