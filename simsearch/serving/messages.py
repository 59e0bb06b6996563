"""What requests and answers look like."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from simsearch.files import json_line
from simsearch.search.filters import Condition

MOST_RESULTS = 200
MOST_EXAMPLES = 16
MOST_FILTERS = 100
MOST_LETTERS = 2000  # of a name or value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_as_text), Field(max_length=MOST_LETTERS)]
Text = Annotated[str, Field(max_length=MOST_LETTERS)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Example(Message):
    """An item of the catalog by `id` (else its path) or, where that is meant, `position`, or an `upload`."""

    id: Name | None = None
    position: int | None = Field(default=None, ge=0)
    upload: str | None = Field(default=None, max_length=64)

    @model_validator(mode="after")
    def _one(self) -> Example:
        if [self.id, self.position, self.upload].count(None) != 2:
            raise ValueError('give either {"id": <item>} or {"upload": <token>} (or {"position": <number>})')
        return self


class Filter(Message):
    """A condition as data: one of `values` ("" is unknown), or a number in low .. high, or else any known value."""

    attribute: Text
    values: list[Text] = Field([], max_length=1000)
    low: float | None = None
    high: float | None = None
    negate: bool = False

    def condition(self) -> Condition:
        """The condition. Raises ValueError as `Condition` does."""
        return Condition(self.attribute, tuple(self.values), self.low, self.high, self.negate)


Filters = Annotated[list[Filter], Field(max_length=MOST_FILTERS)]


class Wanted(Message):
    """What a search may say beside its examples."""

    weights: dict[str, float] | None = None
    where: str = Field("", max_length=2000, description="artist=Claude Monet|Alfred Sisley; year=1850..1900")
    k: int = Field(24, ge=1, le=MOST_RESULTS)
    diversity: float = Field(0.0, ge=0, le=1)
    collapse: bool = True
    hubness: bool = False


class Search(Wanted):
    """Items like these examples and unlike those. Of several examples enough must be near to an item for a verdict."""

    like: list[Example] = Field(min_length=1, max_length=MOST_EXAMPLES)
    unlike: list[Example] = Field([], max_length=MOST_EXAMPLES)
    filters: Filters = Field([], description="as `where`, but as data: both hold")


class Explained(Message):
    """Where the item `id` is like what a search asks for, and the example `shown` of those in `like` like the item."""

    like: list[Example] = Field(min_length=1, max_length=MOST_EXAMPLES)
    unlike: list[Example] = Field([], max_length=MOST_EXAMPLES)
    id: Name
    shown: int = Field(0, ge=0)
    weights: dict[str, float] | None = None


class Problem(BaseModel):
    """What every refusal and failure says.

    reason: of an image that cannot be used, in a word. missing: the examples that there are not. version: the one that
    the catalog has now. items: the ids now of those that a request of another version names, null for what is gone.
    """

    error: str
    reason: str | None = None
    missing: list[Example] | None = None
    version: str | None = None
    items: dict[str, str | None] | None = None


class Reply(JSONResponse):
    """JSON without what JSON has no word for."""

    def render(self, content: Any) -> bytes:
        return json_line(content).encode()
