"""Every yaml composes, and everything that needs no hardware and no download is built."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
import pytorch_lightning as pl
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Checkpoint

from simsearch import configs, tracking, trust
from simsearch.callbacks.training import Throughput

CONF = Path(configs.CONF)
PRIMARY = sorted(p.stem for p in CONF.glob("*.yaml"))
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra")
OPTIONS = [(g, p.stem) for g in GROUPS for p in sorted((CONF / g).glob("*.yaml"))]
NEEDS_A_NAME = {
    "torchvision": ["backbone.name=resnet18"],
    "timm": ["backbone.name=resnet10t"],
    "onnx": ["backbone.weights=random", "backbone.channels=512"],
    "milvus": ["store.uri=u"],
    "pgvector": ["store.uri=u"],
    "factory": ["index.factory=Flat"],
    "files": ["data.source=images"],
    "art": ["data.source=images"],
    "art-targets": ["data.source=images"],
}


@pytest.fixture(autouse=True)
def _hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def compose(*overrides: str, name: str = "train") -> dict:
    config = hydra.compose(name, ["run_dir=unused", *overrides] if name == "train" else list(overrides))
    values = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in values.items()}


def test_there_are_configs():
    commands = {
        "art",
        "train",
        "evaluate",
        "compare",
        "extract",
        "index",
        "progress",
        "search",
        "instance",
        "photographs",
        "reproduce",
        "catalog_add",
        "catalog_remove",
        "catalog_push",
        "catalog_compact",
        "catalog_export",
        "catalog_info",
        "catalog_verify",
        "catalog_migrate",
        "data_audit",
        "data_export",
        "data_convert",
        "data_ingest",
        "recommend",
        "calibrate",
        "serve",
        "assess",
        "export",
    }
    assert commands == set(PRIMARY)
    assert {
        "data",
        "model",
        "backbone",
        "pooling",
        "index",
        "protocol",
        "callbacks",
        "logger",
        "trainer",
    } <= set(GROUPS)


@pytest.mark.parametrize("name", PRIMARY)
def test_primary_composes(name):
    required = {
        "evaluate": ["run=r", "run_dir=d"],
        "compare": ["runs=[r]"],
        "extract": ["run=r", "images=i", "out=o"],
        "index": ["run=r", "images=i"],
        "progress": ["folder=f"],
        "search": ["catalog=c", "image=i"],
        "catalog_add": ["catalog=c", "images=i"],
        "catalog_remove": ["catalog=c", "id=1"],
        "catalog_export": ["catalog=c", "out=o"],
        **{f"catalog_{verb}": ["catalog=c"] for verb in ("compact", "info", "push", "verify", "migrate")},
        "data_audit": ["run=r"],
        "data_export": ["out=o"],
        "data_convert": ["gnd=g"],
        "photographs": ["catalog=c", "photographs=p"],
        "instance": ["run=r", "gnd=g", "images=i", "run_dir=d"],
        "data_ingest": ["images=i", "out=o"],
        "recommend": ["catalog=c", "image=i"],
        "calibrate": ["catalog=c"],
        "serve": ["catalog=c"],
        "assess": ["runs=[r]"],
        "export": ["catalog=c", "out=o"],
    }
    values = compose(*required.get(name, []), name=name)
    assert values


def swept(sweep: str) -> list[str]:
    """Overrides by each value that a sweep gives to each of its parameters, the ends of those without steps."""
    params = hydra.compose("train", ["run_dir=unused", f"sweep={sweep}"], return_hydra_config=True).hydra.sweeper.params
    found = []
    for one in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()]):
        if one.is_discrete_sweep():
            found += [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        else:
            found += [f"{one.get_key_element()}={end}" for end in (one.value().start, one.value().end)]
    assert found
    return found


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_option_composes_and_builds(group, option, tmp_path):
    if group == "evaluators":  # of commands that measure a run
        node = compose("run=r", "run_dir=d", f"evaluators={option}", name="evaluate")["evaluators"]
        trust.check_config(node, "what simsearch evaluate measures")
        assert node
        assert all(callable(configs.build(one)) for one in node.values())
        return
    if group == "verify":  # of commands that make a catalog or measure
        node = compose(f"verify={option}", name="index")["verify"]
        trust.check_config(node, "verify", trust.VERIFIERS)
        assert configs.build(node).config == node
        return
    if group == "store":  # of commands that search a catalog
        needed = NEEDS_A_NAME.get(option, [])
        node = compose("catalog=c", f"store={option}", *needed, name="catalog_push")["store"]
        trust.check_config(node or {}, "store")
        assert option == "none" or configs.build(node).capabilities.filters
        return
    overrides = [f"{group}={option}", *(NEEDS_A_NAME.get(option, []) if group not in ("model", "loss") else [])]
    if group == "experiment" and option.startswith("art-"):
        overrides += NEEDS_A_NAME["art"]
    part = {"art-trained": "content", "art-copy": "copy"}.get(option) if group == "model" else None
    if part is not None:  # the network of a run, which is all that is read of it here
        network = compose("model=dir", "backbone.weights=random", "backbone.size=64")["model"]["network"]
        OmegaConf.save(OmegaConf.create({"model": {"network": network}}), tmp_path / "config.yaml")
        overrides += [f"model.encoders.{part}.start='{tmp_path}'"]
    if group == "backbone":
        size = 70 if option == "dinov2-small" else 32  # transformers take multiples of their patch
        weights = [] if option == "colour" else ["backbone.weights=random"]
        overrides += [f"backbone.size={size}", *weights, "model.cache=null"]
    elif group in ("model", "pooling", "experiment"):
        overrides += ["backbone.weights=random", "backbone.size=64"]
    elif group in ("loss", "optimizer", "scheduler"):
        overrides += ["model=hashing", "backbone.weights=random", "backbone.size=32"]
    elif (group == "sampler" and option == "mined") or (group == "callbacks" and option.startswith("mining")):
        overrides += ["model=dir"]
    values = compose(*overrides)
    trust.check_config(values, "what simsearch train writes into its run")
    values["model"] |= {"cache": None} if "cache" in values["model"] else {}
    if group in ("backbone", "model", "pooling", "experiment"):
        model = configs.build(values["model"])
        assert model.dimension > 0
        assert model.identity()
    elif group == "protocol":
        assert configs.build(values["protocol"]).name
    elif group == "index":
        index = configs.build(values["index"])
        assert str(index.budget) == "" if option == "auto" else len(index) == 0
    elif group == "data":
        protocol = configs.build(values["protocol"])
        node = OmegaConf.create(values["data"])
        data = hydra.utils.instantiate(node, _convert_="all", _partial_=True)(protocol=protocol)
        assert data.protocol is protocol
    elif group == "callbacks":
        assert [configs.build(node) for node in values["callbacks"].values()]
    elif group == "trainer":
        if values["trainer"]["accelerator"] != "gpu":  # that needs the hardware: composed only
            trainer = configs.build_trainer({**values, "callbacks": {}}, Path("unused"), [])
            assert trainer.max_epochs == values["trainer"]["max_epochs"]
    elif group in ("loss", "optimizer", "scheduler"):
        module = configs.build(values["model"])
        module.trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        assert module.configure_optimizers()
        embeddings = torch.randn(6, module.dimension, requires_grad=True)
        labels = torch.tensor([0, 0, 1, 1, 1, 0])
        if option == "art":  # several attributes
            labels = torch.stack([labels, 1 - labels], dim=1)
        assert module.loss(embeddings, labels).isfinite()
    elif group == "sampler":
        batches = configs.build(values["sampler"])(torch.arange(200) % 20)
        assert len(batches) > 0
    elif group == "rerank":
        assert option == "none" or callable(configs.build(values["rerank"]).fit)
    elif group == "sweep":
        for trial in swept(option):
            model = compose(*overrides, "backbone.weights=random", "backbone.size=64", trial)["model"]
            assert configs.build(model | ({"cache": None} if "cache" in model else {})).dimension > 0
    elif group == "logger":
        assert tracking.wandb_mode(values["logger"]["mode"])
    else:
        pytest.fail(f"no check for the group {group}: say what it builds")


def test_data_bring_their_protocol_and_the_user_may_choose_another():
    assert compose("data=cifar10")["protocol"]["name"] == "10k-50k"
    assert compose("data=cifar10", "protocol=dsh-release")["protocol"]["name"] == "dsh-release"
    assert compose()["protocol"]["name"] == "rendered-artist"


@pytest.mark.parametrize("callbacks", ["ema", "lookahead", "mining"])
def test_what_a_step_ends_with_is_not_counted_as_waiting_for_data(callbacks, tmp_path):
    values = compose("model=hashing", "loss=orthohash", f"callbacks={callbacks}")
    trainer = configs.build_trainer(values, tmp_path, [])
    told = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]
    assert isinstance(told[-1], Throughput)
    assert len(told) > 5
