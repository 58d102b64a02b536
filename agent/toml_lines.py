"""On which line of a TOML text a key stands, so that an error can say so.

`tomllib` forgets positions. This scanner only finds statements (it skips strings, comments and brackets that span
lines); whether the text is valid TOML is `tomllib`'s business.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

_TOKEN: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""'
    r"|'''.*?'''"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|[\[\]{}]"
    r"|\n"
    r"""|[^"'#\[\]{}\n]+"""
    r"|.",
    re.DOTALL,
)
_KEY: Final = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_DOTTED: Final = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_ASSIGNMENT: Final = re.compile(rf"\s*({_DOTTED})\s*=")
_HEADER: Final = re.compile(rf"\s*\[\[?\s*({_DOTTED})\s*\]")

Keys = tuple[str, ...]


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """First line and text of each statement."""
    line, start, depth, parts = 1, 1, 0, list[str]()
    for match in _TOKEN.finditer(text):
        token = match.group()
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token == "\n" and depth <= 0:
            yield start, "".join(parts)
            start, depth, parts = line + 1, 0, []
        elif not token.startswith("#"):
            parts.append(token)
        line += token.count("\n")
    yield start, "".join(parts)


def _split(dotted: str) -> Keys:
    return tuple(key[1:-1] if key[0] in "\"'" else key for key in re.findall(_KEY, dotted))


def find_line(text: str, keys: Sequence[str | int]) -> int | None:
    """The line (from 1) on which `keys`, a path of nested keys, is set or its table begins.

    For a key inside an inline table, or one that is not there, the line of the nearest enclosing key; None if there
    is none either.
    """
    wanted = tuple(str(key) for key in keys if not isinstance(key, int))
    table: Keys = ()
    best: tuple[int, int] | None = None  # (length of the match, line)
    for line, statement in _statements(text):
        if header := _HEADER.match(statement):
            path = table = _split(header[1])
        elif assignment := _ASSIGNMENT.match(statement):
            path = table + _split(assignment[1])
        else:
            continue
        common = 0
        while common < min(len(path), len(wanted)) and path[common] == wanted[common]:
            common += 1
        # `[vm.web]` also is a place for a missing `vm.web.id`; `vm.web.qmp` is none for it.
        if common == min(len(path), len(wanted)) and common and (best is None or common > best[0]):
            best = common, line
    return None if best is None else best[1]
