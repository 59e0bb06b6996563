"""Builds encoders from plain configs without Hydra. A `_target_` is called only if the table of trust.py allows it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from simsearch import trust
from simsearch.models.backbones import WeightsError
from simsearch.types import Encoder


def build(config: Mapping[str, Any], allowed: frozenset[str] | None) -> Any:
    """The object that a plain config describes. Nested nodes are built first.

    Args:
        config: `_target_`, an import path, and arguments by name. With `_partial_: true` the result is a
            functools.partial.
        allowed: The targets that may be called. None allows any, for configs that the user trusts.

    Raises:
        Untrusted: If a node names another target.
        WeightsError: If weights are missing or do not fit.
        ValueError: For any other error of a constructor. This message and that of WeightsError begin with the key of
            the node, such as `whitening`.

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
        raise trust.Untrusted(
            f"{key or 'the config'} wants to call {target!r}, which is not allowed; {trust.TRUST_HINT}"
        )
    given = {name: value for name, value in node.items() if name not in ("_target_", "_partial_", "_convert_")}
    values = _built(given, allowed, key)
    positional = values.pop("_args_", [])
    try:
        called = _located(str(target))
        return partial(called, *positional, **values) if node.get("_partial_") else called(*positional, **values)
    except Exception as error:  # a constructor may raise any error about its arguments
        kind = WeightsError if isinstance(error, WeightsError) else ValueError
        reason = str(error) or type(error).__name__
        raise kind(f"{key}: {reason}" if key else reason) from error


def _located(path: str) -> Any:
    """The object at an import path such as `package.module.Class`. Raises ImportError if there is none."""
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
    raise ImportError(f"{path} does not exist")


def build_encoder(config: Mapping[str, Any], *, trusted: bool = False) -> Encoder:
    """The encoder of a catalog's config with blank tensors and without a cache. The caller loads the tensors next.

    Args:
        config: The config of a catalog. It may come from somebody else.
        trusted: Whether the config may name any target. Otherwise only classes and functions of simsearch's own models
            and binarizers are allowed.

    Raises:
        Untrusted: If the config names another target and is not `trusted`.
    """
    model = _without_weights(config["model"])
    trust.follow_moves(model)
    if not trusted:
        trust.check_config({"model": model}, "the catalog's config", trust.ENCODERS)
    return build(model, None if trusted else trust.ENCODERS).eval().requires_grad_(False)


def encoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's config that builds its encoder: the network of a trained family, else the whole frozen model.

    Args:
        config: The config of a run.
    """
    model = config["model"]
    return {"model": model.get("network", model)}


def seen_otherwise(
    run: Mapping[str, Any], size: int | None, fit: str | None, scales: list[float] | None
) -> dict[str, Any]:
    """The config of a run whose encoder sees images at another size, fit or scales.

    The run's own config is not modified.

    Args:
        run: The run's plain config.
        size: Side in pixels, or None to keep it.
        fit: How images are fitted to the size, or None to keep it.
        scales: Scales of the images, or None to keep them.

    Raises:
        ValueError: If the network has no such setting.
    """
    config = copy.deepcopy(dict(run))
    network = config["model"].get("network", config["model"])
    for group, name, value in (("backbone", "size", size), ("backbone", "fit", fit), (None, "scales", scales)):
        if value is not None:
            settings = network.get(group, {}) if group else network
            if name not in settings:
                raise ValueError(f"{name}={value}: the network of this run has no setting {name}")
            settings[name] = value
    return config


def _without_weights(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_weights(value) for value in node]
    if not isinstance(node, dict):
        return node
    blank = {"weights": "random", "cache": None, "start": None}

    def stays(name: str, value: Any) -> bool:
        return name not in blank or (name == "weights" and isinstance(value, dict))  # the weights of parts

    return {name: _without_weights(value) if stays(name, value) else blank[name] for name, value in node.items()}


def device(name: str) -> torch.device:
    """The torch device of a name.

    Args:
        name: Such as "cpu" or "cuda". "auto" is the first accelerator, or the CPU if there is none.

    Raises:
        ValueError: If there is no such device.
    """
    if name != "auto":
        try:
            torch.zeros(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError, TypeError) as error:
            there = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu on this machine"
            raise ValueError(f"device={name}: give {there} ({str(error).splitlines()[0]})") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
