"""simsearch reproduce: rows, runs of equal config, verdicts; one scaled-down row is trained in earnest."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import hydra
import pytest
from conftest import simsearch
from omegaconf import OmegaConf

from simsearch import configs, saved_run
from simsearch.commands.reproduce import exit_status
from simsearch.identity import deciding
from simsearch.studies import check
from simsearch.studies.check import Measured
from simsearch.studies.rows import Expected, read_rows, row_files
from simsearch.studies.runs import compose, train_overrides

TINY = (
    "experiment=dsh data=rendered protocol=rendered-work protocol.validation=0.2 data.styles=2 data.artists=2 "
    "data.works=4 data.photographs=2 data.size=32 sampler.batch_size=8 model.network.bits=16 optimizer.lr=1e-4 "
    "trainer.max_steps=4 trainer.precision=32-true trainer.check_val_every_n_epoch=1000 callbacks.neighbours=null "
    "logger.mode=disabled callbacks.evaluation.ks=[1,10]"
)
BOOK = f"""
rows:
  dsh-tiny:
    what: a tiny network
    train: {TINY}
    minutes: 10
    seeds: [0, 1]
    expect:
      rendered-work: {{mAP: 0.5 ± 0.05}}
  dsh-longer:
    what: goes on from it
    train: {TINY} model.network.bits=24
    start: dsh-tiny
    minutes: 5
    expect:
      rendered-work: {{mAP: 0.5 ± 0.05, P@1: 0.25 +- 0}}
      rendered-style rerank=aqe: {{rerank/mAP: null}}
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.yaml"
    path.write_text(BOOK, encoding="utf-8")
    return path


def metrics(protocol: str, fingerprint: str = "0" * 16, **values: float) -> dict:
    stage = {"protocol": protocol, "fingerprint": fingerprint, "metrics": values, "intervals": {}}
    return {"test": stage}


class Launched:
    """Stands for the commands that would be run: leaves what they would leave, and keeps count."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, list[str]]] = []
        self.values = {"mAP": 0.5, "P@1": 0.25, "rerank/mAP": 0.6}
        self.by_seed: dict[int, float] = {}
        self.fingerprint = "0" * 16

    def __call__(self, command: str, arguments: list[str]) -> None:
        self.lines.append((command, list(arguments)))
        given = dict(argument.split("=", 1) for argument in arguments)
        folder = Path(given["run_dir"].strip("'"))
        if command == "evaluate":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").write_text(json.dumps(metrics(given["protocol"], **self.values)))
            return
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if "resume" not in given:
            overrides = tuple(argument for argument in arguments if not argument.startswith("run_dir="))
            OmegaConf.save(OmegaConf.create(compose(overrides)), folder / "config.yaml")
        seed = OmegaConf.load(folder / "config.yaml").seed
        value = self.by_seed.get(seed, self.values["mAP"])
        (folder / "checkpoints/best.ckpt").write_bytes(b"weights")
        values = self.values | {"mAP": value}
        (folder / "metrics.json").write_text(json.dumps(metrics("rendered-work", self.fingerprint, **values)))

    @property
    def commands(self) -> list[str]:
        return [command for command, _ in self.lines]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    double = Launched()
    monkeypatch.setattr(check, "launch", double)
    return double


def run(rows: Path, *arguments: str, expect: int = 0):
    return simsearch("reproduce", f"rows={rows}", f"run_root={rows.parent}/runs", *arguments, expect=expect)


class TestRun:
    def test_a_scaled_down_row_in_earnest(self, tmp_path):
        """The study's own smoke row where it is there; what it trains and measures is real."""
        files = [path for path in row_files_or_none() if "smoke-dsh-rendered" in read_rows([path])]
        if not files:
            pytest.skip("no study has the row smoke-dsh-rendered")
        done = simsearch("reproduce", "row=smoke-dsh-rendered", f"run_root={tmp_path}/runs")
        assert "smoke-dsh-rendered: reproduced" in done.stderr
        (run,) = tmp_path.glob("runs/smoke-dsh-rendered-s0-*")
        stage = json.loads((run / "metrics.json").read_text())["test"]
        assert f"{stage['metrics']['mAP']:.4f}" in done.stdout
        assert stage["model"]["weights"] == "trained"

    @pytest.mark.slow
    def test_tables_of_what_is_finished_in_earnest(self, rows):
        text = rows.read_text().partition("      rendered-style rerank")[0]
        rows.write_text(text.replace("0.5 ± 0.05", "null"))
        none = run(rows, f"results={rows.parent}/tables", expect=1)
        assert "belongs to these rows: train some with row=<name>" in none.stderr
        assert not (rows.parent / "tables").exists()

        run(rows, "row=dsh-tiny", "seeds=[0,1]", expect=1)  # a gap, since nothing is expected
        done = run(rows, "row=dsh-longer", f"results={rows.parent}/tables", expect=1)
        assert "3 measurements in" in done.stderr
        with (rows.parent / "tables/results.csv").open(newline="") as file:
            got = {(line["row"], line["seed"], line["metric"]): float(line["value"]) for line in csv.DictReader(file)}
        measured = {}
        for path in (rows.parent / "runs").glob("*/metrics.json"):
            row, seed, _ = path.parent.name.rsplit("-", 2)
            stage = json.loads(path.read_text())["test"]
            for metric in ("mAP", "P@1")[: 1 if row == "dsh-tiny" else 2]:
                measured[row, seed.removeprefix("s"), metric] = stage["metrics"][metric]
        assert got == pytest.approx(measured)
        with (rows.parent / "tables/paired.csv").open(newline="") as file:
            pairs = list(csv.DictReader(file))
        assert [(p["row_a"], p["row_b"], p["metric"], p["seeds"]) for p in pairs] == [
            ("dsh-longer", "dsh-tiny", metric, "0") for metric in ("mAP", "P@1")
        ]
        expected = measured["dsh-longer", "0", "mAP"] - measured["dsh-tiny", "0", "mAP"]
        assert float(pairs[0]["difference"]) == pytest.approx(expected, abs=1e-6)
        assert "| dsh-tiny | 2 |" in (rows.parent / "tables/tables.md").read_text()

    def test_start_rows_come_first_and_finished_runs_are_used_again(self, rows, launched):
        done = run(rows, "row=dsh-longer", expect=1)  # a measurement of which nothing is expected yet is a gap
        assert launched.commands == ["train", "train", "evaluate"]
        first, second, third = (dict(a.split("=", 1) for a in arguments) for _, arguments in launched.lines)
        assert Path(first["run_dir"]).name.startswith("dsh-tiny-s0-")
        assert second["model.start"] == first["run_dir"]
        assert third["run"] == second["run_dir"]
        assert (third["protocol"], third["rerank"]) == ("rendered-style", "aqe")
        assert "0.5000 ± 0.05" in done.stdout
        assert "nothing yet" in done.stdout
        again = run(rows, "row=dsh-longer", expect=1)
        assert len(launched.lines) == 3
        assert again.stderr.count("has an equal config") == 2
        assert again.stdout == done.stdout

    def test_a_run_of_another_name_counts_and_one_of_another_config_does_not(self, rows, launched):
        run(rows, "row=dsh-tiny")
        (folder,) = (rows.parent / "runs").glob("dsh-tiny-*")
        folder.rename(folder.with_name("mine"))
        assert "runs/mine has an equal config" in run(rows, "row=dsh-tiny").stderr
        rows.write_text(rows.read_text().replace("optimizer.lr=1e-4", "optimizer.lr=2e-4"))
        run(rows, "row=dsh-tiny")
        assert launched.commands == ["train", "train"]

    def test_reuse_false_trains_anew_beside_it(self, rows, launched):
        run(rows, "row=dsh-tiny")
        run(rows, "row=dsh-tiny", "reuse=false")
        folders = {dict(a.split("=", 1) for a in arguments)["run_dir"] for _, arguments in launched.lines}
        assert len(folders) == 2

    @pytest.mark.parametrize("names", ["ab", "ba"])
    def test_the_newest_of_equal_runs_counts(self, names, rows, launched):
        for i, value in enumerate((0.4, 0.6)):
            launched.values["mAP"] = value
            run(rows, "row=dsh-tiny", "reuse=false", expect=1)
            folder = Path(dict(a.split("=", 1) for a in launched.lines[-1][1])["run_dir"])
            os.utime(folder / "metrics.json", (i, i))
            folder.rename(folder.with_name(names[i]))
        assert "0.6000" in run(rows, "row=dsh-tiny", expect=1).stdout

    def test_reuse_false_trains_a_start_once_for_all_rows(self, rows, launched):
        run(rows, "row=all", "reuse=false", expect=1)
        assert launched.commands == ["train", "train", "evaluate"]

    def test_reuse_false_goes_on_with_what_it_began(self, rows, launched):
        run(rows, "row=dsh-tiny")
        run(rows, "row=dsh-tiny", "reuse=false")
        begun = Path(dict(a.split("=", 1) for a in launched.lines[-1][1])["run_dir"])
        (begun / "metrics.json").unlink()
        (begun / "run.json").write_text("{}")
        run(rows, "row=dsh-tiny", "reuse=false")
        assert launched.lines[-1] == ("train", [f"run_dir={begun}", "resume=true"])

    def test_an_interrupted_run_goes_on(self, rows, launched):
        run(rows, "row=dsh-tiny")
        (folder,) = (rows.parent / "runs").glob("dsh-tiny-*")
        (folder / "metrics.json").unlink()
        (folder / "run.json").write_text("{}")
        done = run(rows, "row=dsh-tiny")
        assert "continuing in" in done.stderr
        assert launched.lines[-1] == ("train", [f"run_dir={folder}", "resume=true"])

    def test_an_evaluation_older_than_the_checkpoint_is_done_again(self, rows, launched):
        run(rows, "row=dsh-longer", expect=1)
        (folder,) = (rows.parent / "runs").glob("dsh-longer-*")
        run(rows, "row=dsh-longer", expect=1)
        assert launched.commands == ["train", "train", "evaluate"]
        os.utime(folder / "checkpoints/best.ckpt", (2e9, 2e9))
        run(rows, "row=dsh-longer", expect=1)
        assert launched.commands == ["train", "train", "evaluate", "evaluate"]

    def test_an_evaluation_older_than_the_checkpoint_is_not_in_the_tables(self, rows, launched):
        run(rows, "row=dsh-longer", expect=1)
        (folder,) = (rows.parent / "runs").glob("dsh-longer-*")
        os.utime(folder / "checkpoints/best.ckpt", (2e9, 2e9))
        run_ = saved_run.open_run(folder)
        assert not check.is_measured(run_, "rendered-style rerank=aqe")
        os.utime(folder / "checkpoints/best.ckpt", (1e9, 1e9))
        assert check.is_measured(run_, "rendered-style rerank=aqe")

    def test_a_training_that_stopped_is_no_finished_one(self, rows, launched, monkeypatch):
        monkeypatch.setattr(check, "launch", lambda command, arguments: None)
        done = run(rows, "row=dsh-tiny", expect=1)
        assert "ended without a result; the same command goes on" in done.stderr

    def test_the_mean_over_seeds_counts(self, rows, launched):
        launched.by_seed = {0: 0.42, 1: 0.56}
        assert "gap" in run(rows, "row=dsh-tiny", expect=1).stdout
        done = run(rows, "row=dsh-tiny", "seeds=[0,1]")
        assert "2 seeds: 0.4200-0.5600" in " ".join(done.stdout.replace("│", " ").split())
        assert "0.4900" in done.stdout
        assert "-0.0100" in done.stdout

    def test_all_seeds_are_those_of_each_row(self, rows, launched):
        run(rows, "row=all", "seeds=all", expect=1)  # a gap: one value is null
        seeds = [a for command, given in launched.lines if command == "train" for a in given if a.startswith("seed=")]
        assert seeds == ["seed=0", "seed=1", "seed=0"]

    @pytest.mark.parametrize("seeds", ["seeds=1", "seeds=[]", "seeds=[a]", "seeds=every"])
    def test_seeds_that_are_none_are_named(self, rows, launched, seeds):
        assert "seeds must be a list of whole numbers" in run(rows, "row=dsh-tiny", seeds, expect=1).stderr

    def test_a_gap_says_how_large(self, rows, launched):
        launched.values["mAP"] = 0.4
        done = run(rows, "row=dsh-tiny", expect=1)
        assert "-0.1000" in done.stdout
        assert "dsh-tiny: gap" in done.stderr

    def test_a_failed_training_is_a_gap_and_leaves_the_other_rows(self, rows, launched, monkeypatch):
        def fail(command, arguments):
            if any("bits=24" in argument for argument in arguments):
                raise check.Failed("`simsearch train ...` ended with status 1")
            launched(command, arguments)

        monkeypatch.setattr(check, "launch", fail)
        done = run(rows, "row=all", expect=1)
        assert "dsh-tiny: reproduced" in done.stderr
        assert "dsh-longer: gap: `simsearch train ...` ended with status 1" in done.stderr

    def test_a_row_that_expects_what_is_not_measured_leaves_the_other_rows(self, rows, launched):
        rows.write_text(BOOK.replace("{mAP: 0.5 ± 0.05}", "{maP: 0.5 ± 0.05}"), encoding="utf-8")
        done = run(rows, "row=all", expect=1)
        assert "dsh-tiny: gap: it expects maP of 'rendered-work', which has P@1, mAP, rerank/mAP" in done.stderr
        assert "rendered-style" in done.stdout

    def test_a_protocol_that_is_none_is_told_before_anything_is_trained(self, rows, launched):
        rows.write_text(rows.read_text().replace("rendered-style rerank", "rendered-stile rerank"), encoding="utf-8")
        done = run(rows, "row=all", expect=1)
        assert "rendered-stile" in done.stderr
        assert launched.lines == []

    def test_overrides_that_do_not_compose_are_told_before_anything_is_trained(self, rows, launched):
        rows.write_text(BOOK.replace("rerank=aqe", "rerank=nothing"), encoding="utf-8")
        assert "rerank/nothing" in run(rows, "row=all", expect=1).stderr
        assert launched.commands == []

    def test_brackets_are_shown_as_they_are(self, rows, launched, monkeypatch):
        def fail(command, arguments):
            raise check.Failed("weights [/w/x.pth] and [cifar10]")

        monkeypatch.setattr(check, "launch", fail)
        assert "[/w/x.pth] and [cifar10]" in " ".join(run(rows, "row=dsh-tiny", expect=1).stdout.split())

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
    def test_a_signal_waits_for_the_training_to_save(self, number, status, scontrol, monkeypatch):
        """A training that takes a while to save; Ctrl-C reaches it by the terminal."""
        program = scontrol / "python"
        program.write_text(
            f"#!{sys.executable}\n"
            "import os, pathlib, signal, sys, time\n"
            "def save(*_):\n"
            "    time.sleep(0.3)\n"
            f"    pathlib.Path({str(scontrol)!r}, 'saved').touch()\n"
            "    sys.exit(138)\n"
            f"signal.signal({int(number)}, save)\n"
            f"pathlib.Path({str(scontrol)!r}, 'asks').write_text(os.environ.get('SIMSEARCH_PARENT_ASKS', ''))\n"
            f"pathlib.Path({str(scontrol)!r}, 'ready').write_text(str(os.getpid()))\n"
            "time.sleep(600)\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(check.sys, "executable", str(program))

        def tell() -> None:
            while not (ready := scontrol / "ready").exists() or not ready.read_text():
                time.sleep(0.01)
            if number == signal.SIGINT:
                os.kill(int(ready.read_text()), number)
            os.kill(os.getpid(), number)

        threading.Thread(target=tell).start()
        with pytest.raises(SystemExit) as error:
            check.launch("train", [])
        assert error.value.code == status
        assert (scontrol / "saved").exists()
        assert (scontrol / "asks").read_text() == "1"
        assert (scontrol / "asked").exists() == (number == signal.SIGUSR1)

    def test_a_bad_exit_status_is_reported_with_its_command(self, capfd):
        with pytest.raises(check.Failed, match=r"`simsearch trian seed=1` ended with status 2"):
            check.launch("trian", ["seed=1"])
        assert "no command 'trian'" in capfd.readouterr().err


class TestNotRunnable:
    @pytest.mark.parametrize(
        ("overrides", "missing"),
        [
            ("data=cifar10 protocol=10k-50k data.root=/nowhere", "no CIFAR-10 in /nowhere"),
            ("model=hashing loss=greedyhash backbone.weights=/nowhere.pth", "no weights at /nowhere.pth"),
            ("trainer.accelerator=gpu", "an accelerator is missing"),
        ],
    )
    def test_what_is_missing_is_named(self, rows, launched, monkeypatch, overrides, missing):
        monkeypatch.setattr(check.torch.cuda, "is_available", lambda: False)
        train = TINY if "cifar10" not in overrides else "experiment=dsh"
        if "hashing" in overrides:
            train = "data=rendered data.styles=2 data.artists=2 data.works=4 data.photographs=2 data.size=32"
        content = (
            f"rows:\n  a:\n    what: w\n    train: {train} {overrides}\n    minutes: 1\n    expect:\n"
            "      rendered-work: {m: null}"
        )
        rows.write_text(content)
        done = run(rows, "row=a", expect=2)
        assert "a: not runnable here: " in done.stderr
        assert missing in done.stderr
        assert launched.lines == []

    def test_other_data_are_not_compared(self, rows, launched):
        rows.write_text("fingerprints: {rendered-work: 1234567890abcdef}\n" + rows.read_text())
        done = run(rows, "row=dsh-tiny", expect=2)
        assert "but 1234567890abcdef in the study" in done.stderr
        assert launched.lines == []

    @pytest.mark.slow
    def test_runs_on_other_data_lie_beside_those_on_the_rows_data(self, rows, launched):
        """The same config on two forms of the images: each study finds its own run in the folder that they share."""
        plain = rows.read_text().partition("  dsh-longer")[0]
        run(rows, "row=dsh-tiny")
        with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
            here = configs.build_data(compose(tuple(TINY.split()))).task("test").fingerprint
        launched.fingerprint, launched.values["mAP"] = here, 0.54
        for fingerprint, value in ((here, "0.5400"), ("0" * 16, "0.5000"), (here, "0.5400")):
            rows.write_text(f"fingerprints: {{rendered-work: '{fingerprint}'}}\n{plain}")
            assert value in run(rows, "row=dsh-tiny").stdout
        assert launched.commands == ["train", "train"]
        rows.write_text(f"fingerprints: {{rendered-work: '{here}'}}\n{plain}".replace("dsh-tiny", "other-name"))
        assert "0.5400" in run(rows, "row=other-name").stdout
        assert launched.commands == ["train", "train"]

    @pytest.mark.slow
    def test_a_budget_counts_what_is_still_to_train(self, rows, launched):
        assert "about 15 minutes" in run(rows, "row=dsh-longer", "budget=14", expect=2).stderr
        run(rows, "row=dsh-tiny", "budget=14")
        run(rows, "row=dsh-longer", "budget=14", expect=1)
        assert launched.commands == ["train", "train", "evaluate"]


class TestList:
    def test_rows_with_cost_and_what_is_finished(self, rows, launched):
        run(rows, "row=dsh-tiny")
        out = " ".join(run(rows, "list=true").stdout.replace("│", " ").split())
        assert "dsh-tiny a tiny network rendered-work mAP 0.5000 ± 0.05 10 0,1 0" in out
        assert "5 0 -" in out

    def test_a_row_must_be_named(self, rows):
        assert "which row? row=<name>; there are dsh-tiny, dsh-longer" in run(rows, expect=1).stderr
        assert "there is no row 'dsh'" in run(rows, "row=dsh", expect=1).stderr


class TestRows:
    @pytest.mark.parametrize(
        ("text", "value", "tolerance"),
        [("0.61 ± 0.01", 0.61, 0.01), (".5 +- 1e-3", 0.5, 0.001), ("-2±0", -2, 0), ("3 ± .5", 3, 0.5)],
    )
    def test_expected_values(self, text, value, tolerance):
        assert Expected.of(text) == Expected(value, tolerance)

    @pytest.mark.parametrize("text", ["0.61", "0.61 ± -0.1", "± 1", "a ± b", "0.6 ± 0.1 ± 0.1"])
    def test_what_is_no_expected_value(self, text):
        with pytest.raises(ValueError, match="not an expected value"):
            Expected.of(text)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("start: dsh-tiny", "start: dsh-none"), "starts from dsh-none, which is not a row"),
            (("start: dsh-tiny", "start: dsh-longer"), "starts from itself"),
            (("what: a tiny network", "wat: x"), "row dsh-tiny does not have what"),
            (("minutes: 10", "minutes: 10\n    budget: 3"), "unknown keys budget"),
            ((f"train: {TINY}\n", "train:\n"), "row dsh-tiny has train=None, which is not text"),
            (("minutes: 10", "minutes: ten"), "row dsh-tiny has minutes='ten', which is not a number"),
            (("seeds: [0, 1]", "seeds: 1"), "row dsh-tiny has seeds=1, which is not a list"),
            (("seeds: [0, 1]", "seeds: []"), "row dsh-tiny has seeds=\\[\\]: give whole numbers"),
            (("{mAP: 0.5 ± 0.05}", ""), "row dsh-tiny has expect=.*rendered-work.: None.*name a protocol"),
            (("{mAP: 0.5 ± 0.05}", "{mAP: 0.5}"), "not an expected value"),
            (("rows:", "rwos:"), "not a file of rows"),
            (("rows:", "rows: ["), "not a file of rows"),
        ],
    )
    def test_mistakes_are_named(self, rows, change, message):
        assert change[0] in rows.read_text()
        rows.write_text(rows.read_text().replace(*change))
        with pytest.raises(ValueError, match=message):
            read_rows([rows])

    def test_two_files_with_one_name(self, rows):
        with pytest.raises(ValueError, match="repeats rows of another file: dsh-tiny, dsh-longer"):
            read_rows([rows, rows])

    def test_a_missing_file_and_a_bad_override_end_in_one_line(self, rows, tmp_path):
        done = simsearch("reproduce", f"rows={tmp_path}/none.yaml", "row=a", expect=1)
        assert "none.yaml" in done.stderr
        rows.write_text(rows.read_text().replace("experiment=dsh", "experiment=none"))
        done = run(rows, "row=dsh-tiny", expect=1)
        assert "Could not find 'experiment/none'" in done.stderr
        assert "Traceback" not in done.stderr


def measured(difference: float, tolerance: float) -> Measured:
    return Measured("p", "mAP", (0.5 + difference,), Expected(0.5, tolerance))


def test_a_difference_of_just_the_tolerance_is_reproduced():
    assert [measured(d, 0.01).verdict for d in (0.01, -0.01, 0.0101, -0.0101)] == ["reproduced"] * 2 + ["gap"] * 2
    assert Measured("p", "m", (float("nan"),), Expected(0.5, 1)).verdict == "gap"
    assert Measured("p", "m", (0.5,), None).verdict == "gap"


def test_exit_status():
    outcomes = {v: check.Outcome("r", v) for v in (check.REPRODUCED, check.GAP, check.NOT_RUNNABLE)}
    good, gap, missing = outcomes.values()
    assert exit_status([good, good]) == 0
    assert exit_status([good, missing]) == 2
    assert exit_status([missing, gap, good]) == 1


class TestComparable:
    @pytest.fixture(autouse=True)
    def _hydra(self):
        with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
            yield

    def tiny(self, **changes: object) -> dict:
        """The tiny row's config with values changed by their dotted names."""
        config = OmegaConf.create(compose(tuple(shlex.split(TINY))))
        for key, value in changes.items():
            OmegaConf.update(config, key, value, force_add=True)
        return OmegaConf.to_container(config)

    def test_places_and_reports_do_not_count(self):
        changes = {"run_root": "/elsewhere", "data.num_workers": 2, "logger.project": "p", "catalog.write": False}
        changes |= {"trainer.log_every_n_steps": 7, "callbacks.progress": None, "callbacks.throughput": None}
        changes |= {"protocol.unit": "work"}  # of intervals, not of values
        assert deciding(self.tiny(**changes)) == deciding(self.tiny())

    @pytest.mark.parametrize(
        ("key", "value"),
        [("seed", 1), ("model.optimizer.lr", 2e-4), ("model.network.bits", 12), ("data.works", 5), ("protocol.seed", 1),
         ("model.loss.weight", 0.1), ("data.sampler.batch_size", 4), ("trainer.precision", "bf16-mixed"),
         ("callbacks.evaluation.ks", [1]), ("callbacks.evaluation.index.factory", "BHNSW16"),
         ("callbacks.ema", {"_target_": "x.Y"}), ("callbacks.checkpoint.monitor", "val/mAP"),
         ("model.start", "/some/where"), ("trainer.accumulate_grad_batches", 2),
         ("model.cache", {"_target_": "simsearch.cache.ArrayCache", "root": "/a"})],
    )  # fmt: skip
    def test_what_decides_the_numbers_counts(self, key, value):
        assert deciding(self.tiny(**{key: value})) != deciding(self.tiny())

    def test_where_a_cache_lies_does_not_count(self):
        a, b = ({"_target_": "simsearch.cache.ArrayCache", "root": root} for root in ("/a", "/b"))
        assert deciding(self.tiny(**{"model.cache": a})) == deciding(self.tiny(**{"model.cache": b}))

    def test_a_config_from_before_an_option_came_equals_one_at_its_default(self):
        older = self.tiny()
        del older["model"]["head_lr"], older["model"]["start"], older["data"]["eval_batch_size"]
        assert deciding(older) == deciding(self.tiny())
        assert deciding(older) != deciding(self.tiny(**{"model.head_lr": 2.0}))

    def test_a_start_counts_by_its_config_not_by_its_place(self, tmp_path):
        for name, lr in (("a", 1), ("b", 1), ("c", 2)):
            (tmp_path / name).mkdir()
            config = self.tiny(**{"model.optimizer.lr": lr})
            OmegaConf.save(OmegaConf.create(config), tmp_path / name / "config.yaml")
            (tmp_path / name / "run.json").write_text("{}")
        a, b, c = (deciding(self.tiny(**{"model.start": str(tmp_path / name)})) for name in "abc")
        assert a == b != c
        assert deciding(self.tiny(**{"model.start": f"{tmp_path}/a/checkpoints/best.ckpt"})) == a


def row_files_or_none() -> list[Path]:
    try:
        return row_files(None)
    except ValueError:
        return []


@pytest.mark.parametrize("path", row_files_or_none(), ids=lambda p: p.parent.name)
def test_the_rows_of_each_study_compose(path):
    book = read_rows([path])
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        for name, row in book.items():
            start = Path("some/run") if row.start else None
            config = compose(train_overrides(book, name, row.seeds[0], start))
            assert config["seed"] == row.seeds[0]
            assert (config["model"].get("start") is not None) == (row.start is not None)
