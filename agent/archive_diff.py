"""What differs between two snapshots: entries of trees, ranges of images, small files.

Two trees are gone through side by side, directory by directory in the order of names, so that memory grows with the
depth, and with the tables of the largest directory. Contents are not read unless that is asked for: equal size and time
count as equal, and where only the time differs, equal chunks prove that a file is the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from agent.archive_listing import MAX_DEPTH, entry_at, entry_document, too_deep, walk_nodes
from agent.image_trees import open_image_of
from agent.listing_output import put, time_text
from agent.snapshot_archives import ContentStream, OpenSnapshot, in_walk
from core.errors import NotFoundError, UsageError
from core.units import format_size
from datastore.crypt_mode import CryptMode
from datastore.index import ArchiveIndex
from datastore.manifest import ManifestFile
from datastore.names import strip_archive_type
from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Hardlink, Node, Symlink
from pxar.format import HEADER_SIZE, escaped
from pxar.metadata import Stat
from repository.restore import restore_blob

#: Bytes of both contents that are compared at once.
_PIECE: Final = 1 << 20
#: Bytes by which ranges of an image are told apart when their contents are compared.
_BLOCK: Final = 4096
#: Entries of a directory that are held at once to sort them; larger ones are gone through twice.
_SORTED_AT_ONCE: Final = 8192

Content = Literal["same", "different", "unknown"]


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: of a whole archive, of an entry of a file archive, or of a range of an image."""

    kind: Literal["added", "removed", "changed"]
    archive: str
    path: bytes | None = None  #: of an entry
    before: "Node | None" = None
    after: "Node | None" = None
    what: tuple[str, ...] = ()  #: of a changed entry: content, mtime, mode, owner, xattrs, acl, ...
    content: Content | None = None  #: of a file in both
    offset: int | None = None  #: of a range
    length: int = 0


class Side(NamedTuple):
    """One of the two trees."""

    accessor: ArchiveAccessor
    contents: ContentStream | None  #: None: contents do not lie in one stream


# Trees.


class TreeComparison:
    """The file archive `archive` in two snapshots; used in a worker thread.

    Args:
        archive: its name, `root.pxar`.
        before: the first tree.
        after: the second.
        content: compare the contents of all files.
    """

    def __init__(self, archive: str, before: Side, after: Side, *, content: bool) -> None:
        self._archive, self._before, self._after, self._content = archive, before, after, content

    def changes(self, path: bytes) -> Iterator[Change]:
        """All differences of what lies at `path`, in the order of names.

        Raises:
            UsageError: `..` in the path.
            NotFoundError: there is nothing in either.
            FleeceError: one of the archives is broken or cannot be read.
        """
        before, after = self._before.accessor.lookup(path), self._after.accessor.lookup(path)
        if before is None and after is None:
            entry_at(self._after.accessor, path)
        path = b"/" + b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
        yield from self._entry(path, before, after)
        stack = [self._pairs(path, before, after)]
        while stack:
            for below, one, other in stack[-1]:
                yield from self._entry(below, one, other)
                if isinstance(one, Directory) and isinstance(other, Directory):
                    if len(stack) >= MAX_DEPTH:
                        raise too_deep(below)
                    stack.append(self._pairs(below, one, other))
                    break
            else:
                stack.pop()

    def _pairs(
        self, path: bytes, before: "Node | None", after: "Node | None"
    ) -> "Iterator[tuple[bytes, Node | None, Node | None]]":
        """The children of two directories side by side; nothing unless both are directories."""
        if not isinstance(before, Directory) or not isinstance(after, Directory):
            return
        prefix = path.rstrip(b"/") + b"/"
        left, right = _by_name(before), _by_name(after)
        one, other = next(left, None), next(right, None)
        while one is not None or other is not None:
            if other is None or (one is not None and one.name < other.name):
                assert one is not None
                yield prefix + one.name, one, None
                one = next(left, None)
            elif one is None or other.name < one.name:
                yield prefix + other.name, None, other
                other = next(right, None)
            else:
                yield prefix + one.name, one, other
                one, other = next(left, None), next(right, None)

    def _entry(self, path: bytes, before: "Node | None", after: "Node | None") -> Iterator[Change]:
        """What differs in the entry itself; all below it, too, if it is a directory on one side only."""
        both_directories = isinstance(before, Directory) and isinstance(after, Directory)
        if before is not None and after is not None:
            what, content = self._compared(before, after)
            if what:
                yield Change("changed", self._archive, path, before, after, what, content)
        elif before is not None:
            yield Change("removed", self._archive, path, before)
        elif after is not None:
            yield Change("added", self._archive, path, after=after)
        if both_directories:
            return
        if isinstance(before, Directory):
            for below, node, _ in walk_nodes(before, path):
                yield Change("removed", self._archive, below, node)
        if isinstance(after, Directory):
            for below, node, _ in walk_nodes(after, path):
                yield Change("added", self._archive, below, after=node)

    def _compared(self, before: Node, after: Node) -> tuple[tuple[str, ...], Content | None]:
        """What differs between two entries of one name; nothing if they are equal."""
        what = []
        one = before.follow() if isinstance(before, Hardlink) else before
        other = after.follow() if isinstance(after, Hardlink) else after
        if one.kind is not other.kind:
            return ("type",), None
        if _link_target(before) != _link_target(after):
            what.append("link")
        content: Content | None = None
        if isinstance(one, FileNode) and isinstance(other, FileNode):
            content = self._contents(one, other)
            if content == "different":
                what.append("content")
        elif isinstance(one, Symlink) and isinstance(other, Symlink):
            what += ["target"] * (one.target != other.target)
        elif isinstance(one, Device) and isinstance(other, Device):
            what += ["device"] * ((one.major, one.minor) != (other.major, other.minor))
        if one.meta != other.meta:
            what += _metadata_changes(one, other)
        # A directory's time changes with what is in it, which is listed already.
        return () if what == ["mtime"] and isinstance(one, Directory) else tuple(what), content

    def _contents(self, before: FileNode, after: FileNode) -> Content:
        if before.size != after.size:
            return "different"
        if not before.size:
            return "same"
        if not self._content and _time(before.stat) == _time(after.stat):
            return "unknown"
        start, offset = _content_offset(self._before, before), _content_offset(self._after, after)
        one, other = self._before.contents, self._after.contents
        assert one is not None
        assert other is not None
        if same_chunks(one.chunks, start, other.chunks, offset, before.size):
            return "same"
        return self._bytes(before, after) if self._content else "unknown"

    def _bytes(self, before: FileNode, after: FileNode) -> Content:
        one, start, size = self._before.accessor.open_content(before)
        other, offset, _ = self._after.accessor.open_content(after)
        for done in range(0, size, _PIECE):
            length = min(_PIECE, size - done)
            # Two views are compared element by element, bytes at once.
            if bytes(one.read(start + done, length)) != bytes(other.read(offset + done, length)):
                return "different"
        return "same"


class DiskComparison(TreeComparison):
    """The file systems of a disk image in two snapshots. Where the files of equal contents lie says nothing."""

    def _contents(self, before: FileNode, after: FileNode) -> Content:
        if before.size != after.size:
            return "different"
        if not before.size:
            return "same"
        return self._bytes(before, after) if self._content else "unknown"


def _by_name(directory: Directory) -> Iterator[Node]:
    """The children in the order of their names."""
    if len(directory) > _SORTED_AT_ONCE:
        last = b""
        for node in directory.stream():
            if node.name <= last:
                break  # no known writer does this
            last = node.name
        else:
            return directory.stream()
    return iter(directory.children())


def _link_target(node: Node) -> bytes | None:
    return node.target_path.lstrip(b"/") if isinstance(node, Hardlink) else None


def _time(known: Stat) -> tuple[int, int]:
    return known.mtime_s, known.mtime_ns


def _content_offset(side: Side, node: FileNode) -> int:
    """Where the content of `node` begins in the stream of contents; unchecked, and found without reading there."""
    position = node.payload_position
    return side.accessor.open_content(node)[1] if position is None else position + HEADER_SIZE


def _metadata_changes(one: Node, other: Node) -> Iterator[str]:
    assert not isinstance(one, Hardlink)
    assert not isinstance(other, Hardlink)
    before, after = one.metadata, other.metadata
    if _time(before.stat) != _time(after.stat):
        yield "mtime"
    if before.stat.mode != after.stat.mode:
        yield "mode"
    if (before.stat.uid, before.stat.gid) != (after.stat.uid, after.stat.gid):
        yield "owner"
    if sorted(before.xattrs) != sorted(after.xattrs):
        yield "xattrs"
    if before.acl != after.acl:
        yield "acl"
    if before.fcaps != after.fcaps:
        yield "capabilities"
    if before.stat.flags != after.stat.flags:
        yield "flags"
    if before.projid != after.projid:
        yield "project"


def same_chunks(one: ArchiveIndex, start: int, other: ArchiveIndex, offset: int, size: int) -> bool:
    """Whether `size` bytes from `start` and from `offset` on lie at the same places of the same chunks.

    If so, they are equal; if not, they may be all the same. Ranges beyond the ends are never equal.
    """
    if start + size > one.size or offset + size > other.size:
        return False
    end = start + size
    while start < end:
        number, counterpart = one.find(start), other.find(offset)
        if one.digest(number) != other.digest(counterpart):
            return False
        (first, length), (second, other_length) = one.span(number), other.span(counterpart)
        if start - first != offset - second or length != other_length:
            return False
        offset += first + length - start
        start = first + length
    return True


# Images.


def image_changes(archive: str, before: ArchiveIndex, after: ArchiveIndex) -> Iterator[Change]:
    """The ranges in which two images have other chunks, joined where they touch; and what only one of them has."""
    common = min(before.size, after.size)
    offset = first = 0
    changed = False
    while offset < common:
        number, counterpart = before.find(offset), after.find(offset)
        span, other = before.span(number), after.span(counterpart)
        equal = span == other and before.digest(number) == after.digest(counterpart)
        if equal is changed:
            if changed:
                yield _differing(archive, first, offset)
            changed, first = not changed, offset
        offset = min(sum(span), sum(other))
    if changed:
        yield _differing(archive, first, common)
    if before.size > common:
        yield Change("removed", archive, offset=common, length=before.size - common)
    if after.size > common:
        yield Change("added", archive, offset=common, length=after.size - common)


def narrowed(changes: Iterator[Change], before: ContentStream, after: ContentStream) -> Iterator[Change]:
    """Of the ranges that `image_changes` found those blocks that do differ; reads both images there."""
    for change in changes:
        if change.kind != "changed" or change.offset is None:
            yield change
            continue
        end = change.offset + change.length
        start: int | None = None
        for position in range(change.offset, end, _PIECE):
            length = min(_PIECE, end - position)
            one, other = bytes(before.stored.read(position, length)), bytes(after.stored.read(position, length))
            for block in range(0, length, _BLOCK):
                if one[block : block + _BLOCK] != other[block : block + _BLOCK]:
                    start = position + block if start is None else start
                elif start is not None:
                    yield _differing(change.archive, start, position + block)
                    start = None
        if start is not None:
            yield _differing(change.archive, start, end)


def _differing(archive: str, start: int, end: int) -> Change:
    return Change("changed", archive, what=("content",), content="different", offset=start, length=end - start)


# Snapshots.


async def compare_snapshots(
    before: OpenSnapshot, after: OpenSnapshot, wanted: str | None, path: bytes, add: Callable[[Change], None], *,
    content: bool,
) -> None:  # fmt: skip
    """Pass the differences of two snapshots to `add`.

    Args:
        before: the first.
        after: the second.
        wanted: only the archive that a person calls so.
        path: only this part of that file archive.
        add: called by one thread at a time.
        content: compare the contents of files and images.

    Raises:
        NotFoundError: neither has such an archive, or nothing lies at `path`.
        UsageError: a path in what is no file archive, or with `..`.
        FormatError, KeyNeededError: what must be read cannot be.
    """
    ones, others = before.archives, after.archives
    names = list(ones | others)
    for name in names if wanted is None else [_named(wanted, names, after)]:
        if path and not name.endswith((".pxar", ".img")):
            raise UsageError("compare", f"{name}/{escaped(path)}", "only file archives and disks have paths in them")
        one, other = ones.get(name), others.get(name)
        if other is None:
            add(Change("removed", name))
        elif one is None:
            add(Change("added", name))
        elif name.endswith(".pxar"):
            sides = [Side(*await opened.with_contents(name)) for opened in (before, after)]
            comparison = TreeComparison(name, sides[0], sides[1], content=content)
            await _pass_on(comparison.changes(path), add)
        elif name.endswith(".img") and path:
            async with open_image_of(before, name) as first, open_image_of(after, name) as second:
                disks = DiskComparison(name, Side(first, None), Side(second, None), content=content)
                await _pass_on(disks.changes(path), add)
        elif name.endswith(".img"):
            await _compare_images(name, before, after, add, content)
        elif await restored(before, one) != await restored(after, other):
            add(Change("changed", name, what=("content",), content="different"))


def _named(wanted: str, names: Sequence[str], after: OpenSnapshot) -> str:
    stem = strip_archive_type(wanted)
    plain = f"{stem.removesuffix('.pxar').removesuffix('.mpxar').removesuffix('.ppxar')}.pxar"
    for name in names:
        if name in (stem, plain):
            return name
    why, hint = "neither snapshot has an archive of that name", f"they have {', '.join(names)}"
    raise NotFoundError("compare", after.where(wanted), why, hint)


async def restored(opened: OpenSnapshot, entry: ManifestFile) -> bytes:
    """The content of a small file."""
    opened.needs_key(entry)
    return await restore_blob(opened.reader, opened.codec, opened.manifest, entry.filename)


async def _compare_images(
    name: str, before: OpenSnapshot, after: OpenSnapshot, add: Callable[[Change], None], content: bool
) -> None:
    one, other = before.archives[name], after.archives[name]
    if not content and not _same_key(before, one, after, other):
        before.progress.warn(
            f"{name} was not compared: its chunks are encrypted with another key, or in one snapshot only; "
            "--content compares what is in them"
        )
        return
    changes = image_changes(name, await before.index(one), await after.index(other))
    if content:
        changes = narrowed(changes, await before.stream(one.filename), await after.stream(other.filename))
    await _pass_on(changes, add)


def _same_key(before: OpenSnapshot, one: ManifestFile, after: OpenSnapshot, other: ManifestFile) -> bool:
    """Whether equal data have equal digests in both."""
    if CryptMode.ENCRYPT not in (one.crypt_mode, other.crypt_mode):
        return True
    return one.crypt_mode is other.crypt_mode and before.manifest.fingerprint == after.manifest.fingerprint


async def _pass_on(changes: Iterator[Change], add: Callable[[Change], None]) -> None:
    def walk() -> None:
        for change in changes:
            add(change)

    await in_walk(walk)


# For people and programs.

_MARKS: Final = {"added": "+", "removed": "-", "changed": "~"}


def change_line(change: Change) -> str:
    """A difference for people."""
    mark = _MARKS[change.kind]
    if change.offset is not None:
        last = change.offset + change.length - 1
        return f"{mark} {change.archive}  bytes {change.offset}-{last} ({format_size(change.length)})"
    node = change.after if change.after is not None else change.before
    slash = "/" if isinstance(node, Directory) and change.path != b"/" else ""
    line = f"{mark} {change.archive}{escaped(change.path or b'')}{slash}"
    details = ", ".join(_details(change))
    return f"{line}  ({details})" if details else line


def _details(change: Change) -> Iterator[str]:
    before, after = change.before, change.after
    if before is None or after is None:
        yield from change.what
        return
    one = before.follow() if isinstance(before, Hardlink) else before
    other = after.follow() if isinstance(after, Hardlink) else after
    for word in change.what:
        if word == "content" and isinstance(one, FileNode) and isinstance(other, FileNode) and one.size != other.size:
            yield f"content, size {one.size} -> {other.size}"
        elif word == "type":
            yield f"type {before.kind.name.lower()} -> {after.kind.name.lower()}"
        elif word == "mtime":
            yield f"mtime {time_text(one.stat.mtime_s)} -> {time_text(other.stat.mtime_s)}"
        elif word == "mode":
            yield f"mode {one.stat.mode & 0o7777:04o} -> {other.stat.mode & 0o7777:04o}"
        elif word == "owner":
            yield f"owner {one.stat.uid}:{one.stat.gid} -> {other.stat.uid}:{other.stat.gid}"
        elif word == "target" and isinstance(one, Symlink) and isinstance(other, Symlink):
            yield f"target {escaped(one.target)} -> {escaped(other.target)}"
        else:
            yield word
    if change.content == "unknown" and "mtime" in change.what:
        yield "content not compared"


def change_document(change: Change) -> dict[str, Any]:
    """A difference for programs."""
    document: dict[str, Any] = {"archive": change.archive, "change": change.kind}
    if change.path is not None:
        put(document, "path", change.path)
    if change.what:
        document["what"] = list(change.what)
    if change.content is not None:
        document["content"] = change.content
    if change.offset is not None:
        document |= {"offset": change.offset, "length": change.length}
    if change.path is not None:
        for key, node in (("before", change.before), ("after", change.after)):
            if node is not None:
                document[key] = entry_document(change.path, node)
    return document
