"""Tasks: list, status, log, stop (spec 6.10)."""

from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Final

from core.buffers import Buffer
from core.errors import FormatError
from core.limits import in_io_thread
from datastore.names import Namespace
from datastore.upid import Upid
from server.access.auth_ids import AuthId
from server.access.roles import Privilege
from server.answers import Answer, Result, as_json
from server.errors import ApiError
from server.routing import Call, Endpoint
from server.schema import BOOL, STORE, UPID, Array, Integer, Parameter, Text, optional
from server.state import namespace
from server.store_files import file_answer
from server.tasks import UNKNOWN, TaskFiles, TaskInfo

_P = Privilege
#: Lines of a log in memory at a time.
_LINES: Final = 5000
#: The one label of JSON without a character set.
_LOG_TYPE: Final = "application/json"
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
    needed = {
        "garbage_collection": _P.DATASTORE_MODIFY,
        "verify": _P.DATASTORE_VERIFY,
        "verify_group": _P.DATASTORE_VERIFY,
        "verify_snapshot": _P.DATASTORE_VERIFY,
        "prune": _P.DATASTORE_MODIFY,
    }.get(upid.kind)
    if needed is None:
        return False
    store, ns = _where(upid)
    return bool(call.state.on(caller, store, ns) & needed)


def _where(upid: Upid) -> tuple[str, Namespace]:
    """The store and the namespace that a task works on."""
    store, _, rest = upid.id.partition(":")
    if upid.kind == "prune":
        return store, namespace(rest.partition(":")[0])
    parts = rest.split("/")
    count = 0
    while parts[2 * count : 2 * count + 1] == ["ns"]:
        count += 1
    return store, namespace("/".join(parts[1 : 2 * count : 2]))


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
    files = call.state.tasks.files
    if call["download"]:
        if start is not None or limit is not None or call["test-status"] is not None:
            raise ApiError("Parameter 'download' cannot be used with other parameters")
        missing = ApiError("unable to open the log - No such file or directory (os error 2)")
        return replace(await file_answer(files.log_path(call["upid"]), missing), content_type="text/plain")
    first = max(0, (start or 0) - 1)
    count = 50 if limit is None else limit
    attributes: dict[str, Any] = {"success": 1, **({"active": active} if call["test-status"] else {})}
    if not 0 < count <= _LINES:
        stream = _streamed(files, call["upid"], first, count or None, attributes)
        return Answer(content_type=_LOG_TYPE, stream=stream)
    shown, total = await in_io_thread(files.log_lines, call["upid"], first, count)
    data = [{"n": first + number, "t": text} for number, text in enumerate(shown, 1)]
    document = {"data": data, "total": total, **attributes}
    return Answer(content_type=_LOG_TYPE, parts=[as_json(document)])


async def _streamed(
    files: TaskFiles, upid: str, first: int, count: int | None, attributes: Mapping[str, Any]
) -> AsyncGenerator[Buffer, None]:
    """The same document for any number of lines, of which few are in memory."""
    yield b'{"data":['
    total = 0

    def counted(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
        nonlocal total
        for line in lines:
            total += 1
            yield total, line

    try:
        file = await in_io_thread(files.open_log, upid)
    except OSError:
        file = None
    if file is not None:
        with file:
            lines = counted(file)
            shown = islice(lines, first, None if count is None else first + count)
            separator = b""
            while batch := await in_io_thread(lambda: list(islice(shown, _LINES))):
                entries = [{"n": number, "t": line.removesuffix("\n")} for number, line in batch]
                yield separator + as_json(entries)[1:-1]
                separator = b","
            await in_io_thread(lambda: deque(lines, maxlen=0))
    yield b"]," + as_json({"total": total, **attributes})[1:]


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
