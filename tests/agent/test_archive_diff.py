"""Walking through archives, and two of them side by side, in memory."""

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import archive_diff
from agent.archive_diff import Side, TreeComparison, image_changes, narrowed, same_chunks
from agent.archive_listing import MAX_DEPTH, Dumped, Found, dump_line, walk_nodes
from agent.listing_output import put, time_text
from agent.snapshot_archives import ContentStream
from datastore.names import Snapshot
from pxar.accessor import ArchiveAccessor
from pxar.encoder import ArchiveEncoder
from pxar.errors import ArchiveError
from pxar.format import escaped
from pxar.metadata import Metadata, Stat, encode_metadata
from tests.pxar.archives import Item, MemoryBytes, MemorySink, archived, item

SNAPSHOT = Snapshot.parse("host/web/2026-01-01T00:00:00Z")
CHUNK = 16
FOLDER = encode_metadata(Metadata(Stat(0o040755)))
FILE = encode_metadata(Metadata(Stat(0o100644)))


@dataclass
class Chunks:
    """What an index says of `data` in chunks of `CHUNK` bytes."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def find(self, offset: int) -> int:
        assert 0 <= offset < self.size
        return offset // CHUNK

    def span(self, number: int) -> tuple[int, int]:
        return number * CHUNK, min(CHUNK, self.size - number * CHUNK)

    def digest(self, number: int) -> bytes:
        return hashlib.sha256(self.data[number * CHUNK :][:CHUNK]).digest()


def stream(data: bytes) -> ContentStream:
    stored: Any = MemoryBytes(data)
    chunks: Any = Chunks(data)
    return ContentStream(stored, chunks)


def side(root: Item, *, split: bool) -> Side:
    archive, payload = archived(root, split=split)
    contents = stream(payload if split else archive)
    accessor = ArchiveAccessor(MemoryBytes(archive), MemoryBytes(payload) if split else None)
    return Side(accessor, contents)


# Trees as plain dictionaries: path -> None (a directory), or content, time and mode of a file.

Tree = dict[bytes, tuple[bytes, int, int] | None]
NAMES = st.sampled_from([b"a", b"a.b", b"ab", b"b", b"-", b"\xff", b"\n"])
FILES = st.tuples(st.binary(max_size=3) | st.just(b"x" * 64), st.integers(0, 2), st.sampled_from([0o644, 0o600]))


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    tree: Tree = {}
    for path in draw(st.lists(st.lists(NAMES, min_size=1, max_size=3), max_size=12)):
        above = [b"/" + b"/".join(path[:length]) for length in range(1, len(path))]
        if any(tree.get(folder) is not None for folder in above):
            continue
        whole = b"/" + b"/".join(path)
        if whole in tree:
            continue
        tree |= dict.fromkeys(above)
        tree[whole] = draw(FILES | st.none())
    return tree


def built(tree: Tree) -> Item:
    root = item(0o040755)
    folders = {b"": root}
    for path, content in sorted(tree.items()):
        above, _, name = path.rpartition(b"/")
        if content is None:
            one = folders[path] = item(0o040755)
        else:
            one = item(0o100000 | content[2], mtime=(content[1], 0), content=content[0])
        folders[above].children[name] = one
    return root


def expected(before: Tree, after: Tree) -> dict[bytes, tuple[str, ...]]:
    found: dict[bytes, tuple[str, ...]] = {}
    for path in before.keys() | after.keys():
        if path not in before:
            found[path] = ("added",)
        elif path not in after:
            found[path] = ("removed",)
        elif (before[path] is None) != (after[path] is None):
            found[path] = ("changed", "type")
        elif (one := before[path]) != (other := after[path]):
            assert one is not None
            assert other is not None
            words = [
                word for word, number in (("content", 0), ("mtime", 1), ("mode", 2)) if one[number] != other[number]
            ]
            found[path] = ("changed", *words)
    return found


def in_order(paths: list[bytes]) -> list[bytes]:
    return sorted(paths, key=lambda path: path.split(b"/"))


@pytest.mark.parametrize("at_once", [0, 8192])
@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
@given(before=trees(), after=trees(), split=st.tuples(st.booleans(), st.booleans()))
def test_any_two_trees_differ_by_what_their_dictionaries_differ(
    monkeypatch: pytest.MonkeyPatch, at_once: int, before: Tree, after: Tree, split: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(archive_diff, "_SORTED_AT_ONCE", at_once)
    one, other = side(built(before), split=split[0]), side(built(after), split=split[1])
    changes = list(TreeComparison("x.pxar", one, other, content=True).changes(b""))
    found = {change.path: (change.kind, *change.what) for change in changes}
    assert len(found) == len(changes)
    assert found == expected(before, after)
    # Without reading contents nothing is said that is wrong.
    for change in TreeComparison("x.pxar", one, other, content=False).changes(b""):
        content = {"same": False, "different": True}.get(change.content or "")
        if content is not None:
            assert ("content" in found[change.path]) is content


@given(before=trees())
@settings(max_examples=50, deadline=None)
def test_a_walk_meets_everything_once_and_in_order(before: Tree) -> None:
    walked = [path for path, _, _ in walk_nodes(side(built(before), split=True).accessor.root, b"/")]
    assert walked == in_order(list(before))


def test_a_directory_that_is_out_of_order_is_compared_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_diff, "_SORTED_AT_ONCE", 1)

    def made(names: list[bytes]) -> Side:
        sink = MemorySink()
        encoder = ArchiveEncoder(sink)
        encoder.begin(FOLDER)
        for name in names:
            encoder.begin_file(name, FILE, 0)
            encoder.end_file()
        encoder.finish()
        return Side(ArchiveAccessor(MemoryBytes(sink.data)), stream(bytes(sink.data)))

    comparison = TreeComparison("x.pxar", made([b"c", b"a", b"b"]), made([b"a", b"b", b"c", b"d"]), content=False)
    assert [(change.kind, change.path) for change in comparison.changes(b"")] == [("added", b"/d")]
    assert [path for path, _, _ in walk_nodes(made([b"c", b"a"]).accessor.root, b"/")] == [b"/c", b"/a"]


def test_a_tree_deeper_than_any_file_system_ends_in_an_error() -> None:
    sink = MemorySink()
    encoder = ArchiveEncoder(sink)
    encoder.begin(FOLDER)
    for _ in range(MAX_DEPTH + 1):
        encoder.directory(b"d", FOLDER)
    for _ in range(MAX_DEPTH + 1):
        encoder.end_directory()
    encoder.finish()
    deep = Side(ArchiveAccessor(MemoryBytes(sink.data)), stream(bytes(sink.data)))
    with pytest.raises(ArchiveError, match="more than 4096 directories within each other"):
        list(walk_nodes(deep.accessor.root, b"/"))
    with pytest.raises(ArchiveError, match="more than 4096 directories within each other"):
        list(TreeComparison("x.pxar", deep, deep, content=False).changes(b""))


PIECES = st.lists(st.sampled_from([b"A" * CHUNK, b"B" * CHUNK, b"C" * CHUNK]), min_size=1, max_size=6)


@given(one=PIECES, other=PIECES, data=st.data())
def test_equal_chunks_prove_equal_ranges_only(one: list[bytes], other: list[bytes], data: st.DataObject) -> None:
    before, after = b"".join(one), b"".join(other)
    start, offset = data.draw(st.integers(0, len(before))), data.draw(st.integers(0, len(after)))
    size = data.draw(st.integers(0, len(before)))
    ours, theirs = stream(before).chunks, stream(after).chunks
    proven = same_chunks(ours, start, theirs, offset, size)
    inside = start + size <= len(before) and offset + size <= len(after)
    if proven:
        assert inside
        assert before[start : start + size] == after[offset : offset + size]
    if inside and start == offset and before == after:
        assert proven


IMAGES = st.lists(st.sampled_from([b"A", b"B"]).flatmap(lambda b: st.just(b * CHUNK)), min_size=1, max_size=8)


@given(one=IMAGES, other=IMAGES, cut=st.integers(1, CHUNK))
def test_ranges_cover_what_differs_in_two_images(one: list[bytes], other: list[bytes], cut: int) -> None:
    before, after = b"".join(one)[:-cut] or b"A", b"".join(other)
    ours, theirs = stream(before), stream(after)
    common = min(len(before), len(after))
    for changes in (
        image_changes("disk.img", ours.chunks, theirs.chunks),
        narrowed(image_changes("disk.img", ours.chunks, theirs.chunks), ours, theirs),
    ):
        covered = set()
        ends = []
        for change in changes:
            assert change.offset is not None
            span = range(change.offset, change.offset + change.length)
            assert span
            if change.kind == "changed":
                covered |= set(span)
            else:
                ends.append((change.kind, change.offset, span.stop))
        differing = {place for place in range(common) if before[place] != after[place]}
        assert differing <= covered <= set(range(common))
        longer = [("removed", common, len(before))] * (len(before) > common)
        longer += [("added", common, len(after))] * (len(after) > common)
        assert ends == longer


@given(st.binary(), st.binary())
def test_escaped_names_are_printable_and_tell_all_names_apart(one: bytes, other: bytes) -> None:
    assert escaped(one).isprintable()
    assert (escaped(one) == escaped(other)) is (one == other)


@pytest.mark.parametrize(
    ("letter", "shown"),
    [
        ("\n", r"\n"), ("\x1b", r"\x1b"), ("\x7f", r"\x7f"), ("\x9b", r"\u009b"), ("\u202e", r"\u202e"),
        ("\u2028", r"\u2028"), ("\ufeff", r"\ufeff"), ("\U000e0001", r"\U000e0001"), ("\\", r"\\"),
    ],
)  # fmt: skip
def test_what_a_terminal_acts_on_is_escaped(letter: str, shown: str) -> None:
    assert escaped(f"a{letter}b".encode()) == f"a{shown}b"
    assert escaped(b"\x9b") == r"\x9b"


@given(st.binary())
def test_json_has_the_exact_bytes_of_every_name(raw: bytes) -> None:
    import base64

    document: dict[str, Any] = {}
    put(document, "path", raw)
    exact = document.get("path-base64")
    assert (document["path"].encode() if exact is None else base64.b64decode(exact)) == raw


def test_times_beyond_any_calendar_are_numbers() -> None:
    for seconds in (1 << 62, -(1 << 62)):
        assert time_text(seconds) == f"@{seconds}"
        one = Found(SNAPSHOT, "x.pxar", b"/a", "f", 3, seconds)
        assert dump_line(Dumped("x.pxar.didx", one)) == f'f "./x.pxar.didx/a" 3 @{seconds}'
    assert dump_line(Dumped("x.pxar.didx", Found(SNAPSHOT, "x.pxar", b'/a"', "f", 3, -2))) == (
        'f "./x.pxar.didx/a\\"" 3 1969-12-31T23:59:58Z'
    )
