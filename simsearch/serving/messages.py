"""The messages of the API: requests and responses."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, field_validator, model_validator

from simsearch.files import json_line
from simsearch.functional.regions import Region, read_region
from simsearch.search.filters import Condition

MOST_RESULTS = 200
MOST_EXAMPLES = 16
MOST_ITEMS = 500
MOST_FILTERS = 100
MOST_LETTERS = 2000  # of a name or value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_as_text), Field(max_length=MOST_LETTERS)]
Text = Annotated[str, Field(max_length=MOST_LETTERS)]


class Message(BaseModel):
    """A message whose fields are all known. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Example(Message):
    """An item of the catalog by `id` (or its path), an item by `position`, or an `upload`; perhaps a part of it.

    `region` is x, y, w, h of the upright image: fractions of its width and height. For an upload, they are pixels if
    one of them is above 1.
    """

    id: Name | None = None
    position: int | None = Field(default=None, ge=0)
    upload: str | None = Field(default=None, max_length=64)
    region: tuple[float, float, float, float] | None = None

    @property
    def part(self) -> Region | None:
        """The region as an object."""
        return read_region(self.region)

    @model_validator(mode="after")
    def _one(self) -> Example:
        if [self.id, self.position, self.upload].count(None) != 2:
            raise ValueError('give either {"id": <item>} or {"upload": <token>} (or {"position": <number>})')
        if (part := self.part) is not None and part.is_pixels and self.upload is None:
            raise ValueError("the region of an item is given in fractions: its image may be shown at another size")
        return self


class Filter(Message):
    """A condition as data: one of `values` ("" is unknown), or a number in low..high; without both, any known value."""

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
    """The settings of a search, besides its examples."""

    weights: dict[str, float] | None = None
    where: str = Field("", max_length=2000, description="artist=Claude Monet|Alfred Sisley; year=1850..1900")
    k: int = Field(24, ge=1, le=MOST_RESULTS)
    diversity: float = Field(0.0, ge=0, le=1)
    collapse: bool = True
    hubness: bool = False
    verify: bool = Field(True, description="compare the best items point by point, if the catalog has local features")
    min_score: float | None = Field(None, allow_inf_nan=False, description="least score of a result; null for any")


class Search(Wanted):
    """Items similar to `like` and dissimilar to `unlike`.

    For a verdict, an item must be close to enough of the examples.
    """

    like: list[Example] = Field(min_length=1, max_length=MOST_EXAMPLES)
    unlike: list[Example] = Field([], max_length=MOST_EXAMPLES)
    filters: Filters = Field([], description="like `where`, but as JSON; items must pass both")


class SearchImage(Wanted):
    """The settings of a search with the image of the same request. `region` is the part of it to search with."""

    weights: Json[dict[str, float] | None] = Field(None, description='JSON, such as {"content": 1, "colour": 0.5}')
    region: str = Field("", max_length=100, description="x,y,w,h: fractions, or pixels if one is above 1")
    v: str = Field("", max_length=64, description="the version of the catalog that the request is for")

    @field_validator("region")
    @classmethod
    def _is_region(cls, given: str) -> str:
        read_region(given or None)
        return given


class Some(Message):
    """Items by their ids or paths."""

    ids: list[Name] = Field(min_length=1, max_length=MOST_ITEMS)


class Explained(Message):
    """Why a search finds the item `id`: regions of the item, and regions of the example `shown` in `like`."""

    like: list[Example] = Field(min_length=1, max_length=MOST_EXAMPLES)
    unlike: list[Example] = Field([], max_length=MOST_EXAMPLES)
    id: Name
    shown: int = Field(0, ge=0)
    weights: dict[str, float] | None = None


class Problem(BaseModel):
    """The body of every error response.

    - `error`: what is wrong and what to do.
    - `reason`: one word, if an image cannot be used.
    - `missing`: the examples that do not exist.
    - `version`: the current version of the catalog.
    - `items`: for a request made for another version, the current ids of the items that it names. null for items that
      are gone.
    """

    error: str
    reason: str | None = None
    missing: list[Example] | None = None
    version: str | None = None
    items: dict[str, str | None] | None = None


class Reply(JSONResponse):
    """A JSON response without values that JSON cannot express."""

    def render(self, content: Any) -> bytes:
        """The body of the response.

        Args:
            content: Plain values.
        """
        return json_line(content).encode()
