"""Tasks of a server, followed to their end: log lines as they come, stopped when we are."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

import trio

from core.errors import FleeceError, FormatError
from datastore.upid import Upid
from repository.remote.connection import RemoteServer
from repository.remote.errors import RemoteAnswerError, RemoteError, RemoteUnavailableError

#: Lines that are asked for at once, and seconds between questions: as the reference client.
_LINES: Final = 500
_PAUSE_S: Final = 1.0
#: Seconds for telling the server to stop a task.
_STOP_TIMEOUT_S: Final = 30.0
#: Characters of a line that are kept.
_MAX_LINE: Final = 2000
_STAMP: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}[^ ]{1,6}: ")


def parse_upid(data: Any, what: str, where: str) -> str:
    """The UPID that a server answers with.

    Raises:
        RemoteAnswerError: it is none.
    """
    try:
        return str(Upid.parse(data)) if isinstance(data, str) and len(data) < 1000 else _refuse(what, where)
    except FormatError:
        return _refuse(what, where)


def _refuse(what: str, where: str) -> str:
    raise RemoteAnswerError(what, where, "the server does not say which task does it")


async def follow(server: RemoteServer, upid: str, line: Callable[[str], None], *, what: str, where: str) -> str:
    """Wait for the end of a task; return its exit status: `OK`, `WARNINGS: <n>`, or why it failed.

    Cancelled or failed, the server is asked to stop the task.

    Args:
        server: whose task it is.
        upid: the task.
        line: told of every line of its log, without the time.
        what: for messages.
        where: for messages.

    Raises:
        RemoteUnavailableError: the server does not answer for some time; the task may be running.
        RemoteAnswerError: its answers make no sense.
    """
    path = f"//nodes/localhost/tasks/{quote(upid, safe='')}"
    try:
        await _read_log(server, path, line, what, where)
    except RemoteUnavailableError:
        raise  # it cannot be told anything either
    except BaseException:
        with trio.move_on_after(_STOP_TIMEOUT_S, shield=True):
            with suppress(RemoteError):  # what is raised already matters more
                await server.call("DELETE", path, what="stop the task of", where=where)
        raise
    status = await server.call("GET", f"{path}/status", what=what, where=where)
    exit_status = status.get("exitstatus") if isinstance(status, dict) else None
    if not isinstance(exit_status, str):
        raise RemoteAnswerError(what, where, "the server does not say how the task ended")
    return exit_status[:_MAX_LINE]


async def _read_log(server: RemoteServer, path: str, line: Callable[[str], None], what: str, where: str) -> None:
    start, tries = 0, 0
    while True:
        try:
            document = await server.rest.document(
                "GET",
                f"{path[1:]}/log",
                {"start": start, "limit": _LINES, "test-status": True},
                what=what,
                credentials=server.credentials,
                where=where,
            )
        except RemoteUnavailableError:
            # The task goes on; a server may be started anew, or the network be away for a moment.
            tries += 1
            if tries > 5:
                raise
            await trio.sleep(5)
            continue
        tries = 0
        lines = document.get("data")
        if not isinstance(lines, list) or len(lines) > _LINES:
            raise RemoteAnswerError(what, where, "the log of the task is no list of lines")
        fresh = 0
        for entry in lines:
            number, text = (entry.get("n"), entry.get("t")) if isinstance(entry, dict) else (None, None)
            if not isinstance(number, int) or not isinstance(text, str):
                raise RemoteAnswerError(what, where, "the log of the task has a line that is none")
            # `start` is the last line that is known: some servers count from 0, others from 1.
            if number > start:
                start, fresh = number, fresh + 1
                line(_STAMP.sub("", _printable(text), count=1))
        if not fresh or len(lines) < _LINES:
            if document.get("active") is not True:
                return
            await trio.sleep(_PAUSE_S)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_LINE])


def check_status(status: str, *, what: str, where: str) -> None:
    """Raise unless the exit status of a task means success or warnings.

    Raises:
        FleeceError: it failed.
    """
    if status != "OK" and not status.startswith("WARNINGS"):
        raise FleeceError(what, where, f"the server's task failed: {_printable(status)}")
