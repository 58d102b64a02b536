"""Results of any length on standard output: lines as they are found, or one JSON array at the end.

Names come out of archives, so whoever made the files chose their bytes: nothing of them reaches a terminal that it
would act on, and in JSON none of them is lost.
"""

import base64
import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio

from agent.errors import InterruptedBySignalError
from core.errors import TargetError, os_reason

if TYPE_CHECKING:
    from agent.invocation import Invocation

T = TypeVar("T")

#: Characters of text that are gathered before they are written.
_BATCH: Final = 32 << 10
#: Bytes of JSON that are kept in memory; more lie in a file without a name until the end.
_IN_MEMORY: Final = 32 << 20
#: Milliseconds after which one who waits for the reader of a pipe looks whether he shall stop.
_WAIT_MS: Final = 200


def put(document: dict[str, Any], key: str, raw: bytes) -> None:
    """Add `raw` to `document` as text; if it is not UTF-8, also as `key` with `-base64`, which then is exact."""
    try:
        document[key] = raw.decode()
    except UnicodeDecodeError:
        document[key] = raw.decode("utf-8", "replace")
        document[f"{key}-base64"] = base64.b64encode(raw).decode()


@lru_cache(maxsize=4096)
def time_text(seconds: int) -> str:
    """A time for people, in this host's time zone; as `@seconds` where no calendar reaches."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"@{seconds}"


class Listing(Generic[T]):
    """Where found things go; made by `listing`."""

    def __init__(
        self, line: Callable[[T], str], document: Callable[[T], Any], *, as_json: bool = False, pretty: bool = False
    ) -> None:
        self.count = 0  #: things so far
        self._line, self._document, self._as_json, self._pretty = line, document, as_json, pretty
        self._parts: list[str] = []
        self._length = 0
        self._spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by `close`

    def add(self, thing: T) -> None:
        """Write `thing`; called by one thread at a time, and best by one that `trio.to_thread` started.

        Raises:
            BrokenPipeError: nobody reads any more.
            TargetError: it cannot be written, or for JSON not be kept.
        """
        text = self._json(thing) if self._as_json else f"{self._line(thing)}\n"
        self.count += 1
        self._parts.append(text)
        self._length += len(text)
        if self._length >= _BATCH:
            self._drain()

    def _json(self, thing: T) -> str:
        document = self._document(thing)
        text = json.dumps(document, ensure_ascii=False)
        # JSON leaves DEL, the second set of control characters and marks that turn the direction of text as they are.
        ascii_only = not text.isprintable()
        if self._pretty:
            text = "\n  " + json.dumps(document, ensure_ascii=ascii_only, indent=2).replace("\n", "\n  ")
        elif ascii_only:
            text = json.dumps(document)
        return f",{text}" if self._pretty else f", {text}"

    def _drain(self) -> None:
        _check()
        data = "".join(self._parts).encode()
        self._parts.clear()
        self._length = 0
        if not self._as_json:
            _write(data)
            return
        try:
            self._spool.write(data)
        except OSError as error:
            raise TargetError("keep the results in", tempfile.gettempdir(), os_reason(error)) from error

    def finish(self) -> None:
        """Write what has been gathered, and for JSON everything; in the main thread, when all is done."""
        self._drain()
        if not self._as_json:
            return
        self._spool.seek(1 if self._pretty else 2)  # behind the first comma
        _write(b"[")
        while data := self._spool.read(1 << 20):
            _write(data)
        _write(b"\n]\n" if self._pretty and self.count else b"]\n")

    def show_partial(self) -> None:
        """After an error: write the lines found before it; JSON is not written at all."""
        if not self._as_json:
            self._drain()

    def close(self) -> None:
        """Give up what lies in files."""
        self._spool.close()


@contextmanager
def listing(invocation: "Invocation", line: Callable[[T], str], document: Callable[[T], Any]) -> "Iterator[Listing[T]]":
    """Where the results of a verb go; they are written completely when the block ends without an error.

    Args:
        invocation: says what standard output is for.
        line: a thing for people, without newlines.
        document: a thing as an element of the JSON array.
    """
    from agent.general_options import Output

    pretty = invocation.output is Output.JSON_PRETTY
    found = Listing(line, document, as_json=invocation.is_json, pretty=pretty)
    try:
        try:
            yield found
        except (BrokenPipeError, InterruptedBySignalError):
            raise  # nobody reads, or somebody who reads slowly was not waited for
        except Exception:
            found.show_partial()
            raise
        found.finish()
    finally:
        found.close()


def _check() -> None:
    """Stop a thread whose work was cancelled; the main thread is stopped by signals."""
    with suppress(RuntimeError):  # not a thread of trio
        trio.from_thread.check_cancelled()


def _write(data: bytes) -> None:
    """Write to standard output; a pipe that nobody empties can be given up."""
    if sys.stdout is None:  # closed by the caller
        return
    fd = sys.stdout.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    view = memoryview(data)
    try:
        while view:
            while not poll.poll(_WAIT_MS):
                _check()
            # A pipe that can be written to takes this many bytes without blocking.
            view = view[os.write(fd, view[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TargetError("write to", "standard output", os_reason(error)) from error
