"""`fleece` in a process of its own without the half second of its imports: forked off one that has them already.

Run as a program it is the parent: for each request on its socket (standard input) it forks a child with the standard
streams, environment, folder and arguments of the request, and tells how it ended. It ends when the socket is closed.
A command that is to be killed, traced or looked at from outside is better started as the program itself.
"""

import array
import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

from tests.support.cache import ROOT

#: Bytes of one request: arguments and environment.
_MAX_REQUEST: Final = 1 << 20
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WarmCommand:
    """The parent of commands, started with the first one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, stdin: bytes = b"", timeout_s: float
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run `fleece arguments` to its end; it is killed if it takes longer than `timeout_s`.

        Raises:
            subprocess.TimeoutExpired: it did, or something that it started holds its standard output or error.
        """
        return self.start(arguments, environment, stdin=stdin).wait(timeout_s)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, stdin: bytes = b""
    ) -> "StartedCommand":
        """Start `fleece arguments`; the caller waits for its end."""
        request = {"arguments": list(arguments), "environment": dict(environment), "folder": os.getcwd()}  # noqa: PTH109
        ours, theirs = zip(*(_pipe(write=number == 0) for number in range(4)), strict=True)
        try:
            self._ask(json.dumps(request).encode(), theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        return StartedCommand(["fleece", *arguments], ours, stdin)

    def close(self) -> None:
        """End the parent; commands that still run go on."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait(60)

    def _ask(self, request: bytes, descriptors: Sequence[int]) -> None:
        assert len(request) < _MAX_REQUEST
        with self._lock:
            if self._socket is None:
                self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                with theirs:
                    self._process = subprocess.Popen([sys.executable, "-m", __name__], stdin=theirs.fileno(), cwd=ROOT)
            head = len(request).to_bytes(4, "big")
            self._socket.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
            self._socket.sendall(request)


class StartedCommand:
    """A command whose streams are served."""

    def __init__(self, line: list[str], descriptors: Sequence[int], stdin: bytes) -> None:
        self.line: Final = line
        self._outputs: Final = [bytearray() for _ in range(3)]
        self._threads = [threading.Thread(target=_write, args=[descriptors[0], stdin], daemon=True)]
        for descriptor, output in zip(descriptors[1:], self._outputs, strict=True):
            self._threads.append(threading.Thread(target=_read, args=[descriptor, output], daemon=True))
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float) -> "subprocess.CompletedProcess[bytes]":
        """How it ended.

        Raises:
            subprocess.TimeoutExpired: not within `timeout_s`: it is killed.
        """
        out, err, told = self._outputs
        for thread in self._threads:
            thread.join(timeout_s)
            if thread.is_alive():
                self.end(signal.SIGABRT)  # PYTHONFAULTHANDLER makes it tell
                thread.join(5)
                self.end()
                raise subprocess.TimeoutExpired(self.line, timeout_s, bytes(out), bytes(err))
        _, status = told.split()
        return subprocess.CompletedProcess(self.line, os.waitstatus_to_exitcode(int(status)), bytes(out), bytes(err))

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill it, unless it has ended."""
        told = self._outputs[2]
        while b"\n" not in told and self._threads[-1].is_alive():
            time.sleep(0.005)
        words = told.split()
        if len(words) == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(words[0]), number)


def _pipe(*, write: bool) -> tuple[int, int]:
    """Our end, which writes or reads, and theirs."""
    read_end, write_end = os.pipe()
    return (write_end, read_end) if write else (read_end, write_end)


def _write(descriptor: int, data: bytes) -> None:
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
    except BrokenPipeError:
        pass  # it did not want to know


def _read(descriptor: int, into: bytearray) -> None:
    with open(descriptor, "rb", buffering=0) as file:
        while data := file.read(1 << 20):
            into += data


def main() -> None:
    """Serve requests."""
    import agent

    for module in pkgutil.iter_modules(agent.__path__):
        importlib.import_module(f"agent.{module.name}")
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who waits for a command
    asking = socket.socket(fileno=os.dup(0))
    while True:
        head, ancillary, _, _ = asking.recvmsg(4, socket.CMSG_SPACE(4 * 4), socket.MSG_WAITALL)
        if not head:
            return
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        request = json.loads(asking.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        if not os.fork():
            asking.close()
            _wait_for(request, list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)


def _wait_for(request: dict[str, Any], descriptors: list[int]) -> None:
    """Fork the command and tell how it ends; its streams are its own alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told = descriptors
    pid = os.fork()
    if not pid:
        os.close(told)
        _become(request, streams)
    for number, descriptor in enumerate(streams):
        os.close(descriptor)
        os.dup2(told, number)
    os.write(told, b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    os.write(told, b"%d" % status)
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    code = 1
    try:
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout = _text(0, "r"), _text(1, "w")
        sys.stderr = _text(2, "w", errors="backslashreplace", line_buffering=True)
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(request["environment"])
        time.tzset()
        if "PYTHONFAULTHANDLER" in os.environ:
            faulthandler.enable()
        os.chdir(request["folder"])
        sys.argv = ["fleece", *request["arguments"]]
        from agent.main import main as command

        command()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # As the interpreter does at its end.
        threading._shutdown()  # type: ignore[attr-defined]
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 120
        os._exit(code)


def _text(descriptor: int, mode: str, **options: Any) -> io.TextIOWrapper:
    file: IO[bytes] = open(descriptor, f"{mode}b", closefd=False)  # noqa: SIM115 - as long as the process
    return io.TextIOWrapper(file, **options)


if __name__ == "__main__":
    main()
