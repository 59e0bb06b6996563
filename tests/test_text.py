"""Text from strangers: nothing of it gives a terminal, a page of Markdown or a spreadsheet orders; equal texts."""

from __future__ import annotations

import csv
import doctest
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import simsearch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.table import Table
from rich.text import Text
from test_serving import encoder, make_catalog, root  # noqa: F401

from simsearch import terminal, text
from simsearch.files import json_line, to_csv, write_csv
from simsearch.text import cell, csv_cell, folded, lines, markdown, printable, spelling_key, spellings

HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]a\r\x9b31m\u202e|`x`<img src=x>\u2028"
ANY = st.text(st.characters(codec=None, categories=None))


def orders(text: str, but: str = "") -> list[str]:
    """Characters of a text that a terminal acts on, or that turn it round."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    turning = ["LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"]
    return [
        sign
        for sign in text
        if sign not in but and (unicodedata.category(sign) in kinds or unicodedata.bidirectional(sign) in turning)
    ]


@given(ANY)
def test_nothing_that_gives_orders_is_left(text):
    assert orders(printable(text)) == []
    assert orders(lines(text), but="\n") == []
    assert lines(text).count("\n") == text.count("\n")
    assert Text.from_markup(cell(text)).plain == printable(text)
    assert orders(markdown(text)) == []
    printable(text).encode()


@pytest.mark.parametrize("text", ["Monet", "Étude 3 (1890) – no. 2", "睡蓮", "می‌خواهم", "👩‍🎨", "a\\b", "נחום"])
def test_honest_text_stays(text):
    assert printable(text) == lines(text) == text


def test_markdown_shows_it_as_it_is():
    assert markdown("a|b `c` <b> [d](e) _f_ *g* &amp; ~~h~~\ni") == (
        r"a\|b \`c\` \<b\> \[d\](e) \_f\_ \*g\* \&amp; \~\~h\~\~ i"
    )


@given(st.one_of(ANY, st.text("=+-@0123456789.,eE%\t\r\n ＝", max_size=8)))
def test_no_cell_is_a_formula(text):
    found = csv_cell(text)
    assert found.removeprefix("'") == printable(text) or found == printable(text)
    if found and found[0] in "=+-@\t\r\n＝＋－＠":
        assert found[1].isdigit()
        assert set(found) - set("0123456789") <= set("+-.,eE%") or not found.isascii()


def test_cells_of_a_spreadsheet():
    for formula in ("=1+1", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "＝1", "-", "--1"):
        assert csv_cell(formula) == f"'{formula}"
    assert csv_cell("\t=1") == "\\t=1"
    for number in ("-1.5", "+3", "-1e-05", "-12 %".replace(" ", ""), "1,000.5", "Monet", "", "a=b", -1.5, 3, None):
        assert csv_cell(number) == number


def test_a_table_for_people_holds_no_formula_and_one_for_programs_every_sign(tmp_path):
    path, rows = tmp_path / "new" / "a.csv", [["=1+1", 'a,"b"\n', -1.5], ["Zoë", "-2+3", None]]
    write_csv(path, ["x", "=y", "z"], iter(rows))
    assert path.read_bytes().decode() == to_csv(["x", "=y", "z"], rows)
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x", "'=y", "z"], ["'=1+1", 'a,"b"\\n', "-1.5"], ["Zoë", "'-2+3", ""]]
    write_csv(path, ["x", "=y", "z"], iter(rows), exact=True)
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x", "=y", "z"], ["=1+1", 'a,"b"\n', "-1.5"], ["Zoë", "-2+3", ""]]


def test_a_table_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, ["x"], [[1]])
    with pytest.raises(ZeroDivisionError):
        write_csv(path, ["x"], ([1 / n] for n in (2, 0)))
    assert path.read_text() == "x\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_tables_show_it(capsys):
    table = Table(title=cell(HOSTILE))
    table.add_column("name")
    table.add_row(cell(HOSTILE))
    table.add_row(HOSTILE.replace("[red]", ""))  # by somebody who forgot
    terminal.show(table, cell(HOSTILE), f"[bold]{cell(HOSTILE)}[/bold]")
    shown = capsys.readouterr().out
    assert orders(shown, but="\n") == []
    assert shown.count("[red]a") >= 3
    assert shown.count("\\x1b[2J") >= 3


def test_json_has_no_nan():
    given = {"a": float("nan"), "b": [float("inf"), 1.5], "c": "é\ud800", "d": {"e": (float("-inf"), True)}}
    assert json.loads(json_line(given)) == {"a": None, "b": [None, 1.5], "c": "é\ud800", "d": {"e": [None, True]}}


class TestCommands:
    """Names of files, columns and values of a stranger's collection, through the commands."""

    def test_search_and_recommend(self, root, encoder, tmp_path):  # noqa: F811
        folder = make_catalog(tmp_path / "c", root, encoder, mark=HOSTILE, count=6)
        images = tmp_path / "images"
        images.mkdir()
        name = HOSTILE.replace("/", "").replace("\u2028", "")
        (images / f"{name}.png").write_bytes((root / "1.png").read_bytes())
        (images / f"broken{name}.png").write_bytes(b"no image")
        for arguments in (
            ("search", f"image={images}"),
            ("recommend", "id=1", "k=3"),
            ("recommend", "id=1", "k=3", "where=title=x"),
        ):
            done = simsearch(*arguments, f"catalog={folder}", expect=1 if "where=title=x" in arguments else 0)
            assert orders(done.stdout + done.stderr, but="\n") == []
            assert "\\x1b[2J" in done.stdout + done.stderr

    def test_ingest(self, tmp_path):
        images = tmp_path / "art"
        names = ["=cmd()", "-2+3", f"b{HOSTILE}".replace("/", "")]
        for i, name in enumerate(names):
            (images / name).mkdir(parents=True)
            Image.linear_gradient("L").rotate(40 * i).save(images / name / f"{i}.png")
            (images / name / "broken.png").write_bytes(b"no image")
        out = tmp_path / "out"
        done = simsearch("data", "ingest", f"images={images}", f"out={out}", "near.descriptors=false", "workers=1")
        assert orders(done.stdout + done.stderr.replace("\r", ""), but="\n\x1b") == []
        report = (out / "report.md").read_text()
        assert orders(report, but="\n") == []
        assert "<img" not in report.replace("\\<img", "")
        with (out / "rejected.csv").open(newline="") as file:
            cells = [one for row in csv.reader(file) for one in row]
        assert not [one for one in cells if one[:1] in tuple("=+-@\t\r")]
        assert "'=cmd()/broken.png" in cells
        assert orders("".join(cells)) == []


def test_printing_goes_through_one_door():
    """Errors and warnings hold names of files; what is printed of them is made harmless."""
    package = Path(terminal.__file__).parent
    for path in package.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not ("print(" in line and "{error" in line), f"{path}:{number}: use simsearch.text.warn"
            assert "rich.markup" not in line or path.name == "text.py", f"{path}:{number}: use simsearch.text.cell"


# ------------------------------------------------------------------------------ equal texts


@pytest.mark.parametrize(
    ("texts", "equal"),
    [
        (
            [
                "Claude Monet",
                "CLAUDE  MONET",
                " claude\nmonet ",
                "Claude-Monet",
                "claude_monet",
                "ｃｌａｕｄｅ　ｍｏｎｅｔ",
            ],
            True,
        ),
        (["Cézanne", "Ce\u0301zanne", "CEZANNE", "cezanne"], True),
        (["Straße", "STRASSE", "strasse"], True),
        (["Ukiyo-e", "ukiyo e", "Ukiyo‐e", "Ukiyo–e", "UKIYOE"], True),
        (["1850-1874", "1850–1874", "1850 - 1874", "1850 1874"], True),
        (["№ 5™", "No 5TM"], True),
        (["1-2", "12", "2", "-12", "1.2", "1/2"], False),
        (["-3", "3", "+3"], False),
        (["-", "—", "", "a"], False),
        (["が", "か", "각", "가", "カ", "ガ"], False),
        (["कि", "क", "שׁ", "ש"], False),
        (["Ødegaard", "Odegaard"], False),  # a letter of its own
    ],
)
def test_which_texts_are_equal(texts, equal):
    keys = [spelling_key(text) for text in texts]
    assert len(set(keys)) == (1 if equal else len(texts)), keys
    assert [spelling_key(key) for key in keys] == keys


@given(
    st.lists(
        st.sampled_from([*"aéÅñßΣς ", "e\u0301", "ﬁ", "Ⅳ", "İ", "ﷺ", "ℌ", "ῼ", "각", "が", "か\u3099"]), max_size=8
    )
)
def test_no_form_of_unicode_and_no_case_makes_another_text(signs):
    text = "".join(signs)
    for other in (
        *(unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")),
        text.upper(),
        text.casefold(),
    ):
        assert folded(other) == folded(text)
        assert spelling_key(other) == spelling_key(text)
    assert not any("\u0300" <= sign <= "\u036f" or sign.isupper() for sign in folded(text))


@given(st.text(max_size=20))
def test_a_key_is_its_own_key(text):
    assert spelling_key(spelling_key(text)) == spelling_key(text)
    assert folded(folded(text)) == folded(text)


def test_spellings_become_the_most_frequent():
    values = Counter(
        {"Claude Monet": 3, "claude monet": 5, "CLAUDE  MONET": 1, "Ukiyo-e": 1, "ukiyo e": 1, "José": 1, "Jose": 1}
        | {"が": 2, "か": 3}
    )
    got = spellings(values)
    assert got["CLAUDE  MONET"] == got["Claude Monet"] == "claude monet"
    assert got["ukiyo e"] == "Ukiyo-e"  # as frequent, and in mixed case
    assert got["Jose"] == "José"
    assert (got["が"], got["か"]) == ("が", "か")


def test_the_examples_run():
    found = doctest.testmod(text)
    assert found.failed == 0 < found.attempted
