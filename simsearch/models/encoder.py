"""Encoders from plain configs, without Hydra: each `_target_` is called by name, if the table of trust.py has it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from simsearch import trust
from simsearch.models.backbones import WeightsError
from simsearch.types import Encoder


def build(config: Mapping[str, Any], allowed: frozenset[str] | None) -> Any:
    """Returns the object that a plain config describes, its nested nodes built first.

    Args:
        config: `_target_`, an import path, and arguments by name; with `_partial_: true` a functools.partial.
        allowed: The targets that may be called; None for any, which is for configs that the user trusts.

    Raises:
        Untrusted: Where a node names another target.
        WeightsError: Where weights cannot be had.
        ValueError: Whatever else a constructor raises. Either is led by the node's key, such as `whitening`.

    Example:
        >>> build({"_target_": "simsearch.models.pooling.GeM", "p": 4.0}, trust.ENCODERS)
        GeM(p=4)
    """
    return _built(dict(config), allowed, "")


def _built(node: Any, allowed: frozenset[str] | None, key: str) -> Any:
    if isinstance(node, list):
        return [_built(value, allowed, f"{key}[{i}]") for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {name: _built(value, allowed, f"{key}.{name}" if key else name) for name, value in node.items()}
    target = node["_target_"]
    if allowed is not None and not (isinstance(target, str) and target in allowed):
        raise trust.Untrusted(f"{key or 'the config'} wants to call {target!r}, which is not allowed; {trust.MEND}")
    given = {name: value for name, value in node.items() if name not in ("_target_", "_partial_", "_convert_")}
    values = _built(given, allowed, key)
    positional = values.pop("_args_", [])
    try:
        called = _located(str(target))
        return partial(called, *positional, **values) if node.get("_partial_") else called(*positional, **values)
    except Exception as error:  # a constructor may raise anything about what the config says
        kind = WeightsError if isinstance(error, WeightsError) else ValueError
        reason = str(error) or type(error).__name__
        raise kind(f"{key}: {reason}" if key else reason) from error


def _located(path: str) -> Any:
    """What an import path such as `package.module.Class` names. Raises ImportError where there is nothing."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found: Any = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue  # a class, not a module
            raise
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"there is no {path}")


def build_encoder(config: Mapping[str, Any], *, trusted: bool = False) -> Encoder:
    """Returns the encoder of a catalog's config on blank tensors, without a cache, for tensors that are loaded next.

    The config may come from a stranger's catalog: raises Untrusted where it names anything but the classes and
    functions of simsearch's own models and binarizers, unless it is `trusted`.
    """
    model = _without_weights(config["model"])
    trust.follow_moves(model)
    if not trusted:
        trust.check_config({"model": model}, "the catalog's config", trust.ENCODERS)
    return build(model, None if trusted else trust.ENCODERS).eval().requires_grad_(False)


def encoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a run's config builds its encoder: a trained family's network, the whole frozen model."""
    model = config["model"]
    return {"model": model.get("network", model)}


def _without_weights(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_weights(value) for value in node]
    if not isinstance(node, dict):
        return node
    blank = {"weights": "random", "cache": None, "start": None}

    def stays(name: str, value: Any) -> bool:
        return name not in blank or (name == "weights" and isinstance(value, dict))  # those of parts

    return {name: _without_weights(value) if stays(name, value) else blank[name] for name, value in node.items()}


def device(name: str) -> torch.device:
    """The device of that name; "auto" is the first accelerator, else the CPU. Raises ValueError where it is none."""
    if name != "auto":
        try:
            torch.zeros(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError, TypeError) as error:
            there = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu on this machine"
            raise ValueError(f"device={name}: give {there} ({str(error).splitlines()[0]})") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
