"""Usual settings of Lightning and slips of the hand: each works, or is refused in one line before anything is made."""

from __future__ import annotations

import math
import re
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
import pytorch_lightning as pl
import torch
from conftest import simsearch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from test_configs import compose as composed
from torch import nn

from simsearch import configs, program, settings
from simsearch.callbacks.training import FrozenBackbone, StepSeed, Throughput
from simsearch.losses.mined import MinedLoss
from simsearch.models.trained import TrainedRetriever

CONF = Path(configs.CONF)
WHOLE = "prevents the measurement of whole tasks"
LIGHTNING = "pytorch_lightning.callbacks."
CLASS_MEANS = "callbacks.evaluation.evaluators={means: {_target_: simsearch.evaluation.class_means.ClassMeans}}"


@cache
def group(*overrides: str) -> dict[str, Any]:
    """The config of a training; composing takes long."""
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        return composed(*([] if any(text.startswith("model=") for text in overrides) else ["model=dsh"]), *overrides)


def compose(*overrides: str) -> dict[str, Any]:
    """The config by overrides of groups, and then of values, also those of copies that interpolation made."""
    groups = [
        text for text in overrides if "." not in text.partition("=")[0] and (CONF / text.partition("=")[0]).is_dir()
    ]
    config = OmegaConf.create(group(*groups))
    for override in OverridesParser.create().parse_overrides([text for text in overrides if text not in groups]):
        for place in ("", "model."):
            if not place or OmegaConf.select(config, f"model.{override.key_or_group}") is not None:
                OmegaConf.update(config, place + override.key_or_group, override.value(), force_add=True)
    return OmegaConf.to_container(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+trainer.fast_dev_run=true"], f"trainer.fast_dev_run=True {WHOLE}: smoke=true"),
        (["+trainer.fast_dev_run=3"], f"trainer.fast_dev_run=3 {WHOLE}"),
        (["+trainer.overfit_batches=1"], f"trainer.overfit_batches=1 {WHOLE}: trainer.limit_train_batches=1"),
        (["+trainer.overfit_batches=0.1"], WHOLE),
        (["+trainer.limit_val_batches=1"], f"trainer.limit_val_batches=1 {WHOLE}"),
        (["+trainer.limit_val_batches=0"], WHOLE),
        (["+trainer.limit_test_batches=0.5"], WHOLE),
        (["+trainer.enable_checkpointing=false"], "the test measures the best checkpoint"),
        (["trainer.precision=bf16-true"], "give bf16-mixed, or 32-true"),
        (["trainer.precision=16-true"], "give 16-mixed, or 32-true"),
        (["trainer.precision=64-true"], "give 32-true"),
        (["trainer=gpu"], "give trainer=training (several devices: training-ddp), with trainer.accelerator=gpu"),
        (["trainer=ddp"], "make one pass, for models that fit without gradients"),
        (["trainer=gpu"], "for one pass by gradient, add +trainer.accumulate_grad_batches=1"),
        (
            ["model=frozen", "trainer.max_steps=5"],
            "trainer.max_steps=5 cuts the one pass by which this model is fitted",
        ),
        (["model=frozen", "callbacks.last.every_n_train_steps=5"], "leave callbacks.last.every_n_train_steps out"),
        (
            ["callbacks.checkpoint.monitor=train/loss", "protocol.validation=null"],
            "callbacks.checkpoint watches train/loss, but saves at validations, and no images are held out",
        ),
        (["trainer.accumulate_grad_batches=0"], "give 1 batch or more"),
        (
            ["callbacks.checkpoint.monitor=val/loss"],
            "watches val/loss, which is not logged; there are train/loss, val/mAP",
        ),
        (
            ["callbacks=early-stopping", "callbacks.early_stopping.monitor=val/map"],
            "which is not logged; there are val/",
        ),
        (
            ["callbacks=early-stopping", "protocol.validation=null"],
            "are held out for validation, give protocol.validation=0.1",
        ),
        (["scheduler=plateau", "protocol.validation=null"], "scheduler watches val/mAP, which is not logged"),
        (
            ["callbacks=early-stopping", "protocol.validation=null", CLASS_MEANS],
            "callbacks.early_stopping watches val/mAP, which is not logged: no images are held out",
        ),
        ([f"+callbacks.x._target_={LIGHTNING}LearningRateFinder"], "-m optimizer.lr=0.001,0.01"),
        ([f"+callbacks.x._target_={LIGHTNING}BackboneFinetuning"], "use callbacks=frozen-backbone"),
        (["callbacks.evaluation=null"], "nothing would be measured"),
        (["callbacks.checkpoint=null"], "nothing to test"),
        (["logger=tensorboard"], "pip install 'simsearch[tensorboard]'"),
        (["seed=null"], "seed=None: give a whole number"),
        (["seed=1.5"], "seed=1.5: give a whole number"),
        (["seed=-1"], "seed=-1"),
        (["seed=abc"], "seed=abc"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: SGD takes a number"),
        (["optimizer.weight_decay=abc"], "optimizer.weight_decay=abc: SGD takes a number"),
        (["scheduler.step_size=abc"], "scheduler.step_size=abc: StepLR takes a whole number"),
        (["trainer.max_steps=1e3x"], "trainer.max_steps=1e3x: Trainer takes a whole number"),
        (["sampler.batch_size=1.5"], "sampler.batch_size=1.5: ShuffledBatches takes a whole number"),
        (["model.network.bits=many"], "model.network.bits=many: DSHNetwork takes a whole number"),
        (["data.works=all"], "data.works=all: RenderedDataModule takes a whole number"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(overrides, message, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)  # what may be installed is not
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        settings.check_training(compose(*overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["+trainer.limit_val_batches=1.0", "+trainer.limit_train_batches=2", "+trainer.fast_dev_run=false"],
        ["trainer.max_steps=1e3", "optimizer.lr=1", "seed=4294967295"],
        ["callbacks=early-stopping", "callbacks.early_stopping.monitor=train/loss", "protocol.validation=null"],
        ["trainer=cpu", "+trainer.accumulate_grad_batches=1"],  # one pass by gradient, as the refusal says
        ["protocol.validation=null"],  # the last checkpoint is the one
        ["scheduler=plateau", "scheduler.mode=min", "protocol.validation=null"],
        ["callbacks.checkpoint.monitor=mine", "+callbacks.x._target_=mine.Callback"],  # who knows what that logs
    ],
)
def test_what_works_is_not_refused(overrides):
    settings.check_training(compose(*overrides))


@pytest.mark.parametrize("experiment", ["art-tuned", "cifar10-codes", "dsh", "hashing-frozen"])
def test_our_own_experiments_are_not_refused(experiment):
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        needs = ["data.source=images"] if experiment.startswith("art-") else []
        settings.check_training(composed(f"experiment={experiment}", *needs))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("rerank=null", "rerank=none"),
        ("scheduler=null", "scheduler=none"),
        ("logger=null", "logger=none"),
        ("objective=null", "objective=null"),
        ("protocol.validation=null", "protocol.validation=null"),
        ("-m", "-m"),
        ("../conf=null", "../conf=null"),
    ],
)
def test_null_for_a_group(argument, expected):
    assert program.without_null(argument) == expected


@pytest.mark.parametrize("group", ["callbacks", "optimizer", "model", "data"])
def test_groups_without_which_nothing_trains_name_their_options(group):
    with pytest.raises(ValueError, match=f"{group}=null is not possible here: leave {group}= out") as caught:
        program.without_null(f"{group}=null")
    assert sorted(path.stem for path in (CONF / group).glob("*.yaml"))[0] in str(caught.value)


def test_none_is_nothing():
    config = compose("scheduler=none", "rerank=none", "logger=none")
    assert config["scheduler"] is config["model"]["scheduler"] is config["rerank"] is None
    assert config["callbacks"]["evaluation"]["rerank"] is None
    assert config["logger"]["mode"] == "disabled"


@pytest.mark.parametrize("place", ["/proc/x/run", "{file}/run"])
def test_a_run_dir_that_cannot_be_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    done = simsearch("train", f"run_dir={place.format(file=tmp_path / 'file')}", expect=1)
    assert done.stderr.startswith("simsearch train: ")
    assert done.stderr.strip().endswith("give another run_dir")
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------- schedules


class Network(nn.Module):
    bits, dimension, input_size, fit = None, 4, 8, "square"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4)
        self.provenance = {"weights": "random"}


def rates(steps: int, **overrides: object) -> list[float]:
    """The rate of the body's weights at each step of a training, by conf/scheduler/cosine.yaml."""
    node = OmegaConf.load(CONF / "scheduler" / "cosine.yaml")
    given = {**OmegaConf.to_container(node), "max_lr": 0.5, "total_steps": steps, **overrides}
    module = TrainedRetriever(
        Network(), nn.Module(), partial(torch.optim.SGD, lr=0.5), scheduler=configs.build(given), head_lr=10.0
    )
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * found[-1])
        optimizer.step()
        if len(found) < steps:
            scheduler.step()
    return found


def test_cosine_warms_up_and_ends_at_nothing():
    found = rates(200)
    peak = found.index(max(found))
    assert 8 <= peak <= 11
    assert max(found) == pytest.approx(0.5)
    assert found[0] < 0.05
    for step in (50, 100, 150, 199):
        expected = 0.25 * (1 + math.cos(math.pi * (step - peak) / (199 - peak)))
        assert found[step] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("rise", [0.0, 0.05, 0.2, 0.5])
def test_a_schedule_of_few_steps_is_finite_and_told(rise, capsys):
    for steps in range(1, 50):
        found = rates(steps, pct_start=rise)
        assert all(math.isfinite(rate) and 0 <= rate <= 0.5 + 1e-9 for rate in found)
        assert max(found) > 0.4
        assert ("too few for a rise" in capsys.readouterr().err) == (steps * rise < 2)


def test_mined_loss_is_of_the_miners_triplets():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(12, 4, generator=generator))
    labels = torch.arange(12) % 3
    found = MinedLoss(TripletMarginLoss(margin=0.1), TripletMarginMiner(margin=0.1, type_of_triplets="semihard"))
    distance = torch.cdist(embeddings, embeddings)
    violations = [
        float(distance[a, p] - distance[a, n] + 0.1)
        for a in range(12)
        for p in range(12)
        for n in range(12)
        if a != p and labels[a] == labels[p] != labels[n]
        if 0 < distance[a, n] - distance[a, p] <= 0.1
    ]
    assert violations
    assert float(found(embeddings, labels)) == pytest.approx(sum(violations) / len(violations), abs=1e-5)


# ------------------------------------------------------------------------------------ a frozen backbone


class Learner(pl.LightningModule):
    """A step by step record of what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.seen: list[tuple[bool, bool]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        weight = self.network.backbone[0].weight
        self.seen.append((weight.requires_grad, self.network.backbone[1].training))
        return self.network.head(self.network.backbone(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fitted(tmp_path: Path, epochs: int | None, of: int = 3) -> tuple[Learner, torch.Tensor]:
    torch.manual_seed(0)
    learner = Learner()
    before = learner.network.backbone[0].weight.detach().clone()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=of, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[FrozenBackbone(epochs)],
    )  # fmt: skip
    trainer.fit(learner, batches)
    return learner, before


def test_a_backbone_trains_after_so_many_epochs(tmp_path):
    learner, before = fitted(tmp_path, 2)
    assert learner.seen == [(False, False)] * 4 + [(True, True)] * 2
    assert not torch.equal(learner.network.backbone[0].weight, before)
    learner, before = fitted(tmp_path, 2, of=2)
    assert torch.equal(learner.network.backbone[0].weight, before)


def test_a_backbone_stays_frozen_and_its_statistics_too(tmp_path):
    learner, before = fitted(tmp_path, None)
    assert learner.seen == [(False, False)] * 6
    assert torch.equal(learner.network.backbone[0].weight, before)
    assert torch.equal(learner.network.backbone[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("steps", "accumulate", "seconds", "told"),
    [
        (1000, 1, 1.0, "about 17 min of training ahead (994 batches"),
        (10_000, 2, 3.0, "about 16 h 39 min of training ahead (19988 batches"),
        (100, 1, 0.5, None),  # not worth a word
        (math.inf, 1, 1.0, None),
    ],
)
@pytest.mark.parametrize(
    ("precision", "device", "arithmetic", "slow"),
    [
        ("bf16-mixed", "cpu", False, True),
        ("bf16-mixed", "cpu", True, False),
        ("bf16-mixed", "cuda", False, False),
        ("32-true", "cpu", False, False),
    ],
)
def test_a_long_training_is_said_beforehand(
    steps, accumulate, seconds, told, precision, device, arithmetic, slow, capsys, monkeypatch
):
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: arithmetic)
    trainer = SimpleNamespace(
        is_global_zero=True, estimated_stepping_batches=steps, accumulate_grad_batches=accumulate, global_step=6,
        precision=precision, strategy=SimpleNamespace(root_device=torch.device(device)),
    )  # fmt: skip
    throughput = Throughput()
    for batch in range(50):  # the first of which takes long
        throughput._forecast(trainer, 100 + seconds * batch if batch else 0.0)
    said = capsys.readouterr().err
    assert said.count("of training ahead") == (told is not None)
    assert (told or "") in said
    assert ("trainer.precision=32-true may be several times as fast" in said) == (slow and told is not None)


def test_a_step_is_seeded_as_torch_does_without_a_stack_trace(monkeypatch):
    trainer = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    with monkeypatch.context() as patched:
        patched.setattr("traceback.format_stack", lambda *_: pytest.fail("a stack trace is written each step"))
        StepSeed(3).on_train_start(trainer, None)
    drawn = torch.rand(4)
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize(("logs", "last", "count"), [(False, False, 0), (True, False, 1), (False, True, 1)])
def test_speed_is_logged_where_it_is_seen(logs, last, count):
    logged: list[dict] = []
    module = SimpleNamespace(log_dict=lambda values, batch_size: logged.append(values))
    trainer = SimpleNamespace(
        _logger_connector=SimpleNamespace(should_update_logs=logs),
        is_last_batch=last,
        world_size=2,
        is_global_zero=False,
        progress_bar_metrics={},
    )
    throughput = Throughput()
    throughput.on_train_start(trainer, module)
    throughput.on_train_batch_end(trainer, module, None, {"index": [0, 1]}, 0)
    assert len(logged) == count
    assert all(values["train/images_per_s"] > 0 for values in logged)
    assert trainer.progress_bar_metrics["img/s"] > 0


@pytest.mark.parametrize("epochs", [0, -1])
def test_a_backbone_is_not_frozen_for_no_epochs(epochs):
    with pytest.raises(ValueError, match=f"epochs={epochs}: give at least 1 epoch"):
        FrozenBackbone(epochs)
