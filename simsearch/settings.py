"""Checks a training's config. A bad one is refused in one line, before a folder is made."""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from simsearch import trust
from simsearch.evaluation.evaluate import metric_names
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.trained import plateau_monitor

# Upper bounds under smoke=true, for keys that the config has.
FEW = {
    "trainer.max_steps": 8,
    "trainer.check_val_every_n_epoch": 1,
    "sampler.batch_size": 32,
    "sampler.classes": 4,
    "sampler.images": 4,
    "sampler.triplets": 8,
    "sampler.batches": 2,
    "callbacks.mining.pool": 256,
}
_SMOKE = "smoke=true runs any experiment on few images and few steps"
# Settings of the Trainer that prevent an evaluation of whole tasks: the value that works, and what to do.
_WHOLE: dict[str, tuple[Any, str]] = {
    "fast_dev_run": (False, _SMOKE),
    "overfit_batches": (0, f"trainer.limit_train_batches=1 trains on one batch of each epoch, and {_SMOKE}"),
    "limit_val_batches": (1.0, f"a part of a gallery gives another ranking; {_SMOKE}"),
    "limit_test_batches": (1.0, f"a part of a gallery gives another ranking; {_SMOKE}"),
    "barebones": (False, "a run needs its checkpoints and logs"),
    "enable_checkpointing": (True, "the test measures the best checkpoint"),
}
_PRECISIONS = {"bf16-true": "bf16-mixed", "16-true": "16-mixed", "bf16": "bf16-mixed", "16": "16-mixed"}
_INSTEAD = {
    "pytorch_lightning.callbacks.LearningRateFinder": "sweep the rate, -m optimizer.lr=0.001,0.01,0.1",
    "pytorch_lightning.callbacks.BatchSizeFinder": "sweep the size, -m sampler.batch_size=64,128,256",
    "pytorch_lightning.callbacks.BackboneFinetuning": "use callbacks=frozen-backbone",
}


def check_training(config: Mapping[str, Any]) -> None:
    """Checks that a config of `simsearch train` asks only for what our training supports.

    Args:
        config: The plain config.

    Raises:
        ValueError: If it does not. The message names the key, the rule and what to do instead.
    """
    seed = config["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: give a whole number from 0 to {2**32 - 1}, so that the run can be repeated")
    check_values(config)
    known = any(find_spec(name) for name in ("tensorboard", "tensorboardX"))
    if config["logger"].get("tensorboard") and not known:
        raise ValueError("logger.tensorboard=true needs the package tensorboard: pip install 'simsearch[tensorboard]'")
    trainer = config["trainer"]
    for name, (whole, hint) in _WHOLE.items():
        value = trainer.get(name)
        batches = isinstance(whole, float) and isinstance(value, int)  # 1 is one batch, 1.0 all of them
        if value is not None and (value != whole or batches):
            raise ValueError(f"trainer.{name}={value} prevents the measurement of whole tasks: {hint}")
    if (batches := trainer.get("accumulate_grad_batches", 1)) < 1:
        raise ValueError(f"trainer.accumulate_grad_batches={batches}: give 1 batch or more")
    if (precision := str(trainer.get("precision"))) in _PRECISIONS:
        raise ValueError(
            f"trainer.precision={precision} keeps the weights themselves in 16 bits, which hardly train: "
            f"give {_PRECISIONS[precision]}, or 32-true"
        )
    if precision == "64-true":
        raise ValueError("trainer.precision=64-true does not fit backbones, which give 32 bits: give 32-true")
    for name, lost in (("evaluation", "nothing would be measured"), ("checkpoint", "there would be nothing to test")):
        if not config["callbacks"].get(name):
            raise ValueError(f"callbacks.{name}=null: {lost}; keep this callback")
    for name, node in config["callbacks"].items():
        if node and (instead := _INSTEAD.get(str(node.get("_target_")))):
            raise ValueError(
                f"callbacks.{name}: {node['_target_'].rpartition('.')[2]} does not work with these models: {instead}"
            )
    _check_length(config)
    _check_monitors(config)


def _check_length(config: Mapping[str, Any]) -> None:
    """Checks that a training by gradient has a length of its own, and that a fit sees all images."""
    trainer, model = config["trainer"], config["model"]
    if model.get("optimizer"):
        if trainer.get("max_epochs") == 1 and "accumulate_grad_batches" not in trainer:  # of trainer=default
            raise ValueError(
                "trainer=default, cpu, gpu and ddp make one pass, for models that fit without gradients: give "
                "trainer=training (several devices: training-ddp), with trainer.accelerator=gpu if you like; for one "
                "pass by gradient, add +trainer.accumulate_grad_batches=1"
            )
    elif model["_target_"] in trust.ALLOWED:
        last = config["callbacks"].get("last") or {}
        limits = {
            "trainer.max_steps": trainer.get("max_steps"),
            "callbacks.last.every_n_train_steps": last.get("every_n_train_steps"),
        }
        for key, value in limits.items():
            if value is not None and value >= 0:
                raise ValueError(
                    f"{key}={value} cuts the one pass by which this model is fitted, and which begins anew if it is "
                    f"stopped: leave {key} out"
                )


def check_values(config: Mapping[str, Any]) -> None:
    """Checks the types in a config against the constructors of our classes, such as text in place of a number.

    Targets outside trust.ALLOWED are not looked at.

    Args:
        config: The plain config.

    Raises:
        ValueError: If a value has a type that the constructor's signature does not accept.
    """
    for key, node in trust.built(config):
        if node["_target_"] not in trust.ALLOWED:
            continue
        module, _, name = node["_target_"].rpartition(".")
        wanted = getattr(importlib.import_module(module), name)
        try:
            hints = get_type_hints(wanted.__init__ if inspect.isclass(wanted) else wanted)
        except (NameError, TypeError):  # not there where types are not checked
            continue
        for argument, value in node.items():
            kinds = {kind for kind in _members(hints.get(argument, Any)) if kind is not type(None)}
            if not isinstance(value, str | float) or not kinds or not kinds <= {int, float, bool, Tensor}:
                continue
            if isinstance(value, str) or (kinds == {int} and not value.is_integer()):
                kind = "a number" if float in kinds else "true or false" if kinds == {bool} else "a whole number"
                raise ValueError(f"{key}.{argument}={value}: {name} takes {kind}")


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _check_monitors(config: Mapping[str, Any]) -> None:
    measured = measured_names(config)
    watchers = {f"callbacks.{name}": node for name, node in config["callbacks"].items() if node}
    scheduler = config["model"].get("scheduler")
    if scheduler and str(scheduler.get("_target_")).endswith("ReduceLROnPlateau"):
        watchers["scheduler"] = {"monitor": plateau_monitor(scheduler.get("mode", "min"))}
    logged = {"train/loss", "train/images_per_s", "train/data_share", "epoch", "step"}
    logged |= {name for name in measured if name.startswith("val/")}
    for where, node in watchers.items():
        name = node.get("monitor")
        checkpoint = str(node.get("_target_")).endswith("ModelCheckpoint")
        saves = node.get("save_on_train_epoch_end") or may_validate(config)
        if checkpoint and name is not None and not name.startswith("val/") and not saves:
            raise ValueError(
                f"{where} watches {name}, but saves at validations, and no images are held out: give "
                f"{where}.save_on_train_epoch_end=true"
            )
        if name is None or name in logged:
            continue
        if name.startswith("val/") and not may_validate(config):
            if checkpoint:
                continue  # a training without a validation keeps its last checkpoint
        elif not measured:
            continue
        raise ValueError(f"{where} watches {name}, which is not logged{name_hint(name, logged)}")


def name_hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown metric: what to write instead.

    Args:
        name: The unknown name.
        known: The known names.
    """
    known = sorted(known)
    if name.startswith("val/") and not any(text.startswith("val/") for text in known):
        return ": no images are held out for validation, give protocol.validation=0.1"
    near = difflib.get_close_matches(name, known, n=3) + [text for text in known if text.endswith("/mAP")]
    return f"; there are {', '.join(dict.fromkeys(near))}, among others"


def may_validate(config: Mapping[str, Any]) -> bool:
    """Whether the protocol may hold images out for a validation. True for a protocol of somebody else's.

    Args:
        config: The plain config; `protocol` is used.
    """
    protocol = config["protocol"]
    return protocol["_target_"] not in trust.ALLOWED or protocol.get("validation") is not None


def measured_names(config: Mapping[str, Any]) -> set[str]:
    """The names of all metrics that the stages will measure, such as `val/mAP`.

    Empty if a foreign class or a further evaluator may measure more.

    Args:
        config: The plain config; `callbacks`, `index`, `model` and `protocol` are used.
    """
    parts = {name: config[name] for name in ("callbacks", "index", "model", "protocol")}
    if not all(target in trust.ALLOWED for _, target in trust.targets(parts)):
        return set()
    if config["index"]["_target_"].endswith("AutoIndex"):  # of codes or of float vectors
        return set()
    names = set()
    index = {name: value for name, value in config["index"].items() if name != "_target_"}
    for node in config["callbacks"].values():
        if node and node["_target_"].endswith("RetrievalEvaluation"):
            codes = FaissIndex(**index).is_binary
            if node.get("evaluators"):
                return set()
            rerank = node.get("rerank") is not None
            order = bool(config["protocol"].get("index_order"))  # of the test alone
            tested = metric_names(node["ks"], codes=codes, rerank=rerank, index_order=order)
            names |= {f"test/{name}" for name in tested}
            names |= (
                {f"val/{name}" for name in metric_names(node["ks"], codes=codes)} if may_validate(config) else set()
            )
    return names
