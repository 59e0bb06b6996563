"""Help, completion and a newcomer's mistakes: what a terminal answers before, and instead of, a traceback."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from conftest import SMALL, simsearch
from omegaconf import OmegaConf

from simsearch import configs, usage
from simsearch.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
YAMLS = sorted(path for path in (ROOT / "conf").rglob("*.yaml") if "launcher" not in path.parts)
DOCUMENTED = sorted(path for path in (ROOT / "conf").rglob("*.yaml") if "job_logging" not in path.parts)


def flat(node: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys of a yaml that PyYAML read, without what is Hydra's."""
    pairs: dict[str, object] = {}
    for key, value in node.items() if isinstance(node, dict) else ():
        if key.startswith("_") or (not prefix and key in ("defaults", "hydra")):
            continue
        pairs[f"{prefix}{key}"] = value if not isinstance(value, dict) or not value else None
        pairs |= flat(value, f"{prefix}{key}.")
    return pairs


class TestPages:
    @pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_keys_and_defaults_are_those_that_yaml_reads(self, path):
        expected = flat(yaml.safe_load(path.read_text()))
        keys = {key.name: key for key in usage.read_page(path).keys}
        assert list(keys) == list(expected)
        for name, value in expected.items():
            if value is not None:
                assert yaml.safe_load(keys[name].default) == value, name

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_says_what_it_does_what_each_key_means_and_gives_examples_that_are_taken(self, command):
        page = usage.page_of(command)
        assert page.about.startswith(f"simsearch {command}: ")
        assert [key.name for key in page.keys if not key.meaning and key.default] == []
        assert len(page.examples) in (2, 3)
        for example in page.examples:
            program, *arguments = shlex.split(example.removeprefix("srun -n 16 "))
            words = command.split()
            assert [program, *arguments[: len(words)]] == ["simsearch", *words]
            assert usage.mistake(command, usage.spelled(command, arguments[len(words) :])) is None, example

    @pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(ROOT)))
    def test_conf_says_what_each_option_is_and_what_each_key_means(self, path):
        page = usage.read_page(path)
        assert page.about
        assert [key.name for key in page.keys if not key.meaning and not key.handed_on] == []

    def test_a_meaning_is_written_once_for_a_target_s_parameter_and_for_a_dotted_name(self):
        def meaning(path: str, name: str) -> str:
            return next(key.meaning for key in usage.read_page(ROOT / "conf" / path).keys if key.name == name)

        said = re.search(r"^metric: ip # (.*)$", (ROOT / "conf/index/flat.yaml").read_text(), re.MULTILINE)[1]
        assert meaning("index/pq16.yaml", "metric") == said  # the same _target_
        assert meaning("trainer/gpu.yaml", "accelerator") == meaning("trainer/default.yaml", "accelerator")
        assert meaning("experiment/dsh-short.yaml", "trainer.max_steps") == meaning("trainer/default.yaml", "max_steps")
        nested = meaning("model/art-learned.yaml", "encoders.style.backbone.stages")  # composed from another group
        assert nested == meaning("backbone/lite0-style.yaml", "stages")
        # A parameter of one loss says nothing of another's.
        assert meaning("loss/triplet.yaml", "margin") != meaning("loss/dsh.yaml", "margin")

    def test_a_command_shows_its_own_groups_and_the_chosen_option_s_keys(self):
        page = usage.help_page("search", width=80)
        for text in ("catalog", "image", "k=10", "images to find for each", "table | json", "rerank=null", "alpha-qe"):
            assert text in page
        for foreign in ("optimizer", "backbone", "scheduler", "hydra"):
            assert foreign not in page
        assert "model.whitening.dimension=128" in usage.help_page("train")
        assert "model.network.bits=12" in usage.help_page("train", ["model=dsh"])
        assert "model.whitening.dimension" not in usage.help_page("train", ["model=dsh"])

    @pytest.mark.parametrize(
        "chosen",
        [
            ["model=dsh"],
            ["experiment=dsh-short"],
            ["sweep=margin-mining"],
            ["data=cifar10", "model=art"],
            ["model=dsh", "trainer=cpu", "loss=hashnet", "callbacks=[mining,early-stopping]"],
        ],
        ids=" ".join,
    )
    def test_help_shows_the_defaults_that_hydra_composes(self, chosen):
        with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
            config = hydra.compose("train", ["hydra.run.dir=x", *chosen], return_hydra_config=True)
        choices = {name: str(choice or "null") for name, choice in config.hydra.runtime.choices.items()}
        options = usage.chosen_options("train", chosen)
        assert options == options | {name: choices[name] for name in options if name in choices}
        keys = usage.keys_of("train", chosen)
        assert len(keys) > 50
        for name, key in keys.items():
            if key.default and "${" not in key.default:
                assert OmegaConf.select(config, name) == yaml.safe_load(key.default), name

    @pytest.mark.parametrize("width", [60, 80, 100])
    def test_lines_fit_the_terminal(self, width):
        for command in COMMANDS:
            for line in usage.help_page(command, width=width).splitlines():
                # What cannot be broken: an example to copy, a name with its default.
                assert len(line) <= width or "simsearch " in line or "=" in line.split()[0], line

    def test_columns_is_obeyed_and_no_library_is_loaded(self):
        code = (
            "import sys\nsys.argv = ['simsearch', 'train', '--help']\nfrom simsearch.__main__ import main\nmain()\n"
            "print([m for m in ('torch', 'hydra', 'omegaconf', 'yaml', 'numpy', 'rich') if m in sys.modules])"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "70"}
        )
        assert run.stdout.splitlines()[-1] == "[]"
        assert run.stdout.splitlines()[:-1] == usage.help_page("train", width=70).splitlines()

    @pytest.mark.parametrize(
        "typed", [["search", "--help"], ["--help", "search"], ["help", "search"], ["search", "help"]]
    )
    def test_asked_for_in_any_order(self, typed):
        assert simsearch(*typed).stdout.startswith("usage: simsearch search catalog=... image=...")


# As newcomers type, and a part of the one line that they get. {run} is a run, {image} an image.
MISTAKES = [
    ("trian", "did you mean train?"),
    ("ingest images=x out=y", "did you mean data ingest?"),
    ("data", "there are data ingest, data audit"),
    ("data ingets images=x out=y", "data ingest"),
    ("run=x search", "the command comes first"),
    ("--catalog x search", "the command comes first"),
    ("search {image}", "did you mean image={image}?"),
    ("search {run}/catalog {image}", "did you mean catalog={run}/catalog?"),
    ("search --catalog {run} --image {image}", "without dashes: catalog={run}"),
    ("search --catalog={run}", "without dashes: catalog={run}"),
    ("search -k 5 catalog={run} image={image}", "without dashes: k=5"),
    ("search catalog = {run} image={image}", "write catalog={run}, without spaces around ="),
    ("search catalog: {run}", "joined by =, as in catalog={run}"),
    ("search catalog:{run}", "joined by =, as in catalog={run}"),
    ("search image={image}", "needs catalog=..., the folder of a catalog"),
    ("search", "needs catalog=..."),
    ("search catlog={run} image={image}", "did you mean catalog?"),
    ("search catalog={run} image={image} top_k=3", "there is no key top_k"),
    ("search catalog={run} image={image} K=3", "did you mean k?"),
    ("search catalog={run} image={image} k=1.5", "k=1.5: it must be a whole number, such as 10"),
    ("search catalog={run} image={image} k=abc", "k=abc: it must be a whole number"),
    ("search catalog={run} image={image} k=0", "k must be at least 1"),
    ("search catalog={run} image={image} format=jsno", "one of table, json: did you mean json?"),
    ("search catalog={run} image={image} trust=yes", "trust=yes: it must be true or false"),
    ("search catalog={run} image={image} device=gpu", "device=gpu: give auto"),
    ("search catalog={run} image={image} rerank=alphaqe", "did you mean alpha-qe?"),
    ("search catalog={run} image={image} backbone=lite0", "search has no group backbone"),
    ("search catalog=/nowhere image={image}", "no catalog in /nowhere"),
    ("search catalog={run} image=/nowhere.jpg", "nowhere.jpg"),
    ("recommend catalog={run} weights.styl=1 id=0", "did you mean weights.style?"),
    ("recommend catalog={run} id=0 diversity=much", "diversity=much: it must be a number, such as 0.0"),
    ("evaluate {run}", "did you mean run={run}?"),
    ("evaluate run={run} stage=tset", "did you mean test?"),
    ("evaluate run={run} index=faltt", "did you mean flat?"),
    ("compare {run} {run}", "did you mean runs={run}?"),
    ("index run={run} images=/nowhere", "/nowhere"),
    ("train data=cifr10", "did you mean cifar10"),
    ("train model.whitening.dimension=sixtyfour", "model.whitening.dimension=sixtyfour: it must be a whole number"),
    ("train model.whitening.dimention=64", "did you mean model.whitening.dimension"),
    ("train backbone.sise=64", "did you mean backbone.size"),
    ("train seed=1.5", "seed=1.5: it must be a whole number"),
    ("train seeds=1", "did you mean seed?"),
    ("train lr=0.1", "there is no key lr: did you mean optimizer.lr?"),
    ("train epochs=3", "there is no key epochs: did you mean trainer.max_epochs?"),
    ("train data=art", "data.source has no value: give data.source=..."),
    ("train data=art data.styles=3", "data.styles belongs to an option of data that is not chosen: give data=<the"),
    (
        "index index.nprobe=8",
        "index.nprobe belongs to an option of index that is not chosen: give index=<the option> too",
    ),
    ("train --epochs 3", "there is no option --epochs"),
    ("train pooling=[gem", "pooling"),
    ("train resume=1", "resume=1: it must be true or false"),
    ("-sc install=tcsh", "completion is there for bash, fish, zsh"),
]


@pytest.mark.parametrize(("typed", "answer"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_newcomer_s_mistake_gets_one_line_that_mends_it(typed, answer, small_run, tmp_path):
    names = {"run": str(small_run), "image": str(small_run / "figures/queries/00.png")}
    arguments = [word.format(**names) for word in typed.split()]
    small = [*SMALL, "logger.mode=disabled", f"run_dir={tmp_path}/r"] if arguments[0] == "train" else []
    small = [one for one in small if one.partition("=")[0] not in typed and ("data=" not in typed or "data" not in one)]
    known = arguments[0] in COMMANDS or " ".join(arguments[:2]) in COMMANDS
    done = simsearch(*arguments, *small, cwd=tmp_path, expect=1 if known else 2)
    assert answer.format(**names) in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "it left something behind"


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ("progress", "watch=0.5"),
        ("serve", "limits.rate=0.5"),
        ("serve", "limits.rate=null"),
        ("train", "trainer.devices=auto"),
        ("train", "model.head_lr=0.5"),
        ("train", "+anything=1"),
        ("train", "hydra.sweep.dir=x"),
        ("recommend", "where=artist=Monet"),
        ("train", "seed=${oc.env:SEED}"),
    ],
)
def test_what_may_be_right_is_not_refused(command, argument):
    assert (usage.mistake(command, [argument]) or "needs").startswith("needs")


def test_a_catalog_of_a_run_is_found_in_the_run(small_run, tmp_path):
    image = small_run / "figures/queries/00.png"
    done = simsearch("search", f"catalog={small_run}", f"image={image}", "k=1", "format=json", cwd=tmp_path)
    assert '"rank": 1' in done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("simsearch tr", ["train"]),
        ("simsearch data ex", ["export"]),
        ("simsearch train pooling=g", ["pooling=gem"]),
        ("simsearch train poo", ["pooling="]),
        ("simsearch search catalog=x k=1 form", ["format="]),
        ("simsearch search format=", ["format=table", "format=json"]),
        ("simsearch search trust=t", ["trust=true"]),
        ("simsearch train model.whitening.dim", ["model.whitening.dimension="]),
        ("simsearch train model=dsh model.network.b", ["model.network.bits="]),
        ("simsearch search image=sub/ph", ["image=sub/photo.jpg", "image=sub/photos/"]),
        ("simsearch nonsense x", []),
    ],
)
def test_completion(line, expected, tmp_path, monkeypatch):
    (tmp_path / "sub/photos").mkdir(parents=True)
    (tmp_path / "sub/photo.jpg").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMP_LINE", line)
    assert simsearch("-sc", "query=bash").stdout.split() == expected


def test_bash_takes_the_script(tmp_path):
    """Bash runs it as it would for a tab after `simsearch train poo`, with a simsearch that is this checkout's."""
    program = tmp_path / "simsearch"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m simsearch "$@"\n')
    program.chmod(0o755)
    script = (
        f"PATH={tmp_path}:$PATH\neval \"$(simsearch -sc install=bash)\"\nCOMP_LINE='simsearch train poo'\n"
        'COMP_POINT=19\n_simsearch 2>/dev/null\necho "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "pooling="
