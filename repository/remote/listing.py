"""What a server lists, checked: nothing of it is used as a name before it has passed the same parsers as ours."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from core.errors import UsageError
from datastore.crypt_mode import CryptMode
from datastore.names import MANIFEST_NAME, BackupType, Group, Namespace, Snapshot, is_safe_id
from repository.interface import FileInfo, GroupInfo, SnapshotInfo
from repository.remote.errors import RemoteAnswerError

#: Last second of the year 9999: later times have no folder name.
MAX_CTIME: Final = 253_402_300_799
_MAX_SIZE: Final = 1 << 64
_MAX_NAME: Final = 255
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){31}")


def group_parameters(group: Group) -> dict[str, str]:
    """How a group is named in calls; the root namespace is left out."""
    ns = {"ns": str(group.ns)} if group.ns.components else {}
    return {**ns, "backup-type": group.type.value, "backup-id": group.id}


def snapshot_parameters(snapshot: Snapshot) -> dict[str, str | int]:
    """How a snapshot is named in calls."""
    return {**group_parameters(snapshot.group), "backup-time": snapshot.ctime}


def parse_namespaces(data: Any, where: str) -> list[Namespace]:
    """The answer to `GET namespace`, depth first and each level by name.

    Raises:
        RemoteAnswerError: no such list.
    """
    found = [_namespace(entry.get("ns"), where) for entry in _objects(data, where)]
    return sorted(set(found), key=lambda ns: ns.components)


def parse_groups(data: Any, ns: Namespace, where: str) -> list[GroupInfo]:
    """The answer to `GET groups`, in PBS's order.

    Raises:
        RemoteAnswerError: no such list.
    """
    infos = []
    for entry in _objects(data, where):
        group = _group(entry, ns, where)
        count = _count(entry.get("backup-count", 0), where)
        last = entry.get("last-backup", 0)
        files = entry.get("files")
        # A group with a single snapshot shows it even if it is unfinished.
        finished = count > 1 or (isinstance(files, list) and MANIFEST_NAME in files)
        latest = group.at(_ctime(last, where)) if last and finished else None
        comment = _text(entry.get("comment"))
        infos.append(
            GroupInfo(group, _owner(entry), comment, count=count if finished or count > 1 else 0, latest=latest)
        )
    return sorted(infos, key=lambda info: info.group.sort_key)


def parse_snapshots(data: Any, ns: Namespace, where: str) -> list[SnapshotInfo]:
    """The answer to `GET snapshots`, by group and then oldest first.

    Raises:
        RemoteAnswerError: no such list.
    """
    infos = [_snapshot(entry, ns, where) for entry in _objects(data, where)]
    return sorted(infos, key=lambda info: (info.snapshot.group.sort_key, info.snapshot.ctime))


def parse_decisions(data: Any, ns: Namespace, where: str) -> list[tuple[Snapshot, bool, bool]]:
    """The answer to `POST prune`: snapshot, keep, protected; oldest first.

    Raises:
        RemoteAnswerError: no such list.
    """
    found = []
    for entry in _objects(data, where):
        keep, protected = entry.get("keep"), entry.get("protected", False)
        if not isinstance(keep, bool) or not isinstance(protected, bool):
            raise _nonsense(where, "'keep' or 'protected' is no truth value")
        found.append((_group(entry, ns, where).at(_ctime(entry.get("backup-time"), where)), keep, protected))
    return sorted(found, key=lambda one: one[0].ctime)


def _snapshot(entry: Mapping[str, Any], ns: Namespace, where: str) -> SnapshotInfo:
    snapshot = _group(entry, ns, where).at(_ctime(entry.get("backup-time"), where))
    size = entry.get("size")
    verification = entry.get("verification")
    fingerprint = entry.get("fingerprint")
    files = tuple(_files(entry.get("files"), where))
    return SnapshotInfo(
        snapshot,
        files=files,
        finished=size is not None,
        owner=_owner(entry),
        protected=entry.get("protected") is True,
        comment=_text(entry.get("comment")),
        verification=verification if _is_verification(verification) else None,
        fingerprint=fingerprint if isinstance(fingerprint, str) and _FINGERPRINT.fullmatch(fingerprint) else None,
        size=None if size is None else _count(size, where),
    )


def _files(data: Any, where: str) -> Iterator[FileInfo]:
    for entry in _objects([] if data is None else data, where):
        name, size, mode = entry.get("filename"), entry.get("size"), entry.get("crypt-mode")
        if not isinstance(name, str) or len(name) > _MAX_NAME or not is_safe_id(name):
            continue  # a stray file of the folder
        modes = {known.value: known for known in CryptMode}
        yield FileInfo(
            name,
            None if size is None else _count(size, where),
            modes.get(mode) if isinstance(mode, str) else None,
        )


def _is_verification(value: Any) -> bool:
    return isinstance(value, dict) and value.get("state") in ("ok", "failed") and isinstance(value.get("upid"), str)


def _objects(data: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise _nonsense(where, "the answer is no list of objects")
    return data


def _namespace(text: Any, where: str) -> Namespace:
    try:
        return Namespace.parse(text if isinstance(text, str) else "/")
    except UsageError as error:
        raise _nonsense(where, error.why) from None


def _group(entry: Mapping[str, Any], ns: Namespace, where: str) -> Group:
    kind, backup_id = entry.get("backup-type"), entry.get("backup-id")
    if kind not in [known.value for known in BackupType]:
        raise _nonsense(where, "'backup-type' is none of vm, ct, host")
    if not isinstance(backup_id, str) or len(backup_id) > _MAX_NAME or not is_safe_id(backup_id):
        raise _nonsense(where, "'backup-id' is missing or unsafe")
    return Group(BackupType(kind), backup_id, ns)


def _ctime(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_CTIME:
        raise _nonsense(where, "a backup time is no time")
    return value


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_SIZE:
        raise _nonsense(where, "a size or number is none")
    return value


def _owner(entry: Mapping[str, Any]) -> str | None:
    owner = entry.get("owner")
    return owner if isinstance(owner, str) and owner.isprintable() and len(owner) <= 64 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _nonsense(where: str, why: str) -> RemoteAnswerError:
    return RemoteAnswerError("understand the list of", where, why)
