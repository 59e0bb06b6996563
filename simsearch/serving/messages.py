"""What requests and answers look like."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from simsearch.files import json_line

MOST_RESULTS = 200
MOST_EXAMPLES = 16


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Example(Message):
    """An item of the catalog by `id`, or an image of the client's by `upload`."""

    id: int | None = None
    upload: str | None = Field(None, max_length=64)

    @model_validator(mode="after")
    def _one(self) -> Example:
        if (self.id is None) == (self.upload is None):
            raise ValueError('give either {"id": <item>} or {"upload": <token>}')
        return self


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


class Explained(Message):
    """Where an item is like an image, and the image like the item."""

    like: Example
    id: int
    weights: dict[str, float] | None = None


class Problem(BaseModel):
    """What every refusal and failure says. reason: of an image that cannot be used, in a word."""

    error: str
    reason: str | None = None


class Reply(JSONResponse):
    """JSON without what JSON has no word for."""

    def render(self, content: Any) -> bytes:
        return json_line(content).encode()
