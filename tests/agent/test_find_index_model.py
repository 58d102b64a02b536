"""The tables of the index against the plainest model: every state of every archive as a list."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.archive_listing import Found
from agent.find_index.conditions import condition_of, directories_above
from agent.find_index.files import IndexFile
from agent.find_index.recording import Part, Records
from agent.find_index.schema import LETTERS, OPEN
from agent.find_index.searching import Search
from agent.find_index.writing import StateWriter, UnusualOrderError
from datastore.names import Group, Snapshot
from pxar.errors import PatternError
from pxar.patterns import MatchPattern

GROUP = Group.parse("host/web")
SNAPSHOT = Snapshot.parse("host/web/2026-01-01T00:00:00Z")
ALL = frozenset(LETTERS)
#: What patterns and names are made of: few letters, so that much matches; and what GLOB or UTF-8 could trip over.
_BYTES = [b"a", b"b", b"A", b"x", b".", b"-", b"]", b"[", b"^", b"*", b"?", b"\\", b"\xc3", b"\xbc", b"\xff", b"\n"]
names = st.lists(st.sampled_from(_BYTES), min_size=1, max_size=4).map(b"".join).filter(lambda n: n not in (b".", b".."))
#: A tree: names, with trees or with (kind, size, time).
leaves = st.tuples(
    st.sampled_from("flhbcps"),
    st.sampled_from([None, 0, 1, OPEN, OPEN + 1, (1 << 64) - 1]),
    st.sampled_from([None, 0, -5, 1_700_000_000]),
)
trees = st.recursive(
    st.dictionaries(names, leaves, max_size=3),
    lambda inner: st.dictionaries(names, leaves | inner | st.tuples(inner, st.integers(0, 2)), max_size=4),
    max_leaves=8,
)
pieces = st.sampled_from(
    [
        *_BYTES,
        b"*",
        b"**",
        b"**/",
        b"/",
        b"?",
        b"[ab]",
        b"[^a]",
        b"[a-x]",
        b"[!]",
        b"[]-]",
        b"\\*",
        b"a/",
        b"[[:alpha:]]",
    ]
)


def patterns() -> st.SearchStrategy[MatchPattern]:
    def parse(parts: list[bytes]) -> MatchPattern | None:
        text = b"".join(parts).lstrip(b"!")
        try:
            return MatchPattern.parse(text) if text else None
        except PatternError:
            return None

    return st.lists(pieces, min_size=1, max_size=5).map(parse).filter(lambda one: one is not None)  # type: ignore[return-value]


def listed(tree: object, prefix: bytes = b"/") -> Iterator[Found]:
    """A tree as an archive gives it."""
    assert isinstance(tree, dict)
    for name, one in sorted(tree.items()):
        path = prefix + name
        if isinstance(one, tuple) and isinstance(one[0], str):
            yield Found(SNAPSHOT, "root.pxar", path, *one)
            continue
        below, mtime = one if isinstance(one, tuple) else (one, None)
        yield Found(SNAPSHOT, "root.pxar", path, "d", None, mtime)
        yield from listed(below, path + b"/")


def write(connection: sqlite3.Connection, entries: list[Found], *, stop: int | None = None) -> int:
    """Write a state as an update does; with `stop` it is killed behind so many entries."""
    records = Records(connection)
    place = records.stream(GROUP, "root.pxar")
    state = records.begin_state(place[0], b"")
    writer = StateWriter(connection, *place, state)
    for entry in entries[:stop]:
        writer.add(entry)
    if stop is not None:
        writer.flush()
        connection.execute("COMMIT")
        return state
    writer.finish()
    records.finish_state(state, writer.entries)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index") / "find-index"


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Callable[[], tuple[IndexFile, sqlite3.Connection]]]:
    """Gives an empty index, in memory's speed: always the same file."""
    folder.mkdir(mode=0o700)
    connections: list[sqlite3.Connection] = []

    def make() -> tuple[IndexFile, sqlite3.Connection]:
        file = IndexFile("folder /somewhere", folder)
        for one in connections:
            one.close()
        connections.clear()
        file.remove()
        connection = file.open(make=True)
        connection.execute("PRAGMA synchronous=OFF")
        connections.append(connection)
        return file, connection

    yield make
    for one in connections:
        one.close()


def answer(
    file: IndexFile, connection: sqlite3.Connection, pattern: MatchPattern, states: list[int]
) -> list[list[Found]]:
    streams = Records(connection).places(states)
    assert len(streams) == len(set(states))
    search = Search(connection, file.path, pattern, ALL, streams)
    found: list[list[Found]] = []
    for state in states:
        found.append([])
        search.found(SNAPSHOT, "root.pxar", state, found[-1].append)
    return found


def wanted(pattern: MatchPattern, entries: list[Found]) -> list[Found]:
    return [one for one in entries if pattern.matches(one.path, one.letter == "d")]


EVERYTHING = MatchPattern.parse(b"**")


@settings(max_examples=500 if os.environ.get("FLEECE_TEST_LONG") else 25)
@given(st.lists(st.tuples(trees, st.none() | st.integers(0, 8)), min_size=1, max_size=5), st.data())
def test_every_state_is_what_it_was(
    opened: Callable[[], tuple[IndexFile, sqlite3.Connection]],
    history: list[tuple[object, int | None]],
    data: st.DataObject,
) -> None:
    """States follow one another, some killed half-way; some of them go; what is left answers as the lists do."""
    file, connection = opened()
    records = Records(connection)
    model: dict[int, list[Found]] = {}
    for number, (tree, stop) in enumerate(history):
        entries = list(listed(tree))
        state = write(connection, entries, stop=stop)
        if stop is None:
            model[state] = entries
            time = f"2026-01-{number + 1:02}T00:00:00Z"
            records.record(Snapshot.parse(f"host/web/{time}"), b"", b"", [Part("root.pxar", state, False)])
        if data.draw(st.booleans()):
            records.tidy()
        records.finish_indexes()
        remove: bool = data.draw(st.booleans())
        if model and remove:
            gone: int = data.draw(st.sampled_from(sorted(model)))
            del model[gone]
            (one,) = [known.id for known in records.snapshots().values() if known.parts[0].state == gone]
            records.forget([one])
            records.tidy()
        pattern = data.draw(patterns())
        for asked in (EVERYTHING, pattern):
            found = answer(file, connection, asked, sorted(model))
            assert found == [wanted(asked, model[state]) for state in sorted(model)]
    records.forget([known.id for known in records.snapshots().values()])
    records.tidy()
    assert set(records.counts().values()) == {0}


@given(st.lists(names, min_size=1, max_size=4), patterns())
@example([b"ab", b"a**", b"x"], MatchPattern.parse(b"a*/**"))
@example([b"a", b"xb"], MatchPattern.parse(b"[^b]b"))
@example([b"\xc3\xbc"], MatchPattern.parse(b"??"))
@example([b"\xbc"], MatchPattern.parse(b"?"))
@example([b"a]b"], MatchPattern.parse(b"a[]]b"))
@example([b"a" * 60], MatchPattern.parse(b"*a" * 30))
def test_a_condition_is_fulfilled_by_every_name_that_matches(components: list[bytes], pattern: MatchPattern) -> None:
    path = b"/" + b"/".join(components)
    matched = pattern.matches(path, True)
    last = pattern.last_name
    condition = None if last is None else condition_of(last)
    if matched and condition is not None:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.execute("CREATE TABLE c(name TEXT)")
            connection.execute("INSERT INTO c VALUES(CAST(? AS TEXT))", (components[-1],))
            query = f"SELECT count(*) FROM c WHERE {condition.sql}"
            assert connection.execute(query, condition.values).fetchall() == [(1,)], condition
    above = directories_above(pattern)
    if matched and above is not None:
        parents = [b"/" + b"/".join(components[:depth]) for depth in range(1, len(components))]
        assert any(above.matches(parent, True) for parent in parents)


@pytest.mark.parametrize("paths", [[b"/b", b"/a"], [b"/a", b"/a"], [b"/d", b"/d/x", b"/e", b"/d/y"]])
def test_an_archive_in_an_unusual_order_is_refused(
    opened: Callable[[], tuple[IndexFile, sqlite3.Connection]], paths: list[bytes]
) -> None:
    _, connection = opened()
    entries = [Found(SNAPSHOT, "root.pxar", path, "d" if path == b"/d" else "f", None, None) for path in paths]
    with pytest.raises(UnusualOrderError):
        write(connection, entries)


def test_directories_of_many_pages_are_compared_page_by_page(
    opened: Callable[[], tuple[IndexFile, sqlite3.Connection]],
) -> None:
    file, connection = opened()
    model = {}
    for step in (1, 2, 3, 1):
        tree = {b"d": {b"%05d" % number: ("f", number, number) for number in range(0, 5200, step)}, b"z": ("f", 0, 0)}
        entries = list(listed(tree))
        model[write(connection, entries)] = entries
    Records(connection).finish_indexes()
    assert answer(file, connection, EVERYTHING, sorted(model)) == [model[state] for state in sorted(model)]


def test_what_is_equal_is_not_written_again(opened: Callable[[], tuple[IndexFile, sqlite3.Connection]]) -> None:
    _, connection = opened()
    tree: dict[bytes, object] = {b"a": {b"b": ("f", 1, 1), b"c": ("f", 1, 1)}, b"d": ("l", None, None)}
    write(connection, list(listed(tree)))
    before = connection.total_changes
    for _ in range(10):
        write(connection, list(listed(tree)))
    assert connection.total_changes - before == 10 * 2  # a row of each state, made and finished
    tree[b"d"] = ("f", 1, 1)
    write(connection, list(listed(tree)))
    assert Records(connection).counts()["entry"] == 5


@pytest.mark.parametrize("gone", [1, 2])
def test_what_only_a_removed_state_had_is_thrown_away(
    opened: Callable[[], tuple[IndexFile, sqlite3.Connection]], gone: int
) -> None:
    _, connection = opened()
    records = Records(connection)
    kept = {b"a": {b"b": ("f", 1, 1)}}
    for number, tree in enumerate([kept, {**kept, b"only": {b"here": ("f", 2, 2)}}, kept][: gone + 1]):
        state = write(connection, list(listed(tree)))
        time = f"2026-01-{number + 1:02}T00:00:00Z"
        records.record(Snapshot.parse(f"host/web/{time}"), b"", b"", [Part("root.pxar", state, False)])
    records.forget([known.id for key, known in records.snapshots().items() if "-02T" in key[2]])
    records.tidy()
    counts = records.counts()
    assert (counts["entry"], counts["dir"], counts["state"]) == (2, 2, gone)
