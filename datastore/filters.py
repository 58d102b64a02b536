"""Group filters: which groups of a namespace a job or a sync works on.

Rules: docs/upkeep.md, "Group filters". PBS reads the same texts; its regular expressions are those of Rust, ours those
of Python, so what only one of the two understands is refused or, where that cannot be seen, documented.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

from core.errors import UsageError
from datastore.names import BackupType, Group

#: Characters of a whole filter: a pattern is tried on every group, and Python's matching is not linear in its length.
MAX_LENGTH: Final = 1024
#: Escaped characters, then what Rust's regular expressions lack: looking around, references to groups, conditions,
#: atomic groups, and Python's names of the last two anchors.
_NOT_RUST: Final = (
    r"\\(?P<escape>[1-9Z])|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|(?P<group>\(\?(?:<?[=!]|P[=>]|\(|>|#))|(?P<possessive>[*+?}]\+)"
)
#: What both have under different names: `\\z`, and a named group without Python's P.
_RUST_ONLY: Final = r"\\(?P<escaped>.)|\(\?<(?=[A-Za-z_])"


class Kind(Enum):
    """What a filter looks at."""

    GROUP = "group"
    TYPE = "type"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """One filter, made by `parse`."""

    kind: Kind
    value: str  #: `vm/100`, `vm`, or the regular expression as given
    exclude: bool
    _pattern: re.Pattern[str] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `[include:|exclude:]group:TYPE/ID`, `type:TYPE` or `regex:PATTERN`.

        Raises:
            UsageError: another form, an unknown type, a pattern that is none or that PBS would not understand.
        """
        if len(text) > MAX_LENGTH:
            raise _error(text[:40] + "...", f"longer than {MAX_LENGTH} characters")
        exclude = text.startswith("exclude:")
        rest = text.removeprefix("exclude:") if exclude else text.removeprefix("include:")
        name, colon, value = rest.partition(":")
        if not colon or name not in {kind.value for kind in Kind}:
            raise _error(text, "it is not of the form [include:|exclude:]group:vm/100, type:vm or regex:PATTERN")
        kind = Kind(name)
        if kind is Kind.GROUP:
            Group.parse(value)
        elif kind is Kind.TYPE:
            if value not in {known.value for known in BackupType}:
                raise _error(text, f"the type {value!r} is none of vm, ct, host")
        else:
            return cls(kind, value, exclude, _compile(text, value))
        return cls(kind, value, exclude)

    def matches(self, group: Group) -> bool:
        """True if it speaks of `group`, whatever its namespace; include or exclude is the caller's matter."""
        if self.kind is Kind.GROUP:
            return str(group) == self.value
        if self.kind is Kind.TYPE:
            return group.type.value == self.value
        return self._pattern is not None and self._pattern.search(str(group)) is not None

    def __str__(self) -> str:
        """The text that `parse` reads; an include has no prefix, as with PBS."""
        return f"{'exclude:' if self.exclude else ''}{self.kind.value}:{self.value}"


def passes(filters: Iterable[GroupFilter], group: Group) -> bool:
    """True if `group` is meant: no include filter, or any of them, matches it, and no exclude filter does."""
    listed = list(filters)
    includes = [one for one in listed if not one.exclude]
    if includes and not any(one.matches(group) for one in includes):
        return False
    return not any(one.matches(group) for one in listed if one.exclude)


def _compile(text: str, pattern: str) -> re.Pattern[str]:
    for found in re.finditer(_NOT_RUST, pattern):
        if found["escape"] or found["group"] or found["possessive"]:
            raise _error(text, f"PBS does not understand {found[0]!r} in a regular expression")
    try:
        with warnings.catch_warnings():
            # Python warns of what it reads otherwise than others do: [[:alpha:]], [a&&b].
            warnings.simplefilter("error")
            return re.compile(re.sub(_RUST_ONLY, _in_python, pattern))
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise _error(text, f"the regular expression cannot be used ({error})") from None


def _in_python(found: re.Match[str]) -> str:
    if found["escaped"] is None:
        return "(?P<"
    return r"\Z" if found["escaped"] == "z" else found[0]


def _error(text: str, why: str) -> UsageError:
    return UsageError("use the group filter", repr(text), why, "docs/upkeep.md explains group filters")
