"""Patterns of paths: what a backup leaves out, and what a restore takes.

Syntax: docs/formats.md, "Exclude patterns". A path is `/` and the path relative to the archive root, as bytes. A
pattern matches the whole path or what follows one of its slashes; of several patterns the last that matches decides.

Patterns come from whoever may write a `.pxarexclude`, so none may take long: they become regular expressions that never
go back over what was matched, and the few that cannot (a class that may match a slash, together with a star) are
matched by arithmetic on the set of reachable places.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from pxar.errors import PatternError

#: The name under which a self-contained archive holds the patterns of its command line.
CLI_FILE: Final = b".pxarexclude-cli"
#: The name of the files in the source that hold patterns for their folder and below.
EXCLUDE_FILE: Final = b".pxarexclude"
#: Bytes of a pattern; a path has 4096 at most.
MAX_PATTERN: Final = 8192

_SLASH: Final = ord("/")
_ASCII: Final[dict[bytes, Callable[[bytes], bool]]] = {
    b"alnum": lambda c: c.isalnum(),
    b"alpha": lambda c: c.isalpha(),
    b"blank": lambda c: c in b" \t",
    b"cntrl": lambda c: c < b" " or c == b"\x7f",
    b"digit": lambda c: c.isdigit(),
    b"graph": lambda c: b"!" <= c <= b"~",
    b"lower": lambda c: c.islower(),
    b"print": lambda c: b" " <= c <= b"~",
    b"punct": lambda c: b"!" <= c <= b"~" and not c.isalnum(),
    b"space": lambda c: c in b" \t\n\v\f\r",
    b"upper": lambda c: c.isupper(),
    b"xdigit": lambda c: c in b"0123456789abcdefABCDEF",
}
_CLASSES: Final = {
    name: frozenset(number for number in range(128) if test(bytes([number]))) for name, test in _ASCII.items()
}
_ALL: Final = frozenset(range(256))
_NO_SLASH: Final = _ALL - {_SLASH}
_ONLY_SLASH: Final = frozenset({_SLASH})


class _Star(NamedTuple):
    """Any number of bytes: of one name, or (`deep`) of any names, followed by a slash unless they end the pattern."""

    deep: bool


#: One byte of the set, or a star.
_Token = frozenset[int] | _Star
_NAME_STAR: Final = _Star(deep=False)
_DEEP_STAR: Final = _Star(deep=True)


class LastName(NamedTuple):
    """What a pattern asks of the last name of a path."""

    parts: tuple[frozenset[int] | None, ...]  #: one byte of the set each; None: any number of bytes
    whole: bool  #: False: of the name's end


@dataclass(frozen=True, slots=True)
class MatchPattern:
    """One pattern."""

    text: bytes  #: without the leading `!`, the trailing slashes, and the folder it is anchored in; never empty
    inverted: bool  #: it had a leading `!`: what matches is not excluded
    directory_only: bool  #: it had a trailing slash
    bang_class: bool  #: a class begins with `!`, which is a member of it and does not negate, as PBS has it
    regex: bytes | None  #: what matches the same paths as a whole; None where that could take long
    _matches: Callable[[bytes], object] = field(repr=False, compare=False)
    _tokens: tuple[_Token, ...] = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: bytes, *, anchor: bytes = b"") -> Self:
        """Read a pattern as it stands on the command line.

        `anchor`, a path, stands literally before it; then it should begin with a slash.

        Raises:
            PatternError: an unclosed or unknown class, a NUL, a backslash at the end, longer than `MAX_PATTERN`.
        """
        inverted = text.startswith(b"!")
        body = text[inverted:]
        stripped = body.rstrip(b"/")
        plain = stripped or b"/"
        reader = _Reader(plain)
        tokens = [frozenset({byte}) for byte in anchor] + reader.tokens()
        regex = _regex(tokens)
        matches: Callable[[bytes], object] = (
            re.compile(regex, re.DOTALL).fullmatch if regex is not None else _Places(tokens).match
        )
        return cls(plain, inverted, stripped != body, reader.bang_class, regex, matches, tuple(tokens))

    def matches(self, path: bytes, is_dir: bool | None) -> bool:
        """Whether it matches `path`; `is_dir` None: of unknown type, which patterns for directories do not match."""
        return (not self.directory_only or bool(is_dir)) and bool(self._matches(path))

    @property
    def last_name(self) -> LastName | None:
        """What the last name of every path must look like that it matches; None if it may be any (`a/**`)."""
        if self._tokens[-1] == _DEEP_STAR:
            return None
        parts: list[frozenset[int] | None] = []
        whole = True
        for token in reversed(self._tokens):
            if isinstance(token, _Star):
                if token.deep:
                    break  # it ends where a name begins
                parts.append(None)
            elif _SLASH not in token:
                parts.append(token)
            else:
                whole = token == _ONLY_SLASH
                break
        return LastName(tuple(reversed(parts)), whole)

    def line(self) -> bytes:
        """How archives store it, with a newline at the end."""
        return b"!" * self.inverted + self.text + b"/" * self.directory_only + b"\n"


class MatchList:
    """Patterns in order, those of the folders on the way to the current one included."""

    def __init__(self, patterns: Iterable[MatchPattern] = ()) -> None:
        self._levels: list[tuple[int, list[Callable[[bytes], object]]]] = []
        self._patterns = list(patterns)
        self._any: list[Callable[[bytes], object]] = []
        self._prepare()

    def __bool__(self) -> bool:
        """Whether there is any pattern: without one nobody needs to put paths together."""
        return bool(self._patterns)

    def add(self, pattern: MatchPattern) -> None:
        """Append one; before any `push`."""
        self._patterns.append(pattern)
        self._prepare()

    def push(self, patterns: Sequence[MatchPattern]) -> None:
        """Enter a folder with `patterns` of its own."""
        self._levels.append((len(self._patterns), self._any))
        if patterns:
            self._patterns += patterns
            self._prepare()

    def pop(self) -> None:
        """Leave the folder that was entered last; its patterns are dropped."""
        size, self._any = self._levels.pop()
        del self._patterns[size:]

    def decide(self, path: bytes, is_dir: bool | None) -> bool | None:
        """True if the last pattern that matches is a plain one (excluded), False if an inverted one, None without any.

        See `MatchPattern.matches` for the parameters.
        """
        number = self.last(path, is_dir)
        return None if number < 0 else not self._patterns[number].inverted

    def last(self, path: bytes, is_dir: bool | None) -> int:
        """The number of the last pattern that matches, from 0; -1 without any. Parameters as those of `decide`."""
        for matches in self._any:
            if matches(path):
                break
        else:
            return -1
        patterns = self._patterns
        for number in range(len(patterns) - 1, -1, -1):
            if patterns[number].matches(path, is_dir):
                return number
        return -1

    def _prepare(self) -> None:
        """One expression for all, since most paths match none of them."""
        regexes = [pattern.regex for pattern in self._patterns if pattern.regex is not None]
        self._any = [pattern._matches for pattern in self._patterns if pattern.regex is None]
        if regexes:
            self._any.insert(0, re.compile(b"|".join(b"(?:%b)" % regex for regex in regexes), re.DOTALL).fullmatch)


def parse_exclude_file(data: bytes, directory: bytes) -> tuple[list[MatchPattern], list[str]]:
    """The patterns of a `.pxarexclude` in the folder with the path `directory` (`/` for the root), and its faults.

    Lines that are no patterns are left out of the first and described in the second.
    """
    patterns, faults = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.strip(b" \t\n\f\r")
        if not text or text.startswith(b"#"):
            continue
        anchored = text.removeprefix(b"!").startswith(b"/")
        try:
            patterns.append(MatchPattern.parse(text, anchor=directory.rstrip(b"/") if anchored else b""))
        except PatternError as error:
            faults.append(f"line {number}: {error.why}")
    return patterns, faults


def pattern_lines(patterns: Iterable[MatchPattern]) -> bytes:
    """What `.pxarexclude-cli` holds: one line each, none for those that an anchor was given."""
    return b"".join(pattern.line() for pattern in patterns)


def prelude(patterns: Sequence[MatchPattern]) -> bytes | None:
    """What the prelude of a split archive says of the command line's `patterns`; None without any.

    It is JSON and for people, so bytes that are no UTF-8 are written as `\\xff`.
    """
    if not patterns:
        return None
    lines = pattern_lines(patterns).decode("utf-8", "backslashreplace")
    return json.dumps({"exclude-patterns": lines}, ensure_ascii=False, separators=(",", ":")).encode()


class _Reader:
    """Turns the text of a pattern into tokens."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0
        self.bang_class = False
        if len(text) > MAX_PATTERN:
            raise self._error(f"{len(text)} bytes, at most {MAX_PATTERN} are allowed")
        if b"\0" in text:
            raise self._error("it has a NUL in it")

    def tokens(self) -> list[_Token]:
        tokens: list[_Token] = []
        text = self._text
        while self._at < len(text):
            byte = text[self._at : self._at + 1]
            if byte == b"*":
                self._star(tokens)
                continue
            if byte == b"[":
                self._at += 1
                tokens.append(self._class())
            elif byte == b"?":
                self._at += 1
                tokens.append(_NO_SLASH)
            else:
                tokens.append(frozenset({self._literal("the pattern")}))
        return tokens

    def _star(self, tokens: list[_Token]) -> None:
        start = self._at
        while self._text[self._at : self._at + 1] == b"*":
            self._at += 1
        rest = self._text[self._at : self._at + 2]
        begins = start == 0 or self._text[start - 1] == _SLASH
        slash = rest[:1] == b"/" or rest == b"\\/"
        if self._at - start < 2 or not begins or (rest and not slash):
            tokens.append(_NAME_STAR)
            return
        if slash:
            self._at += 1 + (rest == b"\\/")
        if tokens[-1:] != [_DEEP_STAR] or not slash:  # one `**/` matches all that several do
            tokens.append(_DEEP_STAR)

    def _literal(self, inside: str) -> int:
        """One byte, with a backslash the one behind it."""
        if self._text[self._at : self._at + 1] == b"\\":
            self._at += 1
        if self._at >= len(self._text):
            raise self._error(f"{inside} ends in a backslash")
        self._at += 1
        return self._text[self._at - 1]

    def _class(self) -> frozenset[int]:
        negated = self._text[self._at : self._at + 1] == b"^"
        self._at += negated
        self.bang_class = self.bang_class or self._text[self._at : self._at + 1] == b"!"
        members: set[int] = set()
        while True:
            byte = self._next()
            if byte == b"]":
                self._at += 1
                return _ALL - members if negated else frozenset(members)
            if byte == b"[" and self._text[self._at + 1 : self._at + 2] == b":":
                members |= self._named_class()
                continue
            first = last = self._literal("a class")
            if self._next() == b"-":
                self._at += 1
                self._next()
                last = self._literal("a class")
            members.update(range(min(first, last), max(first, last) + 1))

    def _next(self) -> bytes:
        """The byte to be read next within a class."""
        if self._at >= len(self._text):
            raise self._error("a class is not closed, '\\[' stands for a bracket")
        return self._text[self._at : self._at + 1]

    def _named_class(self) -> frozenset[int]:
        name, closing, _ = self._text[self._at + 2 :].partition(b":]")
        if not closing or name not in _CLASSES:
            known = ", ".join(f"[:{known.decode()}:]" for known in _CLASSES)
            raise self._error(f"it has an unknown class of characters, known are {known}")
        self._at += 2 + len(name) + 2
        return _CLASSES[name]

    def _error(self, why: str) -> PatternError:
        shown = self._text[:100].decode("utf-8", "backslashreplace")
        return PatternError("use", f"pattern {shown!r}", why)


# --- as a regular expression ---


def _regex(tokens: list[_Token]) -> bytes | None:
    """The expression for whole paths; None if only one that goes back and forth would do.

    Stars split a pattern into runs of single bytes. Of a run that another star follows the first place is as good as
    any later one, so each is an atomic group; only the last may have to move on to reach the end. That is wrong if a
    run may take in a slash that the star before it may not.
    """
    if any(isinstance(token, _Star) for token in tokens) and any(
        isinstance(token, frozenset) and _SLASH in token and len(token) > 1 for token in tokens
    ):
        return None
    parts: list[list[_Token]] = [[]]
    for token in tokens:
        parts.append([]) if token == _DEEP_STAR else parts[-1].append(token)
    anywhere = b"" if tokens[0] == _ONLY_SLASH else rb"(?:/(?:[^/]*/)*?)??"
    expression = anywhere + _names(parts[0])
    for part in parts[1:]:
        # A deep star goes from the begin of a name to the begin of another.
        expression = b"(?>%b)" % expression if expression else b""
        expression += rb"(?:[^/]*/)*?" + _names(part)
    if tokens[-1] == _DEEP_STAR:
        expression += b".*"
    return expression


def _names(tokens: list[_Token]) -> bytes:
    """What matches `tokens`, in which there is no deep star."""
    names: list[list[list[frozenset[int]]]] = [[[]]]  # names, each of runs between stars
    for token in tokens:
        if isinstance(token, _Star):
            names[-1].append([])
        elif token == _ONLY_SLASH:
            names.append([[]])
        else:
            names[-1][-1].append(token)
    return b"/".join(_name(runs) for runs in names)


def _name(runs: list[list[frozenset[int]]]) -> bytes:
    first, *others = (b"".join(_byte(token) for token in run) for run in runs)
    if not others:
        return first
    *between, last = others
    return first + b"".join(b"(?>[^/]*?%b)" % run for run in between if run) + b"[^/]*" + last


def _byte(token: frozenset[int]) -> bytes:
    if len(token) == 1:
        return re.escape(bytes(token))
    if not token:
        return b"(?!)"
    if token == _NO_SLASH:
        return b"[^/]"
    return b"[%b]" % b"".join(b"\\x%02x" % member for member in sorted(token))


# --- by sets of places ---


class _Places:
    """Matches token by token; bit i of a number says that the first i bytes of the path can be matched so far."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens

    def match(self, path: bytes) -> bool:
        """Whether the whole path, or what follows one of its slashes, is matched."""
        where = dict.fromkeys(path, 0)
        for index, byte in enumerate(path):
            where[byte] |= 1 << index
        slashes = where.get(_SLASH, 0)
        full = (1 << len(path) + 1) - 1
        others = (full >> 1) & ~slashes
        places = 1 | slashes << 1
        for index, token in enumerate(self._tokens):
            if isinstance(token, frozenset):
                hit = sum(where[byte] for byte in token & where.keys())
                places = (places & hit) << 1
            elif not token.deep:
                # The carry of the addition runs from each place to the next slash.
                places |= ((places & others) + others) ^ others
            else:
                beyond = full & -(places & -places)
                places = beyond if index + 1 == len(self._tokens) else places | (beyond & slashes) << 1
            if not places:
                return False
        return bool(places >> len(path) & 1)
