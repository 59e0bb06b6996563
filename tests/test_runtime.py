"""Configs to objects, run directories, checkpoints from strangers."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console

from simsearch import configs, program, results, run_directory, terminal
from simsearch.data.datamodule import RenderedDataModule
from simsearch.data.protocols import ByAttribute
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.encoder import build_encoder
from simsearch.models.frozen import FrozenRetriever
from simsearch.saved_run import Run, load_model, open_run

PROTOCOL = {
    "_target_": "simsearch.data.protocols.ByAttribute", "name": "p", "attribute": "artist", "junk": "work",
    "group": "work", "evaluation": 0.5, "validation": 0.3, "seed": 0,
}  # fmt: skip
DATA = {
    "_target_": "simsearch.data.datamodule.RenderedDataModule", "styles": 2, "artists": 2, "works": 6,
    "photographs": 2, "size": 24,
}  # fmt: skip


class TestObjects:
    def test_plain_resolves_and_leaves_hydra_out(self):
        config = OmegaConf.create({"a": 1, "b": {"c": "${a}", "d": ["${a}", 2]}, "hydra": {"job": 0}})
        values = configs.plain(config)
        assert values == {"a": 1, "b": {"c": 1, "d": [1, 2]}}
        assert type(values["b"]["d"]) is list
        with pytest.raises(MissingMandatoryValue, match="missing"):
            configs.plain(OmegaConf.create({"a": {"missing": "???"}}))

    def test_build_gives_plain_lists_and_dictionaries(self):
        built = configs.build({"_target_": "types.SimpleNamespace", "a": [1, {"b": 2}]})
        assert type(built.a) is list
        assert type(built.a[1]) is dict

    def test_data_get_their_protocol_as_an_object(self):
        data = configs.build_data({"data": DATA, "protocol": PROTOCOL})
        assert isinstance(data, RenderedDataModule)
        assert isinstance(data.protocol, ByAttribute)
        assert data.task("test").name == "p"
        assert len(data.collection) == 48
        other = ByAttribute(**{k: v for k, v in PROTOCOL.items() if k != "_target_"} | {"name": "other"})
        data = configs.build_data({"data": DATA, "protocol": PROTOCOL}, other)
        assert data.protocol is other

    def test_trainer_takes_the_callbacks_that_are_there(self, tmp_path):
        early = {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "val/mAP"}
        config = {
            "trainer": {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "max_epochs": 7},
            "callbacks": {"a": early, "b": None},
        }
        logger = CSVLogger(tmp_path)
        trainer = configs.build_trainer(config, tmp_path, [logger])
        assert trainer.max_epochs == 7
        assert trainer.default_root_dir == str(tmp_path)
        assert trainer.loggers == [logger]
        assert [c.monitor for c in trainer.callbacks if isinstance(c, pl.callbacks.EarlyStopping)] == ["val/mAP"]

    def test_encoder_needs_neither_download_nor_cache(self):
        config = {"model": model_config("pretrained") | {"cache": {"_target_": "nowhere.Nothing"}}}
        before = json.dumps(config)
        encoder = build_encoder(config)
        assert json.dumps(config) == before
        assert isinstance(encoder, FrozenRetriever)
        assert encoder.cache is None
        assert not encoder.training

    def test_reasons_are_those_of_the_object_that_failed(self):
        bad = {"_target_": "types.SimpleNamespace", "whitening": whitening(0)}
        with pytest.raises(InstantiationException) as error:
            configs.build(bad)
        assert program.reason(error.value) == "whitening: whitening.dimension must be at least 1, got 0"
        assert program.reason(ValueError()) == "ValueError"


def whitening(dimension: int) -> dict[str, Any]:
    return {"_target_": "simsearch.models.frozen.Whitening", "dimension": dimension}


def model_config(weights: str) -> dict[str, Any]:
    return {
        "_target_": "simsearch.models.frozen.FrozenRetriever",
        "backbone": {
            "_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "weights": weights,
            "size": 32,
        },
        "pooling": {"_target_": "simsearch.models.pooling.GeM", "p": 3.0},
        "whitening": whitening(8),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run directory with a checkpoint of a fitted model."""
    weights = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = {"model": model_config(str(weights)), "seed": 3, "run_dir": str(folder)}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "run.json").write_text(json.dumps({"wandb_id": "abcd1234"}))
    run = open_run(folder)
    model = configs.build(run.config["model"])
    torch.nn.init.normal_(model.head.whitening.projection)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "checkpoints/best.ckpt")
    return run


class TestOpenRun:
    def test_gives_the_plain_config(self, run):
        assert run.config["model"] == model_config(run.config["model"]["backbone"]["weights"])
        assert run.config["seed"] == 3

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match=r"is not a run directory: it has no config.yaml"):
            open_run(tmp_path / "nowhere")

    @pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "a: ${b", "a: 1\na: 2", "a: &x [1]\nb: *x"])
    def test_damaged(self, text, tmp_path):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml is damaged"):
            open_run(tmp_path)


class _Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


class TestLoadModel:
    def test_gives_the_fitted_model(self, run):
        saved = torch.load(run.folder / "checkpoints/best.ckpt", weights_only=True)
        model = load_model(run)
        assert not model.training
        assert torch.equal(model.head.whitening.projection, saved["state_dict"]["head.whitening.projection"])
        weights = torch.load(run.config["model"]["backbone"]["weights"], weights_only=True)
        assert torch.equal(model.backbone.network.model.conv1[0].weight, weights["conv1.0.weight"])

    def test_missing(self, run):
        (run.folder / "checkpoints/best.ckpt").unlink()
        with pytest.raises(
            ValueError, match=r"no checkpoints/best.ckpt: its training did not finish. Continue it with"
        ):
            load_model(run)

    @pytest.mark.parametrize("kept", [0, 10, 3000, "words"])
    def test_damaged(self, kept, run):
        path = run.folder / "checkpoints/best.ckpt"
        path.write_bytes(b"words" if kept == "words" else path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"best.ckpt is damaged or holds other things than tensors"):
            load_model(run)

    @pytest.mark.parametrize("content", [{"epoch": 1}, {"state_dict": {}}, [1, 2], torch.zeros(3)])
    def test_another_kind_of_checkpoint(self, content, run):
        torch.save(content, run.folder / "checkpoints/best.ckpt")
        with pytest.raises(ValueError, match=r"best.ckpt does not fit the model in .*config.yaml"):
            load_model(run)

    def test_a_config_that_was_changed(self, run):
        run.config["model"]["whitening"]["dimension"] = 9
        with pytest.raises(ValueError, match=r"does not fit the model in .*config.yaml"):
            load_model(run)

    def test_code_is_refused_and_not_run(self, run, tmp_path):
        path, mark = run.folder / "checkpoints/best.ckpt", tmp_path / "was-run"
        checkpoint = torch.load(path, weights_only=True)
        torch.save({**checkpoint, "callbacks": _Code(mark)}, path)
        with pytest.raises(ValueError, match="holds other things than tensors"):
            load_model(run)
        assert not mark.exists()
        pickle.loads(pickle.dumps(_Code(mark)))
        assert mark.exists(), "the checkpoint holds no code after all"

    def test_other_backbone_weights(self, run):
        path = Path(run.config["model"]["backbone"]["weights"])
        torch.save(timm.create_model("test_resnet").state_dict(), path)
        with pytest.raises(ValueError, match=r"fitted on weights .* give backbone.weights the same ones"):
            load_model(run)


def hydra_s(monkeypatch: pytest.MonkeyPatch, folder: Path) -> DictConfig:
    """The config of a new run that Hydra gave this folder."""
    folder.mkdir(exist_ok=True)
    found = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(folder)), overrides=SimpleNamespace(task=[]))
    monkeypatch.setattr(run_directory.HydraConfig, "get", lambda: found)
    trainer = {"devices": "auto", "accelerator": "cpu"}
    return OmegaConf.create({"seed": 5, "run_dir": "elsewhere", "b": "${seed}", "resume": False, "trainer": trainer})


class TestStartRun:
    def test_a_new_run_describes_itself_and_is_seeded(self, monkeypatch, tmp_path):
        ids = set()
        for name in ("a", "b"):
            with run_directory.start_run(hydra_s(monkeypatch, tmp_path / name)) as run:
                drawn = torch.rand(1), np.random.rand()  # noqa: NPY002
            pl.seed_everything(5, verbose=False)
            assert drawn == (torch.rand(1), np.random.rand())  # noqa: NPY002
            assert run.folder == tmp_path / name
            assert run.config == {
                "seed": 5,
                "run_dir": str(tmp_path / name),
                "b": 5,
                "resume": False,
                "trainer": {"devices": 1, "accelerator": "cpu"},
            }
            assert open_run(run.folder).config == run.config
            assert run.trusted
            assert not open_run(run.folder).trusted
            about = json.loads((run.folder / "run.json").read_text())
            assert about["versions"]["torch"] == torch.__version__.split("+")[0]
            ids.add(about["wandb_id"])
        assert len(ids) == 2

    def test_resume_takes_the_config_of_the_folder(self, run, capsys, monkeypatch):
        monkeypatch.setattr(run_directory.HydraConfig, "initialized", lambda: False)  # an earlier command's
        before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
        with run_directory.start_run(
            OmegaConf.create({"resume": True, "run_dir": str(run.folder), "seed": 99})
        ) as resumed:
            drawn = torch.rand(1)
        assert (resumed.config, resumed.folder, resumed.resumed) == (run.config, run.folder, True)
        assert str(run.folder) in capsys.readouterr().err
        pl.seed_everything(3, verbose=False)
        assert drawn == torch.rand(1)
        after = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file() and p.name != ".training"}
        assert after == before

    def test_nothing_to_resume(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            config = OmegaConf.create({"resume": True, "run_dir": str(folder)})
            with pytest.raises(ValueError, match="is not a run directory"), run_directory.start_run(config):
                pass

    @pytest.mark.parametrize("text", ["{}", "", '{"wandb_id": "a", "sl'])
    def test_a_start_that_was_killed_before_its_config_is_no_run(self, text, monkeypatch, tmp_path):
        config = hydra_s(monkeypatch, tmp_path / "r")
        (tmp_path / "r" / "run.json").write_text(text)
        with run_directory.start_run(config) as run:
            assert not run.resumed
        assert open_run(run.folder).config["seed"] == 5

    def test_a_start_that_failed_leaves_its_folder_to_the_next(self, monkeypatch, tmp_path):
        for seed in (1, 2):
            config = hydra_s(monkeypatch, tmp_path / "r")
            config.seed = seed
            with run_directory.start_run(config) as run:
                assert not (run.folder / "metrics.csv").exists()
                (run.folder / "metrics.csv").write_text("val/mAP\n0.9\n")
            assert open_run(run.folder).config["seed"] == seed

    @pytest.mark.parametrize("work", ["metrics.json", "checkpoints/last.ckpt"])
    def test_a_run_that_has_something_to_lose_keeps_its_folder(self, work, monkeypatch, tmp_path):
        config = hydra_s(monkeypatch, tmp_path / "r")
        with run_directory.start_run(config) as run:
            (run.folder / work).parent.mkdir(exist_ok=True)
            (run.folder / work).touch()
        with (
            pytest.raises(ValueError, match=r"r already holds a run: continue it with resume=true"),
            run_directory.start_run(hydra_s(monkeypatch, tmp_path / "r")),
        ):
            pass

    @pytest.mark.parametrize("resume", [True, False])
    def test_one_process_at_a_time(self, resume, monkeypatch, tmp_path):
        monkeypatch.setattr(run_directory, "_WAIT_S", 0.1)
        with run_directory.start_run(hydra_s(monkeypatch, tmp_path / "r")) as run:
            second = hydra_s(monkeypatch, tmp_path / "r")
            second.resume, second.run_dir = resume, str(run.folder)
            instead = "$" if resume else ", or give another run_dir=$"
            with (
                pytest.raises(ValueError, match=r"another process works on .*r already: .* end it" + instead),
                run_directory.start_run(second),
            ):
                pass
        with run_directory.start_run(second):
            pass


@pytest.mark.parametrize("width", [80, 140])
def test_results_table_shows_values_and_intervals(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    metrics = {"mAP": 0.31781, "P@1": 0.5, "bytes_per_item": 64.0, "index/latency_ms_p50": 0.123}
    stage = {
        "protocol": "10k-50k", "fingerprint": "0123456789abcdef", "metrics": metrics,
        "intervals": {"mAP": [0.31, 0.32567], "P@1": [0.45, 0.55]}, "unit": "artist", "units": 45,
    }  # fmt: skip
    console = Console(width=width, file=io.StringIO())
    console.print(results.results_table({"test": stage, "other": stage}))
    text = console.file.getvalue().replace("│", " ")
    intervals = ["0.3100-0.3257", "0.4500-0.5500"] if width == 140 else ["0.3100-", "0.3257", "0.4500-", "0.5500"]
    for part in ("0.3178", *intervals, "0.5000", "10k-50k", "0123456789abcdef", "artist", " 45 ", " 64 ", "0.12"):
        assert part in text
    assert text.count("10k-50k") == 1  # stages that were not asked for stay out
    assert text.count(" - ") >= 2  # P@10 and R@10 were not measured


def test_results_table_has_a_row_for_what_was_asked_for(monkeypatch):
    metrics = {"mAP": 0.5, "bytes_per_item": 64.0, "index/latency_ms_p50": 0.1, "index/recall@10": 0.874}
    metrics |= {"rerank/mAP": 0.6, "rerank/P@1": None, "index/P@10": 0.4}
    stage = {"protocol": "p", "fingerprint": "0" * 16, "metrics": metrics, "unit": "artist", "units": 45}
    stage |= {"intervals": {"mAP": [0.4, 0.6], "rerank/mAP": [0.51, 0.69], "index/P@10": [0.3, 0.5]}}

    def shown(width: int, **asked) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        console = Console(width=width, file=io.StringIO())
        console.print(results.results_table({"test": stage}, **asked))
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        return "\n".join(lines)

    plain, index = shown(120), shown(120, also=("rerank", "index"))
    assert "re-ranked" in plain
    assert "0.5100-0.6900" in plain
    assert "by the index" not in plain
    for part in ("by the index", "0.4000", "0.3000-0.5000", "87.4% of the ten nearest"):
        assert part in index
    narrow = shown(80, also=("rerank", "index"))
    for number in ("0.5000", "0.4000-", "0.6000", "0.5100-", "0.6900", "64", "0.10"):
        assert number in narrow


@pytest.mark.parametrize(("columns", "width"), [(None, 120), ("80", 80), ("100", 100), ("wide", 120)])
def test_columns_decides_how_wide_output_is(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert terminal.console().width == width


def test_lines_of_results_say_what_their_intervals_are_over():
    metrics = {"mAP": 0.5, "GAP": 0.4, "queries": 9.0, "bytes_per_item": 64.0}
    stage = {"protocol": "art-artist", "fingerprint": "f" * 16, "metrics": metrics, "intervals": {"mAP": [0.4, 0.6]}}
    facts = {"row": "a", "data": "art", "seconds": 1.0, "seed": 0, "command": "x"}

    def over(about: dict) -> list[tuple]:
        lines = results.result_lines(about, ["mAP", "GAP"], **facts)
        named = [dict(zip(results.RESULT_COLUMNS, line, strict=True)) for line in lines]
        return [(line["ci_low"], line["unit"], line["units"]) for line in named]

    assert over(stage | {"unit": "artist", "units": 3}) == [(0.4, "artist", 3), ("", "", "")]
    assert over(stage) == [(0.4, "query", 9), ("", "", "")]  # of a time before units were named


def test_results_table_says_where_queries_find_themselves():
    metrics = {"bytes_per_item": 6.0, "index/latency_ms_p50": 0.1, "P@1": 0.9995, "queries": 10_000.0}
    stage = {"protocol": "dsh-release", "fingerprint": "0" * 16, "metrics": metrics, "intervals": {"P@1": [0.999, 1.0]}}
    note = "dsh-release: each query is in its own ranking: P@1 and R@k count it"
    for count, expected in ((10_000.0, 1), (0.0, 0), (None, 0)):  # None: measured before this was counted
        console = Console(width=140, file=io.StringIO())
        metrics["queries_in_own_ranking"] = count
        console.print(results.results_table({"test": stage}))
        assert console.file.getvalue().count(note) == expected


def test_a_text_with_commas_is_several_unless_it_is_known_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert configs.listed(None) == []
    assert configs.listed([1, "a,b", "c, d"]) == ["1", "a,b", "c, d"]
    assert configs.listed("a,b") == ["a,b"]
    assert configs.listed("c, d,e") == ["c", "d", "e"]
    assert configs.listed(7) == ["7"]
    assert configs.listed("Monet, 1890", {"Monet, 1890"}.__contains__) == ["Monet, 1890"]
    assert configs.listed("a,b", {"Monet, 1890"}.__contains__) == ["a", "b"]


def test_index_of_a_config_is_fresh_each_time():
    config = {"_target_": "simsearch.index.faiss_index.FaissIndex", "factory": "Flat"}
    first, second = configs.build(config), configs.build(config)
    assert isinstance(first, FaissIndex)
    first.add(torch.eye(4))
    assert len(second) == 0
