"""simsearch art: from paintings to a recommender, as one command."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from conftest import simsearch
from PIL import Image

from simsearch.commands import art
from simsearch.data.rendered.collection import render_collection


def paint(folder: Path, count: int, name: str = "{i}.png") -> Path:
    """A folder of `count` pictures of the sample, called by `name` of number i and one of two artists a."""
    collection = render_collection(styles=4, artists=2, works=(count + 7) // 8, photographs=1, size=96)
    for i, image in enumerate(collection.images[:count]):
        path = folder / name.format(i=i, a=("Anna", "Berta")[i % 2])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def test_a_sample_is_divided_by_style(tmp_path):
    rows = [f"{i}.png,{style}" for i, style in enumerate("abcdab")]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,style", *rows]) + "\n")
    art.divide(tmp_path / "manifest.csv", tmp_path / "in.csv", tmp_path / "out.csv")
    assert (tmp_path / "in.csv").read_text() == "path,style\n0.png,a\n1.png,b\n4.png,a\n5.png,b\n"
    assert (tmp_path / "out.csv").read_text() == "path,style\n2.png,c\n3.png,d\n"


class Steps:
    """Stands for the steps: notes their commands, and leaves what the next ones look for."""

    def __init__(self, failing: str = "") -> None:
        self.commands: list[list[str]] = []
        self.failing = failing

    def __call__(self, what: str, *command: str) -> None:
        if command[0] == self.failing:
            raise ValueError("that step failed with status 1; give the same command again to continue from there")
        self.commands.append(list(command))
        given = dict(argument.split("=", 1) for argument in command if "=" in argument)
        if command[:2] == ("data", "ingest"):
            simsearch(*command, "near.descriptors=false", "workers=1")
        left = {"train": ("run_dir", "metrics.json"), "index": ("out", "catalog.json")}
        left |= {"calibrate": ("catalog", "calibration.json")}
        if command[0] in left:
            key, name = left[command[0]]
            Path(given[key]).mkdir(parents=True, exist_ok=True)
            (Path(given[key]) / name).write_text("{}")
        if command[0] == "train":
            (Path(given["run_dir"]) / "config.yaml").write_text(f"backbone: {{size: {given['backbone.size']}}}")
        if command[0] == "recommend":
            Path(given["figure"]).touch()

    @property
    def names(self) -> list[str]:
        return [command[0] for command in self.commands]


@pytest.fixture
def steps(monkeypatch):
    noted = Steps()
    monkeypatch.setattr(art, "step", noted)
    return noted


@pytest.mark.parametrize(
    ("name", "count", "protocol"),
    [
        (
            "{i}.png",
            24,
            {"protocol=by-attribute", "protocol.attribute=work", "protocol.group=work"},
        ),  # flat: no artists
        ("{a}/{i}.png", 64, {"protocol=art-artist-random"}),  # two artists: too few to keep them apart
    ],
)
def test_the_choices_that_a_small_folder_needs(name, count, protocol, steps, tmp_path, capsys):
    art.make(paint(tmp_path / "in", count, name), None, tmp_path / "out", 224)
    assert steps.names == ["data", "train", "index", "calibrate", "recommend"]
    train = steps.commands[1]
    assert {argument for argument in train if re.match("protocol(=|.attribute|.group)", argument)} == protocol
    assert "+model.encoders.content.whitening.shrinkage=0.1" in train
    assert "backbone.size=224" in train
    assert "without outside=" in capsys.readouterr().out
    done = simsearch("art", f"{tmp_path}/in", f"out={tmp_path}/out", "serve=false")  # goes on with nothing left to do
    assert done.stdout.count("exists already") == 3
    assert f"simsearch serve catalog={tmp_path}/out/catalog root={tmp_path}/in port=8000" in done.stdout
    assert len(steps.commands) == 5, "what is done was done again"


def test_goes_on_where_it_failed_and_refuses_other_images(steps, tmp_path):
    folder, out = paint(tmp_path / "in", 24), tmp_path / "out"
    steps.failing = "index"
    with pytest.raises(ValueError, match="give the same command again to continue from there"):
        art.make(folder, None, out, 224)
    steps.failing = ""
    steps.commands.clear()
    art.make(folder, folder, out, 224)
    assert steps.names == ["index", "calibrate", "recommend"]
    assert f"outside={folder}" in steps.commands[1]
    with pytest.raises(ValueError, match="give another out="):
        art.make(paint(tmp_path / "other", 8), None, out, 224)


def test_what_is_asked_for_later_is_not_ignored(steps, tmp_path, capsys):
    folder, out = paint(tmp_path / "in", 24), tmp_path / "out"
    art.make(folder, None, out, None)
    assert "backbone.size=224" in steps.commands[1]
    steps.commands.clear()
    outside = paint(tmp_path / "outside", 8)
    for times in range(2):  # once is enough
        art.make(folder, outside, out, 224)
        assert steps.commands == [["calibrate", f"catalog={out}/catalog", f"outside={outside}"]], times
    art.make(folder, None, out, None)  # keeps it
    assert len(steps.commands) == 1
    assert "note:" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="was made with size=224: leave size= out, or give another out="):
        art.make(folder, None, out, 384)
    Image.new("RGB", (40, 40)).save(folder / "new.png")
    art.make(folder, None, out, None)
    assert f"{folder} has 25 images, and had 24 when" in capsys.readouterr().err


def test_too_few_works(steps, tmp_path):
    with pytest.raises(ValueError, match="3 works are too few for a recommender: give at least 4"):
        art.make(paint(tmp_path / "in", 3), None, tmp_path / "out", 224)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere does not exist: give a folder of images"),
        (["{few}", "outside=/nowhere"], "/nowhere does not exist"),
        (["images={few}", "serve=perhaps"], "serve must be true, false or null"),
        (["{few}", "paintings"], "'paintings' is not of the form key=value"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    few = paint(tmp_path / "few", 3)
    given = [argument.format(few=few) for argument in arguments]
    done = simsearch("art", *given, f"out={tmp_path}/out", expect=1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_flat_folder_with_a_broken_file_ends_in_a_recommender(tmp_path):
    images, out = paint(tmp_path / "paintings", 24), tmp_path / "out"
    (images / "broken.jpg").write_text("no picture")
    said = simsearch("art", str(images), f"out={out}", "size=96", "serve=false").stdout
    assert "your recommender in the browser: simsearch serve" in said
    with (out / "collection" / "rejected.csv").open() as file:
        assert "not-an-image" in str(list(csv.reader(file)))
    assert json.loads((out / "catalog" / "calibration.json").read_text())["similar"] is None
    assert (out / "recommendations.png").is_file()
    found = simsearch(
        "recommend", f"catalog={out / 'catalog'}", f"image={images / '3.png'}", "force=true", "format=json"
    )
    assert json.loads(found.stdout)["results"][0]["attributes"]["path"] == "3.png"
