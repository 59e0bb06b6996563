"""What a sweep optimises: names of metrics, which of them should be large, and their values in a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from simsearch.files import read_json

_COSTS = (
    "bytes_per_item",
    "_s",
    "seconds_per_query",
    "_ms_p50",
    "_ms_p95",
    "_ms_p99",
    "_ms",
    "ms_per_query",
    "code/correlation",
    "code/dead_bits",
    "code/quantisation_error",
    "code/empty_ball@2",
)  # endings of metrics that should be small


def names_of(objective: Any) -> list[str]:
    """The names of the metrics that a sweep optimises.

    Args:
        objective: A name, several, or None.
    """
    return [objective] if isinstance(objective, str) else list(objective or [])


def check(config: DictConfig) -> None:
    """Checks that this training will measure the `objective`.

    Args:
        config: The composed config.

    Raises:
        ValueError: If it will not.
    """
    names = names_of(config.objective)
    if not names:
        return
    from simsearch import settings  # takes seconds; who only looks at a sweep goes without

    values = {
        key: OmegaConf.to_container(config[key], resolve=True) for key in ("callbacks", "index", "model", "protocol")
    }
    known = settings.measured_names(values)
    for name in names:
        unheld = name.startswith("val/") and not settings.may_validate(values)
        if unheld or (known and name not in known):
            raise ValueError(f"objective={name} will not be measured{settings.name_hint(name, known)}")


def directions(names: Sequence[str], given: Any) -> Any:
    """What a sweeper does with each objective.

    Args:
        names: Names of the objectives.
        given: The sweeper's direction: a word, a list of them, or None, which maximises what is better when it is
            larger.

    Returns:
        A word for one objective, a list for several.

    Raises:
        ValueError: If a direction is no such word, or their number differs from the number of objectives.
    """
    several = OmegaConf.is_list(given) or isinstance(given, list)
    said = list(given) if several else [given] * len(names)
    if not several and given is None:
        said = ["minimize" if is_cost(name) else "maximize" for name in names]
    if len(said) != len(names) or not {"minimize", "maximize"}.issuperset(said):
        raise ValueError(
            f"hydra.sweeper.direction={said} is for {len(said)} objectives, but objective names {len(names)}: "
            "give as many directions (minimize or maximize), or none"
        )
    return said if len(said) > 1 else said[0]


def is_cost(name: str) -> bool:
    """Whether smaller values of a metric are better: bytes, seconds, milliseconds and defects of codes.

    Args:
        name: Name of the metric.

    Example:
        >>> is_cost("val/bytes_per_item"), is_cost("test/index/queries_per_s"), is_cost("val/mAP")
        (True, False, False)
    """
    return name.endswith(_COSTS) and not name.endswith("per_s")


def values_of(folder: Path, names: str | Sequence[str] | None) -> Any:
    """The values of a finished run that a sweeper optimises: a float for one name, a list for several, None for none.

    Args:
        folder: The run directory.
        names: Names of metrics, such as `val/mAP`, or None.

    Raises:
        ValueError: If a metric was not measured or has no value.
    """
    if names is None:
        return None
    stages = read_json(folder / "metrics.json")
    known = {f"{stage}/{name}": value for stage, about in stages.items() for name, value in about["metrics"].items()}

    def value(name: str) -> float:
        if name in known and known[name] is None:
            raise ValueError(f"objective={name} was measured without a value in {folder}: it is null in metrics.json")
        if name not in known:
            from simsearch import settings

            raise ValueError(f"objective={name} was not measured{settings.name_hint(name, known)}")
        return float(known[name])

    return value(names) if isinstance(names, str) else [value(name) for name in names]
