"""What is in the file archives of snapshots: folders of the catalog or the archive, single files, whole folders."""

import base64
import binascii
from typing import Any, Final

from core.errors import FleeceError, UsageError
from datastore.catalog import DIRECTORY, FILE, Catalog, CatalogEntry
from datastore.errors import SnapshotNotFoundError
from datastore.names import CATALOG_NAME, ArchiveKind, Snapshot, archive_kind
from datastore.store import Datastore
from pxar.accessor import Directory, FileNode, Node
from server.access.roles import Privilege
from server.answers import RAW, Answer
from server.api.snapshots import opened
from server.browsing import Budget, OpenArchive, check_content, content, in_walk, open_archive, open_stream
from server.errors import ApiError
from server.routing import Call, Endpoint
from server.schema import ARCHIVE, BOOL, SNAPSHOT, Parameter, Text, optional
from server.state import snapshot
from server.store_files import unreadable

_P = Privilege
_FILE_ARCHIVES: Final = (".pxar.didx", ".mpxar.didx")


async def _allowed(call: Call) -> tuple[Snapshot, Datastore]:
    """The snapshot of a call that may read it, and its store."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_READ, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    return wanted, repository.store


def _path(text: str) -> bytes:
    """The path that a parameter means.

    Raises:
        ApiError: it is no base64, or leads upwards.
    """
    if text in ("root", "/"):
        return b"/"
    try:
        path = base64.b64decode(text.encode(), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError("base64 decoding of path failed - error decoding base64 data") from None
    if b".." in path.split(b"/") or b"\0" in path:
        raise ApiError("the path leads out of the archive")
    return path


def _components(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _file_archive(name: str) -> str:
    """The file archive `name` if it can be one.

    Raises:
        ApiError: it is something else.
    """
    try:
        kind = archive_kind(name)
    except UsageError:
        raise ApiError(f"failed to parse archive type for '{name}'") from None
    if kind is not ArchiveKind.DYNAMIC or not name.endswith(_FILE_ARCHIVES):
        raise ApiError(f"'{name}' is no file archive")
    return name


def _entry(budget: Budget, path: bytes, name: bytes, kind: bytes, file: tuple[int, int] | None) -> dict[str, Any]:
    """One entry of a listing; `file`: size and time of a file."""
    budget.take(name, path)
    entry: dict[str, Any] = {
        "filepath": base64.b64encode(path).decode(),
        "text": name.decode("utf-8", "replace"),
        "type": kind.decode(),
        "leaf": kind != DIRECTORY,
    }
    if file is not None:
        entry["size"], entry["mtime"] = file
    return entry


async def catalog(call: Call) -> object:
    """`GET /admin/datastore/{store}/catalog`: one folder."""
    wanted, store = await _allowed(call)
    path = _path(call["filepath"])
    name = CATALOG_NAME if call["archive-name"] is None else _file_archive(call["archive-name"])
    try:
        if call["archive-name"] is None:
            async with open_stream(call.state, call["store"], wanted, name) as stream:
                return await in_walk(lambda: _of_catalog(Catalog(stream, where=f"{wanted}/{name}"), path))
        async with open_archive(call.state, call["store"], wanted, name) as archive:
            return await in_walk(lambda: _of_archive(archive, path))
    except FleeceError as error:
        raise _refusal(store, wanted, name, error) from error


def _refusal(store: Datastore, wanted: Snapshot, name: str, error: FleeceError) -> ApiError:
    """Why nothing can be shown: what is missing in PBS's words."""
    is_missing = isinstance(error, LookupError) and not isinstance(error, SnapshotNotFoundError)
    return unreadable(store, wanted, name, error) if is_missing else ApiError(str(error))


def _of_catalog(catalog: Catalog, path: bytes) -> list[dict[str, Any]]:
    parts = _components(path)
    entry: CatalogEntry | None = catalog.root
    for part in parts:
        if entry is None or entry.kind != DIRECTORY:
            break
        entry = catalog.lookup(entry, part)
    shown = path.decode("utf-8", "replace")
    if entry is None:
        raise ApiError(f'path "{shown}" not found in catalog')
    if entry.kind != DIRECTORY:
        raise ApiError("parent is not a directory - internal error")
    budget = Budget()
    # Only the archives themselves have a slash in front.
    before = b"/".join(parts) + b"/"
    return [
        _entry(budget, before + one.name, one.name, one.kind, (one.size, one.mtime_s) if one.kind == FILE else None)
        for one in catalog.entries(entry)
    ]


def _of_archive(archive: OpenArchive, path: bytes) -> list[dict[str, Any]]:
    parts = _components(path)
    node = archive.accessor.lookup(path)
    if node is None:
        shown = path.decode("utf-8", "replace")
        raise ApiError(f'path "{shown}" not found in archive')
    if not isinstance(node, Directory):
        raise ApiError(f"expected directory entry, got {node.kind.name.lower()}")
    before = b"".join(b"/" + part for part in parts) + b"/"
    budget = Budget()
    return [_node_entry(budget, before, one) for one in node.stream()]


def _node_entry(budget: Budget, before: bytes, node: Node) -> dict[str, Any]:
    file = (node.size, node.stat.mtime_s) if isinstance(node, FileNode) else None
    return _entry(budget, before + node.name, node.name, node.kind.value, file)


async def pxar_file(call: Call) -> object:
    """`GET /admin/datastore/{store}/pxar-file-download`: a file, or a folder as zip or tar."""
    wanted, store = await _allowed(call)
    text = call["filepath"]
    path = b"/" if call["archive-name"] is not None and text == "root" else _path(text)
    if call["archive-name"] is not None:
        name = _file_archive(call["archive-name"])
    else:
        first, *rest = _components(path) or [b""]
        name = _file_archive(first.decode("utf-8", "replace"))
        path = b"/".join(rest)
    state, where, as_tar = call.state, call["store"], call["tar"]
    try:
        await check_content(state, where, wanted, name, path)
    except FleeceError as error:
        raise _refusal(store, wanted, name, error) from error
    return Answer(content_type=RAW, stream=content(state, where, wanted, name, path, as_tar=as_tar))


_BASE: Final = "/admin/datastore/{store}"
#: A path of 4096 bytes, encoded.
_FILEPATH: Final = Parameter(Text(longest=5464))
ENDPOINTS: Final = (
    Endpoint(
        "GET", f"{_BASE}/catalog", catalog, {**SNAPSHOT, "filepath": _FILEPATH, "archive-name": optional(ARCHIVE)}
    ),
    Endpoint(
        "GET",
        f"{_BASE}/pxar-file-download",
        pxar_file,
        {**SNAPSHOT, "filepath": _FILEPATH, "archive-name": optional(ARCHIVE), "tar": optional(BOOL, False)},
        raw=True,
    ),
)
