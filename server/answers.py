"""What handlers return, and what goes to the client."""

import hashlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from core.buffers import Buffer
from server.errors import ApiError

JSON: Final = "application/json;charset=UTF-8"
RAW: Final = "application/octet-stream"


@dataclass(slots=True)
class Answer:
    """One answer. `stream`, if there is one, follows `parts`; who sends the answer closes it."""

    status: int = 200
    content_type: str | None = JSON
    parts: Sequence[Buffer] = ()
    headers: Sequence[tuple[str, str]] = ()
    stream: AsyncGenerator[Buffer, None] | None = None

    @property
    def length(self) -> int | None:
        """Bytes of the body; None if that is not known."""
        return None if self.stream is not None else sum(len(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Result:
    """A value for `data`, and what stands beside it."""

    data: Any
    attributes: Mapping[str, Any] = field(default_factory=dict)


def raw(*parts: Buffer) -> Answer:
    """A file."""
    return Answer(content_type=RAW, parts=parts)


def envelope(value: object, *, extjs: bool = False) -> Answer:
    """The answer for what a handler returned."""
    if isinstance(value, Answer):
        return value
    document: dict[str, Any] = dict(value.attributes) if isinstance(value, Result) else {}
    document["data"] = value.data if isinstance(value, Result) else value
    if extjs:
        document = {**document, "success": True, "status": 200}
    return Answer(parts=[as_json(document)])


def refusal(error: ApiError, *, extjs: bool = False) -> Answer:
    """The answer for a refused request: plain text, labelled JSON all the same (spec 3.3)."""
    if extjs and error.status != 401:
        document = {"message": error.message, "status": error.status, "success": False, "errors": error.errors}
        return Answer(parts=[as_json(document)])
    plain = error.status == 401 and error.message.startswith("authentication failed")
    return Answer(error.status, None if plain else JSON, [error.message.encode("utf-8", "replace")])


def as_json(document: object) -> bytes:
    """Compact JSON; what is no Unicode becomes replacement characters."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def digest_of(document: object) -> str:
    """What a client may give back to see to it that a configuration is still the same."""
    return hashlib.sha256(as_json(document)).hexdigest()
