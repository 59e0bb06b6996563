"""Evaluation protocols: the rows of a collection for training, queries and gallery, and what is relevant.

A draw ranks rows by seeded random keys, one key for each row, taken from the raw output of NumPy's PCG64. This stream
is the same on every platform and in every version of NumPy, unlike the methods of numpy.random.Generator. ByHash draws
by SHA-256 of names instead, for collections that grow. Rows without a value of the attribute are left out. Row lists
are sorted.

A protocol names its sampling unit, which confidence intervals and tests resample: the thing that other data of the kind
would have new examples of. If a split keeps artists or works apart, these are the units. If test images are
independent, each query is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from simsearch.data.collection import Collection
from simsearch.types import RetrievalTask


@dataclass(frozen=True)
class Split:
    """Rows to train on, and the tasks of validation and test.

    Attributes:
        train: int64 (N,), sorted collection rows.
        validation: The task for choosing models, drawn from the training part. None if all of that part trains.
        test: The task that is reported.

    Raises:
        ValueError: If a query of either task is a training row, or validation and test share a query.
    """

    train: Tensor
    validation: RetrievalTask | None
    test: RetrievalTask

    def __post_init__(self) -> None:
        held = self.train[:0] if self.validation is None else self.validation.query
        train, validation, test = (t.numpy() for t in (self.train, held, self.test.query))
        for first, second, what in (
            (train, test, "test queries are training rows"),
            (train, validation, "validation queries are training rows"),
            (validation, test, "validation queries are test queries"),
        ):
            shared = np.intersect1d(first, second)
            if len(shared):
                raise ValueError(f"{len(shared)} {what}, first row {shared[0]}: the protocol must keep them apart")


class RetrievalProtocol(Protocol):
    """The interface of a protocol.

    Attributes:
        name: Name in reports.
    """

    name: str

    def split(self, collection: Collection) -> Split:
        """The split of a collection, the same in every process.

        Args:
            collection: The collection.

        Raises:
            ValueError: If the protocol does not fit the collection.
        """
        ...


@dataclass(frozen=True)
class OfficialSplit:
    """The official training and test parts. Every test image is a query.

    Attributes:
        name: Name in reports.
        gallery: "train" searches the training images (10k-50k), "test" the test images themselves (the DSH release).
        exclude_self: Whether a query's own row is left out of its ranking. Otherwise P@1 and R@k count it.
        index_order: Whether codes are also measured with ties broken by gallery order.
        validation: Fraction of each class's training rows, in (0, 1), that become validation queries. None trains on
            all.
        attribute: The attribute that makes items relevant.
        seed: Seed of the draw, from 0.

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    name: str
    gallery: Literal["train", "test"]
    exclude_self: bool
    index_order: bool = False
    validation: float | None = 0.1
    attribute: str = "class"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gallery not in ("train", "test"):
            raise ValueError(f"gallery={self.gallery!r} is unknown: use 'train' or 'test'")
        if self.validation is not None:
            _check_share("validation", self.validation)
        _check_seed(self.seed)

    def split(self, collection: Collection) -> Split:
        """The split of a collection with a test part.

        Args:
            collection: The collection.

        Raises:
            ValueError: If it has no test part or lacks the attribute.
        """
        values = _values(collection, self.attribute, self.name)
        train, test = _official_parts(collection, values, self.name)
        kept, validation = _validation(collection, self.name, train, self.attribute, self.validation, self.seed)
        gallery = test if self.gallery == "test" else train
        task = _task(collection, self.name, test, gallery, self.attribute, None, self.exclude_self)
        return Split(kept, validation, replace(task, index_order=self.index_order))


@dataclass(frozen=True)
class SampledSplit:
    """Queries and training rows drawn for each class from the whole collection. The other rows are the gallery.

    Attributes:
        name: Name in reports.
        train_in_gallery: Whether the gallery also holds the training rows (1k-59k) or not (1k-54k).
        queries_per_class: Queries drawn for each class, from 1.
        train_per_class: Training rows drawn for each class, from 2.
        validation: Fraction of each class's training rows, in (0, 1), that become validation queries. In the test
            gallery they are treated like the other training rows. None trains on all.
        attribute: The attribute that makes items relevant.
        seed: Seed of the draw, from 0.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str
    train_in_gallery: bool
    queries_per_class: int = 100
    train_per_class: int = 500
    validation: float | None = 0.1
    attribute: str = "class"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, least in (("queries_per_class", 1), ("train_per_class", 2)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)} is too small: use {least} or more")
        if self.validation is not None:
            _check_share("validation", self.validation)
        _check_seed(self.seed)

    def split(self, collection: Collection) -> Split:
        """The split of a collection.

        Args:
            collection: The collection.

        Raises:
            ValueError: If a class has too few images, or the attribute is missing.
        """
        values = _values(collection, self.attribute, self.name)
        rows = np.flatnonzero(values >= 0)
        drawn = self.queries_per_class + self.train_per_class
        for value, count in zip(*np.unique(values[rows], return_counts=True), strict=True):
            if count < drawn:
                raise ValueError(
                    f"protocol {self.name} draws {drawn} images per class, but "
                    f"{_class(collection, self.attribute, value)} has {count}: "
                    "lower queries_per_class or train_per_class"
                )
        rank = _rank(rows, values[rows], self.seed, "sample")
        query, train = (
            rows[rank < self.queries_per_class],
            rows[(rank >= self.queries_per_class) & (rank < drawn)],
        )
        gallery = rows[rank >= (self.queries_per_class if self.train_in_gallery else drawn)]
        kept, validation = _validation(collection, self.name, train, self.attribute, self.validation, self.seed)
        return Split(kept, validation, _task(collection, self.name, query, gallery, self.attribute, None, True))


@dataclass(frozen=True)
class UnseenClasses:
    """Held-out classes search among themselves. Training sees only the other classes.

    The task is named `<name>/<fold>`. Report the mean over folds. The sampling unit is the query: an interval holds for
    new images of the fold's classes. Only the spread between folds shows how results vary over classes.

    Attributes:
        name: Name in reports.
        folds: Disjoint groups of class numbers.
        fold: The group that is held out. Its test images are the queries, its training images the gallery.
        validation: Fraction of each remaining class's training rows, in (0, 1), that become validation queries. None
            trains on all.
        attribute: The attribute that makes items relevant.
        seed: Seed of the draw, from 0.

    Raises:
        ValueError: If folds overlap or are empty, or a value is out of range.

    Source:
        Sablayrolles, Douze, Usunier, Jégou: How should we evaluate supervised hashing? ICASSP 2017 (arXiv 2016).
    """

    name: str = "unseen-classes"
    folds: tuple[tuple[int, ...], ...] = ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    fold: int = 0
    validation: float | None = 0.1
    attribute: str = "class"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "folds", tuple(tuple(int(c) for c in fold) for fold in self.folds))
        if not 0 <= self.fold < len(self.folds):
            raise ValueError(
                f"fold={self.fold} is not one of the {len(self.folds)} folds: use 0..{len(self.folds) - 1}"
            )
        held = [c for fold in self.folds for c in fold]
        if not all(self.folds):
            raise ValueError(f"folds={self.folds} has an empty fold: hold out at least one class in each")
        twice = sorted({c for c in held if held.count(c) > 1})
        if twice:
            raise ValueError(f"folds overlap in the classes {twice}: hold each class out once")
        if self.validation is not None:
            _check_share("validation", self.validation)
        _check_seed(self.seed)

    def split(self, collection: Collection) -> Split:
        """The split of a collection with a test part.

        Args:
            collection: The collection.

        Raises:
            ValueError: If a held-out class is unknown or lacks images, or the collection does not fit.
        """
        name = f"{self.name}/{self.fold}"
        values = _values(collection, self.attribute, name)
        known = len(collection.classes[collection.attributes.index(self.attribute)])
        unknown = [c for c in self.folds[self.fold] if not 0 <= c < known]
        if unknown:
            raise ValueError(
                f"protocol {name} holds out the classes {unknown}, but {collection.name} has 0..{known - 1}: "
                "correct the folds"
            )
        train, test = _official_parts(collection, values, name)
        held = np.array(self.folds[self.fold], dtype=np.int64)
        query, gallery = test[np.isin(values[test], held)], train[np.isin(values[train], held)]
        for value in self.folds[self.fold]:
            if value not in values[query] or value not in values[gallery]:
                raise ValueError(
                    f"protocol {name} holds out {_class(collection, self.attribute, value)}, which has "
                    "no test or no training images: use a larger part of the data or other folds"
                )
        seen = train[~np.isin(values[train], held)]
        kept, validation = _validation(collection, name, seen, self.attribute, self.validation, self.seed)
        return Split(kept, validation, _task(collection, name, query, gallery, self.attribute, None, True))


@dataclass(frozen=True)
class ByAttribute:
    """Groups (works) divided into training, validation and evaluation, for collections without a test part.

    One item of each group of a part is a query. All items of the part are its gallery. The query's own row is excluded.

    Attributes:
        name: Name in reports.
        attribute: The attribute that makes items relevant.
        junk: An attribute. Items that share its value with the query are left out of the ranking. None for no such
            rule.
        group: An attribute. No value of it is in two parts. None makes each image a group of its own.
        evaluation: Fraction of the groups, in (0, 1).
        validation: Fraction of the groups, in (0, 1); with `evaluation` less than 1. None trains on all groups that are
            not evaluated.
        seed: Seed of the draw, from 0.
        unit: The sampling unit, an attribute or "query". None for the group. Name the artist if works of one artist
            search each other.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str
    attribute: str
    junk: str | None
    group: str | None = "work"
    evaluation: float = 0.5
    validation: float | None = 0.2
    seed: int = 0
    unit: str | None = None

    def __post_init__(self) -> None:
        _check_shares(self.evaluation, self.validation)
        _check_seed(self.seed)

    def split(self, collection: Collection) -> Split:
        """The split of a collection.

        Args:
            collection: The collection.

        Raises:
            ValueError: If an attribute is missing or there are too few groups.
        """
        values = _values(collection, self.attribute, self.name)
        groups = np.arange(len(values)) if self.group is None else _values(collection, self.group, self.name)
        if self.junk is not None:
            _values(collection, self.junk, self.name)
        rows = np.flatnonzero((values >= 0) & (groups >= 0))
        present = np.unique(groups[rows])
        rank = _rank(present, np.zeros_like(present), self.seed, "groups")
        evaluated = round(self.evaluation * len(present))
        validated = evaluated + round((self.validation or 0) * len(present))
        unit = self.unit or self.group or "query"
        units = _units(collection, unit, self.name)
        empty = self.validation is not None and evaluated == validated
        if empty or not 0 < evaluated <= validated < len(present):
            raise ValueError(
                f"protocol {self.name} divides {len(present)} values of {self.group or 'row'!r} into {evaluated} "
                f"for evaluation, {validated - evaluated} for validation, {len(present) - validated} for "
                "training: each part needs one; use a larger collection or other shares"
            )

        def part(name: str, chosen: np.ndarray) -> RetrievalTask:
            gallery = rows[np.isin(groups[rows], chosen)]
            query = gallery[_rank(gallery, groups[gallery], self.seed, "queries") == 0]
            task = _task(collection, name, query, gallery, self.attribute, self.junk, True)
            return replace(task, unit=unit, units=units)

        held = present[(rank >= evaluated) & (rank < validated)]
        return Split(
            torch.from_numpy(rows[np.isin(groups[rows], present[rank >= validated])]),
            None if self.validation is None else part(f"{self.name}/val", held),
            part(self.name, present[rank < evaluated]),
        )


@dataclass(frozen=True)
class ByHash:
    """Names (of artists, of works) divided into training, validation and evaluation by hash, for growing collections.

    Adding images never changes the split of existing ones, unless an added image joins two names.

    Images connected through a shared part or work, also through other images, form one group. Its name is the
    alphabetically first of its parts, or of its works if no part is known, or else the path of the image. The split
    does not depend on which other attribute is relevant or which rows lack it: protocols for artist and for style with
    the same part, work, fractions and seed train on the same artists.

    All items of a part of the data are its gallery. An item is a query if it has at least `least` relevant items there,
    without junk and itself. So images of a rare artist are in the gallery of whatever part they fall in, but are never
    queries.

    Attributes:
        name: Name in reports.
        attribute: The attribute that makes items relevant.
        part: An attribute, such as the artist. No value of it is in two parts of the data. None if only `work` is kept
            together.
        junk: An attribute. Items that share its value with the query are left out of the ranking. None for no such
            rule.
        work: An attribute for photographs and near-duplicates of one work. No value of it is in two parts of the data.
            None makes each image a work of its own.
        evaluation: Expected fraction of the names, in (0, 1). 1 with validation=None evaluates a whole collection that
            nothing is trained on, to measure runs trained on other data.
        validation: Expected fraction of the names, in (0, 1); with `evaluation` less than 1. None trains on all names
            that are not evaluated.
        least: Number of relevant items that a query needs. With 0, items that have none are queries too: distractors.
        most_queries: Number of queries of each class, at most, chosen by smallest hash. None for all.
        seed: Seed of the hash, from 0.
        unit: The sampling unit, an attribute or "query". None for the names; the unit is then called after `part`, or
            `work` without a part.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str
    attribute: str
    part: str | None
    junk: str | None
    work: str | None = "work"
    evaluation: float = 0.5
    validation: float | None = 0.2
    least: int = 2
    most_queries: int | None = None
    seed: int = 0
    unit: str | None = None

    def __post_init__(self) -> None:
        _check_shares(self.evaluation, self.validation, whole=True)
        _check_seed(self.seed)
        for field, fewest in (("least", 0), ("most_queries", 1)):
            if (value := getattr(self, field)) is not None and value < fewest:
                raise ValueError(f"{field}={value} is too few: use {fewest} or more")

    def split(self, collection: Collection) -> Split:
        """The split of a collection.

        Args:
            collection: The collection.

        Raises:
            ValueError: If an attribute is missing, or a part of the data has no query or no row.
        """
        values = _values(collection, self.attribute, self.name)
        apart = dict.fromkeys(attribute for attribute in (self.part, self.work) if attribute is not None)
        names, named = _names_apart(collection, [*apart], self.name)
        place = _hashed(names, self.seed, "part")[named]
        held = self.evaluation + (self.validation or 0)
        units = torch.from_numpy(named) if self.unit is None else _units(collection, self.unit, self.name)
        known = values >= 0
        train = np.flatnonzero(known & (place >= held))
        if not len(train) and self.evaluation < 1:
            raise ValueError(
                f"protocol {self.name} leaves none of the {known.sum()} images of {collection.name} to train on: "
                "use a larger collection, other shares or another seed"
            )
        validation = None
        if self.validation is not None:
            rows = np.flatnonzero(known & (place >= self.evaluation) & (place < held))
            validation = self._task(collection, f"{self.name}/val", rows, values, units)
        test = self._task(collection, self.name, np.flatnonzero(known & (place < self.evaluation)), values, units)
        return Split(torch.from_numpy(train), validation, test)

    def _task(
        self, collection: Collection, name: str, rows: np.ndarray, values: np.ndarray, units: Tensor | None
    ) -> RetrievalTask:
        """The task in which the rows of one part search among themselves."""
        label = values[rows]
        relevant = np.bincount(label, minlength=1)[label] - 1
        if self.junk is not None:
            junk = _values(collection, self.junk, self.name)[rows]
            both = label * (junk.max(initial=-1) + 2) + junk + 1
            _, pair, count = np.unique(both, return_inverse=True, return_counts=True)
            relevant = np.where(junk < 0, relevant, relevant + 1 - count[pair])
        asks = relevant >= self.least
        if not asks.any():
            raise ValueError(
                f"protocol {name} has no query: none of its {len(rows)} images has least={self.least} relevant ones "
                f"among them (same {self.attribute}{f', another {self.junk}' if self.junk else ''}); lower least, "
                "or use a larger collection, other shares or another seed"
            )
        query = rows[asks]
        if self.most_queries is not None:
            key = _hashed([collection.path(row) for row in query.tolist()], self.seed, "query")
            query = query[_rank_by(key, values[query]) < self.most_queries]
        task = _task(collection, name, query, rows, self.attribute, self.junk, True)
        return replace(task, unit=self.unit or self.part or self.work or "query", units=units)


def drop_rows(task: RetrievalTask, rows: Tensor, suffix: str) -> RetrievalTask:
    """The same task without some rows among its queries and its gallery, named `<name><suffix>`.

    The fingerprint depends on the task's own and the remaining rows. It is unchanged if nothing was dropped.

    Args:
        task: The task.
        rows: int64 (N,), collection rows. Rows that the task lacks are ignored.
        suffix: Suffix of the name.

    Raises:
        ValueError: If no query or no gallery row remains.
    """
    dropped = rows.numpy()
    query, gallery = (t.numpy()[~np.isin(t.numpy(), dropped)] for t in (task.query, task.gallery))
    name = task.name + suffix
    _check_rows(name, query, gallery)
    fingerprint = task.fingerprint
    if len(query) < len(task.query) or len(gallery) < len(task.gallery):
        fingerprint = _fingerprint(task.fingerprint, query, gallery)
    return replace(
        task,
        name=name,
        query=torch.from_numpy(query),
        gallery=torch.from_numpy(gallery),
        fingerprint=fingerprint,
    )


@dataclass(frozen=True)
class Everything:
    """A protocol for a whole collection that is only described. Nothing is used for training.

    Attributes:
        name: Name of the protocol.
    """

    name: str = "everything"

    def split(self, collection: Collection) -> Split:
        """The split of a collection, without a training part.

        Args:
            collection: The collection.
        """
        rows, attribute = torch.arange(len(collection)), collection.attributes[0]
        return Split(rows[:0], None, RetrievalTask(self.name, rows, rows, attribute, None, True, ""))


@dataclass(frozen=True)
class WithoutRows:
    """Another protocol whose test lacks some rows, such as queries with near-duplicates in the gallery.

    Attributes:
        protocol: The other protocol. Its training and validation are unchanged.
        rows: int64 (N,), collection rows to leave out.
        suffix: Suffix of the name.
    """

    protocol: RetrievalProtocol
    rows: Tensor
    suffix: str = "-without"

    @property
    def name(self) -> str:
        """Name in reports."""
        return self.protocol.name + self.suffix

    def split(self, collection: Collection) -> Split:
        """The split of the other protocol, with a smaller test.

        Args:
            collection: The collection.

        Raises:
            ValueError: If nothing remains, or the other protocol raises it.
        """
        split = self.protocol.split(collection)
        return replace(split, test=drop_rows(split.test, self.rows, self.suffix))


def _task(
    collection: Collection,
    name: str,
    query: np.ndarray,
    gallery: np.ndarray,
    attribute: str,
    junk: str | None,
    exclude_self: bool,
) -> RetrievalTask:
    _check_rows(name, query, gallery)
    rule = repr((collection.fingerprint, attribute, junk, bool(exclude_self)))
    return RetrievalTask(
        name=name,
        query=torch.from_numpy(query),
        gallery=torch.from_numpy(gallery),
        attribute=attribute,
        junk=junk,
        exclude_self=exclude_self,
        fingerprint=_fingerprint(rule, query, gallery),
    )


def _fingerprint(rule: str, query: np.ndarray, gallery: np.ndarray) -> str:
    digest = hashlib.sha256(repr((rule, len(query), len(gallery))).encode())
    for rows in (query, gallery):
        digest.update(rows.astype("<i8").data)
    return digest.hexdigest()[:16]


def _check_rows(name: str, query: np.ndarray, gallery: np.ndarray) -> None:
    for what, rows in (("query", query), ("gallery", gallery)):
        if not len(rows):
            raise ValueError(f"protocol {name} has no {what} image left: use a larger part of the data")


def _check_share(field: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{field}={value} is not a share: use a number between 0 and 1, such as 0.1")


def _check_shares(evaluation: float, validation: float | None, *, whole: bool = False) -> None:
    """Checks the fractions. With `whole`, everything may be evaluated, since nothing is trained."""
    if whole and evaluation == 1 and validation is None:
        return
    _check_share("evaluation", evaluation)
    if validation is not None:
        _check_share("validation", validation)
    if evaluation + (validation or 0) >= 1:
        raise ValueError(
            f"evaluation={evaluation} and validation={validation} leave nothing to train on: keep their sum below 1"
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: use 0 or more")


def _values(collection: Collection, attribute: str, protocol: str) -> np.ndarray:
    if attribute not in collection.attributes:
        raise ValueError(
            f"protocol {protocol} needs the attribute {attribute!r}, but {collection.name} has "
            f"{', '.join(collection.attributes)}: choose a protocol that fits the data, or name one of these in it"
        )
    return collection.column(attribute).numpy()


def _units(collection: Collection, unit: str, protocol: str) -> Tensor | None:
    """For each row its value of the attribute `unit`, or a unique number if unknown. None for "query"."""
    if unit == "query":
        return None
    values = _values(collection, unit, protocol)
    return torch.from_numpy(np.where(values < 0, values.max(initial=-1) + 1 + np.arange(len(values)), values))


def _class(collection: Collection, attribute: str, value: int) -> str:
    return f"{attribute} {collection.classes[collection.attributes.index(attribute)][value]!r}"


def _official_parts(collection: Collection, values: np.ndarray, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows with a known value, each int64 (N,)."""
    is_test = collection.is_test.numpy()
    if is_test.all() or not is_test.any():
        raise ValueError(
            f"protocol {protocol} needs a training and a test part, but {collection.name} has only one: "
            "choose a protocol that draws its own, such as rendered-style"
        )
    return np.flatnonzero(~is_test & (values >= 0)), np.flatnonzero(is_test & (values >= 0))


def _validation(
    collection: Collection, name: str, train: np.ndarray, attribute: str, share: float | None, seed: int
) -> tuple[Tensor, RetrievalTask | None]:
    """The remaining training rows, and the task in which a fraction of each class searches them (None for no task)."""
    if share is None:
        return torch.from_numpy(train), None
    values = collection.column(attribute).numpy()[train]
    classes, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    for value, count in zip(classes, counts, strict=True):
        if count < 2:
            raise ValueError(
                f"protocol {name} needs 2 training images per class, but "
                f"{_class(collection, attribute, value)} has 1: use a larger part of the data"
            )
    taken = np.clip(np.round(share * counts), 1, counts - 1)
    chosen = _rank(train, values, seed, "validation") < taken[place]
    query, rest = train[chosen], train[~chosen]
    return torch.from_numpy(rest), _task(collection, f"{name}/val", query, rest, attribute, None, True)


def _rank(items: np.ndarray, group: np.ndarray, seed: int, draw: str) -> np.ndarray:
    """Place of each item in a random order of its group, int64 (N,) from 0.

    `items` int64 (N,) are the rows, each with its own random key; `group` is int64 (N,). `draw` names the purpose, so
    that two draws of one seed are independent.
    """
    if not len(items):
        return np.empty(0, dtype=np.int64)
    stream = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:4], "little")
    return _rank_by(np.random.PCG64([seed, stream]).random_raw(int(items.max()) + 1)[items], group)


def _rank_by(key: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Place of each item in its group by ascending key, int64 (N,) from 0. key, group: (N,)."""
    order = np.lexsort((key, group))
    starts = np.searchsorted(group[order], group[order])
    rank = np.empty(len(key), dtype=np.int64)
    rank[order] = np.arange(len(key)) - starts
    return rank


def _hashed(names: Sequence[str], seed: int, draw: str) -> np.ndarray:
    """A number in [0, 1) for each name, float64 (N,), which depends only on the name, the seed and the draw."""
    digests = b"".join(hashlib.sha256(f"{draw}/{seed}/{name}".encode()).digest()[:8] for name in names)
    return (np.frombuffer(digests, dtype=">u8") >> 11) / 2.0**53


def _names_apart(collection: Collection, attributes: Sequence[str], protocol: str) -> tuple[list[str], np.ndarray]:
    """Names of groups, and for each row the position of its name, int64 (N,).

    Rows connected through a shared value of an attribute, also through other rows, have one name: the alphabetically
    first value of the first attribute that any of them knows. Rows that know no attribute have their path as name.
    """
    columns = [_values(collection, attribute, protocol) for attribute in attributes]
    names: list[str] = []
    none = np.iinfo(np.int64).max
    named = np.full(len(collection), none)
    for attribute, column in zip(attributes, columns, strict=True):
        classes = collection.classes[collection.attributes.index(attribute)]
        order = sorted(range(len(classes)), key=classes.__getitem__)
        place = np.full(len(classes) + 1, none)  # the last entry is for -1, unknown
        place[order] = len(names) + np.arange(len(classes))
        named = np.minimum(named, place[column])
        names += [classes[value] for value in order]
    alone = np.flatnonzero(named == none)
    named[alone] = len(names) + np.arange(len(alone))
    names += [collection.path(row) for row in alone.tolist()]
    before = None
    while before is None or not np.array_equal(before, named):
        before = named
        for column in columns:
            first = np.full(column.max(initial=-1) + 2, none)
            np.minimum.at(first, column, named)
            named = np.where(column < 0, named, first[column])
    return names, named
