"""The process that reads images, as the one that asks has it: started, told, ended.

It is started with few imports and before there is an event loop, so that it gets ready while the command does.
"""

import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import trio


class Worker:
    """A process that runs; whoever made it stops it, or hands it to `client.look_into`."""

    def __init__(self) -> None:
        self._end, theirs = socket.socketpair()
        self._stream: trio.SocketStream | None = None
        self.told = False  #: it knows which disks there are
        with theirs:
            try:
                self.process: Final[subprocess.Popen[bytes]] = subprocess.Popen(
                    [sys.executable, "-IB", "-m", "diskfs.worker"],
                    stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                    env={"LC_ALL": "C.UTF-8"},
                )  # fmt: skip
            except BaseException:
                self._end.close()
                raise

    @property
    def stream(self) -> "trio.SocketStream":
        """The connection to it, within an event loop."""
        import trio

        if self._stream is None:
            self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._end))
        return self._stream

    def stop(self) -> int:
        """End it now, if it has not ended; returns its exit code, or the signal as a negative number."""
        self.process.kill()
        code = self.process.wait()  # it waits for nothing that it could not be killed in
        if self._stream is not None:
            self._stream.socket.close()
        else:
            self._end.close()
        return code

    def why_ended(self) -> str:
        """For people: why it ended before it answered."""
        code = self.stop()
        if code == -signal.SIGVTALRM:
            return "it takes too much of a processor; it may be damaged"
        return f"the process that reads it ended ({code}); it may be damaged"
