"""Which namespaces, groups and snapshots a sync is about."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from core.errors import FleeceError, UsageError
from core.progress import Progress
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest
from datastore.names import (
    CLIENT_LOG_NAME,
    MANIFEST_NAME,
    MAX_NAMESPACE_DEPTH,
    ROOT,
    Group,
    Namespace,
    format_time,
)
from repository.interface import Repository, SnapshotInfo
from repository.remote.errors import RemoteRefusedError
from repository.sync.options import Direction, SyncOptions


@dataclass(frozen=True, slots=True)
class SourceNamespaces:
    """The namespaces of the source that are meant, parents first."""

    found: list[Namespace]
    hidden: bool = False  #: some of them are not to be seen
    problem: str = ""  #: why there may be more


async def source_namespaces(source: Repository, options: SyncOptions) -> SourceNamespaces:
    """What is at and below the anchor.

    Raises:
        SnapshotNotFoundError: the anchor is not there.
        UsageError: it would become too deep at the target.
        FleeceError: they cannot be listed.
    """
    anchor, depth = options.source_ns, options.max_depth
    problem = ""
    if anchor == ROOT and depth == 0:
        listed = [ROOT]  # servers without namespaces know no such call
    else:
        try:
            listed = await source.namespaces(anchor, depth=depth)
        except RemoteRefusedError as error:
            if error.status != 404 or anchor != ROOT or depth is not None:
                raise
            listed, problem = [ROOT], f"the server has no namespaces ({error.why})"
    within = {ns for ns in listed if _below(ns, anchor) and (depth is None or len(_relative(ns, anchor)) <= depth)}
    seen = {ns for ns in within if options.rights.reads(ns)}
    # A server leaves out what its user may not see, but not what is below that.
    gaps = any(parent not in within for ns in within for parent in _parents(ns, anchor))
    if seen:
        deepest = max(len(_relative(ns, anchor)) for ns in seen)
        if deepest + len(options.target_ns.components) > MAX_NAMESPACE_DEPTH:
            why = f"the source is {deepest} levels deep, with {options.target_ns} above it that is too much"
            raise UsageError("sync into", str(options.target_ns), why, f"{MAX_NAMESPACE_DEPTH} levels are possible")
    found = sorted(seen, key=lambda ns: (len(str(ns)), str(ns)))
    return SourceNamespaces(found, gaps or seen != within or anchor not in within, problem)


def mapped(ns: Namespace, options: SyncOptions) -> Namespace:
    """The namespace of the target for one of the source.

    Raises:
        UsageError: its name would be too long.
    """
    return Namespace.parse("/".join((*options.target_ns.components, *_relative(ns, options.source_ns))))


def mapped_group(group: Group, ns: Namespace) -> Group:
    """The same group in another namespace."""
    return Group(group.type, group.id, ns)


def is_within_target(ns: Namespace, options: SyncOptions) -> bool:
    """True if a namespace of the target is at or below the anchor there, and not too deep for this sync."""
    anchor = options.target_ns
    depth = MAX_NAMESPACE_DEPTH if options.max_depth is None else options.max_depth
    return _below(ns, anchor) and len(_relative(ns, anchor)) <= depth


def _below(ns: Namespace, anchor: Namespace) -> bool:
    return ns.components[: len(anchor.components)] == anchor.components


def _relative(ns: Namespace, anchor: Namespace) -> tuple[str, ...]:
    return ns.components[len(anchor.components) :]


def _parents(ns: Namespace, anchor: Namespace) -> Iterable[Namespace]:
    return (Namespace(ns.components[:length]) for length in range(len(anchor.components), len(ns.components)))


async def ensure_namespace(
    target: Repository, ns: Namespace, there: set[Namespace], options: SyncOptions, created: Callable[[Namespace], None]
) -> None:
    """Make a namespace of the target and those above it, level by level, unless it is in `there`, which grows.

    Raises:
        FleeceError: no right to, or it cannot be made.
    """
    for length in range(1, len(ns.components) + 1):
        one = Namespace(ns.components[:length])
        if one in there:
            continue
        if not options.rights.modifies(one):
            raise FleeceError("create the namespace", str(one), "no right to")
        if await target.create_namespace(one, known=there):
            created(one)
        there.add(one)


@dataclass(slots=True)
class Choice:
    """The snapshots of one group that are to be worked on, each oldest first."""

    new: list[SnapshotInfo] = field(default_factory=list)
    again: list[SnapshotInfo] = field(default_factory=list)  #: on both sides; the newest, to be looked at again
    corrupt: list[SnapshotInfo] = field(default_factory=list)  #: on both sides, and damaged at the target
    old: list[SnapshotInfo] = field(default_factory=list)  #: not newer than the newest one at the target
    beyond_last: list[SnapshotInfo] = field(default_factory=list)  #: outside of `transfer_last`


def choose(source: Sequence[SnapshotInfo], target: Sequence[SnapshotInfo], options: SyncOptions) -> Choice:
    """What is to be done about the snapshots of a group, given all of them on both sides."""
    pull = options.direction is Direction.PULL
    by_time = {info.snapshot.ctime: info for info in source if info.finished and _passes(info, options)}
    candidates = [by_time[ctime] for ctime in sorted(by_time)]
    # What a sync or server left that was killed is not there: the next session of the group removes it.
    there = {info.snapshot.ctime: info for info in target if info.finished}
    last = max(there, default=0)
    first_of_last = 0 if options.transfer_last is None else max(0, len(candidates) - options.transfer_last)
    choice = Choice()
    for number, info in enumerate(candidates):
        ctime = info.snapshot.ctime
        if pull and options.resync_corrupt and ctime in there and is_corrupt(there[ctime]):
            choice.corrupt.append(info)
        elif ctime < last or (ctime == last and not pull):
            choice.old.append(info)
        elif ctime == last:
            choice.again.append(info)
        elif number < first_of_last:
            choice.beyond_last.append(info)
        else:
            choice.new.append(info)
    return choice


def is_corrupt(info: SnapshotInfo) -> bool:
    """True if its verification failed, or its manifest cannot be read."""
    return info.finished and (info.size is None or (info.verification or {}).get("state") == "failed")


def _passes(info: SnapshotInfo, options: SyncOptions) -> bool:
    if options.verified_only and (info.verification or {}).get("state") != "ok":
        return False
    if not options.encrypted_only:
        return True
    wanted = {MANIFEST_NAME: CryptMode.SIGN_ONLY}
    listed = [file for file in info.files if file.filename != CLIENT_LOG_NAME]
    return bool(listed) and all(file.crypt_mode is wanted.get(file.filename, CryptMode.ENCRYPT) for file in listed)


def passes_by_manifest(manifest: Manifest, options: SyncOptions) -> bool:
    """The two flags once more, by what is really going to be transferred."""
    if options.verified_only and (manifest.verify_state or {}).get("state") != "ok":
        return False
    return not options.encrypted_only or all(file.crypt_mode is CryptMode.ENCRYPT for file in manifest.files)


def tell_skipped(choice: Choice, progress: Progress) -> None:
    """One line for each reason why snapshots are left out."""
    for infos, why in (
        (choice.old, "not newer than the newest snapshot at the target"),
        (choice.beyond_last, "due to transfer-last"),
    ):
        if infos:
            first, last = (format_time(info.snapshot.ctime) for info in (infos[0], infos[-1]))
            span = first if len(infos) == 1 else f"{first} .. {last}"
            progress.log(f"{infos[0].snapshot.group}: skipped {len(infos)} snapshots ({span}), {why}")


def same_files(one: Manifest, other: Manifest) -> bool:
    """True if two manifests list the same data in the same order."""
    return one.files == other.files
