"""Tasks: list, status, log, stop (spec 6.10)."""

from typing import Any, Final

from core.errors import FormatError
from core.limits import in_io_thread
from datastore.upid import Upid
from server.access.auth_ids import AuthId
from server.access.roles import Privilege
from server.answers import Answer, Result
from server.errors import ApiError
from server.routing import Call, Endpoint
from server.schema import BOOL, STORE, UPID, Array, Integer, Parameter, Text, optional
from server.tasks import UNKNOWN, TaskInfo

_P = Privilege
_NODE: Final = {"node": Parameter(Text(shortest=1, longest=64))}
_STATUS: Final = Text(choices=("ok", "warning", "error", "unknown"))
_TASK: Final = {**_NODE, "upid": Parameter(UPID)}


def _may_see(call: Call, upid: Upid) -> bool:
    """Own tasks, those of own tokens, and of the same user's other tokens for what is no session (spec 6.10)."""
    owner, caller = upid.auth_id, call.caller
    if caller.owns(owner):
        return True
    if call.state.privileges(caller, ("system", "tasks")) & _P.SYS_AUDIT:
        return True
    store = upid.id.partition(":")[0]
    needed = {
        "garbage_collection": _P.DATASTORE_MODIFY,
        "verify": _P.DATASTORE_VERIFY,
        "verify_group": _P.DATASTORE_VERIFY,
        "verify_snapshot": _P.DATASTORE_VERIFY,
        "prune": _P.DATASTORE_MODIFY,
    }.get(upid.kind)
    return needed is not None and bool(call.state.on(caller, store) & needed)


async def tasks(call: Call) -> object:
    """`GET /nodes/{node}/tasks`."""
    start, limit = call["start"], call["limit"]
    everybody = bool(call.state.privileges(call.caller, ("system", "tasks")) & _P.SYS_AUDIT)
    found: list[dict[str, Any]] = []
    total = 0
    for info in call.state.tasks.infos():
        if not (everybody or call.caller.owns(info.upid.auth_id)) or not _matches(call, info):
            continue
        total += 1
        if total > start and (not limit or len(found) < limit):
            found.append(_entry(info))
        if limit and total > start + limit:
            break
    return Result(found, {"total": total})


def _matches(call: Call, info: TaskInfo) -> bool:
    upid = info.upid
    if info.end is not None:
        if call["running"]:
            return False
        if call["errors"] and info.status == "OK":
            return False
        if call["statusfilter"] and _kind(info.status) not in call["statusfilter"]:
            return False
    elif call["statusfilter"]:
        return False
    return (
        (call["store"] is None or upid.id.partition(":")[0] == call["store"])
        and (call["userfilter"] is None or call["userfilter"] in upid.auth_id)
        and (call["typefilter"] is None or call["typefilter"] in upid.kind)
        and (call["since"] is None or upid.start >= call["since"])
        and (call["until"] is None or upid.start <= call["until"])
    )


def _kind(status: str | None) -> str:
    if status == "OK":
        return "ok"
    if status == UNKNOWN:
        return "unknown"
    return "warning" if (status or "").startswith("WARNINGS: ") else "error"


def _entry(info: TaskInfo) -> dict[str, Any]:
    upid = info.upid
    entry: dict[str, Any] = {
        "upid": str(upid),
        "node": "localhost",
        "pid": upid.pid,
        "pstart": upid.pstart,
        "starttime": upid.start,
        "worker_type": upid.kind,
        "worker_id": upid.id or None,
        "user": upid.auth_id,
    }
    if info.end is not None:
        entry |= {"endtime": info.end, "status": info.status}
    return entry


def _upid(call: Call) -> Upid:
    try:
        return Upid.parse(call["upid"])
    except FormatError:
        raise ApiError("parameter verification failed - 'upid': value does not match the regex pattern") from None


async def status(call: Call) -> object:
    """`GET /nodes/{node}/tasks/{upid}/status`."""
    upid = _upid(call)
    if not _may_see(call, upid):
        raise ApiError("task access not allowed")
    info = call.state.tasks.info(call["upid"])
    user = AuthId(*upid.auth_id.split("!")[:2])
    document: dict[str, Any] = {
        "upid": call["upid"],
        "node": upid.node,
        "pid": upid.pid,
        "pstart": upid.pstart,
        "starttime": upid.start,
        "type": upid.kind,
        "id": upid.id or None,
        "user": user.user,
        "status": "running" if info is not None and info.end is None else "stopped",
    }
    if user.token is not None:
        document["tokenid"] = user.token
    if info is None or info.end is not None:
        document["exitstatus"] = UNKNOWN if info is None else info.status
    return document


async def log(call: Call) -> object:
    """`GET /nodes/{node}/tasks/{upid}/log`."""
    upid = _upid(call)
    if not _may_see(call, upid):
        raise ApiError("task access not allowed")
    start, limit = call["start"], call["limit"]
    # Whether it runs is asked first: what is written later than the answer says is read by the next call.
    active = call.state.tasks.get(call["upid"]) is not None
    lines = await in_io_thread(call.state.tasks.files.read_log, call["upid"])
    if call["download"]:
        if start is not None or limit is not None or call["test-status"] is not None:
            raise ApiError("Parameter 'download' cannot be used with other parameters")
        data = "".join(f"{line}\n" for line in lines).encode()
        return Answer(content_type="text/plain", parts=[data])
    first = max(0, (start or 0) - 1) if start else 0
    count = 50 if limit is None else limit
    shown = lines[first : first + count] if count else lines[first:]
    attributes: dict[str, Any] = {"total": len(lines), "success": 1}
    if call["test-status"]:
        attributes["active"] = active
    return Result([{"n": first + number, "t": text} for number, text in enumerate(shown, 1)], attributes)


async def stop(call: Call) -> None:
    """`DELETE /nodes/{node}/tasks/{upid}`."""
    upid = _upid(call)
    may = call.caller.owns(upid.auth_id) or call.state.privileges(call.caller, ("system", "tasks")) & _P.SYS_MODIFY
    if not may:
        raise ApiError("missing permissions 'Sys.Modify' on '/system/tasks'")
    task = call.state.tasks.get(call["upid"])
    if task is not None:
        task.stop()


_BASE: Final = "/nodes/{node}/tasks"
ENDPOINTS: Final = (
    Endpoint(
        "GET",
        _BASE,
        tasks,
        {
            **_NODE,
            "start": optional(Integer(0), 0),
            "limit": optional(Integer(0), 50),
            "running": optional(BOOL, False),
            "errors": optional(BOOL, False),
            "store": optional(STORE),
            "userfilter": optional(Text(longest=64)),
            "typefilter": optional(Text(longest=64)),
            "statusfilter": optional(Array(_STATUS)),
            "since": optional(Integer()),
            "until": optional(Integer()),
        },
    ),
    Endpoint("GET", f"{_BASE}/{{upid}}/status", status, _TASK),
    Endpoint(
        "GET",
        f"{_BASE}/{{upid}}/log",
        log,
        {
            **_TASK,
            "start": optional(Integer(0)),
            "limit": optional(Integer(0)),
            "test-status": optional(BOOL),
            "download": optional(BOOL, False),
        },
    ),
    Endpoint("DELETE", f"{_BASE}/{{upid}}", stop, _TASK),
)
