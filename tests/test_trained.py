"""The LightningModule of the trained families: parameter groups, slices, warm start, and trainings by config alone."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import simsearch
from PIL import Image
from pytorch_metric_learning.losses import ContrastiveLoss
from safetensors.torch import load_file
from test_resume import DATA, DSH, HASHING, checkpoint, numbers
from torch import Tensor, nn

from simsearch import configs, saved_run
from simsearch.api import open_catalog
from simsearch.cache import ArrayCache
from simsearch.callbacks.training import Lookahead, WeightAverage
from simsearch.commands.train import note_small_images
from simsearch.files import read_json
from simsearch.functional.resize import resize_to_fit
from simsearch.functional.views import Views
from simsearch.index.binarize import ITQ
from simsearch.losses.classification import ClassificationLoss
from simsearch.losses.dsh import DSHLoss
from simsearch.losses.memory import CrossBatchMemory
from simsearch.losses.spread import SpreadLoss
from simsearch.models.backbones import timm_backbone
from simsearch.models.cifar import cifar_backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.dsh import DSHNetwork
from simsearch.models.feature_cache import pooled_features
from simsearch.models.hashing import HashNetwork, PooledBackbone
from simsearch.models.pooling import RMAC, Average
from simsearch.models.trained import TrainedRetriever, _needs_all_ranks, parameter_groups

SGD = partial(torch.optim.SGD, lr=0.1)
FLOAT32 = "trainer.precision=32-true"


def hashing(bits: int = 8, **arguments: Any) -> HashNetwork:
    torch.manual_seed(0)
    return HashNetwork(timm_backbone("test_efficientnet", "random", 32), Average(), bits, **arguments)


def images(count: int = 8, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def batch(count: int = 8) -> dict[str, Tensor]:
    return {"image": images(count), "label": torch.arange(count) % 3, "index": 100 + torch.arange(count)}


def train(run: Path, *arguments: str, expect: int = 0):
    return simsearch("train", *DATA, *arguments, f"run_dir={run}", expect=expect)


def test_a_memory_inside_another_loss_needs_all_ranks():
    memory = CrossBatchMemory(ContrastiveLoss(), size=4, dimension=2)
    assert _needs_all_ranks(memory)
    assert _needs_all_ranks(SpreadLoss(memory, weight=1.0))
    assert not _needs_all_ranks(SpreadLoss(ContrastiveLoss(), weight=1.0))


# ------------------------------------------------------------------------------ parameter groups


def rates(network: nn.Module, loss: nn.Module, **settings: Any) -> dict[str, tuple[float, float]]:
    """Of each parameter its rate and decay; asserts that none comes twice."""
    names = {id(p): n for n, p in [*network.named_parameters(prefix="net"), *loss.named_parameters(prefix="loss")]}
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(network, loss, **settings):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (pytest.approx(group["lr"]), group["weight_decay"])
    torch.optim.SGD(parameter_groups(network, loss, **settings))  # which refuses doubles
    return found


def test_groups_of_the_dsh_paper():
    network = DSHNetwork(12)
    got = rates(network, DSHLoss(), lr=1e-3, weight_decay=0.004, bias_lr=2.0, bias_decay=False)
    wanted = {}
    for layer in ("conv1", "conv2", "conv3", "hidden", "head"):
        wanted |= {f"net.{layer}.weight": (1e-3, 0.004), f"net.{layer}.bias": (2e-3, 0.0)}
    assert got == wanted
    assert len(parameter_groups(network, DSHLoss(), lr=1.0, weight_decay=0.1)) == 1


def test_groups_of_a_longer_code_have_the_last_layer_at_10_and_20():
    got = rates(DSHNetwork(48), DSHLoss(), lr=1e-4, weight_decay=0.004, head_lr=10, bias_lr=2, bias_decay=False)
    assert got["net.head.weight"] == (1e-3, 0.004)
    assert got["net.head.bias"] == (2e-3, 0.0)
    assert got["net.hidden.weight"] == (1e-4, 0.004)
    assert got["net.hidden.bias"] == (2e-4, 0.0)


def test_groups_hold_the_loss_s_own_at_the_rate_of_the_head_and_leave_frozen_ones_out():
    network = hashing()
    network.backbone.requires_grad_(False)
    got = rates(network, ClassificationLoss(8, 3), lr=0.1, weight_decay=0.5, head_lr=3.0)
    names = ("net.head.weight", "net.head.bias", "loss.classifier.weight", "loss.classifier.bias")
    assert got == dict.fromkeys(names, (pytest.approx(0.3), 0.5))


def test_scales_and_shifts_of_normalisation_decay_only_where_biases_do():
    network = hashing()
    narrow = {f"net.{name}" for name, p in network.named_parameters() if p.ndim == 1 and p.requires_grad}
    assert any("bn1.weight" in name for name in narrow)
    without = rates(network, DSHLoss(), lr=0.1, weight_decay=0.5, bias_decay=False)
    assert {name for name, (_, decay) in without.items() if decay == 0} == narrow
    assert {decay for _, decay in rates(network, DSHLoss(), lr=0.1, weight_decay=0.5).values()} == {0.5}


@pytest.mark.parametrize("given", [10, 40, 0])  # the length itself, trainer.max_steps that max_epochs cuts, none
def test_one_cycle_keeps_the_ratio_of_the_groups(given):
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=given)
    module = TrainedRetriever(DSHNetwork(12), DSHLoss(), SGD, schedule, head_lr=10, bias_lr=2)
    module._trainer = SimpleNamespace(max_steps=40, estimated_stepping_batches=10)
    built = module.configure_optimizers()
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    highest = [0.0] * len(optimizer.param_groups)
    for _ in range(10):
        now = [group["lr"] for group in optimizer.param_groups]
        highest = [max(pair) for pair in zip(highest, now, strict=True)]
        assert now == pytest.approx([now[0], 2 * now[0], 10 * now[0], 20 * now[0]])
        optimizer.step()
        scheduler.step()
    assert highest[0] == pytest.approx(0.2, rel=0.2)
    assert now[0] < 0.01 * highest[0]


# ------------------------------------------------------------------------------ the module alone


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("slices", [1, 3, 8, 100])
def test_slices_give_the_gradients_of_the_whole_batch(slices, autocast):
    gradients = []
    for size in (None, slices):
        module = TrainedRetriever(hashing(), DSHLoss(), SGD, freeze_batchnorm=True, slices=size).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module.training_step(batch(), 0)
        loss.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert gradients[0]["network.backbone.network.model.conv_stem.weight"].any()
    assert gradients[0].keys() == gradients[1].keys()
    for name, whole in gradients[0].items():
        # In bfloat16 a batch of another size is rounded elsewhere.
        far = (gradients[1][name] - whole).norm() / whole.norm().clamp(min=1e-6)
        assert far < (0.1 if autocast else 1e-4), name


def test_slices_hold_activations_of_one_slice_only():
    saved = {}
    for size in (None, 2):
        module = TrainedRetriever(hashing(), DSHLoss(), SGD, freeze_batchnorm=True, slices=size).train()
        kept: list[int] = []
        parameters = {p.data_ptr() for p in module.parameters()}

        def pack(x: Tensor, kept=kept, parameters=parameters) -> Tensor:
            kept.append(0 if x.data_ptr() in parameters else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module(batch())
        saved[size] = sum(kept)
    assert saved[2] < saved[None] / 5


class Typed(nn.Module):
    """Notes in what precision it is called."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.seen = embeddings.dtype, torch.is_autocast_enabled("cpu"), (embeddings @ embeddings.T).dtype
        return embeddings.square().sum()


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_loss_is_float32_under_autocast():
    module = TrainedRetriever(hashing(), Typed(), SGD)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(batch()).dtype == torch.bfloat16
        module.training_step(batch(), 0).backward()
        embedded = module.eval().embed(images())
    assert module.loss.seen == (torch.float32, False, torch.float32)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, module.embed(images()))  # nor does autocast reach what is searched


def test_frozen_batch_normalisation_stays_frozen():
    module = TrainedRetriever(hashing(), DSHLoss(), SGD, freeze_batchnorm=True)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for mode in (True, False, True):
        module.train(mode)
        assert not any(m.training for m in norms)
    assert module.network.head.training
    assert not any(p.requires_grad for m in norms for p in m.parameters())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_step_and_rows(value):
    class Broken(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            return embeddings.square().sum() * value

    module = TrainedRetriever(hashing(), Broken(), SGD)
    with pytest.raises(ValueError, match=rf"loss is {value}.*step 0.*batch 7.*rows \[100, 101, .*lower optimizer.lr"):
        module.training_step(batch(), 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": torch.optim.SGD}, "_partial_: true"),
        ({"optimizer": partial(torch.optim.SGD, momentum=0.9)}, "partial with lr"),
        ({"slices": 0}, "model.slices=0"),
        ({"slices": 4}, "model.freeze_batchnorm=true"),
        ({"cache": ArrayCache("nowhere"), "network": DSHNetwork(12)}, "model.cache"),
        (
            {
                "cache": ArrayCache("nowhere"),
                "network": RegionNetwork(timm_backbone("test_efficientnet", "random", 64), Average(), 4, scales=[1, 2]),
            },
            r"model.network.scales=\[1.0\]",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainedRetriever(**{"network": hashing(), "loss": DSHLoss(), "optimizer": SGD, **arguments})


def test_provenance_says_trained_and_from_what():
    module = TrainedRetriever(hashing(), DSHLoss(), SGD)
    assert module.provenance["weights"] == "trained"
    assert module.provenance["start"] == "random"
    assert TrainedRetriever(DSHNetwork(12), DSHLoss(), SGD).provenance["start"] == "none"


# ------------------------------------------------------------------------------ losses by yaml alone

ONE_STEP = ("trainer.max_steps=1", FLOAT32)


@pytest.mark.parametrize("loss", ["multi-similarity", "contrastive", "batch-hard", "orthohash", "greedyhash"])
def test_a_loss_by_its_yaml(loss, tmp_path):
    train(tmp_path / "run", *HASHING, *ONE_STEP, f"loss={loss}", "catalog.write=false", "scheduler=constant")
    state = checkpoint(tmp_path / "run")["optimizer_states"][0]["state"]
    assert any(entry["momentum_buffer"].any() for entry in state.values())


def test_a_loss_of_another_library_with_parameters_joins_optimizer_and_checkpoint(tmp_path):
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "mine.yaml").write_text(
        "_target_: pytorch_metric_learning.losses.ProxyAnchorLoss\nnum_classes: 3\nembedding_size: 8\n"
    )
    run = tmp_path / "run"
    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    train(run, *HASHING, *ONE_STEP, search, "loss=mine", "scheduler=constant", "model.head_lr=7", "optimizer.lr=0.01")
    saved = checkpoint(run)
    assert saved["state_dict"]["loss.proxies"].shape == (3, 8)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert {round(group["lr"], 6) for group in groups} == {0.01, 0.07}
    count = sum(len(group["params"]) for group in groups)
    network = hashing()
    assert count == sum(p.requires_grad for p in network.parameters()) + 1
    assert not any(name.startswith("loss") for name in load_file(run / "catalog" / "encoder.safetensors"))


def test_a_memory_and_a_count_are_in_the_checkpoint(tmp_path):
    bank = ("loss=xbm", "loss.start=1", "loss.size=20")
    train(tmp_path / "a", *HASHING, "trainer.max_steps=2", *bank, "scheduler=constant", "catalog.write=false")
    state = checkpoint(tmp_path / "a")["state_dict"]
    assert state["loss.step"] == 2
    assert state["loss.stored"] == 8  # the first batch was not remembered
    assert state["loss.memory"][:8].any(1).all()
    assert not state["loss.memory"][8:].any()
    train(tmp_path / "b", *HASHING, "trainer.max_steps=2", "loss=hashnet", "scheduler=constant", "catalog.write=false")
    assert checkpoint(tmp_path / "b")["state_dict"]["loss.step"] == 2


# ------------------------------------------------------------------------------ trainings by config

PLAIN = (  # plain gradient descent, its gradient left in the weights
    *("optimizer.lr=0.01", "optimizer.momentum=0", "optimizer.weight_decay=0", "scheduler=constant", "model.head_lr=1"),
    *("loss=classification", "loss.classes=3", "catalog.write=false", "model.freeze_batchnorm=true", FLOAT32),
    *("data.augment=null", "trainer.max_steps=1"),
)


def weights(run: Path, name: str = "last") -> dict[str, Tensor]:
    state = checkpoint(run, name)["state_dict"]
    return {n: v for n, v in state.items() if v.is_floating_point()}


@pytest.mark.slow
def test_accumulated_batches_are_one_and_clipping_shortens_the_step(tmp_path):
    train(tmp_path / "whole", *HASHING, *PLAIN, "sampler.batch_size=16")
    train(tmp_path / "parts", *HASHING, *PLAIN, "trainer.accumulate_grad_batches=2")
    train(tmp_path / "still", *HASHING, *PLAIN, "optimizer.lr=0")
    train(tmp_path / "short", *HASHING, *PLAIN, "sampler.batch_size=16", "trainer.gradient_clip_val=0.001")
    start, whole, parts, short = (weights(tmp_path / name) for name in ("still", "whole", "parts", "short"))

    def step(end: dict[str, Tensor]) -> Tensor:
        return torch.cat([(end[name] - start[name]).flatten() for name in start])

    assert step(whole).norm() > 1e-3
    torch.testing.assert_close(step(parts), step(whole), rtol=1e-3, atol=1e-7)
    assert step(short).norm().item() == pytest.approx(0.01 * 0.001, rel=0.05)
    assert torch.cosine_similarity(step(short), step(whole), dim=0) > 0.99


def test_frozen_batch_normalisation_stays_as_it_was_in_a_training(tmp_path):
    train(tmp_path / "run", *HASHING, *PLAIN)
    state = checkpoint(tmp_path / "run")["state_dict"]
    means = [v for n, v in state.items() if n.endswith("running_mean")]
    assert means
    assert not any(v.any() for v in means)  # as a random network has them
    assert not any(v for n, v in state.items() if n.endswith("num_batches_tracked"))


class Later(nn.Module):
    """A loss that is no number from its sixth batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return embeddings.square().mean() * (float("nan") if self.calls >= 6 else 1.0)


def test_nan_stops_a_training_and_leaves_the_last_checkpoint(tmp_path):
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "later.yaml").write_text("_target_: test_trained.Later\n")
    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    run = tmp_path / "run"
    arguments = (*DSH, search, "loss=later", "trainer.max_steps=20", "trainer.check_val_every_n_epoch=1")
    done = train(run, *arguments, expect=1)
    (line,) = (line for line in done.stderr.splitlines() if "loss is nan" in line)
    assert "step 5 (epoch 1, batch 1, collection rows [" in line
    assert "lower optimizer.lr" in line
    assert "Traceback" not in done.stderr
    saved = checkpoint(run)
    assert saved["global_step"] == 4  # of the end of the first epoch
    assert all(v.isfinite().all() for v in saved["state_dict"].values())


@pytest.mark.slow
def test_a_deterministic_training_repeats_itself(tmp_path):
    arguments = (*HASHING, "trainer.max_steps=3", "trainer.deterministic=true", "loss=hashnet", "scheduler=constant")
    try:
        for name in ("a", "b"):
            train(tmp_path / name, *arguments, "seed=3")
    finally:
        torch.use_deterministic_algorithms(False)
    train(tmp_path / "c", *arguments, "seed=4", "trainer.deterministic=false")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


class Average64(pl.Callback):
    """The average of the weights after each step, in double precision."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        for name, value in module.state_dict().items():
            wide = value.detach().double().clone()
            self.average[name] = 0.5 * (self.average[name] + wide) if name in self.average else wide

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        torch.save(self.average, Path(trainer.default_root_dir) / "average.pt")


def test_averaged_weights_are_tested_and_cataloged(tmp_path):
    run = tmp_path / "run"
    train(
        run, *HASHING, "callbacks=ema", "callbacks.ema.decay=0.5", "trainer.max_steps=5", "scheduler=constant",
        "loss=greedyhash", "optimizer.lr=0.1", FLOAT32, "+callbacks.average._target_=test_trained.Average64",
    )  # fmt: skip
    average = torch.load(run / "average.pt", weights_only=True)
    saved = checkpoint(run, "best")
    names = [n for n, v in saved["state_dict"].items() if v.is_floating_point() and n.startswith("network.")]
    cataloged = load_file(run / "catalog" / "encoder.safetensors")
    for name in names:
        torch.testing.assert_close(saved["state_dict"][name].double(), average[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(cataloged[name.removeprefix("network.")], saved["state_dict"][name])
    far = [n for n in names if not torch.allclose(saved["current_model_state"][n], saved["state_dict"][n])]
    assert "network.head.weight" in far
    simsearch("evaluate", f"run={run}", f"run_dir={tmp_path / 'again'}", "trust=true")  # for the callback of our own
    again, first = numbers(tmp_path / "again")["test"], numbers(run)["test"]
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_has_frozen_weights_and_counts_as_they_are(use_buffers):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module.device = torch.device("cpu")
    module[0].requires_grad_(False)
    callback = WeightAverage(0.9, use_buffers)
    callback.setup(None, module, "fit")
    with torch.no_grad():
        module[0].weight.fill_(7.0)  # as a checkpoint that is loaded after the setup
    wanted = {}
    for step in range(4):
        with torch.no_grad():
            module[1].running_mean = torch.full((4,), float(step))  # another tensor, as after a move to a GPU
            module[1].num_batches_tracked.fill_(step)
            module[2].weight.fill_(10.0**step)
        callback._average_model.update_parameters(module)
        for name, value in module.state_dict().items():
            averaged = value.is_floating_point() and (use_buffers or "running" not in name)
            wanted[name] = 0.9 * wanted[name] + 0.1 * value if averaged and step else value.clone()
    got = callback._average_model.module.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)
    assert got["2.weight"].unique().tolist() == pytest.approx([0.729 + 0.81 + 9 + 100])


class Lookahead64(pl.Callback):
    """Lookahead in double precision beside the callback, which must have run before: d from 0 to 0.9, every 2 steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.moved = steps, 0
        self.slow: dict[str, Tensor] = {}
        self.fast: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.slow = {n: v.double().clone() for n, v in self.tensors(module)}

    def tensors(self, module: pl.LightningModule) -> list[tuple[str, Tensor]]:
        return [(n, v.detach()) for n, v in module.network.state_dict().items() if v.is_floating_point()]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step, fast = trainer.global_step, self.fast
        if step % 2 and step < self.steps:
            return
        d = 1.0 if step == self.steps else 0.9 * (step / self.steps) ** 3
        for name, now in self.tensors(module):
            self.slow[name] = d * self.slow[name] + (1 - d) * fast[name].double()
            torch.testing.assert_close(now.double(), self.slow[name], rtol=1e-5, atol=1e-7)
            self.moved += not torch.equal(now, fast[name])

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self.moved > 100
        (Path(trainer.default_root_dir) / "checked").touch()


class Before(pl.Callback):
    """Keeps the weights for Lookahead64 before the averaging callback sees them."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        other = next(c for c in trainer.callbacks if isinstance(c, Lookahead64))
        other.fast = {n: v.clone() for n, v in other.tensors(module)}


def test_lookahead_draws_weights_and_statistics_to_their_average(tmp_path):
    run = tmp_path / "run"
    train(
        run, *HASHING, "+callbacks.before={_target_: test_trained.Before}",
        "+callbacks.real={_target_: simsearch.callbacks.training.Lookahead, every: 2, decay: 0.9}",
        "+callbacks.twin={_target_: test_trained.Lookahead64, steps: 5}", "trainer.max_steps=5", "scheduler=constant",
        "loss=greedyhash", "optimizer.lr=0.1", FLOAT32,
    )  # fmt: skip
    assert (run / "checked").exists()


def test_lookahead_of_accumulated_gradients_averages_once_a_step():
    module = TrainedRetriever(hashing(), ClassificationLoss(8, 3), SGD)
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=8)
    lookahead = Lookahead(every=2, decay=0.9)
    lookahead.on_train_start(trainer, module)
    start = module.network.head.weight.detach().clone()
    expected = start.double()
    for trainer.global_step in (1, 2, 2, 2, 3, 4):
        module.network.head.weight.data += 1
        lookahead.on_train_batch_end(trainer, module, None, None, 0)
    # By hand: two added, averaged at step 2; two more without an average, one at step 3, one at step 4.
    first = expected + 2 * (1 - 0.9 * (2 / 8) ** 3)
    second = first + 4 * (1 - 0.9 * (4 / 8) ** 3)
    torch.testing.assert_close(module.network.head.weight.double(), second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("arguments", "match"), [({"every": 0}, "every=0"), ({"decay": 1.0}, "decay=1.0")])
def test_wrong_lookaheads_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        Lookahead(**arguments)


# ------------------------------------------------------------------------------ views


VIEWS = get_args(Views)


def naive_views(image: Tensor, views: str) -> list[tuple[float, Tensor]]:
    """One image (3, H, W) at a time, by numpy."""
    one = image.numpy()
    wide = np.pad(one, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    seen = {"one": [(1.0, one)], "mirror": [(0.5, one), (0.5, one[..., ::-1])]}
    down, up = wide[:, :-2, :-2], wide[:, 2:, 2:]
    sixth = [(0.25, one), (0.25, one[..., ::-1]), *((0.125, w) for v in (down, up) for w in (v, v[..., ::-1]))]
    return [(w, torch.from_numpy(v.copy())) for w, v in (seen | {"mirror-shift": sixth})[views]]


@pytest.mark.parametrize("views", VIEWS)
def test_codes_are_those_of_mean_features_over_views(views):
    network = hashing(views=views, hidden=6).eval()
    plain = hashing(hidden=6).eval()
    batch = images(3)

    def features(image: Tensor) -> Tensor:
        return plain.pool(plain.backbone(image[None]))

    with torch.no_grad():
        expected = [plain.describe(sum(w * features(v) for w, v in naive_views(image, views)))[0] for image in batch]
        torch.testing.assert_close(network.embed(batch), torch.stack(expected), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(batch), plain(batch))  # training sees one
    assert (network.identity() == plain.identity()) == (views == "one")
    assert "views" not in plain.identity()


def test_views_are_those_of_the_size_that_the_network_sees():
    network, plain = hashing(views="mirror-shift").eval(), hashing().eval()
    large = images(2, side=64)
    small = resize_to_fit(large, 32, "square")
    with torch.no_grad():
        torch.testing.assert_close(network.embed(large), network.embed(small))
        assert not torch.allclose(network.embed(small), plain.embed(small))


def test_codes_without_a_hidden_layer_are_means_over_views():
    network, plain, batch = hashing(views="mirror-shift").eval(), hashing().eval(), images(3)
    with torch.no_grad():
        expected = [sum(w * plain(v[None])[0] for w, v in naive_views(image, "mirror-shift")) for image in batch]
        torch.testing.assert_close(network.embed(batch), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_unknown_views_are_refused():
    with pytest.raises(ValueError, match="views='all'"):
        hashing(views="all")


def test_each_kind_of_views_has_its_own_cached_features(tmp_path):
    collection = SimpleNamespace(images=images(20), content="twenty images")
    for views in (*VIEWS, "one"):
        network = hashing(views=views, hidden=6).eval()
        pooled = pooled_features(network, collection, ArrayCache(tmp_path))
        assert (pooled.shape, pooled.dtype) == ((20, 1, network.backbone.channels), torch.float16)
        with torch.no_grad():
            own = network.embed(collection.images)
            others = [hashing(views=v, hidden=6).eval() for v in VIEWS if v != views]
            error = (network.describe(pooled.float()) - own).abs().max()
            assert all(error < (other.embed(collection.images) - own).abs().max() / 3 for other in others)
    assert len(list(tmp_path.glob("*/array.npy"))) == 3


def test_bits_of_a_binarizer_follow_the_learnt_ones():
    network = hashing(bits=3, hidden=6, binarizer=ITQ(5)).eval()
    assert (network.learnt, network.bits, network.dimension) == (3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    regions = torch.randn(40, 2, network.backbone.channels, generator=generator)
    network.prepare_regions(regions, torch.arange(len(regions)))
    weight, bias = ITQ(5).fit(regions.mean(1))
    with torch.no_grad():
        code = network.describe(regions)
        torch.testing.assert_close(code[:, :3], network.head(network.hidden(regions.mean(1))))
    agreed = (code[:, 3:] > 0) == (regions.mean(1) @ weight.T + bias > 0)
    assert agreed.float().mean() > 0.99  # the sum over images in another order
    assert 0.2 < (code[:, 3:] > 0).float().mean() < 0.8


def test_a_binarizer_needs_frozen_features_and_enough_channels():
    with pytest.raises(ValueError, match=r"model.network.binarizer .* set model.cache"):
        hashing(binarizer=ITQ(8)).prepare(images(), torch.arange(1))
    channels = hashing().backbone.channels
    with pytest.raises(ValueError, match=rf"binarizer.bits={channels + 1}: the backbone has {channels} channels"):
        hashing(binarizer=ITQ(channels + 1))


def second_backbone(seed: int = 1, size: int = 48) -> PooledBackbone:
    torch.manual_seed(seed)
    return PooledBackbone(timm_backbone("test_efficientnet", "random", size), Average())


def test_bits_of_a_second_backbone_follow_the_learnt_ones(tmp_path):
    itq = ITQ(5)
    network = hashing(bits=3, hidden=6, views="mirror", binarizer=itq, second=second_backbone()).eval()
    alone, second = hashing(bits=3, hidden=6, views="mirror").eval(), second_backbone().eval()
    assert (network.learnt, network.bits, network.input_size) == (3, 8, 48)
    collection = SimpleNamespace(images=images(40), content="forty images")
    pooled = pooled_features(network, collection, ArrayCache(tmp_path))
    network.prepare_regions(pooled, torch.arange(len(pooled)))
    with torch.no_grad():
        features = second.backbone(collection.images).mean((2, 3))  # pooled otherwise than by the pooling module
        weight, bias = itq.fit(features)
        code = network.embed(collection.images)
        torch.testing.assert_close(code[:, :3], alone.embed(collection.images))
        agreed = (code[:, 3:] > 0) == (features @ weight.T + bias > 0)
        assert agreed.float().mean() > 0.95  # the cache rounds features to float16, and ITQ turns with them
        torch.testing.assert_close(network.describe(pooled.float()), code, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(network(collection.images), hashing(bits=3, hidden=6).eval()(collection.images))
    assert not any(p.requires_grad for p in network.second.parameters())
    assert network.identity() != alone.identity()
    facts = network.provenance
    assert facts["second_sha256"] == second.provenance["sha256"] != facts["sha256"] == alone.provenance["sha256"]


def test_networks_share_the_stored_features_of_a_second_backbone(tmp_path):
    collection = SimpleNamespace(images=images(20), content="twenty images")
    for views in ("mirror", "one"):
        network = hashing(views=views, binarizer=ITQ(5), second=second_backbone()).eval()
        pooled_features(network, collection, ArrayCache(tmp_path))
    assert len(list(tmp_path.glob("*/array.npy"))) == 3


def test_a_second_backbone_that_cannot_be_used_is_named():
    with pytest.raises(ValueError, match=r"model.network.second is a backbone for a binarizer"):
        hashing(second=second_backbone())
    whole = second_backbone()
    whole.backbone.fit = "longest"
    with pytest.raises(ValueError, match=r"second.backbone.fit=longest .* backbone.fit=square"):
        hashing(binarizer=ITQ(5), second=whole)
    untrained = PooledBackbone(cifar_backbone(width=24), Average())
    with pytest.raises(ValueError, match=r"second.backbone=\S+ has random weights that nothing trains"):
        hashing(binarizer=ITQ(5), second=untrained)


@pytest.mark.slow
def test_a_run_shorter_than_the_pause_between_validations_has_a_best_checkpoint(tmp_path):
    train(tmp_path / "run", *DSH, "trainer.max_steps=2", "catalog.write=false")
    assert checkpoint(tmp_path / "run", "best")["global_step"] == 2
    stages = read_json(tmp_path / "run" / "metrics.json")
    assert set(stages) == {"val", "test"}


# ------------------------------------------------------------------------------ starting from another run


@pytest.fixture(scope="module")
def short_code(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("start") / "12 bits"
    train(run, *DSH, "trainer.max_steps=3")
    return run


@pytest.fixture(scope="module")
def hashed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("start") / "hashed"
    train(run, *HASHING, "backbone.size=64", "trainer.max_steps=3", "scheduler=constant", "loss=greedyhash")
    return run


def test_a_longer_code_starts_from_the_12_bit_net(short_code, tmp_path):
    run = tmp_path / "run"
    arguments = (*DSH, "model.network.bits=24", "optimizer.lr=0", "trainer.max_steps=1")
    done = train(run, *arguments, f"model.start={short_code}", "model.head_lr=10")
    assert "new: head.bias, head.weight" in done.stderr
    before, after = weights(short_code, "best"), weights(run)
    assert before.keys() == after.keys()
    for name in before:
        if name.startswith("network.head"):
            assert after[name].shape[0] == 24
        else:
            assert torch.equal(after[name], before[name]), name
    about = json.loads((run / "metrics.json").read_text())["test"]["model"]
    assert about["start"] == str(short_code)
    # A checkpoint's own path does as well.
    train(
        tmp_path / "file", *arguments, f"model.start={short_code / 'checkpoints' / 'last.ckpt'}", "catalog.write=false"
    )
    assert torch.equal(weights(tmp_path / "file")["network.conv1.weight"], weights(short_code)["network.conv1.weight"])


def test_dir_takes_the_pca_of_the_backbone_that_it_starts_from(hashed, tmp_path):
    from test_resume import DIR

    run = tmp_path / "run"
    train(run, *DIR, "optimizer.lr=0", "trainer.max_steps=1", f"model.start={hashed}", FLOAT32)
    before, after = weights(hashed, "best"), weights(run)
    backbone = [name for name in before if name.startswith("network.backbone.")]
    assert all(torch.equal(after[name], before[name]) for name in backbone)

    network = RegionNetwork(timm_backbone("test_efficientnet", "random", 64), RMAC(levels=2), 8, power=0.5)
    network.load_state_dict({n.removeprefix("network."): before[n] for n in backbone}, strict=False)
    from simsearch import configs, saved_run

    config = saved_run.open_run(run).config
    data = configs.build_data(config)
    network.prepare(data.collection.images, data.split.train)
    torch.testing.assert_close(after["network.descriptor.whitening.weight"], network.head.weight.data)
    torch.testing.assert_close(after["network.descriptor.whitening.bias"], network.head.bias.data)


@pytest.mark.slow
def test_the_second_stage_of_dir_goes_on_with_its_projection(tmp_path):
    from test_resume import DIR

    first, second = tmp_path / "first", tmp_path / "second"
    stage = ("loss=classification", "loss.classes=3", "sampler=shuffle", "sampler.batch_size=8", "callbacks=training")
    arguments = tuple(a for a in DIR if not a.startswith(("sampler.", "callbacks.")))
    train(first, *arguments, *stage, "trainer.max_steps=2", "catalog.write=false")
    train(second, *DIR, "trainer.max_steps=1", "optimizer.lr=0", f"model.start={first}", "catalog.write=false")
    before, after = weights(first, "best"), weights(second)
    assert "loss.classifier.weight" in before
    assert "loss.classifier.weight" not in after
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_what_cannot_be_started_from_is_named(short_code, hashed, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no weights")
    for number, (start, message) in enumerate(
        [
            (short_code, "no tensor of .* fits this network"),
            (tmp_path, r"no weights at .*best\.ckpt"),
            (tmp_path / "nothing.ckpt", r"no weights at .*nothing\.ckpt"),
            (text, r"cannot read weights from .*notes\.txt"),
        ]
    ):
        arguments = (*HASHING, "trainer.max_steps=1", "scheduler=constant", f"model.start={start}")
        done = train(tmp_path / str(number), *arguments, expect=1)
        assert "Traceback" not in done.stderr
        assert re.search(message, done.stderr)


def cached(folder: Path) -> tuple[str, ...]:
    return (
        f"model.cache={{_target_: simsearch.cache.ArrayCache, root: {folder / 'cache'}}}",
        *("data.augment=null", "loss=greedyhash", "scheduler=constant", "catalog.write=false"),
    )


def test_a_cached_backbone_trains_its_head_only(tmp_path):
    run, arguments = tmp_path / "run", (*HASHING, *cached(tmp_path), "backbone.size=64", "trainer.max_steps=3")
    train(run, *arguments)
    assert {group["lr"] for group in checkpoint(run)["optimizer_states"][0]["param_groups"]} == {0.1}
    simsearch("evaluate", f"run={run}", f"run_dir={tmp_path / 'again'}")
    assert numbers(tmp_path / "again")["test"]["metrics"] == numbers(run)["test"]["metrics"]
    train(tmp_path / "longer", *arguments, f"model.start={run}", "model.network.bits=16")


@pytest.mark.slow
def test_a_code_with_bits_of_a_binarizer_learns_the_others_as_without_it(tmp_path):
    arguments = (*HASHING, *cached(tmp_path), "backbone.size=64", "trainer.max_steps=3")
    itq = "model.network.binarizer={_target_: simsearch.index.binarize.ITQ, bits: 16}"
    train(tmp_path / "plain", *arguments)
    train(tmp_path / "both", *arguments, itq, "catalog.write=true")
    plain, both = (checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "both"))
    assert all(torch.equal(both[name], plain[name]) for name in plain)
    assert set(both) - set(plain) == {"network.code_weight", "network.code_bias"}
    assert both["network.code_weight"].shape[0] == 16
    assert (both["network.code_weight"].norm(dim=1) - 1).abs().max() < 1e-4  # rows of a rotation times components

    simsearch("evaluate", f"run={tmp_path / 'both'}", f"run_dir={tmp_path / 'again'}")
    got = [numbers(tmp_path / name)["test"]["metrics"] for name in ("plain", "both", "again")]
    assert got[2] == got[1] != got[0]
    assert open_catalog(tmp_path / "both" / "catalog").encoder.bits == plain["network.head.weight"].shape[0] + 16


SMALL = (
    *("model=hashing", "backbone=cifar", "backbone.width=24", "backbone.size=32", "pooling=mac"),
    *("sampler.batch_size=8", "model.network.bits=8", "scheduler=constant", "optimizer.lr=1e-4"),
)


def assert_stored_codes_are_those_of_images(run: Path) -> None:
    """Codes of the kept features, which are float16, against codes of the images themselves."""
    stored, opened = saved_run.load_model(saved_run.open_run(run)), saved_run.open_run(run)
    collection = configs.build_data(opened.config).collection
    opened.config["model"]["cache"] = None
    direct = saved_run.load_model(opened).eval()
    with torch.no_grad():
        kept = stored.network.describe(pooled_features(stored.network.eval(), collection, stored.cache).float())
        codes = torch.cat([direct.embed(block) for block in collection.images[:].split(64)])
    scale = codes.abs().mean()
    assert (kept - codes).abs().max() < 0.02 * scale
    assert ((kept > 0) == (codes > 0)).float().mean() > 0.99


@pytest.mark.slow
def test_a_pooling_with_a_number_has_that_of_the_start(tmp_path):
    """Its kept features are pooled as the checkpoint pools, whatever the new run asks for."""
    small = [text for text in SMALL if not text.startswith("pooling")]
    train(tmp_path / "run", *small, "pooling=gem", "pooling.p=3", "trainer.max_steps=1", "catalog.write=false")
    begun = (*small, "pooling=gem", "pooling.p=6", f"model.start={tmp_path / 'run'}")
    train(tmp_path / "head", *begun, *cached(tmp_path), "trainer.max_steps=2", "catalog.write=false")
    assert checkpoint(tmp_path / "head")["state_dict"]["network.pooling.p"].item() == pytest.approx(3, abs=0.1)
    simsearch("evaluate", f"run={tmp_path / 'head'}", f"run_dir={tmp_path / 'again'}")
    assert numbers(tmp_path / "again")["test"]["metrics"] == numbers(tmp_path / "head")["test"]["metrics"]


@pytest.mark.slow
def test_a_head_learns_on_the_frozen_backbone_of_a_run(tmp_path):
    """Its features are those of that run's weights, also where a training goes on and where it is measured again."""
    run, whole, resumed = (tmp_path / name for name in ("run", "whole", "resumed"))
    train(run, *SMALL, "trainer.max_steps=4", "catalog.write=false")
    arguments = (*SMALL, *cached(tmp_path), "model.network.hidden=12", f"model.start={run}")
    train(whole, *arguments, "trainer.max_steps=4")
    begun, got = checkpoint(run, "best")["state_dict"], checkpoint(whole)["state_dict"]
    backbone = [name for name in begun if name.startswith("network.backbone.")]
    assert len(backbone) > 20
    assert all(torch.equal(got[name], begun[name]) for name in backbone)
    kept = sorted((tmp_path / "cache").iterdir())

    train(resumed, *arguments, "trainer.max_steps=2")
    simsearch("train", "resume=true", f"run_dir={resumed}", "trainer.max_steps=4")
    assert checkpoint(resumed)["global_step"] == 4
    again = checkpoint(resumed)["state_dict"]
    assert again.keys() == got.keys()
    assert all(torch.equal(again[name], got[name]) for name in got)
    assert sorted((tmp_path / "cache").iterdir()) == kept  # the same features in all three

    simsearch("evaluate", f"run={whole}", f"run_dir={tmp_path / 'measured'}")
    assert numbers(tmp_path / "measured")["test"]["metrics"] == numbers(whole)["test"]["metrics"]
    assert_stored_codes_are_those_of_images(whole)
    start = read_json(whole / "metrics.json")["test"]["model"]
    assert start["weights"] == "trained"
    assert start["start"] == str(run)


@pytest.mark.parametrize(
    ("data", "told"),
    [({"size": 800}, True), ({"size": 1050}, False), ({}, False), ({"size": 32}, False)],  # 32: the images are small
)
def test_images_that_are_decoded_too_small_for_a_scale_are_told(data, told, capsys):
    note_small_images({"data": data, "backbone": {"size": 800}}, 1050)
    assert ("give data.size=1050" in capsys.readouterr().err) is told


@pytest.mark.slow
def test_a_start_that_saw_what_is_measured_is_told(tmp_path):
    start = ("trainer.max_steps=1", "catalog.write=false")
    train(tmp_path / "all", *SMALL, *start, "protocol=rendered-style", "protocol.validation=null")
    train(tmp_path / "some", *SMALL, *start, "protocol=rendered-style", "protocol.validation=0.2")
    again = (*SMALL, "protocol=rendered-style", "trainer.max_steps=1", "catalog.write=false")
    for begun, held_out, expected in (("all", "0.2", True), ("some", "0.2", False), ("all", "null", False)):
        run = tmp_path / f"{begun}-{held_out}"
        said = train(run, *again, f"protocol.validation={held_out}", f"model.start={tmp_path / begun}").stderr
        assert ("model.start, or what it starts from, was trained" in said) is expected


@pytest.mark.slow
def test_a_start_gives_no_tensors_of_a_second_backbone_or_of_bits_that_are_fitted(tmp_path):
    """A code's bits are fitted to this training's images, on the second backbone that its own config names."""
    two = (
        "experiment=hashing-cifar-itq", "data=rendered", "data.augment=null", "protocol=rendered-style",
        "backbone.width=24", "model.network.second.backbone.weights=random", "sampler.batch_size=8",
        "model.network.second.backbone.size=64", "model.network.binarizer.bits=8", "trainer.max_steps=1",
        f"model.cache.root={tmp_path / 'cache'}", "catalog.write=false",
    )  # fmt: skip
    train(tmp_path / "small", *SMALL, "trainer.max_steps=1", "catalog.write=false")
    train(tmp_path / "first", *two, f"model.start={tmp_path / 'small'}")
    train(tmp_path / "next", *two, f"model.start={tmp_path / 'first'}", "seed=5")
    first, following = (checkpoint(tmp_path / name)["state_dict"] for name in ("first", "next"))
    shared = [name for name in first if name.startswith("network.backbone.")]
    assert shared
    assert all(torch.equal(first[name], following[name]) for name in shared)
    own = [name for name in first if name.startswith(("network.second.backbone.", "network.code_"))]
    drawn = [name for name in own if first[name].is_floating_point() and first[name].std() > 0]
    assert len(drawn) > 20
    assert not any(torch.equal(first[name], following[name]) for name in drawn)
    about = read_json(tmp_path / "next" / "metrics.json")["test"]["model"]
    kept = saved_run.load_model(saved_run.open_run(tmp_path / "next")).network.second
    assert about["second_sha256"] == kept.provenance["sha256"]


@pytest.mark.slow
def test_a_code_of_two_networks_is_the_same_stored_measured_again_and_in_a_catalog(tmp_path):
    small, run = tmp_path / "small", tmp_path / "run"
    train(small, *SMALL, "trainer.max_steps=4", "catalog.write=false")
    train(
        run, "experiment=hashing-cifar-itq", "data=rendered", "data.augment=null", "protocol=rendered-style",
        "backbone.width=24", "model.network.second.backbone.weights=random",
        "model.network.second.backbone.size=64", "model.network.binarizer.bits=8", f"model.start={small}",
        f"model.cache.root={tmp_path / 'cache'}", "sampler.batch_size=8", "trainer.max_steps=4",
    )  # fmt: skip
    simsearch("evaluate", f"run={run}", f"run_dir={tmp_path / 'again'}")
    assert numbers(tmp_path / "again")["test"]["metrics"] == numbers(run)["test"]["metrics"]
    assert_stored_codes_are_those_of_images(run)
    facts = read_json(run / "metrics.json")["test"]["model"]
    assert (facts["start"], facts["second_weights"]) == (str(small), "random")
    kept = dict(saved_run.load_model(saved_run.open_run(run)).network.second.provenance)
    assert kept["sha256"] == facts["second_sha256"]

    catalog = open_catalog(run / "catalog")
    assert catalog.encoder.bits == 32
    picture = Image.fromarray(images(1, side=64)[0].permute(1, 2, 0).numpy())
    assert len(catalog.search(picture, k=3).ids) == 3


@pytest.mark.slow
def test_features_of_an_untrained_or_another_backbone_are_not_kept(hashed, tmp_path):
    arguments = (*SMALL, *cached(tmp_path), "trainer.max_steps=1")
    assert "name the run that trained it in model.start" in train(tmp_path / "none", *arguments, expect=1).stderr
    refused = train(tmp_path / "other", *HASHING, *cached(tmp_path), f"model.start={tmp_path / 'small'}", expect=1)
    assert "no weights at" in refused.stderr
    wide = (*arguments, "backbone.width=32")
    train(tmp_path / "small", *SMALL, "trainer.max_steps=1", "catalog.write=false")
    refused = train(tmp_path / "wide", *wide, f"model.start={tmp_path / 'small'}", expect=1).stderr
    assert re.search(r"keeps the features of a whole backbone, but \d+ of its tensors are not in .*small", refused)
