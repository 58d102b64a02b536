"""Snapshots and tables as people and programs read them; the keys are those of PBS."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from core.errors import UsageError
from core.units import format_size
from datastore.crypt_mode import CryptMode
from datastore.names import Group, Namespace, Snapshot, strip_archive_type
from repository.interface import Repository, SnapshotInfo


def snapshot_document(info: SnapshotInfo) -> dict[str, Any]:
    """One snapshot, an element of `fleece list` and the document of `fleece show`."""
    snapshot = info.snapshot
    document = {
        "backup-type": snapshot.group.type.value,
        "backup-id": snapshot.group.id,
        "backup-time": snapshot.ctime,
        "ns": str(snapshot.group.ns),
        "snapshot": str(snapshot),
        "files": [
            _without_none(
                {
                    "filename": file.filename,
                    "size": file.size,
                    "crypt-mode": file.crypt_mode.value if file.crypt_mode is not None else None,
                }
            )
            for file in info.files
        ],
        "size": info.size,
        "owner": info.owner,
        "protected": info.protected,
        "comment": info.comment or None,
        "verification": info.verification,
        "fingerprint": info.fingerprint,
        "finished": info.finished,
    }
    return _without_none(document)


def _without_none(document: dict[str, Any]) -> dict[str, Any]:
    """PBS leaves out what it does not know."""
    return {key: value for key, value in document.items() if value is not None}


def snapshot_lines(infos: Sequence[SnapshotInfo]) -> Iterator[str]:
    """A list of snapshots for people."""
    if not infos:
        yield "No snapshots."
        return
    rows = []
    for info in infos:
        archives = [strip_archive_type(file.filename) for file in info.files if is_archive(file.filename)]
        rows.append(
            (
                in_namespace(info.snapshot),
                "" if info.size is None else format_size(info.size),
                ", ".join(archives),
                verify_word(info),
                "yes" if info.protected else "",
                " ".join(marks(info)),
                first_line(info.comment),
            )
        )
    yield from table(("snapshot", "size", "archives", "verified", "protected", "", "notes"), rows, right=(1,))


def verify_word(info: SnapshotInfo) -> str:
    """What the last verify found, in a word; empty if there was none."""
    return str(info.verification.get("state", "unknown")) if info.verification else ""


_VERIFY_ORDER: Final = {"failed": 0, "": 1, "ok": 3}


def sorted_snapshots(infos: Sequence[SnapshotInfo], key: str, *, reverse: bool = False) -> list[SnapshotInfo]:
    """`infos`, which are by group and then oldest first, in another order; what is equal stays in that one."""
    keys: dict[str, Callable[[SnapshotInfo], Any]] = {
        "group": lambda info: 0,
        "time": lambda info: info.snapshot.ctime,
        "size": lambda info: info.size or 0,
        "owner": lambda info: info.owner or "",
        "verified": lambda info: _VERIFY_ORDER.get(verify_word(info), 2),
        "protected": lambda info: not info.protected,
    }
    if reverse:
        return sorted(infos, key=keys[key], reverse=True) if key != "group" else list(reversed(infos))
    return sorted(infos, key=keys[key])


def show_lines(info: SnapshotInfo) -> Iterator[str]:
    """One snapshot with its files for people."""
    yield in_namespace(info.snapshot)
    facts = [("owner", info.owner or "unknown")]
    if info.fingerprint:
        facts.append(("key", info.fingerprint))
    if info.verification:
        facts.append(("verified", str(info.verification.get("state", "unknown"))))
    if info.protected:
        facts.append(("protected", "yes"))
    if not info.finished:
        facts.append(("unfinished", "the backup is running, or was cut off"))
    for name, value in facts:
        yield f"  {name}: {value}"
    for number, line in enumerate(info.comment.splitlines()):
        yield f"  notes: {line}" if number == 0 else f"         {line}"
    yield ""
    rows = [
        (
            file.filename,
            "" if file.size is None else format_size(file.size),
            file.crypt_mode.value if file.crypt_mode is not None else "",
        )
        for file in info.files
    ]
    yield from table(("file", "size", "crypt mode"), rows, right=(1,))


def is_archive(filename: str) -> bool:
    """True for the files that hold what was backed up: not the manifest."""
    return filename != "index.json.blob"


def marks(info: SnapshotInfo) -> Iterator[str]:
    """What is remarkable about a snapshot beside its own columns, in single words."""
    if not info.finished:
        yield "unfinished"
    if any(file.crypt_mode is CryptMode.ENCRYPT for file in info.files):
        yield "encrypted"
    elif any(file.crypt_mode is CryptMode.SIGN_ONLY for file in info.files):
        yield "signed"


def in_namespace(snapshot: Snapshot | Group) -> str:
    """`snapshot` with its namespace in front, for lists over several."""
    group = snapshot if isinstance(snapshot, Group) else snapshot.group
    return f"{group.ns}: {snapshot}" if group.ns.components else str(snapshot)


def first_line(text: str) -> str:
    """The first line of notes, which listings show."""
    return text.splitlines()[0] if text.strip() else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Iterator[str]:
    """Columns aligned by blanks; columns without any text are left out; those in `right` stand at the right."""
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    widths = {column: max(len(row[column]) for row in (header, *rows)) for column in used}
    for row in (header, *rows):
        cells = [
            row[column].rjust(widths[column]) if column in right else row[column].ljust(widths[column])
            for column in used
        ]
        yield "  ".join(cells).rstrip()


async def find_snapshot(repository: Repository, text: str, ns: Namespace) -> Snapshot:
    """The snapshot that `text` means: `type/id/time` or `type/id/latest`.

    Raises:
        UsageError: another form.
        SnapshotNotFoundError: `latest` of a group without a finished snapshot.
    """
    from datastore.errors import SnapshotNotFoundError

    group_text, _, time = text.rpartition("/")
    if time != "latest":
        return Snapshot.parse(text, ns)
    group = Group.parse(group_text, ns)
    newest = await repository.latest(group)
    if newest is None:
        raise SnapshotNotFoundError(
            "find the snapshot", text, "the group has no finished snapshot", "'fleece list' shows what is there"
        )
    return newest


def parse_selection(text: str | None, ns: Namespace) -> Group | str | None:
    """A group, the text of a snapshot, or None for everything.

    Raises:
        UsageError: neither `type/id` nor `type/id/time`.
    """
    if text is None:
        return None
    parts = text.count("/")
    if parts == 1:
        return Group.parse(text, ns)
    if parts == 2:
        return text
    raise UsageError("understand", repr(text), "it is neither a group (vm/100) nor a snapshot (vm/100/latest)")
