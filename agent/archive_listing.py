"""What is in file archives: one directory, a whole archive, and what matches a pattern in many of them.

Everything that walks is synchronous and reads from a worker thread; memory grows with the depth of a tree, and with
the table of its largest directory. Paths begin with a slash and are bytes.
"""

import stat
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

from agent.listing_output import put, time_text
from agent.snapshot_archives import OpenSnapshot, in_walk
from core.errors import NotFoundError
from datastore.catalog import DIRECTORY, Catalog, CatalogEntry
from datastore.names import Snapshot
from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Hardlink, Node, Symlink
from pxar.errors import ArchiveError
from pxar.format import escaped, shown
from pxar.metadata import Acl, Metadata, Stat
from pxar.patterns import MatchPattern

#: Directories within each other, as in catalogs. Linux itself cannot name a path of more than 2048 components.
MAX_DEPTH: Final = 4096
_LETTERS: Final = {letter.encode(): letter for letter in "dflhbcps"}

#: What a walk comes upon: an entry of an archive or of a catalog.
Item: TypeAlias = "Node | CatalogEntry"


class Found(NamedTuple):
    """An entry as `find` and `catalog dump` show it."""

    snapshot: Snapshot
    archive: str  #: `root.pxar`
    path: bytes
    letter: str  #: its kind, a letter as in catalogs: d f l h b c p s
    size: int | None  #: bytes, of files; of a hard link where the archive itself was read
    mtime_s: int | None  #: Unix seconds; catalogs know it of files only

    @property
    def line(self) -> str:
        """Kind, size, time and path for people."""
        when = "" if self.mtime_s is None else time_text(self.mtime_s)
        size = "" if self.size is None else self.size
        return f"{self.letter} {size:>13}  {when:19}  {self.archive}{escaped(self.path)}"

    @property
    def fields(self) -> dict[str, Any]:
        """The same for programs."""
        document: dict[str, Any] = {"archive": self.archive}
        put(document, "path", self.path)
        return {**document, "type": self.letter, "size": self.size, "mtime": self.mtime_s}


# Walking.


def walk_nodes(directory: Directory, path: bytes) -> Iterator[tuple[bytes, Node, bool]]:
    """Everything below `directory`, which lies at `path`, in the archive's order: path, entry, whether a directory.

    Raises:
        ArchiveError: the archive is broken, or deeper than any tree.
        FleeceError: it cannot be read.
    """
    # One path for all directories that are open: a prefix for each would be gigabytes in an archive made for that.
    open_path = bytearray(path.rstrip(b"/") + b"/")
    stack = [(len(open_path), directory.stream())]
    while stack:
        length, nodes = stack[-1]
        del open_path[length:]
        prefix = bytes(open_path)
        for node in nodes:
            below = prefix + node.name
            if not isinstance(node, Directory):
                yield below, node, False
                continue
            yield below, node, True
            if len(stack) >= MAX_DEPTH:
                raise too_deep(below)
            open_path += node.name + b"/"
            stack.append((len(open_path), node.stream()))
            break
        else:
            stack.pop()


def too_deep(path: bytes) -> ArchiveError:
    """The error for a tree that no file system can have."""
    return ArchiveError("walk through", shown(path), f"more than {MAX_DEPTH} directories within each other")


def walk_catalog(catalog: Catalog, directory: CatalogEntry) -> Iterator[tuple[bytes, CatalogEntry, bool]]:
    """The same for the part of a catalog that belongs to one archive.

    Raises:
        FormatError: the catalog is broken.
        FleeceError: it cannot be read.
    """
    open_path, lengths = bytearray(b"/"), [1]
    prefix = b"/"
    for depth, entry in catalog.walk(directory):
        if lengths[depth] != len(prefix):
            del open_path[lengths[depth] :], lengths[depth + 1 :]
            prefix = bytes(open_path)
        path = prefix + entry.name
        if entry.kind != DIRECTORY:
            yield path, entry, False
            continue
        del lengths[depth + 1 :]
        open_path += entry.name + b"/"
        lengths.append(len(open_path))
        prefix = bytes(open_path)
        yield path, entry, True


def found(snapshot: Snapshot, archive: str, path: bytes, item: Item) -> Found:
    """`item` at `path` as it is shown.

    Raises:
        ArchiveError: a hard link leads nowhere.
    """
    if isinstance(item, CatalogEntry):
        size, mtime = (item.size, item.mtime_s) if item.kind == b"f" else (None, None)
        return Found(snapshot, archive, path, _LETTERS[item.kind], size, mtime)
    letter = _LETTERS[item.kind.value]
    node = item.follow() if isinstance(item, Hardlink) else item
    size = node.size if isinstance(node, FileNode) else None
    return Found(snapshot, archive, path, letter, size, node.stat.mtime_s)


async def walk_archive(opened: OpenSnapshot, name: str) -> Iterator[tuple[bytes, Item, bool]]:
    """Everything in the file archive `name`, read from its catalog if it has one; to be gone through in a thread.

    Raises:
        FormatError, KeyNeededError, NotFoundError: it cannot be read.
    """
    known = await opened.catalog_of(name)
    if known is not None:
        return walk_catalog(*known)
    return walk_nodes((await opened.accessor(name)).root, b"/")


# find.


async def find_in(
    opened: OpenSnapshot, name: str, pattern: MatchPattern, letters: frozenset[str], add: Callable[[Found], None]
) -> None:
    """Pass what matches `pattern`, and is of one of the kinds `letters`, in the file archive `name` to `add`.

    Raises:
        FormatError, KeyNeededError, NotFoundError: it cannot be read, or not to its end.
    """
    entries = await walk_archive(opened, name)
    snapshot, matches = opened.snapshot, pattern.matches

    def walk() -> None:
        for path, item, is_directory in entries:
            if matches(path, is_directory):
                one = found(snapshot, name, path, item)
                if one.letter in letters:
                    add(one)

    await in_walk(walk)


class Versions(NamedTuple):
    """One path of a group and the versions of it that snapshots have."""

    first: Found
    versions: dict[tuple[str, int | None, int | None], list[Snapshot]]  #: kind, size, time -> where it is found


class VersionsOf:
    """Gathers what was found by path; memory grows with that."""

    def __init__(self) -> None:
        self._paths: dict[tuple[object, str, bytes], Versions] = {}

    def add(self, one: Found) -> None:
        """Remember `one`."""
        versions = self._paths.setdefault((one.snapshot.group, one.archive, one.path), Versions(one, {})).versions
        versions.setdefault((one.letter, one.size, one.mtime_s), []).append(one.snapshot)

    def __iter__(self) -> Iterator[Versions]:
        return iter(self._paths.values())


def versions_lines(one: Versions) -> str:
    """A path with its versions for people, oldest first."""
    from agent.documents import in_namespace

    lines = [f"{in_namespace(one.first.snapshot.group)}  {one.first.archive}{escaped(one.first.path)}"]
    for (letter, size, mtime), snapshots in one.versions.items():
        when = "" if mtime is None else time_text(mtime)
        where = snapshots[0].time if len(snapshots) == 1 else f"{snapshots[0].time} to {snapshots[-1].time}"
        count = "1 snapshot" if len(snapshots) == 1 else f"{len(snapshots)} snapshots"
        lines.append(f"  {letter} {'' if size is None else size:>13}  {when:19}  {count}, {where}")
    return "\n".join(lines)


def versions_document(one: Versions) -> dict[str, Any]:
    """The same for programs."""
    group = one.first.snapshot.group
    document: dict[str, Any] = {"ns": str(group.ns), "group": str(group), "archive": one.first.archive}
    put(document, "path", one.first.path)
    document["versions"] = [
        {"type": letter, "size": size, "mtime": mtime, "snapshots": [str(snapshot) for snapshot in snapshots]}
        for (letter, size, mtime), snapshots in one.versions.items()
    ]
    return document


# ls.


def entry_at(accessor: ArchiveAccessor, path: bytes) -> Node:
    """What lies at `path`.

    Raises:
        NotFoundError: nothing.
        UsageError: `..` in the path.
    """
    node = accessor.lookup(path)
    if node is None:
        raise NotFoundError("find", f"{accessor.where}/{escaped(path.strip(b'/'))}", "the archive has no such entry")
    return node


class Listed(NamedTuple):
    """An entry as `ls` shows it."""

    name: bytes  #: its own name, or the path where several directories are listed
    path: bytes
    node: Node


def list_entry(accessor: ArchiveAccessor, path: bytes, recursive: bool, itself: bool) -> Iterator[Listed]:
    """What lies in the directory at `path` or, of anything else and with `itself`, the entry itself.

    Raises:
        NotFoundError, UsageError: as `entry_at`.
        ArchiveError: the archive is broken.
    """
    node = entry_at(accessor, path)
    path = b"/" + b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
    if itself or not isinstance(node, Directory):
        yield Listed(path, path, node)
    elif recursive:
        for below, one, _ in walk_nodes(node, path):
            yield Listed(below, below, one)
    else:
        prefix = path.rstrip(b"/") + b"/"
        for one in node.stream():
            yield Listed(one.name, prefix + one.name, one)


def entry_line(one: Listed) -> str:
    """An entry for people, in the manner of `ls -ln`; a `+` for access control lists or extended attributes."""
    node = one.node
    real = node.follow() if isinstance(node, Hardlink) else node
    metadata = real.metadata
    known = metadata.stat
    letters = stat.filemode(known.mode)
    if isinstance(node, Hardlink):
        letters = "h" + letters[1:]
    more = "+" if metadata.xattrs or metadata.acl or metadata.fcaps is not None else " "
    size = f"{real.major}, {real.minor}" if isinstance(real, Device) else real.size if isinstance(real, FileNode) else 0
    line = f"{letters}{more} {known.uid:>5} {known.gid:>5} {size:>12} {time_text(known.mtime_s)}  {escaped(one.name)}"
    if isinstance(node, Symlink):
        return f"{line} -> {escaped(node.target)}"
    if isinstance(node, Hardlink):
        return f"{line} link to /{escaped(node.target_path.lstrip(b'/'))}"
    return line


def entry_document(path: bytes, node: Node) -> dict[str, Any]:
    """An entry for programs; of a hard link with the metadata of the file that it leads to."""
    document: dict[str, Any] = {}
    put(document, "path", path)
    document["type"] = _LETTERS[node.kind.value]
    real = node.follow() if isinstance(node, Hardlink) else node
    metadata = real.metadata
    document |= _stat_fields(metadata.stat)
    if isinstance(real, FileNode):
        document["size"] = real.size
    if isinstance(node, Symlink):
        put(document, "target", node.target)
    elif isinstance(node, Hardlink):
        put(document, "target", b"/" + node.target_path.lstrip(b"/"))
    elif isinstance(node, Device):
        document |= {"major": node.major, "minor": node.minor}
    return document | _attribute_fields(metadata)


def _stat_fields(known: Stat) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "mode": f"{known.mode & 0o7777:04o}",
        "uid": known.uid,
        "gid": known.gid,
        "mtime": known.mtime_s,
        "mtime-ns": known.mtime_ns,
    }
    if known.flags:
        fields["flags"] = known.flags
    return fields


def _attribute_fields(metadata: Metadata) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if metadata.xattrs:
        fields["xattrs"] = [_xattr(name, value) for name, value in metadata.xattrs]
    if metadata.acl:
        fields["acl"] = _acl(metadata.acl)
    if metadata.fcaps is not None:
        fields["capabilities"] = metadata.fcaps.hex()
    if metadata.projid is not None:
        fields["project"] = metadata.projid
    return fields


def _xattr(name: bytes, value: bytes) -> dict[str, Any]:
    field: dict[str, Any] = {}
    put(field, "name", name)
    put(field, "value", value)
    return field


def _acl(acl: Acl) -> dict[str, Any]:
    def pairs(entries: tuple[tuple[int, int], ...]) -> list[dict[str, int]]:
        return [{"id": number, "permissions": permissions} for number, permissions in entries]

    fields: dict[str, Any] = {"users": pairs(acl.users), "groups": pairs(acl.groups), "group-obj": acl.group_obj}
    if acl.default is not None:
        fields["default"] = {key.replace("_", "-"): value for key, value in acl.default._asdict().items()}
    if acl.default_users or acl.default_groups:
        fields |= {"default-users": pairs(acl.default_users), "default-groups": pairs(acl.default_groups)}
    return fields


# catalog dump.


class Dumped(NamedTuple):
    """A line of `catalog dump`."""

    file: str  #: file name of the archive's index, `root.pxar.didx`, as catalogs name its directory
    entry: Found


def dump_line(one: Dumped) -> str:
    """As `proxmox-backup-client catalog dump` prints it: kind and quoted path, of files also size and time."""
    from datastore.names import format_time

    entry = one.entry
    path = escaped(entry.path.rstrip(b"/")).replace('"', '\\"')
    line = f'{entry.letter} "./{one.file}{path}"'
    if entry.letter not in "fh" or entry.size is None or entry.mtime_s is None:
        return line
    try:
        when = format_time(entry.mtime_s)
    except (ValueError, OverflowError, OSError):
        when = f"@{entry.mtime_s}"
    return f"{line} {entry.size} {when}"


async def dump(opened: OpenSnapshot, name: str, add: Callable[[Dumped], None]) -> None:
    """Pass every entry of the file archive `name` to `add`.

    Raises:
        FormatError, KeyNeededError, NotFoundError: it cannot be read, or not to its end.
    """
    entries = await walk_archive(opened, name)
    snapshot, file = opened.snapshot, opened.archives[name].filename

    def walk() -> None:
        add(Dumped(file, Found(snapshot, name, b"/", "d", None, None)))
        for path, item, _ in entries:
            add(Dumped(file, found(snapshot, name, path, item)))

    await in_walk(walk)
