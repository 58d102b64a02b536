"""Prune, garbage collection and verification as tasks of a server."""

import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final

from core.progress import Progress
from datastore.errors import SnapshotNotFoundError
from datastore.filters import GroupFilter, passes
from datastore.gc import GcReport
from datastore.gc_status import GcStatus
from datastore.names import BackupType, Group, Namespace, Snapshot
from datastore.prune import Decision, KeepOptions, Mark, PruneResult, decide
from repository.interface import SnapshotInfo
from repository.remote.errors import RemoteAnswerError, RemoteRefusedError, precise
from repository.remote.listing import group_parameters, parse_decisions, snapshot_parameters
from repository.remote.rest import Parameters
from repository.remote.tasks import check_status, follow, parse_upid
from repository.verify import VerifyOptions, VerifyResult

if TYPE_CHECKING:
    from repository.remote.repository import RemoteRepository

_MAX: Final = 1 << 64
#: What a server's log says before it looks at a snapshot, and of one that is damaged.
_SNAPSHOT_LINE: Final = re.compile(
    r"\b(?:verify|SKIPPED: verify) [^ ]*?((?:vm|ct|host)/[A-Za-z0-9_][A-Za-z0-9._\-]*/[0-9TZ:.\-]+)"
)
_ERROR_LINE: Final = re.compile(r"fail|error|corrupt|mismatch|wrong|missing|can't|cannot|unable", re.IGNORECASE)
#: Lines that are kept of each snapshot.
_MAX_LINES: Final = 20
_BENCHMARK: Final = (BackupType.HOST, "benchmark")


def number(value: Any, where: str) -> int:
    """`value` if it is a 64-bit number.

    Raises:
        RemoteAnswerError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX:
        raise RemoteAnswerError("ask", where, "a number is missing in the answer, or is none")
    return value


async def prune(
    repository: "RemoteRepository", group: Group, keep: KeepOptions, *, dry_run: bool, progress: Progress
) -> PruneResult:
    """Have the server prune a group; see `Repository.prune`. Reasons are ours where the server decides as we would."""
    what, where = "prune", str(group)
    infos = await repository.snapshots(group.ns, group, unfinished=True)
    parameters: Parameters = {
        **group_parameters(group),
        **{f"keep-{kind}": count for kind, count in keep.given()},
        "dry-run": dry_run,
    }
    try:
        data = await repository.server.call("POST", "/prune", parameters, what=what, where=where)
    except RemoteRefusedError as error:
        raise precise(error) from error
    ours = {decision.snapshot.ctime: decision for decision in decide(infos, keep)}
    decisions = [_decision(one, ours.get(one[0].ctime)) for one in parse_decisions(data, group.ns, where)]
    result = PruneResult(group, decisions)
    if dry_run:
        return result
    left = {info.snapshot.ctime for info in await repository.snapshots(group.ns, group, unfinished=True)}
    for decision in decisions:
        if decision.keep:
            continue
        if decision.snapshot.ctime in left:
            why = "the server did not remove it"
            result.failed[decision.snapshot] = why
            progress.warn(f"{decision.snapshot} stays: {why}; the log of its prune task tells more")
        else:
            result.removed.add(decision.snapshot)
            progress.log(f"removed {decision.snapshot}")
    return result


def _decision(theirs: tuple[Snapshot, bool, bool], ours: Decision | None) -> Decision:
    snapshot, keep, protected = theirs
    if ours is not None and (ours.keep, ours.protected) == (keep, protected):
        return ours
    mark = Mark.PROTECTED if protected else Mark.KEEP if keep else Mark.REMOVE
    return Decision(snapshot, mark, protected, "decided by the server")


async def run_task(
    repository: "RemoteRepository",
    path: str,
    parameters: Parameters,
    progress: Progress,
    *,
    what: str,
    where: str,
    listener: Callable[[str], None] | None = None,
) -> tuple[str, str]:
    """Start a task and follow it to its end; returns its UPID and exit status. `listener` is told every line too.

    Raises:
        RemoteError: the server says no, or is away.
    """
    try:
        data = await repository.server.call("POST", path, parameters, what=what, where=where)
    except RemoteRefusedError as error:
        raise precise(error) from error
    upid = parse_upid(data, what, where)
    progress.log(f"{repository.name}: task {upid}")

    def line(text: str) -> None:
        progress.log(text)
        if listener is not None:
            listener(text)

    with progress.task(f"{what} {where}", None, "lines"):
        return upid, await follow(repository.server, upid, line, what=what, where=where)


async def collect_garbage(repository: "RemoteRepository", progress: Progress) -> GcReport:
    """Have the server collect garbage; see `Repository.collect_garbage`."""
    what, where = "collect garbage in", repository.name
    begun = time.monotonic()
    upid, status = await run_task(repository, "/gc", {}, progress, what=what, where=where)
    check_status(status, what=what, where=where)
    if status != "OK":
        progress.warn(f"the server's garbage collection ended with {status}")
    data = await repository.server.call("GET", "/gc", what=what, where=where)
    if not isinstance(data, dict):
        raise RemoteAnswerError(what, where, "the result of the garbage collection is no object")
    report = GcReport(GcStatus(upid=upid), False, time.monotonic() - begun)
    for name in (
        "index_file_count", "index_data_bytes", "disk_bytes", "disk_chunks", "removed_bytes", "removed_chunks",
        "pending_bytes", "pending_chunks", "removed_bad", "still_bad",
    ):  # fmt: skip
        setattr(report.status, name, number(data.get(name.replace("_", "-")), where))
    return report


async def verify(
    repository: "RemoteRepository",
    selection: Namespace | Group | Snapshot,
    options: VerifyOptions,
    progress: Progress,
    *,
    depth: int | None,
    filters: Sequence[GroupFilter],
) -> list[VerifyResult]:
    """Have the server verify; see `ServerVerify.verify_there`."""
    jobs: list[Namespace | Group | Snapshot] = [selection]
    if isinstance(selection, Namespace) and filters:
        jobs = []
        for ns in await repository.namespaces(selection, depth=depth):
            jobs += [info.group for info in await repository.groups(ns) if passes(filters, info.group)]
    results: list[VerifyResult] = []
    for job in jobs:
        before = await _covered(repository, job, depth)
        parameters: dict[str, Any] = {"ignore-verified": options.ignore_verified}
        if options.ignore_verified and options.outdated_after is not None:
            parameters["outdated-after"] = options.outdated_after
        if isinstance(job, Namespace):
            parameters["ns"] = str(job) if job.components else None
            parameters["max-depth"] = depth
            where = str(job) or repository.name
        else:
            parameters |= group_parameters(job) if isinstance(job, Group) else snapshot_parameters(job)
            where = str(job)
        log = _VerifyLog({str(info.snapshot) for info in before})
        upid, status = await run_task(
            repository, "/verify", parameters, progress, what="verify", where=where, listener=log.line
        )
        after = {info.snapshot: info for info in await _covered(repository, job, depth)}
        found = [_result(info.snapshot, after.get(info.snapshot), upid, log.errors) for info in before]
        if not any(one.errors for one in found):
            # It failed for another reason than a damaged snapshot.
            check_status(status, what="verify", where=where)
        results += found
    return results


async def _covered(
    repository: "RemoteRepository", job: Namespace | Group | Snapshot, depth: int | None
) -> list[SnapshotInfo]:
    """The snapshots that a task looks at, in the order in which it does."""
    if isinstance(job, Snapshot):
        return [await repository.snapshot(job)]
    if isinstance(job, Group):
        found = await repository.snapshots(job.ns, job)
        if not found:
            raise SnapshotNotFoundError("verify", str(job), "the group has no finished snapshot")
        return found[::-1]
    infos: list[SnapshotInfo] = []
    for ns in await repository.namespaces(job, depth=depth):
        of_group: dict[Group, list[SnapshotInfo]] = {}
        for info in await repository.snapshots(ns):
            if (info.snapshot.group.type, info.snapshot.group.id) != _BENCHMARK:
                of_group.setdefault(info.snapshot.group, []).append(info)
        for found in of_group.values():
            infos += found[::-1]
    return infos


def _result(snapshot: Snapshot, info: SnapshotInfo | None, upid: str, errors: dict[str, list[str]]) -> VerifyResult:
    if info is None:
        return VerifyResult(snapshot, skipped="it was removed meanwhile")
    state = info.verification or {}
    if state.get("upid") != upid:
        was = {"ok": "it was found to be sound before", "failed": "it was found to be damaged before"}
        return VerifyResult(snapshot, skipped=was.get(str(state.get("state")), "the server passed over it"))
    if state.get("state") == "ok":
        return VerifyResult(snapshot)
    return VerifyResult(snapshot, errors.get(str(snapshot)) or ["the log of the server's task tells what is wrong"])


class _VerifyLog:
    """What a task's log says of each snapshot; for people, nothing depends on it. Keeps little, however long it is."""

    def __init__(self, snapshots: Collection[str]) -> None:
        self.errors: Final[dict[str, list[str]]] = {}  #: by snapshot
        self._snapshots = snapshots
        self._current: list[str] | None = None

    def line(self, text: str) -> None:
        """Take the next line."""
        match = _SNAPSHOT_LINE.search(text)
        if match is not None:
            self._current = self.errors.setdefault(match[1], []) if match[1] in self._snapshots else None
        begins = match.end() if match is not None else 0
        if self._current is not None and len(self._current) < _MAX_LINES and _ERROR_LINE.search(text, begins):
            self._current.append(text.strip())
