"""Parameters of requests: their types, and the checks with the texts that clients may know (spec 3.2, 3.3)."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from server.access.auth_ids import AUTH_ID, SAFE_ID, USER_ID
from server.access.roles import ROLES
from server.errors import ApiError

#: Pairs of a query or form that are looked at.
MAX_PAIRS: Final = 32_768
_TRUE: Final = ("1", "on", "yes", "true")
_FALSE: Final = ("0", "off", "no", "false")
_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_MAX_I64: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Text:
    """A string."""

    pattern: re.Pattern[str] | None = None
    shortest: int = 0
    longest: int | None = None
    choices: tuple[str, ...] = ()

    def from_text(self, text: str) -> str:
        """The value of a query's text; raises ValueError with the reason."""
        if self.choices and text not in self.choices:
            raise ValueError(f"value '{text[:200]}' is not defined in the enumeration.")
        if len(text) < self.shortest:
            raise ValueError(f"value must be at least {self.shortest} characters long")
        if self.longest is not None and len(text) > self.longest:
            raise ValueError(f"value may only be {self.longest} characters long")
        if self.pattern is not None and self.pattern.fullmatch(text) is None:
            raise ValueError("value does not match the regex pattern")
        return text

    def from_json(self, value: object) -> str:
        """The value of JSON; raises ValueError with the reason."""
        if not isinstance(value, str):
            raise ValueError("Expected string value.")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("value is no Unicode text.")  # half of a pair, which no file can hold
        return self.from_text(value)


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number."""

    least: int | None = None
    most: int | None = None

    def from_text(self, text: str) -> int:
        """As `Text.from_text`."""
        if _INTEGER.fullmatch(text) is None:
            raise ValueError("cannot parse integer from empty string" if not text else "invalid digit found in string")
        if len(text) > 20 or abs(int(text)) > _MAX_I64:
            raise ValueError("number too large to fit in target type")
        return self._checked(int(text))

    def from_json(self, value: object) -> int:
        """As `Text.from_json`."""
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MAX_I64:
            raise ValueError("Expected integer value.")
        return self._checked(value)

    def _checked(self, value: int) -> int:
        if self.least is not None and value < self.least:
            raise ValueError(f"value must have a minimum value of {self.least} (got {value})")
        if self.most is not None and value > self.most:
            raise ValueError(f"value must have a maximum value of {self.most} (got {value})")
        return value


@dataclass(frozen=True, slots=True)
class Boolean:
    """A truth value."""

    def from_text(self, text: str) -> bool:
        """As `Text.from_text`."""
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise ValueError("Unable to parse boolean option.")

    def from_json(self, value: object) -> bool:
        """As `Text.from_json`."""
        if not isinstance(value, bool):
            raise ValueError("Expected boolean value.")
        return value


@dataclass(frozen=True, slots=True)
class Array:
    """Several values of one type."""

    item: Text | Integer

    def from_text(self, texts: Sequence[str]) -> list[Any]:
        """As `Text.from_text`, of a repeated key."""
        return [self.item.from_text(text) for text in texts]

    def from_json(self, value: object) -> list[Any]:
        """As `Text.from_json`."""
        if not isinstance(value, list):
            raise ValueError("Expected array - got scalar value.")
        return [self.item.from_json(one) for one in value]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a call."""

    type: Text | Integer | Boolean | Array
    optional: bool = False
    default: Any = None  #: of an optional one


Schema = Mapping[str, Parameter]


def optional(type: Text | Integer | Boolean | Array, default: Any = None) -> Parameter:
    """A parameter that may be left out."""
    return Parameter(type, True, default)


def parse_pairs(text: str) -> list[tuple[str, str]]:
    """The decoded pairs of a query or form.

    Raises:
        ApiError: too many, or not UTF-8.
    """
    if not text:
        return []
    if text.count("&") >= MAX_PAIRS:
        raise ApiError("too many parameters")
    pairs = []
    for part in text.split("&"):
        if part:
            key, _, value = part.partition("=")
            pairs.append((_decoded(key), _decoded(value)))
    return pairs


def _decoded(text: str) -> str:
    try:
        return unquote_to_bytes(text.replace("+", " ")).decode()
    except UnicodeDecodeError:
        raise ApiError("invalid utf-8 sequence in parameters") from None


def from_pairs(schema: Schema, pairs: Sequence[tuple[str, str]], path: Mapping[str, str]) -> dict[str, Any]:
    """Parameters from a query or form, and from the path.

    Raises:
        ApiError: wrong ones, all of them named.
    """
    faults: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    lists: dict[str, list[str]] = {}
    for key, text in [*path.items(), *pairs]:
        parameter = schema.get(key)
        if parameter is None:
            faults.append((key[:200], "schema does not allow additional properties."))
        elif isinstance(parameter.type, Array):
            lists.setdefault(key, []).append(text)
        elif key in values:
            faults.append((key, "duplicate parameter."))
        else:
            try:
                values[key] = parameter.type.from_text(text)
            except ValueError as error:
                values[key] = None
                faults.append((key, str(error)))
    for key, texts in lists.items():
        kind = schema[key].type
        assert isinstance(kind, Array)
        try:
            values[key] = kind.from_text(texts)
        except ValueError as error:
            values[key] = None
            faults.append((key, str(error)))
    return _complete(schema, values, faults, "parameter is missing and it is not optional.")


def from_json(schema: Schema, body: bytes, path: Mapping[str, str]) -> dict[str, Any]:
    """Parameters from a JSON object, and from the path.

    Raises:
        ApiError: no JSON object, or wrong parameters, all of them named.
    """
    try:
        document = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_unique) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ApiError(_json_fault(body, error)) from None
    if not isinstance(document, dict):
        raise ApiError("Unable to parse parameters (expected JSON object)")
    faults: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    for key, text in path.items():
        if key in document:
            faults.append((key, "duplicate parameter."))
            continue
        try:
            values[key] = schema[key].type.from_text(text)
        except ValueError as error:
            values[key] = None
            faults.append((key, str(error)))
    for key, value in sorted(document.items()):  # so that faults come in PBS's order
        parameter = schema.get(key)
        if parameter is None:
            faults.append((key[:200], "schema does not allow additional properties"))
            continue
        try:
            values[key] = parameter.type.from_json(value)
        except ValueError as error:
            values[key] = None
            faults.append((key, str(error)))
    return _complete(schema, values, faults, "property is missing and it is not optional")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate field")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _json_fault(body: bytes, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        what = "EOF while parsing a value" if error.pos >= len(body.rstrip()) else "expected value"
        return f"{what} at line {error.lineno} column {error.colno - 1}"
    return f"invalid JSON: {type(error).__name__}"


def _complete(schema: Schema, values: dict[str, Any], faults: list[tuple[str, str]], missing: str) -> dict[str, Any]:
    faults += [(key, missing) for key in sorted(schema) if key not in values and not schema[key].optional]
    if faults:
        raise parameter_error(faults)
    for key, parameter in schema.items():
        values.setdefault(key, parameter.default)
    return values


def from_stored(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that a file holds, checked as JSON is.

    Raises:
        ValueError: an unknown or missing one, or one of another type.
    """
    found = {}
    for key, value in values.items():
        if key not in schema:
            raise ValueError(f"{key} is unknown")
        try:
            found[key] = schema[key].type.from_json(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    for key, parameter in schema.items():
        if key not in found and not parameter.optional:
            raise ValueError(f"{key} is missing")
    return found


def parameter_error(faults: Sequence[tuple[str, str]]) -> ApiError:
    """The answer that names wrong parameters."""
    shown = faults[:100]
    if len(shown) == 1:
        text = f"parameter verification failed - '{shown[0][0]}': {shown[0][1]}"
    else:
        text = "parameter verification failed:" + "".join(f"\n- '{key}': {reason}" for key, reason in shown)
    return ApiError(text, errors=dict(shown))


# The types that several calls share (spec 4).
SAFE: Final = re.compile(SAFE_ID)
STORE: Final = Text(SAFE, 3, 32)
REMOTE: Final = Text(SAFE, 3, 32)
NAMESPACE: Final = Text(re.compile(rf"(?:(?:{SAFE_ID}/){{0,7}}{SAFE_ID})?"), 0, 256)
NAMESPACE_COMPONENT: Final = Text(SAFE, 1, 32)
BACKUP_TYPE: Final = Text(choices=("vm", "ct", "host"))
BACKUP_ID: Final = Text(SAFE, 1, 200)
BACKUP_TIME: Final = Integer(least=1, most=253_402_300_799)
ARCHIVE: Final = Text(SAFE, 1, 200)
DIGEST: Final = Text(re.compile(r"[a-f0-9]{64}"))
CSUM: Final = Text(re.compile(r"[A-Fa-f0-9]{64}"))
CONFIG_DIGEST: Final = CSUM
USER: Final = Text(USER_ID, 3, 64)
AUTH: Final = Text(AUTH_ID, 3, 64)
TOKEN_NAME: Final = Text(SAFE, 3, 32)
ROLE: Final = Text(choices=tuple(ROLES))
MAX_DEPTH: Final = Integer(0, 7)
BOOL: Final = Boolean()
NOTES: Final = Text(longest=65_536)
COMMENT: Final = Text(re.compile(r"[^\x00-\x1f\x7f]*"), longest=128)
UPID: Final = Text(
    re.compile(
        r"UPID:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?:[0-9A-Fa-f]{8}:[0-9A-Fa-f]{8,9}:[0-9A-Fa-f]{8,16}:"
        r"[0-9A-Fa-f]{8}:[A-Za-z0-9_-]+:[^:\s/\x00-\x1f]*:[^:\s/\x00-\x1f]+:"
    ),
    36,
    2048,
)

IN_STORE: Final = {"store": Parameter(STORE), "ns": optional(NAMESPACE, "")}
GROUP: Final = {**IN_STORE, "backup-type": Parameter(BACKUP_TYPE), "backup-id": Parameter(BACKUP_ID)}
SNAPSHOT: Final = {**GROUP, "backup-time": Parameter(BACKUP_TIME)}
KEEP: Final = {
    f"keep-{kind}": optional(Integer(least=1)) for kind in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
}
