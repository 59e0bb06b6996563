"""The search space of a sweep, from Hydra's overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

if TYPE_CHECKING:
    import optuna


def distributions(
    params: Mapping[str, Any] | None, overrides: Sequence[str], loader: ConfigLoader | None = None
) -> tuple[dict[str, optuna.distributions.BaseDistribution], list[str]]:
    """The search space of a sweep, and the overrides that all its trials share.

    Args:
        params: The sweeper's `params`, or None.
        overrides: Overrides of the command line. They take the place of `params` of the same key.
        loader: Finds the options of a group, which glob(*) chooses among.

    Raises:
        ValueError: If a range or an interval is empty.
    """
    parsed = _parsed(params, overrides, loader)
    swept = {str(one.get_key_element()): _distribution(one) for one in parsed if one.is_sweep_override()}
    shared = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
    return swept, shared


def plan(
    params: Mapping[str, Any] | None, overrides: Sequence[str], loader: ConfigLoader | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """The keys that a sweep varies, with their values, and the overrides that its trials share.

    An interval has no values. The product of the numbers of values is the number of jobs of Hydra's basic sweeper.

    Args:
        params: The sweeper's `params`, or None.
        overrides: Overrides of the command line.
        loader: Finds the options of a group, which glob(*) chooses among.
    """
    parsed = _parsed(params, overrides, loader)
    swept = {
        str(override.get_key_element()): list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        for override in parsed
        if override.is_sweep_override()
    }
    shared = [  # as the basic sweeper writes them
        f"{override.get_key_element()}={override.get_value_element_as_str()}"
        for override in parsed
        if not override.is_sweep_override()
    ]
    return swept, shared


def _parsed(params: Mapping[str, Any] | None, overrides: Sequence[str], loader: ConfigLoader | None) -> list[Override]:
    """The overrides of a sweep; those of the command line take the place of `params` of the same key."""
    arguments = {name: f"{name}={value}" for name, value in (params or {}).items()}
    arguments |= {text.partition("=")[0]: text for text in overrides}
    return OverridesParser.create(config_loader=loader).parse_overrides(list(arguments.values()))


def _distribution(override: Override) -> optuna.distributions.BaseDistribution:
    from optuna import distributions as kinds

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        log = "log" in value.tags
        try:
            if isinstance(low, int) and isinstance(high, int):
                return kinds.IntDistribution(low, high, log=log)
            return kinds.FloatDistribution(float(low or 0), float(high or 0), log=log)
        except ValueError as error:
            raise ValueError(f"{override.input_line}: {error}") from error
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers = sorted(float(text) for text in override.sweep_string_iterator())
        if not numbers:
            raise ValueError(f"{override.input_line}: the range is empty")
        step = abs(value.step)
        if all(isinstance(number, int) for number in (value.start, value.stop, value.step)):
            return kinds.IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(step))
        return kinds.FloatDistribution(numbers[0], numbers[-1], step=float(step))
    return kinds.CategoricalDistribution(list(override.sweep_string_iterator()))


def point(
    space: Mapping[str, optuna.distributions.BaseDistribution], overrides: Sequence[str]
) -> dict[str, Any] | None:
    """The parameters that a trial's overrides stand for. None if they do not lie in the search space.

    Args:
        space: The search space.
        overrides: The overrides.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    given = dict(text.split("=", 1) for text in overrides if "=" in text)
    found = {}
    for name, distribution in space.items():
        try:
            text = given[name]
            value: Any = text
            if not isinstance(distribution, CategoricalDistribution):
                value = int(text) if isinstance(distribution, IntDistribution) else float(text)
            if not distribution._contains(distribution.to_internal_repr(value)):
                return None
        except (LookupError, ValueError):
            return None
        found[name] = value
    return found
