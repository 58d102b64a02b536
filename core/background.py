"""A process of its own for work that goes on after the command has returned: a mount, a disk that is held ready.

`start` forks, and returns when the new process says that it is ready, with what it has to tell; what goes wrong before
that is raised in the caller. The new process has a session of its own, no terminal and no descriptor of the
caller's; its folder is the caller's until it is ready.
"""

import json
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from core.errors import FleeceError, UsageError, os_reason

_LOG = logging.getLogger(__name__)

#: Called once by the work when it is ready, with a JSON value for the caller.
Ready = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Background:
    """How a process in the background is called in messages, and where its log goes."""

    what: str  #: what cannot be done if it fails: `mount`
    where: str  #: on which thing
    name: str  #: in log lines: `fleece mount`
    fault: type[FleeceError]  #: the class of its errors, for the caller
    log: Path | None = None  #: None: the system log, where there is one


def start(work: Callable[[Ready], None], background: Background) -> tuple[int, Any]:
    """Run `work(ready)` in a new process; returns its id and what it gave to `ready`, as soon as it calls that.

    To be called outside of trio and without other threads. Interrupted, it ends what it has begun.

    Raises:
        FleeceError: it ended before; of class `background.fault`, or a UsageError if it was one.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None if the caller closed it
        stream.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run_and_exit(work, writing, background)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        # Interrupted: nobody is to find later what he gave up.
        os.kill(child, signal.SIGTERM)
        raise
    try:
        kind, value = json.loads(answer)
    except ValueError:
        kind, value = "killed", None
    if kind == "ready":
        return child, value
    os.waitpid(child, 0)
    if kind == "killed":
        raise background.fault(background.what, background.where, "the serving process was killed")
    raise (UsageError if kind == "usage" else background.fault)(*value)


def end(child: int) -> None:
    """End the process `child` that `start` returned, and wait until it is gone."""
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)


def run_and_exit(work: Callable[[Ready], None], pipe: int, background: Background) -> NoReturn:
    """The life of the new process; it tells the caller through `pipe` how it went."""
    code = 1
    told = False

    def tell(kind: str, value: Any) -> None:
        nonlocal told
        if not told:
            told = True
            try:
                _write_all(pipe, json.dumps([kind, value]).encode())
            except BrokenPipeError:
                if kind == "ready":
                    # Nobody is to find later what he gave up.
                    raise _failed(background, "the command was killed before it was usable") from None
            finally:
                os.close(pipe)

    def ready(value: Any) -> None:
        os.chdir("/")  # not before: until then what the caller has named may be looked up from its folder
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        tell("ready", value)

    try:
        os.setsid()
        # Whoever waits for the end of a pipe that the caller inherited must not wait for this process.
        os.closerange(3, pipe)
        os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))
        _log_to(background)
        work(ready)
        code = 0
        _tell_error(tell, _failed(background, "it ended before it was usable"))
    except FleeceError as error:
        if told:
            _LOG.error("%s", error)
        _tell_error(tell, error)
    except BaseException as error:
        if told:
            _LOG.exception("it ended")
        _tell_error(tell, _failed(background, f"{type(error).__name__}: {error}"))
    finally:
        logging.shutdown()
        # Nothing of the parent's stack (its finally blocks, its exit handlers) may run a second time.
        os._exit(code)


def _failed(background: Background, why: str) -> FleeceError:
    return background.fault(background.what, background.where, why)


def _tell_error(tell: Callable[[str, Any], None], error: FleeceError) -> None:
    notes = getattr(error, "__notes__", [])
    hint = "; ".join(filter(None, [error.hint, *notes]))
    tell("usage" if isinstance(error, UsageError) else "error", [error.what, error.where, error.why, hint])


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _log_to(background: Background) -> None:
    """Send log lines to a file, else to the system log, else nowhere."""
    handler: logging.Handler
    if background.log is not None:
        try:
            handler = logging.FileHandler(background.log)
        except OSError as error:
            raise background.fault("write the log", str(background.log), os_reason(error)) from error
        handler.setFormatter(logging.Formatter(f"%(asctime)s {background.name}[%(process)d]: %(message)s"))
    else:
        handler = logging.NullHandler()
        if Path("/dev/log").is_socket():
            handler = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter(f"{background.name}[%(process)d]: %(message)s"))
    # A log that cannot be written must not end the work, and there is nobody to tell.
    logging.raiseExceptions = False
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
