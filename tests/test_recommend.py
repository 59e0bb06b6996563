"""simsearch recommend and calibrate from a user's side."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import change_items, simsearch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest

from simsearch.__main__ import quoted
from simsearch.commands.calibrate import OUTCOMES
from simsearch.commands.recommend import answer_table
from simsearch.search.catalog import read_catalog
from simsearch.search.engine import Engine
from simsearch.search.request import Request


@pytest.fixture(scope="module")
def catalog(small_run, tmp_path_factory) -> Path:
    """A copy of the catalog of a run, to calibrate."""
    return Path(shutil.copytree(small_run / "catalog", tmp_path_factory.mktemp("recommend") / "catalog"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """Noise, and a file that is no image."""
    folder = tmp_path_factory.mktemp("outside")
    generator = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_text("nothing")
    return folder


def test_recommend_by_images_and_items(catalog, small_run, tmp_path):
    items = read_catalog(catalog).items
    image = sorted((small_run / "figures/queries").iterdir())[0]
    path, other = items["path"][3].as_py(), items["path"][9].as_py()
    done = simsearch(
        "recommend",
        f"catalog={catalog}",
        f"image={image}",
        f"id={path}",
        "unlike=position:9",
        "k=4",
        "diversity=0.3",
        "hubness=true",
        "weights.content=2",
        f"figure={tmp_path}/answer.png",
        "format=json",
    )
    answer = json.loads(done.stdout)
    names = read_catalog(catalog).names
    number, of_other = names.of([names.find(path), names.find(other)])
    assert answer["like"] == [str(image), number]
    assert answer["unlike"] == [of_other]
    assert answer["verdict"] == "uncalibrated"
    assert [result["rank"] for result in answer["results"]] == [1, 2, 3, 4]
    for result in answer["results"]:
        assert names.find(result["attributes"]["path"]) == names.find(result["id"])
        assert sum(result["parts"].values()) == pytest.approx(result["score"], abs=1e-5)
        assert result["id"] not in (number, of_other)
    with Image.open(tmp_path / "answer.png") as picture:
        assert picture.width > 500
        assert picture.height > 3 * 128  # two examples and a counter-example


def test_ids_go_first_and_positions_where_asked_for(catalog, tmp_path):
    """Ids that are other items' positions and each other's numbers, from the command line as it is typed."""
    items = read_catalog(catalog).items
    ids = ["1e3", "7", "007", "0007", "true", "[x].jpg", "a, b", "2", "1", *(f"x{i}" for i in range(len(items) - 9))]
    renamed = Path(shutil.copytree(catalog, tmp_path / "catalog"))
    change_items(renamed, lambda table: table.add_column(0, "id", pa.array(ids)))
    (renamed / "calibration.json").unlink(missing_ok=True)

    def like(*names: str, key: str = "id") -> list[str]:
        more = () if key == "id" else ("id=position:30",)
        asked = f"{key}={names[0] if len(names) == 1 else '[' + ','.join(names) + ']'}"
        done = simsearch("recommend", f"catalog={renamed}", asked, *more, "k=2", "format=json")
        return json.loads(done.stdout)["like" if key == "id" else "unlike"]

    for name in ids[:9]:
        assert like(name) == [name] == like(name, key="unlike")
    assert like("007", "7", "'a, b'", "position:1") == ["007", "7", "a, b", "7"]
    assert like(items["path"][4].as_py()) == ["true"]
    for name in ("00007", "0", "12", "1000.0", "position:9999"):
        assert f"no item '{name}'" in simsearch("recommend", f"catalog={renamed}", f"id={name}", expect=1).stderr
    assert simsearch("recommend", f"catalog={renamed}", "id=7", "unlike=[y].jpg", expect=1).stderr.count("\n") == 1


def test_filtered_table(catalog, tmp_path):
    attribute = next(name for name in read_catalog(catalog).items.column_names if name in ("artist", "style", "label"))
    value = read_catalog(catalog).items[attribute][0].as_py()
    where = f"where={attribute}={value}"
    done = simsearch("recommend", f"catalog={catalog}", "id=position:0", where, "k=3", cwd=tmp_path)
    assert done.stdout.count(value) >= 3
    assert "bold: the same as an example's" in done.stdout
    assert not list(tmp_path.iterdir())  # no picture unless it is asked for
    done = simsearch("recommend", f"catalog={catalog}", "id=position:0", f"where={attribute}=zzz", expect=1)
    assert f"no item has {attribute} 'zzz'" in done.stderr


def test_a_long_path_is_never_cut(catalog):
    recommender = Engine(read_catalog(catalog))
    answer = recommender.recommend(Request(recommender.vectors([0]), k=1, collapse=False))
    path = "images/" + "x" * 150 + "/end.jpg"
    (item,) = [asdict(hit) for hit in recommender.hits(answer, [], [0])]
    item["attributes"] = {**item["attributes"], "path": path}
    out = io.StringIO()
    Console(file=out, width=80).print(answer_table(recommender, ["query"], [], [item], answer))
    cells = [line.split("│")[-2].strip() for line in out.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells).endswith(path)


def test_calibrated_it_says_no(catalog, outside):
    (catalog / "calibration.json").write_text('{"same_work": 0.9, "similar": 0.4}')  # of an earlier method
    done = simsearch("recommend", f"catalog={catalog}", "id=position:0", "format=json")
    assert json.loads(done.stdout)["verdict"] == "uncalibrated"
    assert "was made by an earlier method" in done.stderr
    shutil.copy(outside / "0.png", outside / "copy.png")
    done = simsearch("calibrate", f"catalog={catalog}", f"outside={outside}", "rate=0.2", "workers=0")
    assert "the same work" in done.stdout
    assert "not-an-image" in done.stderr
    calibration = json.loads((catalog / "calibration.json").read_text())
    works = Engine(read_catalog(catalog)).works
    same = calibration["held_out"]["same_work"]["of"]
    units = (len(set(works.tolist())) - same) // 2  # a work counts once, and two works that are each other's nearest
    assert calibration["units"]["same_work"] == units
    assert calibration["rate"] == {"same_work": pytest.approx(max(0.2, 1 - 0.05 ** (1 / units))), "similar": 0.2}
    assert (calibration["asked"], calibration["certainty"]) == (0.2, 0.95)
    assert f'"same work" is calibrated at a rate of {calibration["rate"]["same_work"]:.3g}, not 0.2' in done.stderr
    for kind, held in calibration["held_out"].items():
        found, of = held["found"], held["matches"]
        least = calibration["coverage"][kind]
        assert least == pytest.approx(binomtest(found, of, alternative="greater").proportion_ci(0.95).low)
        assert f"{least:.4f}" in done.stdout
    assert calibration["of"] == {
        "same_work": "works that are not in the catalog, asked for by one image each",
        "similar": "images from outside, one of each work where the table names works",
    }
    assert calibration["weights"] == {"content": 1.0}
    assert calibration["neighbours"] == max(1, len(read_catalog(catalog)) // 20)
    assert calibration["units"]["similar"] + calibration["held_out"]["similar"]["of"] == 60  # a copy counts once
    assert read_catalog(catalog).calibration == {n: v for n, v in calibration.items() if n != "checksum"}
    with (catalog / "calibration/curve.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "similar"]
    thresholds = [float(row["threshold"]) for row in rows]
    assert thresholds == sorted(thresholds)
    with Image.open(catalog / "calibration/curve.png") as picture:
        assert picture.width > 400

    done = simsearch("recommend", f"catalog={catalog}", f"image={outside}/1.png", "k=3", "format=json")
    answer = json.loads(done.stdout)
    assert answer["verdict"] in ("none", "similar")  # one in five may be taken for similar
    assert bool(answer["results"]) == (answer["verdict"] == "similar")


def test_photographs_whose_works_are_known(catalog, outside, small_run, tmp_path):
    """Of works of the catalog (by work and by path), of none, and of one that has a name and is not there."""
    items = read_catalog(catalog).items
    engine = Engine(read_catalog(catalog, calibrated=False))
    shutil.copytree(outside, tmp_path / "photographs")
    queries = sorted((small_run / "figures/queries").iterdir())[:2]
    rows = []
    for number, query in enumerate(queries):
        shutil.copy(query, tmp_path / "photographs" / f"q{number}.png")
        found = json.loads(simsearch("search", f"catalog={catalog}", f"image={query}", "k=1", "format=json").stdout)
        rows.append((f"q{number}.png", found["results"][0]["path"]))
    rows += [("0.png", ""), ("1.png", "elsewhere"), ("2.png", "elsewhere")]
    table = tmp_path / "photographs" / "works.csv"
    table.write_text("path,work\n" + "".join(f"{path},{work}\n" for path, work in rows))
    arguments = ("calibrate", f"catalog={catalog}", "rate=0.3", "workers=0")
    done = simsearch(*arguments, f"photographs={table}")
    assert "1 works of the photographs are not in the catalog (elsewhere)" in done.stderr
    with (catalog / "calibration/photographs.csv").open() as file:
        told = {row["path"]: row for row in csv.DictReader(file)}
    assert list(told) == [path for path, _ in rows]
    calibrated = Engine(read_catalog(catalog))
    paths = items["path"].to_pylist()
    for path, work in rows:
        image = f"image={tmp_path}/photographs/{path}"
        said = simsearch("recommend", f"catalog={catalog}", image, "k=20", "force=true", "format=json").stdout
        results = json.loads(said)["results"]
        own = engine.works[paths.index(work)] if work in paths else None
        works = {engine.works[paths.index(r["attributes"]["path"])] for r in results if r["verdict"] == "same work"}
        expected = "false" if works - {own} else "found" if works else "unknown"
        assert {name: told[path][name] for name in OUTCOMES} == {name: f"{name == expected:d}" for name in OUTCOMES}
        assert (told[path]["work"], told[path]["first"]) == (work, results[0]["id"])
        assert float(told[path]["confidence"]) == pytest.approx(results[0]["score"], abs=1e-5)
    groups = calibrated.catalog.calibration["photographs"]
    assert (groups["in_catalog"]["photographs"], groups["elsewhere"]["photographs"]) == (2, 3)
    assert groups["elsewhere"]["works"] == 2
    assert groups["elsewhere"]["shares"].keys() == {"false", "unknown"}  # there is nothing to find
    for name, picked in (("in_catalog", rows[:2]), ("elsewhere", rows[2:])):
        for outcome, (share, low, high) in groups[name]["shares"].items():
            assert share == pytest.approx(sum(float(told[path][outcome]) for path, _ in picked) / len(picked))
            assert low <= share <= high
    assert "in the catalog" in done.stdout
    assert "elsewhere" in done.stdout
    simsearch(*arguments)
    assert not (catalog / "calibration/photographs.csv").exists()
    assert "photographs" not in read_catalog(catalog).calibration
    with table.open("a") as file:
        file.write("broken.png,\n")
    (catalog / "calibration.json").unlink()
    assert "broken.png" in simsearch(*arguments, f"photographs={table}", expect=1).stderr
    assert read_catalog(catalog).calibration["units"]  # the thresholds are kept
    (tmp_path / "photographs" / "broken.png").unlink()
    assert "first broken.png" in simsearch(*arguments, f"photographs={table}", expect=1).stderr
    (tmp_path / "photographs" / "works.csv").write_text("path\n0.png\n")
    done = simsearch(*arguments, f"photographs={table}", expect=1)
    assert "it needs path and work" in done.stderr


def test_images_from_outside_of_one_work_count_once(catalog, outside, tmp_path):
    shutil.copytree(outside, tmp_path / "outside")
    rows = [f"{i}.png,{i // 6 if i < 30 else ''}" for i in range(60)]
    table = tmp_path / "outside" / "works.csv"
    table.write_text("\n".join(["path,work", *rows]))
    simsearch("calibrate", f"catalog={catalog}", f"outside={table}", "rate=0.3", "workers=0")
    calibration = json.loads((catalog / "calibration.json").read_text())
    assert calibration["units"]["similar"] + calibration["held_out"]["similar"]["of"] == 5 + 30


def test_the_least_score_cuts(catalog):
    arguments = [f"catalog={catalog}", "format=json"]
    whole = json.loads(simsearch("recommend", *arguments, "id=position:0", "k=8", "force=true").stdout)["results"]
    least = f"min_score={whole[3]['score'] - 1e-4}"
    cut = json.loads(simsearch("recommend", *arguments, "id=position:0", "k=8", "force=true", least).stdout)["results"]
    assert [result["id"] for result in cut] == [result["id"] for result in whole[:4]]
    none = simsearch("recommend", f"catalog={catalog}", "id=position:0", "min_score=1.5").stdout
    assert "is left to recommend: relax min_score=" in none
    assert (
        "min_score must be a finite number"
        in simsearch("recommend", *arguments, "id=position:0", "min_score=nan", expect=1).stderr
    )


def test_a_second_try_describes_nothing_again(catalog, outside, monkeypatch):
    arguments = ["calibrate", f"catalog={catalog}", f"outside={outside}", "rate=0.3", "workers=0"]
    first = simsearch(*arguments)
    before = json.loads((catalog / "calibration.json").read_text())
    monkeypatch.setattr("simsearch.search.describe.encode", None)
    again = simsearch(*arguments)
    assert json.loads((catalog / "calibration.json").read_text()) == before
    assert "not-an-image" in first.stderr
    assert "not-an-image" in again.stderr
    Image.new("RGB", (32, 32)).save(outside / "new.png")  # other content: described anew
    with pytest.raises(TypeError, match="not callable"):
        simsearch(*arguments)
    (outside / "new.png").unlink()


@pytest.mark.slow
def test_search_says_what_recommend_says(catalog, outside, small_run, tmp_path):
    simsearch("calibrate", f"catalog={catalog}", f"outside={outside}", "rate=0.3", "workers=0")
    queries = [*sorted((small_run / "figures/queries").iterdir())[:2], outside / "3.png"]
    seen = set()
    for query in queries:
        arguments = [f"catalog={catalog}", f"image={query}", "k=8"]
        found = json.loads(simsearch("search", *arguments, "format=json").stdout)
        told = json.loads(simsearch("recommend", *arguments, "collapse=false", "force=true", "format=json").stdout)
        assert found["verdict"] == told["verdict"]
        assert [r["path"] for r in found["results"]] == [r["attributes"]["path"] for r in told["results"]]
        assert [r["verdict"] for r in found["results"]] == [r["verdict"] for r in told["results"]]
        least = f"min_score={found['results'][2]['score'] - 1e-4}"
        cut = json.loads(simsearch("search", *arguments, least, "format=json").stdout)
        assert cut["results"] == found["results"][:3]
        seen |= {r["verdict"] for r in found["results"]}
    assert len(seen) > 1
    table = simsearch("search", *arguments, f"figure={tmp_path}/f.png").stdout
    assert ("no similar work" if found["verdict"] == "none" else found["verdict"]) in table
    assert "verdict" in table


def test_too_few_for_the_rate_is_said_before_the_work(catalog, outside, monkeypatch):
    def late(*_: object) -> None:
        raise ValueError("the work begins")

    monkeypatch.setattr("simsearch.commands.calibrate.leave_work_out", late)
    said = simsearch("calibrate", f"catalog={catalog}", f"outside={outside}", "rate=0.001", expect=1).stderr
    assert said.index("it takes 5990") < said.index("the work begins")  # twice 2,995
    assert "images from outside in the calibrating half allow no lower rate" in said
    for wrong in ("rate=0", "rate=1.5", "certainty=1"):
        assert "use a number between 0 and 1" in simsearch("calibrate", f"catalog={catalog}", wrong, expect=1).stderr


@pytest.mark.slow
def test_a_compressed_catalog_is_calibrated_by_its_images(small_run, outside, tmp_path):
    simsearch(
        "index",
        f"run={small_run}",
        f"images={outside}",
        f"out={tmp_path}/c",
        "index=factory",
        "index.factory=PQ4x4",
        "workers=0",
    )
    done = simsearch("calibrate", f"catalog={tmp_path}/c", expect=1)
    assert "the index PQ4x4 stores vectors only approximately" in done.stderr
    assert "give images=" in done.stderr
    simsearch("calibrate", f"catalog={tmp_path}/c", f"images={outside}", "rate=0.3", "workers=0")
    assert read_catalog(tmp_path / "c").calibration["similar"] is None
    (tmp_path / "other").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "other/x.png")
    done = simsearch("calibrate", f"catalog={tmp_path}/c", f"images={tmp_path}/other", "workers=0", expect=1)
    assert "no item of the catalog" in done.stderr


@pytest.mark.parametrize("key", ["image", "id", "unlike"])
def test_several_are_a_list(key):
    assert overridden(f"{key}=[a.jpg, [x].jpg,007,5e3,'b, c.jpg',\"d\"]") == [
        *("a.jpg", "[x].jpg", "007", "5e3", "b, c.jpg", "d")
    ]
    assert overridden(f"{key}=a, b.jpg") == "a, b.jpg"
    assert overridden(f"{key}=[x].jpg") == "[x].jpg"


def overridden(argument: str, command: str = "") -> object:
    """What Hydra makes of an argument as the program hands it on."""
    (parsed,) = OverridesParser.create().parse_overrides([quoted(argument, command)])
    return parsed.value()


TYPED = ["image", "id", "+figure", "index.factory", "catalog", "out", "run_dir", "data.source", "model.start"]


@given(st.sampled_from(TYPED), st.text(st.characters(exclude_characters="$", exclude_categories=["C"]), min_size=1))
@example("catalog", "a[1]/b (c), d=e {f}.jpg")
@example("image", "it's")
@example("data.source", "a\\'b\\")
@example("index.factory", "IVF256,PQ16")
@example("id", "1e3")
@example("id", "007")
@example("run_dir", "true")
def test_text_is_taken_as_it_is_typed(key, text):
    assume(text not in ("null", "???") and not re.fullmatch(r"~.*|'.*'|\".*\"|\[.*\]|\{.*\}", text, re.DOTALL))
    assert overridden(f"{key}={text}") == text


def test_text_in_quotes_lists_and_sweeps_is_hydras():
    assert overridden("image='a, b'") == "a, b"
    assert overridden('where="style"="Art; Deco"') == '"style"="Art; Deco"'
    assert overridden("catalog={a: x, b: y}") == {"a": "x", "b": "y"}
    assert overridden("out=null") is None
    assert overridden("rows=5", "search") == 5
    assert overridden("rows=5", "reproduce") == "5"
    assert quoted("data.source=a,b", "train", swept=True) == "data.source=a,b"
    assert quoted("model.start=glob(*)", "train", swept=True) == "model.start=glob(*)"
    assert quoted("data.source=a[1]", "train", swept=True) == "data.source='a[1]'"
    assert quoted("loss.start=10") == "loss.start=10"
    assert quoted("weights.style=1") == "weights.style=1"
    assert quoted("model.weights={content: 1}") == "model.weights={content: 1}"
    assert quoted("k=10") == "k=10"


@pytest.mark.parametrize(
    ("command", "typed", "said"),
    [
        ("search", "k=abc", "k=abc: it must be a whole number, such as 10"),
        ("search", "k=1.5", "k=1.5: it must be a whole number, such as 10"),
        ("search", "rows=true", "rows=true: it must be a whole number, such as 20"),
        ("search", "catalog=c image=i rows=0", "rows and batch_size must be at least 1, got 0 and 64"),
        ("recommend", "diversity=lots", "diversity=lots: it must be a number, such as 0.0"),
        ("recommend", "collapse=1", "collapse=1: it must be true or false"),
        (
            "instance",
            "run=r gnd=g images=i batch_size=null",
            "batch_size=null: it must be a whole number, such as 128",
        ),
        ("serve", "port=http", "port=http: it must be a whole number, such as 8000"),
        ("data ingest", "near.hash=x", "near.hash=x: it must be a whole number, such as 10"),
    ],
)
def test_a_value_of_another_kind_is_one_line(command, typed, said):
    done = simsearch(*command.split(), *typed.split(), expect=1)
    assert done.stderr == f"simsearch {command}: {said}\n"
