"""Reading JSON from the other side of a socket without trusting its shape.

QEMU, and more so what runs in a guest, may be hostile: every value is checked for its type where it is taken out.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from hypervisor.errors import QmpAnswerError

T = TypeVar("T", bool, int, str, list[Any], dict[str, Any])


def of_type(value: object, kind: type[T], where: str) -> T:
    """`value` if it is of JSON type `kind`; a JSON boolean is no integer.

    Raises:
        QmpAnswerError: it is not; `where` says whose answer it is and which part.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise QmpAnswerError("understand", where, f"{_name(type(value))} where {_name(kind)} belongs")
    return value


def field(mapping: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    """The member `key` of `mapping`.

    Raises:
        QmpAnswerError: it is missing, or of another type.
    """
    if key not in mapping:
        raise QmpAnswerError("understand", where, f"member '{key}' is missing")
    return of_type(mapping[key], kind, f"{where}, member '{key}'")


def optional(mapping: dict[str, Any], key: str, kind: type[T], where: str) -> T | None:
    """The member `key` of `mapping`, None where it is absent or null.

    Raises:
        QmpAnswerError: it is there but of another type.
    """
    value = mapping.get(key)
    return None if value is None else of_type(value, kind, f"{where}, member '{key}'")


def objects(value: object, where: str) -> Iterator[dict[str, Any]]:
    """The entries of a list of JSON objects.

    Raises:
        QmpAnswerError: no list, or an entry that is no object.
    """
    for entry in of_type(value, list, where):
        yield of_type(entry, dict, where)


def nonsense(where: str, why: str) -> QmpAnswerError:
    """The error for an answer that is not even JSON, or has a value that makes no sense."""
    return QmpAnswerError("understand", where, why)


def printable(text: str, length: int = 200) -> str:
    """At most `length` characters of `text`, for messages: what would steer a terminal becomes `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:length])


def _name(kind: type) -> str:
    return {dict: "an object", list: "a list", str: "a text", int: "a number", bool: "a truth value"}.get(
        kind, "null" if kind is type(None) else kind.__name__
    )
