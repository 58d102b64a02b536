"""Sync jobs: stored with the server, started over REST (spec 6.11).

Jobs with a schedule are the agent's, in the configuration; the server has no clock of its own.
"""

from typing import Any, Final

from core.errors import FleeceError
from core.limits import in_io_thread
from core.state_files import StateFile
from repository.sync import Direction
from server.access.auth_ids import ROOT_USER, AuthId
from server.answers import Result, digest_of
from server.api.sync import OPTIONS, check_values, prepared, sides_of
from server.errors import ApiError, forbidden
from server.routing import Call, Endpoint
from server.schema import (
    AUTH,
    BOOL,
    COMMENT,
    CONFIG_DIGEST,
    REMOTE,
    STORE,
    Array,
    Parameter,
    Schema,
    Text,
    from_stored,
    optional,
    parameter_error,
)
from server.state import ServerState
from server.sync_rights import SyncSides, first_missing, to_change, to_see

_DIRECTIONS: Final = Text(choices=("pull", "push"))
_MODIFIED: Final = "detected modified configuration - file changed by other user? Try again."
#: What a job is, but for its id.
_JOB: Final[Schema] = {
    **{name: optional(one.type) for name, one in OPTIONS.items()},
    "store": Parameter(STORE),
    "remote-store": Parameter(STORE),
    "remote": optional(REMOTE),
    "resync-corrupt": optional(BOOL),
    "owner": optional(AUTH),
    "comment": optional(COMMENT),
    "sync-direction": optional(_DIRECTIONS),
    "schedule": optional(Text(longest=64)),
    "run-on-mount": optional(BOOL),
    "unmount-on-done": optional(BOOL),
}
_REMOVABLE: Final = tuple(name for name, one in _JOB.items() if one.optional)
Job = dict[str, Any]


def _file(state: ServerState) -> StateFile:
    return StateFile(
        state.folder / "sync-jobs.toml", "job", "the list of sync jobs",
        "Sync jobs. Written by the server, not for editing by hand.", "repair or remove the file", mode=0o600,
    )  # fmt: skip


def jobs_of(state: ServerState) -> dict[str, Job]:
    """All jobs by id, with the values that are set.

    Raises:
        FleeceError: the list cannot be read.
    """
    file = _file(state)
    jobs = {}
    for id, table in sorted(file.read().items()):
        try:
            jobs[id] = from_stored(_JOB, table)
        except ValueError as error:
            raise file.wrong(f"job.{id}: {error}") from None
    return jobs


def _owner(job: Job) -> AuthId:
    return AuthId.parse(job["owner"]) if "owner" in job else ROOT_USER


def _sides(job: Job) -> SyncSides:
    return sides_of(Direction(job.get("sync-direction", "pull")), job)


def _is_seen(call: Call, job: Job) -> bool:
    return first_missing(call.state, call.caller, to_see(_sides(job))) is None


def _may_change(call: Call, job: Job) -> bool:
    vanished = bool(job.get("remove-vanished"))
    checks = to_change(call.state, call.caller, _owner(job), _sides(job), remove_vanished=vanished)
    return first_missing(call.state, call.caller, checks) is None


def _check(job: Job) -> None:
    """See to it that a job makes sense.

    Raises:
        ApiError: it does not.
    """
    push = job.get("sync-direction") == "push"
    if push and job.get("resync-corrupt"):
        raise ApiError("push jobs do not support resync-corrupt option")
    if push and "remote" not in job:
        raise parameter_error([("remote", "property is missing and it is not optional")])
    if "schedule" in job:
        what = "the server starts no jobs by itself, put it into the configuration of 'fleece agent'"
        raise parameter_error([("schedule", what)])
    for name in ("run-on-mount", "unmount-on-done"):
        if job.get(name):
            raise parameter_error([(name, "there are no removable datastores")])
    check_values(job)
    _sides(job)


async def _found(call: Call) -> Job:
    jobs = await in_io_thread(jobs_of, call.state)
    if call["id"] not in jobs:
        raise ApiError(f"no such sync '{call['id']}'")
    return jobs[call["id"]]


async def _listed(call: Call, *, with_runs: bool) -> object:
    jobs = await in_io_thread(jobs_of, call.state)
    wanted = call["sync-direction"]
    found = []
    for id, job in jobs.items():
        direction = job.get("sync-direction", "pull")
        if wanted not in ("all", direction) or not _is_seen(call, job):
            continue
        if with_runs and call["store"] not in (None, job["store"]):
            continue
        found.append({"id": id, **job, **(_last_run(call.state, id) if with_runs else {})})
    return Result(found, {"digest": digest_of(jobs)})


def _last_run(state: ServerState, id: str) -> dict[str, Any]:
    for info in state.tasks.infos():
        if info.upid.kind == "syncjob" and info.upid.id.rpartition(":")[2] == id:
            run: dict[str, Any] = {"last-run-upid": str(info.upid)}
            if info.end is not None:
                run |= {"last-run-endtime": info.end, "last-run-state": info.status}
            return run
    return {}


async def jobs(call: Call) -> object:
    """`GET /config/sync`."""
    return await _listed(call, with_runs=False)


async def states(call: Call) -> object:
    """`GET /admin/sync`: with their last runs."""
    return await _listed(call, with_runs=True)


async def job(call: Call) -> object:
    """`GET /config/sync/{id}`."""
    found = await _found(call)
    if not _is_seen(call, found):
        raise forbidden()
    return Result({"id": call["id"], **found}, {"digest": digest_of(await in_io_thread(jobs_of, call.state))})


def _given(call: Call) -> Job:
    return {name: call[name] for name in _JOB if call.values.get(name) is not None}


def _without_defaults(job: Job) -> Job:
    return {name: value for name, value in job.items() if value is not None and (name != "ns" or value)}


async def add(call: Call) -> None:
    """`POST /config/sync`."""
    wanted = _without_defaults(_given(call))
    _check(wanted)
    if not _may_change(call, wanted):
        raise forbidden()

    def write() -> None:
        file = _file(call.state)
        with file.changing():
            tables = jobs_of(call.state)
            if call["id"] in tables:
                raise ApiError(f"job '{call['id']}' already exists.")
            file.write({**tables, call["id"]: wanted})

    await in_io_thread(write)


async def update(call: Call) -> None:
    """`PUT /config/sync/{id}`: what is not named stays."""
    old = await _found(call)
    kept = {name: value for name, value in old.items() if name not in (call["delete"] or ())}
    wanted = _without_defaults({**kept, **_given(call)})
    _check(wanted)
    if not _may_change(call, old) or not _may_change(call, wanted):
        raise forbidden()
    await _replace(call, old, wanted)


async def remove(call: Call) -> None:
    """`DELETE /config/sync/{id}`."""
    old = await _found(call)
    if not _may_change(call, old):
        raise forbidden()
    await _replace(call, old, None)


async def _replace(call: Call, old: Job, new: Job | None) -> None:
    def write() -> None:
        file = _file(call.state)
        with file.changing():
            tables = jobs_of(call.state)
            given = call["digest"]
            # Also changed between the check of rights and now.
            if tables.get(call["id"]) != old or (given is not None and given.lower() != digest_of(tables)):
                raise ApiError(_MODIFIED)
            del tables[call["id"]]
            file.write(tables if new is None else {**tables, call["id"]: new})

    await in_io_thread(write)


async def run(call: Call) -> object:
    """`POST /admin/sync/{id}/run`: with the rights of its owner, whoever starts it."""
    found = await _found(call)
    if not _may_change(call, found):
        raise ApiError(f"permission check failed, '{call.caller}' is missing access")
    sides, owner = _sides(found), _owner(found)
    if owner != ROOT_USER and not call.state.access.active(owner):
        raise ApiError(f"the job's owner '{owner}' is inactive or non-existent")
    try:
        ready = await prepared(call.state, owner, sides, found, told_at_end=True)
    except FleeceError as error:
        raise ApiError(str(error)) from error
    worker = ":".join((sides.remote or "-", sides.remote_store, sides.store, str(sides.ns), call["id"]))
    return await call.state.tasks.start("syncjob", worker, str(call.caller), ready.work)


_CONFIG: Final = "/config/sync"
_ID: Final = {"id": Parameter(REMOTE)}
_DIGEST: Final = {"digest": optional(CONFIG_DIGEST)}
_DIRECTION: Final = {"sync-direction": optional(Text(choices=("all", "push", "pull")), "pull")}
_CHANGES: Final = {name: optional(one.type) for name, one in _JOB.items()}
ENDPOINTS: Final = (
    Endpoint("GET", _CONFIG, jobs, _DIRECTION),
    Endpoint("POST", _CONFIG, add, {**_ID, **_JOB}),
    Endpoint("GET", f"{_CONFIG}/{{id}}", job, _ID),
    Endpoint(
        "PUT",
        f"{_CONFIG}/{{id}}",
        update,
        {**_ID, **_CHANGES, "delete": optional(Array(Text(choices=_REMOVABLE))), **_DIGEST},
    ),
    Endpoint("DELETE", f"{_CONFIG}/{{id}}", remove, {**_ID, **_DIGEST}),
    Endpoint("GET", "/admin/sync", states, {"store": optional(STORE), **_DIRECTION}),
    Endpoint("POST", "/admin/sync/{id}/run", run, _ID),
)
