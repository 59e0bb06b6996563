"""A griffe extension: examples (>>>) in docstrings are shown as code, wherever they stand."""

from __future__ import annotations

import re

import griffe


class Doctests(griffe.Extension):
    """Puts a fence around each block of a docstring that begins with >>> and ends with an empty line."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with its examples fenced.

    >>> print(fenced("Sums.\\n\\n>>> 1 + 1\\n2"))
    Sums.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    return re.sub(
        r"^( *)>>> .*(?:\n(?!\s*(?:\n|$)).*)*", lambda m: f"{m[1]}```pycon\n{m[0]}\n{m[1]}```", text, flags=re.MULTILINE
    )
