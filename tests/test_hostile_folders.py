"""Folders that somebody else made: whatever lies in them, nothing runs and nothing outside is touched."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from conftest import SMALL, simsearch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from simsearch import configs, saved_run, trust
from simsearch import worker as rank
from simsearch.identity import start_config
from simsearch.models.backbones import timm_backbone, torchvision_backbone
from simsearch.models.encoder import build_encoder
from simsearch.models.frozen import Whitening
from simsearch.search.catalog import read_catalog
from simsearch.studies.rows import read_rows

CONF = Path(configs.CONF)
OWN = "test_hostile_folders.OwnWhitening"


class OwnWhitening(Whitening):
    """What a user has in a module of their own."""


def payloads(marker: Path) -> dict[str, Any]:
    """Nodes that make `marker`, or would with a little more luck, when they are built."""
    path = str(marker)
    return {
        "own function": {
            "_target_": "simsearch.files.write_json", "path": {"_target_": "pathlib.Path", "_args_": [path]},
            "value": {"a": 1},
        },
        "through a module of ours": {
            "_target_": "simsearch.models.backbones.torch.hub.load", "repo_or_dir": path, "model": "x",
        },
        "class imported there": {"_target_": "simsearch.models.backbones.Path.touch", "_args_": [path]},
        "save": {"_target_": "numpy.save", "file": path, "arr": [1]},
        "torch": {"_target_": "torch.save", "obj": 1, "f": path},
        "unpickle": {"_target_": "torch.load", "f": path, "weights_only": False},
        "log": {"_target_": "logging.FileHandler", "filename": path},
        "text": {"_target_": "pathlib.Path.write_text", "self": path, "data": "x"},
        "system": {"_target_": "os.system", "command": f"touch {path}"},
        "through another module": {"_target_": "shutil.os.system", "command": f"touch {path}"},
        "process": {"_target_": "subprocess.run", "args": ["touch", path]},
        "eval": {"_target_": "builtins.eval", "_args_": [f"open({path!r}, 'w')"]},
        "exec": {"_target_": "builtins.exec", "_args_": [f"open({path!r}, 'w')"]},
        "import": {"_target_": "importlib.import_module", "name": "antigravity"},
        "partial": {
            "_target_": "functools.partial", "_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}],
        },
        "instantiate": {
            "_target_": "hydra.utils.instantiate", "config": {"_target_": "simsearch.files.write_json", "path": path},
        },
        "operator": {"_target_": "operator.methodcaller", "name": "touch"},
        "deferred": {"_target_": "simsearch.files.write_json", "_partial_": True, "path": path, "value": 1},
        "within what is allowed": {
            "_target_": "simsearch.models.pooling.GeM", "p": {"_target_": "simsearch.files.write_json", "path": path},
        },
        "positional": {"_target_": "simsearch.models.pooling.GeM", "_args_": [3.0]},
        "not built as it looks": {"_target_": "simsearch.models.pooling.MAC", "_recursive_": False, "x": [{}]},
        "no name": {"_target_": ["os.system"]},
        "nothing": {"_target_": None},
        "like one of ours": {"_target_": "simsearch.models.pooling.MAC.__init__.__globals__"},
        "space": {"_target_": " simsearch.models.pooling.MAC"},
        "environment": "${oc.env:HOME}",
        "resolver": "${network_of:/tmp}",
        "inside a text": "a ${oc.env:HOME} b",
    }  # fmt: skip


PLACES = (
    *("model", "model.network", "model.network.backbone", "model.network.pooling.levels", "model.encoders.x"),
    *("model.optimizer", "model.scheduler", "model.loss", "model.cache", "model.head_lr", "optimizer", "scheduler"),
    *("protocol", "protocol.name", "index", "index.factory", "data", "data.sampler", "data.augment", "data.root"),
    *("callbacks.x", "callbacks.evaluation", "callbacks.evaluation.index", "callbacks.evaluation.ks", "callbacks"),
    *("trainer", "trainer.strategy", "trainer.devices.0", "trainer.precision", "logger", "logger.x", "logger.tags.0"),
    *("rerank", "loss", "sampler", "backbone", "pooling", "catalog.write", "seed", "objective.0", "a.b.0.c.1.d", "_x"),
)


def put(config: dict[str, Any], place: str, value: object) -> str:
    """Puts a value into a config, in the place of whatever is there; the place as a message names it."""
    node: Any = config
    *parents, last = place.split(".")
    for name in parents:
        if isinstance(node, list):
            node.extend({} for _ in range(int(name) + 1 - len(node)))
            node = node[int(name)]
            continue
        if not isinstance(node.get(name), dict | list):
            node[name] = {}
        following = (*parents, last)[parents.index(name) + 1]
        if following.isdigit() and not isinstance(node[name], list):
            node[name] = []
        node = node[name]
    if isinstance(node, list):
        node.extend({} for _ in range(int(last) + 1 - len(node)))
        node[int(last)] = value
    else:
        node[last] = value
    return re.sub(r"\.(\d+)", r"[\1]", place)


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The config of a run that has something at nearly every place."""
    GlobalHydra.instance().clear()
    overrides = ["model=dir", "experiment=dir-lite0", "rerank=aqe", "run_dir=x"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return configs.plain(hydra.compose("train", overrides))


@pytest.fixture
def marker(tmp_path):
    """A file that is not to be made."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def without_digests(path: Path) -> dict[str, Any]:
    """What a JSON file holds, without what would tell that it was changed: a stranger computes that anew."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in ("checksum", "sha256")}


def hostile_run(source: Path, folder: Path, place: str, value: object) -> tuple[Path, str]:
    """A copy of a run with something in its config, and how the message names the place."""
    shutil.copytree(source, folder, symlinks=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    name = put(config, place, value)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps(without_digests(folder / "run.json")))
    return folder, name


# ------------------------------------------------------------------------------------------ the table


def conf_targets() -> set[str]:
    found = set()
    for path in CONF.rglob("*.yaml"):
        if path.relative_to(CONF).parts[0] == "hydra":  # launchers and sweepers, which are no part of a run's config
            continue
        found |= {str(target) for _, target in trust.targets(yaml.safe_load(path.read_text()))}
    return found


def test_the_table_is_what_the_configs_of_a_run_name():
    never_in_a_run = {"simsearch.sweeps.callback.Sweep", "simsearch.serving.limits.Limits"}
    assert conf_targets() - never_in_a_run == trust.ALLOWED


@pytest.mark.parametrize("target", sorted(trust.ALLOWED))
def test_an_entry_of_the_table_is_a_class_or_function_defined_there(target):
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert callable(found)
    assert found.__name__ == name
    if module.startswith("simsearch"):
        assert found.__module__ == module
    else:  # libraries name their classes one room above where they define them
        assert found.__module__.split(".")[0] == module.split(".")[0]


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("place", PLACES)
def test_nothing_of_a_hostile_config_is_built(place, composed, marker, tmp_path):
    for name, payload in payloads(marker).items():
        config = json.loads(json.dumps(composed))
        at = put(config, place, payload)
        with pytest.raises(trust.Untrusted, match="trust=true") as error:
            saved_run.admitted(config, "config.yaml")
        message = str(error.value)
        assert at in message, (name, message)
        assert "\n" not in message
        strange = [target for _, target in trust.targets(payload) if str(target) not in trust.ALLOWED]
        assert not strange or repr(strange[0]) in message, (name, message)
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")  # of the last: to read a file takes its time
    with pytest.raises(trust.Untrusted, match=re.escape(at)):
        saved_run.open_run(tmp_path)


def test_the_payloads_would_do_it(tmp_path):
    """They run as soon as somebody builds them: so the tests above see something."""
    done = []
    for name, node in payloads(tmp_path / "marker").items():
        if isinstance(node, dict) and "_partial_" not in node:
            try:
                configs.build(node)
            except Exception:  # Hydra's own block list, or arguments that do not fit
                continue
            finally:
                if (tmp_path / "marker").exists():
                    done.append(name)
                    (tmp_path / "marker").unlink()
    assert {"own function", "torch", "log"} <= set(done)


def test_the_config_itself_is_fine(composed, tmp_path):
    OmegaConf.save(OmegaConf.create(composed), tmp_path / "config.yaml")
    assert saved_run.open_run(tmp_path).config["model"] == composed["model"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("trainer.default_root_dir", "/tmp"), ("trainer.logger", True), ("trainer.plugins", ["x"]),
        ("trainer.model_registry", "somebody/model"), ("callbacks.checkpoint.dirpath", "/tmp"),
        ("callbacks.checkpoint.filename", "../../x"), ("callbacks.checkpoint.filename", "a/b"),
    ],
)  # fmt: skip
def test_what_is_allowed_writes_into_the_run_alone(place, value, composed, tmp_path):
    config = json.loads(json.dumps(composed))
    put(config, place, value)
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    with pytest.raises(trust.Untrusted, match=re.escape(place)):
        saved_run.open_run(tmp_path)
    assert saved_run.open_run(tmp_path, trusted=True).trusted


def test_a_stranger_chooses_no_cache_and_no_download(composed, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSEARCH_CACHE", "/mine")
    config = json.loads(json.dumps(composed))
    cache = {"_target_": "simsearch.cache.ArrayCache", "root": "/theirs"}
    config["model"]["cache"] = cache
    config["data"] |= {"cache": "/theirs", "download": True, "root": "/data"}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    run = saved_run.open_run(tmp_path)
    assert run.config["model"]["cache"] == cache | {"root": "/mine/features"}
    assert {name: run.config["data"][name] for name in ("cache", "download", "root")} == {
        "cache": "/mine/images", "download": False, "root": "/data",
    }  # fmt: skip
    trusted = saved_run.open_run(tmp_path, trusted=True).config
    assert trusted["model"]["cache"] == cache
    assert trusted["data"]["download"]


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {marker}']", "a: !!python/object/new:os.system ['touch {marker}']",
        "a: !!python/name:os.system", "a: !!python/module:os", "a: !!python/object/apply:pathlib.Path ['{marker}']",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "a: !!binary aGk=",
    ],
)  # fmt: skip
def test_yaml_makes_plain_values_only(text, marker, tmp_path):
    (tmp_path / "config.yaml").write_text(text.format(marker=marker))
    with pytest.raises(ValueError, match=r"config\.yaml"):
        saved_run.open_run(tmp_path)
    (tmp_path / "rows.yaml").write_text(text.format(marker=marker))
    with pytest.raises(ValueError, match=r"rows\.yaml"):
        read_rows([tmp_path / "rows.yaml"])


def test_as_deep_as_it_likes(tmp_path):
    (tmp_path / "config.yaml").write_text("a: " + "[" * 1000 + "]" * 1000)
    with pytest.raises(ValueError, match="damaged"):
        saved_run.open_run(tmp_path)


def test_a_message_is_one_line_that_a_terminal_prints(tmp_path):
    with pytest.raises(trust.Untrusted) as error:
        trust.check_config({"\x1b[2J\n": {"_target_": "a\x1b[2J\nb" * 99}}, "here")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "name", ["hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp/x", "resnet18/../x", "resnet18.hf-hub:a/b"]
)
def test_a_backbone_is_a_name_of_its_library(name):
    with pytest.raises(ValueError, match=r"(no|Unknown) .*model"):
        timm_backbone(name, weights="random")
    with pytest.raises(ValueError, match=r"(no|Unknown) .*model"):
        torchvision_backbone(name, weights="random")
    with pytest.raises(ValueError, match=r"(no|Unknown) .*model"):
        torchvision_backbone("list_models", weights="random")


# ----------------------------------------------------------------------------------------- every command

NODE = "simsearch.files.write_json"
OF_RUNS = {
    "evaluate": ("evaluate", "run={run}"),
    "extract": ("extract", "run={run}", "images={run}/figures/queries", "out={out}"),
    "index": ("index", "run={run}", "images={run}/figures/queries", "out={out}"),
    "instance": ("instance", "run={run}", "gnd=gnd.json", "images={run}/figures/queries"),
    "data audit": ("data", "audit", "run={run}"),
    "assess": ("assess", "runs=[{run}]", "out={out}"),
    "train resume": ("train", "resume=true", "run_dir={run}"),
    "train from a network": ("train", "model=art-trained", "model.encoders.content.start={run}", "run_dir={out}"),
}
OF_CATALOGS = {
    "search": ("search", "catalog={catalog}", "image={run}/figures/queries/00.png"),
    "recommend": ("recommend", "catalog={catalog}", "image={run}/figures/queries/00.png"),
    "calibrate": ("calibrate", "catalog={catalog}", "outside={run}/figures/queries", "workers=0"),
    "export": ("export", "catalog={catalog}", "out={out}"),
    "serve": ("serve", "catalog={catalog}", "port=0"),
}


@pytest.mark.parametrize("place", ["model.pooling", "callbacks.x"])
@pytest.mark.parametrize("command", OF_RUNS)
def test_commands_on_runs(command, place, small_run, marker, tmp_path):
    run, at = hostile_run(small_run, tmp_path / "run", place, payloads(marker)["own function"])
    before = set(tmp_path.rglob("*"))
    arguments = [text.format(run=run, out=tmp_path / "out") for text in OF_RUNS[command]]
    done = simsearch(*arguments, cwd=tmp_path, expect=1)
    assert f"{at}._target_ wants to call '{NODE}'" in done.stderr
    assert "trust=true" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert {path for path in tmp_path.rglob("*") if tmp_path / "out" not in (path, *path.parents)} == before


@pytest.mark.parametrize("command", OF_CATALOGS)
def test_commands_on_catalogs(command, small_run, marker, tmp_path):
    catalog = tmp_path / "catalog"
    shutil.copytree(small_run / "catalog", catalog)
    about = without_digests(catalog / "catalog.json")
    about["config"]["model"]["pooling"] = payloads(marker)["own function"]
    (catalog / "catalog.json").write_text(json.dumps(about))
    arguments = [t.format(catalog=catalog, run=small_run, out=tmp_path / "out") for t in OF_CATALOGS[command]]
    done = simsearch(*arguments, cwd=tmp_path, expect=1)
    assert f"model.pooling._target_ wants to call '{NODE}'" in done.stderr
    assert "trust=true" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_config_of_a_catalog_builds_encoders_alone(small_run):
    config = read_catalog(small_run / "catalog").about["config"]
    for target in sorted(trust.ALLOWED - trust.ENCODERS):
        node = json.loads(json.dumps(config))
        node["model"]["pooling"] = {"_target_": target}
        with pytest.raises(trust.Untrusted, match=target):
            build_encoder(node)


def test_index_of_shards(small_run, marker, tmp_path):
    shards = tmp_path / "shards"
    simsearch("extract", f"run={small_run}", f"images={small_run / 'figures/queries'}", f"out={shards}", "workers=0")
    about = without_digests(shards / "plan/plan.json")
    about["config"]["model"]["pooling"] = payloads(marker)["own function"]
    (shards / "plan/plan.json").write_text(json.dumps(about))
    done = simsearch("index", f"shards={shards}", expect=1)
    assert f"model.pooling._target_ wants to call '{NODE}'" in done.stderr


def test_compare_lists_but_builds_nothing(small_run, marker, tmp_path):
    run, _ = hostile_run(small_run, tmp_path / "run", "data", payloads(marker)["own function"])
    done = simsearch("compare", f"runs=[{run},{small_run}]", f"out={tmp_path / 'out'}", "force=true")
    assert "data._target_ wants to call" in done.stderr
    assert "trust=true" in done.stderr


@pytest.mark.parametrize("others", [0, 1])
def test_a_run_that_starts_from_itself_is_named(others, tmp_path):
    """Directly, or through another run."""
    folders = [tmp_path / str(i) for i in range(others + 1)]
    for folder, before in zip(folders, [*folders[1:], folders[0]], strict=True):
        folder.mkdir()
        OmegaConf.save(OmegaConf.create({"model": {"start": str(before)}}), folder / "config.yaml")
    with pytest.raises(ValueError, match=f"{folders[0]} starts from itself"):
        start_config({"model": {"start": str(folders[0])}})


def test_a_checkpoint_beside_another_program_s_config_is_of_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {lr: 1}\n")
    (tmp_path / "checkpoints").mkdir()
    start = {"model": {"start": str(tmp_path / "checkpoints" / "best.ckpt")}}
    assert start_config(start) is None
    (tmp_path / "run.json").write_text("{}")
    assert start_config(start) == {"trainer": {"lr": 1}, "run_dir": str(tmp_path)}


def test_a_digest_imports_no_module_that_a_config_names(small_run, tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\ndef f(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run, _ = hostile_run(small_run, tmp_path / "run", "model.pooling", {"_target_": "hostile_module.f"})
    simsearch("compare", f"runs=[{run},{small_run}]", f"out={tmp_path / 'out'}", "force=true")
    assert not (tmp_path / "marker").exists()


def test_progress_reads_numbers(tmp_path):
    trial = tmp_path / "sweep/one"
    trial.mkdir(parents=True)
    (tmp_path / "sweep/sweep.json").write_text('{"planned": 1}')
    about = {"state": "finished", "overrides": [], "values": None, "error": "", "started": 0, "ended": 1, "host": "x"}
    (trial / "trial.json").write_text(json.dumps(about))
    (trial / "metrics.csv").write_text("step\n1\n")
    (trial / "config.yaml").write_text("trainer:\n  max_steps: 7\n  x: ${oc.env:NOWHERE_TO_BE_FOUND}\n")
    assert "1/7" in simsearch("progress", f"folder={tmp_path / 'sweep'}", "watch=0").stdout


def test_a_rank_that_is_started_by_hand(small_run, marker, tmp_path, monkeypatch):
    run, at = hostile_run(small_run, tmp_path / "run", "callbacks.x", payloads(marker)["own function"])
    monkeypatch.setattr("sys.argv", ["rank", str(run)])
    with pytest.raises(trust.Untrusted, match=at):
        rank.main()


# ------------------------------------------------------------------------------------------------- rows

ROW = {
    "what": "x",
    "train": "model=frozen backbone.weights=random",
    "minutes": 1,
    "expect": {"rendered-artist": {"mAP": None}},
}


@pytest.mark.parametrize(
    "text",
    [
        "+x=${oc.env:HOME}", "hydra.run.dir=/tmp/x", "+hydra.callbacks.x._target_=a.b", "hydra/launcher=joblib",
        "--config-dir=/tmp", "-m", "trust=true", "++trust=true", "run_dir=/tmp/x", "run_root=/tmp/x", "resume=true",
        "hydra.searchpath=[file:///tmp]", "pooling@hydra.x=mac", "~hydra.job", "+run=/tmp", "override hydra/launcher=x",
    ],
)  # fmt: skip
def test_an_override_of_a_stranger_is_a_value_of_the_config(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        configs.check_overrides(["seed=1", text], "row")


@pytest.mark.parametrize(
    ("train", "told", "more"),
    [
        ("+callbacks.x._target_=simsearch.files.write_json", NODE, []),
        ("'model.pooling={_target_: simsearch.files.write_json}'", NODE, ["list=true"]),
        ("hydra.run.dir=/tmp/x", "hydra.run.dir", []),
        ("model.cache.root=/tmp/x", "cache", []),
        ("data=cifar10 data.download=true", "download", []),
    ],
)
def test_a_row_of_a_stranger(train, told, more, tmp_path):
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"rows": {"bad": ROW | {"train": f"{ROW['train']} {train}"}}}))
    arguments = ("reproduce", "row=bad", f"rows={tmp_path / 'rows.yaml'}", f"run_root={tmp_path / 'runs'}")
    done = simsearch(*arguments, *more, expect=1)
    assert told in done.stderr
    assert "trust=true" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("more", ["+index._target_={NODE}", "trust=true"])
def test_a_measurement_of_a_stranger(more, tmp_path):
    expect = {f"rendered-artist {more.format(NODE=NODE)}": {"mAP": None}}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"rows": {"bad": ROW | {"expect": expect}}}))
    arguments = ("reproduce", "row=bad", f"rows={tmp_path / 'rows.yaml'}", f"run_root={tmp_path / 'runs'}")
    done = simsearch(*arguments, expect=1)
    assert "trust=true" in done.stderr
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize(
    "name", ["config.yaml", "checkpoints", "checkpoints/best.ckpt", "evaluations", "catalog/index"]
)
def test_a_link_out_of_a_run(name, small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run, symlinks=True)
    outside = tmp_path / "outside"
    if (run / name).exists():
        shutil.move(run / name, outside)
    else:
        outside.mkdir()
    (run / name).symlink_to(outside)
    with pytest.raises(trust.Untrusted, match=f"{name} is a link .*trust=true"):
        saved_run.open_run(run)
    assert saved_run.open_run(run, trusted=True).trusted


def test_a_link_out_of_what_the_command_line_says_itself(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run, symlinks=True)
    own = saved_run.read_config(run / "config.yaml")
    assert saved_run.open_run(run, own=own).trusted
    (run / "figures" / "out").symlink_to("/tmp")
    with pytest.raises(trust.Untrusted, match="figures/out is a link"):
        saved_run.open_run(run, own=own)
    assert "figures/out is a link" in simsearch("compare", f"runs={run}", f"out={tmp_path / 'out'}", expect=1).stderr


def test_a_link_inside_and_those_of_wandb(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run, symlinks=True)
    (run / "checkpoints/newest.ckpt").symlink_to("best.ckpt")
    (run / "wandb" / "logs").symlink_to("/tmp")
    (tmp_path / "renamed").symlink_to(run)
    assert saved_run.open_run(tmp_path / "renamed").config["seed"] == 0
    shutil.rmtree(run / "wandb")
    (run / "wandb").symlink_to("/tmp")
    with pytest.raises(trust.Untrusted, match="wandb is a link"):
        saved_run.open_run(run)


@pytest.mark.parametrize("name", ["catalog.json", "segments", "segments/1/index/index.faiss", "encoder.safetensors"])
def test_a_link_out_of_a_catalog(name, small_run, tmp_path):
    catalog = tmp_path / "catalog"
    shutil.copytree(small_run / "catalog", catalog)
    shutil.move(catalog / name, tmp_path / "outside")
    (catalog / name).symlink_to(tmp_path / "outside")
    with pytest.raises(trust.Untrusted, match=f"{name} is a link .*trust=true"):
        read_catalog(catalog)
    assert len(read_catalog(catalog, trusted=True)) > 0


def test_folders_that_vanish_meanwhile_hide_no_link(tmp_path, monkeypatch):
    """As those of segments do when another process merges them."""
    listed = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).parent.name == "segments":
            os.rmdir(path)
        return listed(path)

    for name in ("segments/1", "segments/2", "later"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", scandir)
    trust.check_links(tmp_path)
    assert not os.listdir(tmp_path / "segments")
    (tmp_path / "segments" / "3").mkdir()
    (tmp_path / "later" / "out").symlink_to("/tmp")
    with pytest.raises(trust.Untrusted, match="later/out is a link"):
        trust.check_links(tmp_path)


# ------------------------------------------------------------------------------------- checkpoints resume


@pytest.mark.slow
def test_a_checkpoint_deletes_nothing_outside(small_run, tmp_path):
    """Lightning deletes the best file so far, which a checkpoint names, when the next is saved."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "letters").write_text("dear")
    run = tmp_path / "run"
    shutil.copytree(small_run, run, symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["max_epochs"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "run.json").write_text(json.dumps(without_digests(run / "run.json")))
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for key, state in checkpoint["callbacks"].items():
        if key.startswith("ModelCheckpoint"):
            state["best_model_path"] = f"local://{victim}"
            state["best_k_models"] = {f"local://{victim}": torch.tensor(-1.0)}
            state["kth_best_model_path"] = f"local://{victim}"
            state["dirpath"] = str(run / "checkpoints")
    torch.save(checkpoint, path)
    simsearch("train", "resume=true", f"run_dir={run}")
    assert (victim / "letters").read_text() == "dear"


# --------------------------------------------------------------------------------- a user's own class


class TestOwnClass:
    """Who composes a config may name whatever they like; who opens a folder says that they trust it."""

    @pytest.fixture(scope="class")
    def command(self, tmp_path_factory) -> list[str]:
        run = tmp_path_factory.mktemp("own") / "run"
        return ["train", *SMALL, f"model.whitening._target_={OWN}", "logger.mode=disabled", f"run_dir={run}"]

    @pytest.fixture(scope="class")
    def run(self, command) -> Path:
        simsearch(*command)
        return Path(command[-1].partition("=")[2])

    def test_is_refused_in_a_folder_and_taken_with_trust(self, run, tmp_path):
        for arguments in (
            ("evaluate", f"run={run}", f"run_dir={tmp_path / 'e'}"),
            ("index", f"run={run}", f"images={run / 'figures/queries'}", f"out={tmp_path / 'c'}", "workers=0"),
            ("search", f"catalog={run / 'catalog'}", f"image={run / 'figures/queries/00.png'}"),
        ):
            assert OWN in simsearch(*arguments, expect=1).stderr
            simsearch(*arguments, "trust=true")
        assert "trust" not in yaml.safe_load((run / "config.yaml").read_text())

    @pytest.mark.slow
    def test_the_same_command_goes_on_without(self, command, run):
        assert OWN in simsearch("train", "resume=true", f"run_dir={run}", expect=1).stderr
        assert OWN in simsearch(*command, "seed=1", "resume=true", expect=1).stderr
        simsearch(*command, "resume=true")
        simsearch("train", "resume=true", f"run_dir={run}", "trust=true")

    def test_trust_is_true_or_false(self, run):
        assert "it must be true or false" in simsearch("evaluate", f"run={run}", "trust=perhaps", expect=1).stderr
