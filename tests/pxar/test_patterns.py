"""Patterns against what the client of a real PBS did, and against a simple model."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxar.errors import PatternError
from pxar.patterns import MatchList, MatchPattern, parse_exclude_file, pattern_lines, prelude


def matches(pattern: str, path: str, is_dir: bool | None = False) -> bool:
    return MatchPattern.parse(pattern.encode("latin-1")).matches(path.encode("latin-1"), is_dir)


# --- what PBS did ---


def excluded_of(tree: Sequence[tuple[str, str]], cli: Sequence[str], files: dict[str, str]) -> set[str]:
    """The paths that a walk leaves out, with everything below them."""
    kinds = dict(tree) | {f"{folder}/.pxarexclude".lstrip("/"): "f" for folder in files}
    patterns = MatchList(MatchPattern.parse(text.encode("latin-1")) for text in cli)
    left_out: set[str] = set()

    def walk(folder: str) -> None:
        data = files.get(folder, "").encode("latin-1")
        patterns.push(parse_exclude_file(data, b"/" + folder.encode("latin-1"))[0])
        for path in sorted(kinds):
            if path.rpartition("/")[0] != folder:
                continue
            is_dir = kinds[path] == "d"
            if patterns.decide(b"/" + path.encode("latin-1"), is_dir):
                left_out.update(other for other in kinds if other == path or other.startswith(path + "/"))
            elif is_dir:
                walk(path)
        patterns.pop()

    walk("")
    return left_out


def test_everything_that_pbs_excluded_is_excluded_and_nothing_else(golden: Path) -> None:
    recorded = json.loads((golden / "exclude.json").read_text())
    differing = []
    for case in recorded["cases"]:
        try:
            found: object = excluded_of(recorded["tree"], case["cli"], case["files"])
        except PatternError:
            found = "refused"
        expected: object = "refused" if case.get("error") else set(case.get("documented", case.get("excluded", [])))
        if found != expected and not (case.get("error") and case["files"]):
            differing.append((case["cli"], case["files"], found, expected))
    assert not differing


def test_a_bad_line_of_an_exclude_file_is_told_and_the_others_count() -> None:
    patterns, faults = parse_exclude_file(b"a[b\nfoo\n# a[\nx\\\n  \n!/bar/\n\0\n", b"/sub")
    assert pattern_lines(patterns) == b"foo\n!/bar/\n"
    assert faults == [
        r"line 1: a class is not closed, '\[' stands for a bracket",
        "line 4: the pattern ends in a backslash",
        "line 7: it has a NUL in it",
    ]


# --- the syntax ---


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("foo", "/foo", True),
        ("foo", "/a/foo", True),
        ("foo", "/a/xfoo", False),
        ("/foo", "/a/foo", False),
        ("a/**/b", "/a/b", True),
        ("a/**/b", "/x/a/1/2/b", True),
        ("a/**/b", "/ab", False),
        ("a/**", "/a", False),
        ("a/**", "/a/b/c", True),
        ("**/b/**/**/d", "/a/b/d", True),
        ("/**/d", "/d", True),
        ("a**b", "/axyb", True),
        ("a**b", "/a/b", False),
        ("*/foo", "/foo", True),
        ("[^x]a", "/a", True),
        ("*[^x]*b", "/1/22b", True),
        ("a[/]b", "/a/b", True),
        ("[z-a]", "/m", True),
        ("[a-c-e]", "/-", True),
        ("[a-c-e]", "/d", False),
        ("[]", "/x", False),
        ("[^]", "/x", True),
        ("[[:xdigit:]_]", "/_", True),
        ("\\*", "/*", True),
        ("\\*", "/x", False),
        ("x\\/**", "/x/y", True),
        (".*", "/.hidden", True),
        ("*", "/.hidden", True),
        ("\xff?", "/\xff\xfe", True),
        ("a\nb", "/a\nb", True),
        ("?", "/\n", True),
        ("a/**", "/a/\n/\n", True),
    ],
)
def test_syntax(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


@pytest.mark.parametrize("text", ["[", "a[", "[a", "[a-", "[a-]", "[\\", "a\\", "[[:foo:]]", "[[:alpha]", "a\0b", "!["])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(PatternError, match="cannot use pattern"):
        MatchPattern.parse(text.encode())


def test_a_pattern_longer_than_any_use_is_refused() -> None:
    with pytest.raises(PatternError, match="8193 bytes"):
        MatchPattern.parse(b"a" * 8193)


def test_directory_patterns_match_neither_files_nor_what_is_unknown() -> None:
    assert [matches("foo//", "/foo", is_dir) for is_dir in (True, False, None)] == [True, False, False]


def test_an_exclamation_mark_in_a_class_is_a_member_and_is_noted() -> None:
    assert matches("[!a]", "/!")
    assert not matches("[!a]", "/b")
    assert MatchPattern.parse(b"x[!a]").bang_class
    assert not MatchPattern.parse(b"!x[a!]").bang_class


def test_an_anchor_is_taken_literally() -> None:
    patterns, _ = parse_exclude_file(b"/x*\n", b"/a[b]*")
    assert patterns[0].matches(b"/a[b]*/xy", False)
    assert not patterns[0].matches(b"/ab/xy", False)
    assert not patterns[0].matches(b"/c/a[b]*/xy", False)


# --- lists ---


def test_the_last_match_decides_and_a_folder_takes_its_patterns_with_it() -> None:
    patterns = MatchList([MatchPattern.parse(b"*.o"), MatchPattern.parse(b"!keep.o")])
    assert [patterns.decide(path, False) for path in (b"/a.o", b"/keep.o", b"/a.c")] == [True, False, None]
    patterns.push([MatchPattern.parse(b"keep.o")])
    patterns.push([])
    assert patterns.decide(b"/sub/keep.o", False) is True
    patterns.pop()
    patterns.pop()
    assert patterns.decide(b"/keep.o", False) is False


def test_a_list_is_false_only_without_patterns() -> None:
    patterns = MatchList()
    assert not patterns
    assert patterns.decide(b"/a", True) is None
    patterns.add(MatchPattern.parse(b"[^b]*"))
    assert patterns
    assert patterns.decide(b"/a", True) is True


# --- as archives store them ---


def test_lines_have_the_marks_and_neither_anchors_nor_spare_slashes() -> None:
    texts = [b"foo", b"!/a/b//", b"", b"!", b"*.tmp/", b"\xff"]
    assert pattern_lines(MatchPattern.parse(text) for text in texts) == b"foo\n!/a/b/\n/\n!/\n*.tmp/\n\xff\n"


def test_prelude_is_compact_json() -> None:
    patterns = [MatchPattern.parse(text) for text in (b"lost+found", b'!"\xc3\xa4"/', b"a\tb\\ \xff")]
    assert prelude(patterns) == (b'{"exclude-patterns":"lost+found\\n!\\"\xc3\xa4\\"/\\na\\tb\\\\ \\\\xff\\n"}')
    assert prelude([]) is None


# --- against a model that tries everything ---


def model(pattern: bytes, path: bytes) -> bool:
    starts = [0] + [index + 1 for index, byte in enumerate(path) if byte == 0x2F]
    return any(_model(pattern, 0, path[start:]) for start in starts)


def _model(pattern: bytes, at: int, text: bytes) -> bool:
    if at == len(pattern):
        return not text
    byte = pattern[at : at + 1]
    if byte == b"*":
        end = at
        while pattern[end : end + 1] == b"*":
            end += 1
        alone = (at == 0 or pattern[at - 1 : at] == b"/") and pattern[end : end + 1] in (b"", b"/")
        if end - at > 1 and alone and pattern[end : end + 1] == b"/":
            return any(_model(pattern, end + 1, rest) for rest in _after_slashes(text))
        deep = end - at > 1 and alone
        for length in range(len(text) + 1):
            if _model(pattern, end, text[length:]):
                return True
            if not deep and text[length : length + 1] == b"/":
                return False
        return False
    if byte == b"?":
        return text[:1] not in (b"", b"/") and _model(pattern, at + 1, text[1:])
    if byte == b"[":
        closing = pattern.index(b"]", at)
        members = pattern[at + 1 : closing]
        negated = members[:1] == b"^"
        hit = bool(text) and ((text[:1] in members[negated:]) != negated)
        return hit and _model(pattern, closing + 1, text[1:])
    return text[:1] == byte and _model(pattern, at + 1, text[1:])


def _after_slashes(text: bytes) -> Iterator[bytes]:
    yield text
    for index, byte in enumerate(text):
        if byte == 0x2F:
            yield text[index + 1 :]


PIECES = [b"a", b"b", b"/", b"/", b"*", b"*", b"**", b"/**/", b"?", b"[ab]", b"[^a]", b"[a/]", b"\n"]
PATTERNS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map(b"".join)
PATHS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda names: b"/" + "/".join(names).encode()
)


@settings(max_examples=3000, deadline=None)
@given(PATTERNS, PATHS)
def test_random_patterns_match_what_a_simple_model_matches(pattern: bytes, path: bytes) -> None:
    stripped = pattern.rstrip(b"/") or b"/"
    assert MatchPattern.parse(pattern).matches(path, True) == model(stripped, path)


@settings(max_examples=500, deadline=None)
@given(st.lists(PATTERNS, max_size=4), PATHS)
def test_a_list_decides_as_its_patterns_one_by_one(texts: list[bytes], path: bytes) -> None:
    patterns = [MatchPattern.parse(text) for text in texts]
    expected = next((not one.inverted for one in reversed(patterns) if one.matches(path, False)), None)
    assert MatchList(patterns).decide(path, False) == expected


@given(st.binary(max_size=12))
def test_any_bytes_are_a_pattern_or_refused_and_a_stored_line_reads_back(text: bytes) -> None:
    try:
        pattern = MatchPattern.parse(text)
    except PatternError:
        return
    if pattern.text == b"/":
        return
    again = MatchPattern.parse(pattern.line()[:-1])
    assert (again.text, again.inverted, again.directory_only) == (
        pattern.text,
        pattern.inverted,
        pattern.directory_only,
    )


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        (b"*a" * 120 + b"*b", b"/" + b"a" * 255),
        (b"**/*a*a*a*a*/" * 40 + b"b", b"/a" * 2000),
        (b"**/a/" * 300 + b"**/b", b"/a" * 2000),
        (b"*[^b]" * 100 + b"c", b"/" + b"a" * 4000),
        (b"**/[^b]*[^c]*" * 100 + b"c", b"/ab" * 1300),
        (b"a/" * 1500 + b"b", b"/a" * 2000),
    ],
)
@pytest.mark.timeout(60)
def test_no_pattern_takes_long(pattern: bytes, path: bytes) -> None:
    assert not MatchPattern.parse(pattern).matches(path, False)
