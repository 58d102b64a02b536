"""`fleece task`: what this host's server does and did."""

import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from core.errors import NotFoundError

if TYPE_CHECKING:
    from server.tasks import TaskFiles, TaskInfo

UpidArgument = Annotated[str, typer.Argument(metavar="UPID", help="As 'fleece task list' shows it.")]
#: Seconds between two looks into the log of a running task.
_POLL_S = 0.5


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(no_args_is_help=True, help="Tasks of this host's server.", rich_markup_mode=None)
    application.add_typer(group, name="task")
    command(
        group,
        "list",
        repository=False,
        examples="""
fleece task list
fleece task list --running
fleece task list --limit 0 --output json | jq '.[] | select(.status != "OK")'
""",
    )(list_tasks)
    command(group, "log", repository=False, examples="fleece task log UPID:...\nfleece task log UPID:... --follow")(log)
    command(group, "stop", repository=False, examples="fleece task stop UPID:...")(stop)


def _files() -> "TaskFiles":
    from agent.serving import server_folder
    from server.tasks import TaskFiles

    return TaskFiles(server_folder() / "tasks")


def _info(files: "TaskFiles", upid: str) -> "TaskInfo":
    info = files.listed().get(upid)
    if info is None:
        raise NotFoundError("find the task", repr(upid), "the server knows none of that name", "see 'fleece task list'")
    return info


def list_tasks(
    invocation: Invocation,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=0, help="The newest N; 0: all.")] = 50,
    running: Annotated[bool, typer.Option("--running", help="Only those that run.")] = False,
) -> None:
    """List the tasks, the newest first."""
    tasks = [one for one in reversed(_files().listed().values()) if not running or one.status is None]
    tasks = tasks[:limit] if limit else tasks
    document = [_entry(one) for one in tasks]

    def lines() -> list[str]:
        return [
            f"{datetime.fromtimestamp(one.upid.start):%Y-%m-%d %H:%M:%S}  {one.status or 'running':<12.60}  {one.upid}"
            for one in tasks
        ]

    invocation.emit(document, lines)


def _entry(info: "TaskInfo") -> dict[str, Any]:
    return {
        "upid": str(info.upid),
        "starttime": info.upid.start,
        "endtime": info.end,
        "worker_type": info.upid.kind,
        "worker_id": info.upid.id,
        "user": info.upid.auth_id,
        "status": info.status,
    }


def log(
    invocation: Invocation,
    upid: UpidArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task has ended.")] = False,
) -> None:
    """Show the log of a task."""
    files = _files()
    info = _info(files, upid)

    def lines() -> Iterator[str]:
        shown, over = 0, info.status is not None
        while True:
            found, shown = files.log_lines(upid, shown)
            yield from found
            if over or not follow:
                return
            time.sleep(_POLL_S)
            over = _info(files, upid).status is not None

    invocation.emit({**_entry(info), "log": files.log_lines(upid)[0]}, lines)


def stop(invocation: Invocation, upid: UpidArgument) -> None:
    """Ask the server to end a task; a backup that is stopped leaves nothing behind."""
    files = _files()
    info = _info(files, upid)
    runs = info.status is None
    if runs:
        files.ask_to_stop(upid)
    words = "The server will stop it within a second or so." if runs else "It had ended already."
    invocation.emit({"upid": upid, "asked": runs}, lambda: words)
