"""Protocols: sizes, disjointness, relevance, reproducibility and errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from simsearch.data.collection import Collection
from simsearch.data.protocols import (
    ByAttribute,
    ByHash,
    OfficialSplit,
    SampledSplit,
    Split,
    UnseenClasses,
    drop_rows,
)
from simsearch.types import RetrievalTask

CONF = Path(__file__).parents[1] / "conf" / "protocol"


def classes_collection(train: list[int], test: list[int], classes: int, name: str = "fake") -> Collection:
    """Tiny images of the given labels, training rows first."""
    labels = torch.tensor(train + test)
    return Collection(
        name=name,
        images=torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8),
        labels=labels[:, None],
        attributes=("class",),
        classes=(tuple(f"c{i}" for i in range(classes)),),
        is_test=torch.arange(len(labels)) >= len(train),
    )


@pytest.fixture(scope="module")
def cifar_like() -> Collection:
    """60,000 rows with CIFAR-10's class counts."""
    generator = torch.Generator().manual_seed(0)
    train, test = (
        torch.arange(10).repeat(n)[torch.randperm(10 * n, generator=generator)].tolist() for n in (5_000, 1_000)
    )
    return classes_collection(train, test, 10)


@pytest.fixture(scope="module")
def art_like() -> Collection:
    """3 styles x 4 artists x 5 works x 3 photographs in a shuffled order, no test part."""
    work = torch.arange(180) * 7 % 180 // 3
    return Collection(
        name="art",
        images=torch.zeros(180, 3, 1, 1, dtype=torch.uint8),
        labels=torch.stack([work // 20, work // 5, work], dim=1),
        attributes=("style", "artist", "work"),
        classes=tuple(tuple(map(str, range(n))) for n in (3, 12, 60)),
        is_test=torch.zeros(180, dtype=torch.bool),
    )


def load(name: str):
    return instantiate(OmegaConf.load(CONF / f"{name}.yaml"))


def per_class(collection: Collection, rows: torch.Tensor) -> dict[int, int]:
    return dict(Counter(collection.column("class")[rows].tolist()))


CIFAR = {
    # name: training rows left, validation queries, test queries, test gallery, exclude_self
    "dsh-release": (45_000, 5_000, 10_000, 10_000, False),
    "10k-50k": (45_000, 5_000, 10_000, 50_000, True),
    "1k-54k": (4_500, 500, 1_000, 54_000, True),
    "1k-59k": (4_500, 500, 1_000, 59_000, True),
    "unseen-classes": (31_500, 3_500, 3_000, 15_000, True),
}


@pytest.mark.parametrize("name", CIFAR)
def test_configs_have_the_sizes_of_the_literature(cifar_like, name):
    split = load(name).split(cifar_like)
    train, validation, query, gallery, exclude_self = CIFAR[name]
    assert len(split.train) == train
    assert len(split.validation.query) == validation
    assert len(split.validation.gallery) == train
    assert len(split.test.query) == query
    assert len(split.test.gallery) == gallery
    assert split.test.exclude_self is exclude_self
    assert split.test.attribute == "class"
    assert split.test.junk is None
    assert split.test.name == ("unseen-classes/0" if name == "unseen-classes" else name)
    assert split.validation.name == f"{split.test.name}/val"


@pytest.mark.parametrize("name", [*CIFAR, "rendered-style", "rendered-artist", "rendered-work"])
def test_rows_are_sorted_unique_and_apart(cifar_like, art_like, name):
    collection = cifar_like if name in CIFAR else art_like
    split = load(name).split(collection)
    lists = [split.train]
    for task in (split.validation, split.test):
        lists += [task.query, task.gallery]
    for rows in lists:
        assert rows.dtype == torch.int64
        assert (rows[1:] > rows[:-1]).all()
        assert rows[0] >= 0
        assert rows[-1] < len(collection)
    train, validation, test = (set(rows.tolist()) for rows in (split.train, split.validation.query, split.test.query))
    assert not train & test
    assert not train & validation
    assert not validation & test
    # The validation split never touches a test query, in its gallery neither.
    assert not test & set(split.validation.gallery.tolist())


def test_official_split_is_stratified_and_shares_its_validation(cifar_like):
    release, gallery = load("dsh-release").split(cifar_like), load("10k-50k").split(cifar_like)
    assert per_class(cifar_like, release.validation.query) == dict.fromkeys(range(10), 500)
    assert per_class(cifar_like, release.train) == dict.fromkeys(range(10), 4_500)
    assert torch.equal(release.validation.gallery, release.train)
    assert torch.equal(release.test.gallery, release.test.query)
    assert gallery.test.gallery.tolist() == [*range(50_000)]
    assert gallery.test.query.tolist() == [*range(50_000, 60_000)]
    # One and the same task has one fingerprint, whatever it is called.
    assert release.validation.fingerprint == gallery.validation.fingerprint
    assert release.validation.name != gallery.validation.name


def test_sampled_split_draws_per_class_from_all_rows(cifar_like):
    out, within = load("1k-54k").split(cifar_like), load("1k-59k").split(cifar_like)
    assert torch.equal(out.test.query, within.test.query)
    assert torch.equal(out.train, within.train)
    assert per_class(cifar_like, out.test.query) == dict.fromkeys(range(10), 100)
    assert per_class(cifar_like, out.validation.query) == dict.fromkeys(range(10), 50)
    query, trained = set(out.test.query.tolist()), {*out.train.tolist(), *out.validation.query.tolist()}
    everything = set(range(60_000))
    assert set(within.test.gallery.tolist()) == everything - query
    assert set(out.test.gallery.tolist()) == everything - query - trained
    # A sixth of a fair draw comes from the official test part.
    share = cifar_like.is_test[out.test.query].double().mean()
    assert 0.11 < share < 0.23


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_unseen_classes_hold_their_classes_out(cifar_like, fold):
    split = replace(load("unseen-classes"), fold=fold).split(cifar_like)
    held = {3 * fold, 3 * fold + 1, 3 * fold + 2}
    seen = set(range(10)) - held
    assert split.test.name == f"unseen-classes/{fold}"
    assert per_class(cifar_like, split.test.query) == dict.fromkeys(held, 1_000)
    assert per_class(cifar_like, split.test.gallery) == dict.fromkeys(held, 5_000)
    assert per_class(cifar_like, split.train) == dict.fromkeys(seen, 4_500)
    assert per_class(cifar_like, split.validation.query) == dict.fromkeys(seen, 500)
    assert cifar_like.is_test[split.test.query].all()
    assert not cifar_like.is_test[split.test.gallery].any()


@pytest.mark.parametrize(
    ("name", "attribute", "junk"),
    [
        ("rendered-style", "style", "artist"),
        ("rendered-artist", "artist", "work"),
        ("rendered-work", "work", None),
    ],
)
def test_by_attribute_divides_the_works(art_like, name, attribute, junk):
    split = load(name).split(art_like)
    work = art_like.column("work")
    train, validation, test = (
        set(work[rows].tolist()) for rows in (split.train, split.validation.gallery, split.test.gallery)
    )
    assert (len(train), len(validation), len(test)) == (18, 12, 30)
    assert train | validation | test == set(range(60))
    for task in (split.validation, split.test):
        assert sorted(work[task.query].tolist()) == sorted(set(work[task.gallery].tolist()))
        assert set(Counter(work[task.gallery].tolist()).values()) == {3}
        assert set(task.query.tolist()) <= set(task.gallery.tolist())
        assert (task.attribute, task.junk, task.exclude_self) == (attribute, junk, True)


def test_by_attribute_leaves_unknown_rows_out(art_like):
    labels = art_like.labels.clone()
    labels[:10, 2] = -1
    labels[10:20, 1] = -1
    unknown = replace(art_like, labels=labels)
    split = load("rendered-artist").split(unknown)
    used = torch.cat([split.train, split.validation.gallery, split.test.gallery])
    assert sorted(used.tolist()) == [*range(20, 180)]


def test_more_data_do_not_redraw_the_queries():
    """A row's random key is its own: rows of the same classes keep their rank when others are added."""
    small = classes_collection([0] * 30, [0] * 5, 2)
    large = classes_collection([0] * 30, [0] * 5 + [1] * 20, 2)
    protocol = SampledSplit("p", train_in_gallery=True, queries_per_class=3, train_per_class=5)
    first, second = protocol.split(small).test.query, protocol.split(large).test.query
    assert torch.equal(first, second[second < 35])


@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 50),
)
@settings(max_examples=50, deadline=None)
def test_validation_takes_its_share_of_each_class(counts, share, seed):
    train = [value for value, count in enumerate(counts) for _ in range(count)]
    collection = classes_collection(train, [0], len(counts))
    protocol = OfficialSplit("p", gallery="train", exclude_self=True, validation=share, seed=seed)
    split = protocol.split(collection)
    taken = per_class(collection, split.validation.query)
    for value, count in enumerate(counts):
        assert taken[value] == min(max(round(share * count), 1), count - 1)
    assert sorted(split.train.tolist() + split.validation.query.tolist()) == [*range(len(train))]


def test_draws_are_uniform():
    """Each of 20 rows becomes one of 5 validation queries in a quarter of 800 seeds."""
    collection = classes_collection([0] * 20, [0], 1)
    drawn = Counter()
    for seed in range(800):
        protocol = OfficialSplit("p", gallery="train", exclude_self=True, validation=0.25, seed=seed)
        drawn.update(protocol.split(collection).validation.query.tolist())
    assert sum(drawn.values()) == 4_000
    # Binomial(800, 1/4): mean 200, standard deviation 12.2; 20 rows stay within 5 of them.
    assert all(139 < drawn[row] < 261 for row in range(20))


# Division by hash


def art_rows(rows: list[tuple[str | None, ...]], name: str = "art") -> Collection:
    """Images <place>.jpg with (style, artist, work), None where unknown; classes are sorted as of files."""
    classes = tuple(
        tuple(sorted({value for value in column if value is not None})) for column in zip(*rows, strict=True)
    )
    labels = [[-1 if v is None else names.index(v) for v, names in zip(row, classes, strict=True)] for row in rows]
    return Collection(
        name=name,
        images=torch.zeros(len(rows), 3, 1, 1, dtype=torch.uint8),
        labels=torch.tensor(labels),
        attributes=("style", "artist", "work"),
        classes=classes,
        is_test=torch.zeros(len(rows), dtype=torch.bool),
        paths=tuple(f"{place}.jpg" for place in range(len(rows))),
    )


def museum_rows() -> list[tuple[str | None, ...]]:
    """60 artists of 1 to 8 works in 1 or 2 photographs, 4 styles; every fifth artist has a style to himself, and
    every seventh image lacks its artist."""
    rows = []
    for artist in range(60):
        for work in range(artist % 8 + 1):
            style = f"s{(artist + work // 6) % 4}" if artist % 5 else f"of a{artist}"
            rows += [(style, f"a{artist}", f"w{artist}-{work}")] * (1 + (artist + work) % 2)
    return [(style, artist if i % 7 else None, work) for i, (style, artist, work) in enumerate(rows)]


@pytest.fixture(scope="module")
def museum() -> Collection:
    return art_rows(museum_rows())


def parts_of(split: Split) -> list[list[int]]:
    validation = [] if split.validation is None else split.validation.gallery.tolist()
    return [split.train.tolist(), validation, split.test.gallery.tolist()]


def names_in(collection: Collection, attribute: str, rows: list[int]) -> set[int]:
    return set(collection.column(attribute)[rows].tolist()) - {-1}


@pytest.mark.parametrize("name", ["artist", "style", "work", "artist-random"])
def test_by_hash_shares_no_artist_and_no_work_between_parts(museum, name):
    split = load(f"art-{name}").split(museum)
    parts = parts_of(split)
    assert all(len(part) > 30 for part in parts)
    for attribute in ("artist", "work"):
        train, validation, test = (names_in(museum, attribute, part) for part in parts)
        shared = train & validation | train & test | validation & test
        assert bool(shared) == (name == "artist-random" and attribute == "artist")
    for task in (split.validation, split.test):
        assert set(task.query.tolist()) <= set(task.gallery.tolist())
        assert task.exclude_self


@pytest.mark.parametrize("name", ["artist", "style", "work", "artist-random"])
def test_by_hash_asks_what_can_be_answered(museum, name):
    """Against a loop over pairs: queries are the items with enough relevant ones, and all the others are searched."""
    protocol = load(f"art-{name}")
    split = protocol.split(museum)
    label = museum.column(protocol.attribute).tolist()
    junk = [-1] * len(museum) if protocol.junk is None else museum.column(protocol.junk).tolist()
    for task in (split.validation, split.test):
        gallery = task.gallery.tolist()
        assert all(label[row] >= 0 for row in gallery)

        def counts(row, other):
            same_junk = junk[row] == junk[other] != -1
            return other != row and label[other] == label[row] and not same_junk

        asked = [row for row in gallery if sum(counts(row, other) for other in gallery) >= protocol.least]
        assert task.query.tolist() == asked
        assert 0 < len(asked) < len(gallery)
    everything = sorted(row for part in parts_of(split) for row in part)
    assert everything == [row for row in range(len(museum)) if label[row] >= 0]


def test_artist_and_style_have_one_division(museum):
    """A model trained on artists may be measured on styles and works: rows differ by what lacks a value only."""
    artist, style, work = (parts_of(load(f"art-{name}").split(museum)) for name in ("artist", "style", "work"))
    assert style == work
    known = museum.column("artist") >= 0
    assert artist == [[row for row in part if known[row]] for part in style]


def test_shares_are_those_of_the_names():
    """1,000 artists: binomial, so that 5 standard deviations of a share are at most 8 %."""
    collection = art_rows([("s", f"a{i}", None) for i in range(1000) for _ in range(2)])
    protocol = ByHash("p", "style", "artist", "artist", evaluation=0.3, validation=0.1)
    train, validation, test = (len(part) / 2000 for part in parts_of(protocol.split(collection)))
    assert abs(train - 0.6) < 0.08
    assert abs(validation - 0.1) < 0.05
    assert abs(test - 0.3) < 0.08
    other = replace(protocol, seed=1).split(collection)
    assert (
        0.2 < len(set(other.test.gallery.tolist()) & set(protocol.split(collection).test.gallery.tolist())) / 600 < 0.4
    )
    assert replace(protocol, validation=None).split(collection).validation is None


def component_names(rows: list[tuple[str | None, ...]]) -> list[str]:
    """By hand: flood from each row over shared artists and works, and take the first name that was met."""
    names = []
    for start in range(len(rows)):
        met, waiting = set(), [start]
        while waiting:
            row = waiting.pop()
            met.add(row)
            waiting += [
                other
                for other in range(len(rows))
                if other not in met
                and any(a == b and a is not None for a, b in zip(rows[row][1:], rows[other][1:], strict=True))
            ]
        artists, works = ([rows[row][i] for row in met if rows[row][i] is not None] for i in (1, 2))
        names.append(min(artists or works or [f"{start}.jpg"]))
    return names


def test_items_without_a_relevant_one_may_be_distractors():
    rows = [("x", f"a{i}", f"w{i // 2 if i < 20 else i}") for i in range(30)]  # ten works of two images, ten of one
    few, all_ = (
        ByHash("p", "work", None, None, work=None, least=least, evaluation=1.0, validation=None).split(art_rows(rows))
        for least in (1, 0)
    )
    assert len(few.test.query) == 20
    assert len(all_.test.query) == len(all_.test.gallery) == 30


ART_ROW = st.tuples(
    st.sampled_from("xyz"),
    st.none() | st.integers(0, 9).map("a{}".format),
    st.none() | st.integers(0, 30).map("w{}".format),
)


@given(old=st.lists(ART_ROW, min_size=12, max_size=40), new=st.lists(ART_ROW, max_size=40), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_more_images_move_none(old, new, seed):
    """Whatever comes, a row moves only where its name does: where artists or works that were apart are joined."""
    protocol = ByHash("p", "style", "artist", None, least=1, seed=seed)
    try:
        before, after = (protocol.split(art_rows(rows)) for rows in (old, old + new))
    except ValueError as error:  # too few names for three parts
        assert "has no query" in str(error) or "leaves none" in str(error)  # noqa: PT017
        return
    names = component_names(old), component_names(old + new)
    place = [{row: i for i, part in enumerate(parts_of(split)) for row in part} for split in (before, after)]
    assert len(place[1]) == len(old) + len(new)
    by_name = {}
    for row, name in enumerate(names[1]):
        assert by_name.setdefault(name, place[1][row]) == place[1][row]
    for row in range(len(old)):
        if names[0][row] == names[1][row]:
            assert place[0][row] == place[1][row]


def test_queries_of_a_class_are_the_first_by_hash(museum):
    protocol = replace(load("art-style"), most_queries=5)
    all_queries, few = (p.split(museum).test.query.tolist() for p in (load("art-style"), protocol))
    names = museum.classes[0]
    every, asked = (Counter(names[v] for v in museum.column("style")[rows].tolist()) for rows in (all_queries, few))
    assert set(few) < set(all_queries)
    assert asked == {style: min(5, count) for style, count in every.items()}
    # A larger collection asks no more of a class, and only new images push an old one out.
    grown = art_rows(museum_rows() + [(f"s{i % 4}", f"new{i}", None) for i in range(40)])
    task = protocol.split(grown).test
    styles = Counter(grown.classes[0][v] for v in grown.column("style")[task.query].tolist())
    assert max(styles.values()) == 5
    old = {row for row in task.query.tolist() if row < len(museum)}
    assert old < set(few)


# Reproducibility and fingerprints


def test_draws_are_the_same_everywhere(art_like):
    """Recorded rows: another platform, process or NumPy must draw the same."""
    collection = classes_collection([0] * 8 + [1] * 8, [0, 1] * 4, 2)
    sampled = SampledSplit("p", train_in_gallery=True, queries_per_class=2, train_per_class=4, validation=0.5)
    split = sampled.split(collection)
    assert split.test.query.tolist() == [2, 4, 8, 13]
    assert split.validation.query.tolist() == [1, 7, 14, 21]
    assert split.train.tolist() == [3, 9, 12, 20]
    assert split.test.fingerprint == "6a95f2425565ebb2"
    assert load("rendered-style").split(art_like).test.query[:8].tolist() == [0, 2, 7, 8, 9, 12, 15, 18]
    # `printf part/0/Monet | sha256sum` begins with f5, Rembrandt ae, Hokusai 8a, Cassatt 12, Turner 57: what is
    # below 80 (a half) is evaluated, below b3 (0.7) validation.
    painters = art_rows([("s", artist, None) for artist in ("Monet", "Rembrandt", "Hokusai", "Cassatt", "Turner")] * 2)
    assert parts_of(load("art-style").split(painters)) == [[0, 5], [1, 2, 6, 7], [3, 4, 8, 9]]


def test_fingerprints_tell_tasks_apart(cifar_like, art_like):
    tasks = [load(name).split(cifar_like).test for name in CIFAR]
    tasks += [replace(load("unseen-classes"), fold=fold).split(cifar_like).test for fold in (1, 2)]
    tasks += [load(f"rendered-{name}").split(art_like).test for name in ("style", "artist", "work")]
    tasks += [replace(load("1k-59k"), seed=1).split(cifar_like).test]
    tasks += [replace(load("dsh-release"), exclude_self=True).split(cifar_like).test]
    tasks += [replace(load("rendered-style"), junk=None).split(art_like).test]
    fingerprints = [task.fingerprint for task in tasks]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in fingerprints)


def test_fingerprint_follows_data_and_task_but_neither_name_nor_training_rows():
    collection = classes_collection([0, 1] * 10, [0, 1] * 3, 2)
    protocol = OfficialSplit("p", gallery="train", exclude_self=True)
    task = protocol.split(collection).test
    assert replace(protocol, name="q").split(collection).test.fingerprint == task.fingerprint
    assert replace(protocol, validation=0.3).split(collection).test.fingerprint == task.fingerprint
    images = collection.images.clone()
    images[3, 0, 0, 0] = 1
    assert protocol.split(replace(collection, images=images)).test.fingerprint != task.fingerprint


@pytest.mark.parametrize(
    ("name", "changes", "unit", "column"),
    [
        *((f"art-{name}", {}, "artist", None) for name in ("artist", "style", "work")),
        ("art-artist", {"part": None}, "work", None),
        ("art-artist", {"part": None, "work": None, "junk": None}, "query", None),
        ("art-artist", {"unit": "style"}, "style", "style"),
        ("art-artist", {"unit": "query"}, "query", None),
        ("art-artist-random", {}, "artist", "artist"),
        ("rendered-artist", {}, "artist", "artist"),
        ("rendered-style", {}, "artist", "artist"),
        ("rendered-work", {}, "work", "work"),
        ("rendered-work", {"group": None}, "query", None),
    ],
)
def test_protocols_name_their_unit_of_chance(museum, name, changes, unit, column):
    """Rows of one value are one unit, rows without one are each their own; numbers and fingerprints do not change."""
    protocol = replace(load(name), **changes)
    split = protocol.split(museum)
    by_query = replace(protocol, unit="query").split(museum).test
    assert split.test.unit == split.validation.unit == unit
    assert split.test.fingerprint == by_query.fingerprint
    assert torch.equal(split.test.query, by_query.query)
    assert torch.equal(by_query.query_units, by_query.query)
    if unit == "query":
        assert len(split.test.query_units.unique()) == len(split.test.query)
    elif column is not None:
        values = museum.column(column).tolist()
        mine = [value if value >= 0 else f"row {row}" for row, value in enumerate(values)]
        assert same_partition(split.test.units.tolist(), mine)
    few = drop_rows(split.test, split.test.query[:1], "-without")
    assert (few.unit, few.query_units.tolist()) == (unit, split.test.query_units[1:].tolist())


def same_partition(ours: list, theirs: list) -> bool:
    return len(set(zip(ours, theirs, strict=True))) == len(set(ours)) == len(set(theirs))


def test_units_by_hash_are_what_the_split_keeps_together(museum):
    """Also a photograph whose artist is not known, of a work whose other photographs tell."""
    units = load("art-artist").split(museum).test.units
    assert same_partition(units.tolist(), component_names(museum_rows()))


def test_test_images_are_units_of_their_own(cifar_like):
    for name in ("10k-50k", "dsh-release", "1k-59k", "unseen-classes"):
        split = load(name).split(cifar_like)
        assert (split.test.unit, split.test.units, split.validation.unit) == ("query", None, "query")


def test_drop_rows():
    collection = classes_collection([0, 1] * 10, [0, 1] * 3, 2)
    task = OfficialSplit("p", gallery="train", exclude_self=True).split(collection).test
    fewer = drop_rows(task, torch.tensor([25, 3, 4, 999, 3]), "/no-doubles")
    assert fewer.name == "p/no-doubles"
    assert fewer.query.tolist() == [20, 21, 22, 23, 24]
    assert fewer.gallery.tolist() == [0, 1, 2, *range(5, 20)]
    assert (fewer.attribute, fewer.junk, fewer.exclude_self) == ("class", None, True)
    assert fewer.fingerprint != task.fingerprint
    assert fewer.fingerprint != drop_rows(task, torch.tensor([3, 4]), "/no-doubles").fingerprint
    assert fewer.fingerprint == drop_rows(task, torch.tensor([3, 4, 25]), "/other name").fingerprint
    none = drop_rows(task, torch.tensor([], dtype=torch.int64), "/all")
    assert (none.name, none.fingerprint) == ("p/all", task.fingerprint)
    with pytest.raises(ValueError, match="p/x has no query image left"):
        drop_rows(task, torch.arange(20, 26), "/x")
    with pytest.raises(ValueError, match="p/x has no gallery image left"):
        drop_rows(task, torch.arange(20), "/x")


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OfficialSplit("p", "all", True), "gallery='all' is unknown: use 'train' or 'test'"),
        (lambda: OfficialSplit("p", "train", True, validation=0.0), r"validation=0\.0 is not a share"),
        (lambda: OfficialSplit("p", "train", True, validation=1), "validation=1 is not a share: use a number"),
        (lambda: OfficialSplit("p", "train", True, seed=-1), "seed=-1 is negative"),
        (lambda: SampledSplit("p", True, queries_per_class=0), "queries_per_class=0 is too small: use 1"),
        (lambda: SampledSplit("p", True, train_per_class=1), "train_per_class=1 is too small: use 2"),
        (lambda: UnseenClasses(fold=3), r"fold=3 is not one of the 3 folds: use 0\.\.2"),
        (lambda: UnseenClasses(fold=-1), "fold=-1 is not one"),
        (lambda: UnseenClasses(folds=((0, 1), (2, 1))), r"overlap in the classes \[1\]: hold each"),
        (lambda: UnseenClasses(folds=((0, 1), ())), "has an empty fold"),
        (lambda: ByAttribute("p", "style", None, evaluation=0.8, validation=0.2), "keep their sum below 1"),
        (lambda: ByAttribute("p", "style", None, evaluation=-0.1), r"evaluation=-0\.1 is not a share"),
        (lambda: ByHash("p", "style", None, None, evaluation=0.8, validation=0.2), "keep their sum below 1"),
        (lambda: ByHash("p", "style", None, None, least=-1), "least=-1 is too few: use 0 or more"),
        (lambda: ByHash("p", "style", None, None, most_queries=0), "most_queries=0 is too few: use 1 or more"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("protocol", "train", "test", "message"),
    [
        (OfficialSplit("p", "train", True), [0, 0, 1, 1], [], "p needs a training and a test part, but fake"),
        (OfficialSplit("p", "train", True), [], [0, 0, 1, 1], "p needs a training and a test part, but fake"),
        (
            OfficialSplit("p", "train", True),
            [0, 0, 1],
            [0],
            "p needs 2 training images per class, but class 'c1'",
        ),
        (
            OfficialSplit("p", "train", True, attribute="style"),
            [0],
            [0],
            "needs the attribute 'style', but fake",
        ),
        (OfficialSplit("p", "train", True), [0, 0], [-1], "has no query image left"),
        (
            SampledSplit("p", True, 2, 2),
            [0] * 9 + [1] * 2,
            [1],
            "draws 4 images per class, but class 'c1' has 3",
        ),
        (SampledSplit("p", False, 2, 2), [0] * 4, [1] * 4, "has no gallery image left"),
        (UnseenClasses(folds=((1, 5),)), [0, 0], [0], r"holds out the classes \[5\], but fake has 0\.\.1"),
        (UnseenClasses(folds=((1,),)), [0, 0, 1, 1], [0], "class 'c1', which has no test or no training"),
        (UnseenClasses(folds=((0, 1),)), [0, 0, 1, 1], [0, 1], "has no query image left"),
        (ByAttribute("p", "style", None), [0], [], "needs the attribute 'style'"),
        (ByAttribute("p", "class", None, group="class"), [0, 1], [], "divides 2 values of 'class' into 1"),
        (ByAttribute("p", "class", "artist", group="class"), [0, 1], [], "needs the attribute 'artist'"),
        (ByHash("p", "style", None, None), [0], [], "needs the attribute 'style', but fake has class: choose"),
        (ByHash("p", "class", "artist", None), [0], [], "needs the attribute 'artist'"),
        (ByHash("p", "class", None, None), [0], [], "needs the attribute 'work'.* or name one of these in it"),
        (ByHash("p", "class", None, "artist", None), [0] * 20, [], "needs the attribute 'artist'"),
        (ByHash("p", "class", None, None, None, 0.98, 0.01), [0] * 3, [], "p leaves none of the 3 images of fake"),
        (
            ByHash("p", "class", None, "class", None),
            [0] * 20,
            [],
            r"p/val has no query: none of its \d images has least=2 .* \(same class, another class\); lower least",
        ),
    ],
)
def test_collections_that_do_not_fit_are_refused(protocol, train, test, message):
    with pytest.raises(ValueError, match=message):
        protocol.split(classes_collection(train, test, 2))


def test_split_refuses_rows_in_two_parts():
    def task(query: list[int]) -> RetrievalTask:
        return RetrievalTask("t", torch.tensor(query), torch.tensor([9]), "class", None, True, "0" * 16)

    Split(torch.tensor([0, 1]), task([2]), task([3]))
    for train, validation, test, message in (
        ([0, 1], [2], [1], "1 test queries are training rows, first row 1"),
        ([0, 1], [0], [3], "1 validation queries are training rows, first row 0"),
        ([0, 1], [2], [2], "1 validation queries are test queries, first row 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Split(torch.tensor(train), task(validation), task(test))
