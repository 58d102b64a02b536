"""The process that reads one disk image: `python -IB -m diskfs.worker`, started by `client.py`.

The libraries that know file systems were not made for images that want to do harm: a chain that leads to itself keeps
them busy for ever, a length makes them ask for all memory. Here that costs a request, at worst this process:

- a request has `CPU_S` seconds of processor and `MAX_FETCHED` bytes of disks; the kernel ends what overruns by far,
- the process has `MAX_MEMORY` bytes of address space,
- it gets bytes of disks from its parent alone: it can open no file but modules of Python, no connection, no program,
- it ends with its parent, whose socket is its standard input.
"""

import contextlib
import os
import resource
import signal
import socket
import sys
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

from diskfs.entries import MAX_NAME, Entry, Id, Run, bytes_of, entry_to_json, text_of
from diskfs.errors import DiskFsError, ImageLibraryError
from diskfs.filesystem import MAX_ENTRIES, FileSystem
from diskfs.frames import HEADER, PAGE_CONTENT, PAGE_ENTRIES, PAGE_RUNS, lengths, pack
from diskfs.image import DiskImage, reason

#: Seconds of processor for one request: listing a directory of a million entries takes five.
CPU_S: Final = 20.0
#: Bytes of disks for one request.
MAX_FETCHED: Final = 2 << 30
#: Bytes of address space: Python with a library has 50 MiB, a directory of two million entries takes 500.
MAX_MEMORY: Final = 1 << 30
#: Names of all directories that are remembered.
_MAX_REMEMBERED: Final = 1_000_000
_BAD_NAMES: Final = frozenset({b"", b".", b".."})
_MODULES: Final = (".py", ".pyc", ".so")
_FORBIDDEN: Final = (
    "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "socket.connect",
    "socket.bind", "socket.sendto", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
    "os.truncate", "os.chmod", "os.chown", "shutil.", "tempfile.", "urllib.", "ftplib.", "smtplib.",
)  # fmt: skip


class Exhausted(BaseException):
    """A request asks for too much. No library may take it for an error of its own."""


class Failed(Exception):  # noqa: N818 - nothing that anybody here can do anything about
    """The parent could not read a part of a disk; it knows why."""


class Listing:
    """A directory's names, sorted, without those that no directory has or that come twice."""

    def __init__(self, system: FileSystem, id: Id) -> None:
        self.dropped = 0
        found: dict[bytes, Id] = {}
        for count, (name, below) in enumerate(system.names(id)):
            if count >= MAX_ENTRIES:
                raise DiskFsError("list", "directory", f"more than {MAX_ENTRIES} entries")
            if name in (b".", b".."):
                continue
            if name in _BAD_NAMES or b"/" in name or b"\0" in name or len(name) > MAX_NAME or name in found:
                self.dropped += 1
            else:
                found[name] = below
        self.names: Final = sorted(found)
        self.ids: Final = [found[name] for name in self.names]

    def find(self, name: bytes) -> Id | None:
        """What is called `name`."""
        slot = bisect_left(self.names, name)
        return self.ids[slot] if slot < len(self.names) and self.names[slot] == name else None


class Server:
    """Answers the requests of one parent."""

    def __init__(self, channel: "Channel", sizes: Sequence[int], number: int) -> None:
        self._channel, self._sizes, self._number = channel, sizes, number
        self._fetched = 0
        self._has_failed = False
        self._forget()

    def _forget(self) -> None:
        """Know nothing of the image any more."""
        self._image = DiskImage(self._sizes, self._number, self._fetch)
        self._listings: OrderedDict[tuple[bytes, Id], Listing] = OrderedDict()
        self._last_runs: tuple[bytes, Id, list[Run] | None] = (b"", (0, 0), None)
        self._has_failed = False

    def _fetch(self, disk: int, offset: int, length: int) -> bytes:
        self._fetched += length
        if self._fetched > MAX_FETCHED:
            raise Exhausted(f"it asks for more than {MAX_FETCHED >> 30} GiB of the disk")
        self._channel.send({"op": "fetch", "disk": disk, "offset": offset, "length": length})
        answer = self._channel.receive()
        if answer is None:
            raise SystemExit
        document, data = answer
        if document.get("failed") or len(data) != length:
            self._has_failed = True
            raise Failed("the disk cannot be read there")
        return data

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The answer to `request`: a document and content."""
        self._fetched = 0
        try:
            # If one long call into C keeps the first signal from being heard, the second one, which nothing catches,
            # ends the process. (A limit on its time in all would not do: the kernel counts that by ticks, which after a
            # while differs by more than this from the time that it says was used.)
            signal.setitimer(signal.ITIMER_VIRTUAL, 3 * CPU_S)
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
            try:
                return self._answered(request)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except Exhausted as error:
            self._forget()
            return {"error": "disk", "why": f"{error}; it may be damaged"}, b""
        except MemoryError:
            self._forget()
            return {"error": "memory", "why": f"it takes more than {MAX_MEMORY >> 20} MiB of memory"}, b""
        except ImageLibraryError as error:
            return {"error": "library", "why": error.why, "where": error.where}, b""
        except DiskFsError as error:
            return {"error": "disk", "why": error.why}, b""
        except EOFError:
            return {"error": "disk", "why": "it is damaged: it is cut off"}, b""
        except RecursionError:
            return {"error": "disk", "why": "it is damaged: it leads to itself"}, b""
        except Exception as error:
            return {"error": "disk", "why": f"it is damaged: {reason(error)}"}, b""
        except BaseException as error:
            # What a library in Rust makes of an index that is too large is no `Exception`.
            if type(error).__name__ != "PanicException":
                raise
            return {"error": "disk", "why": f"it is damaged: {reason(error)}"}, b""
        finally:
            if self._has_failed:
                self._forget()

    def _answered(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if request["op"] == "volumes":
            volumes = [[text_of(one.name), *one[1:]] for one in self._image.volumes()]
            return {"volumes": volumes, "remarks": [list(one) for one in self._image.remarks()]}, b""
        name = bytes_of(request["volume"])
        system = self._image.file_system(name)
        id = (int(request["id"][0]), int(request["id"][1])) if "id" in request else system.root
        match request["op"]:
            case "entry":
                document: dict[str, Any] = {"entry": entry_to_json(_sound(system.entry(id)))}
                if "id" not in request:
                    document["notes"] = list(system.notes)
                return document, b""
            case "lookup":
                found = self._listing(name, system, id).find(bytes_of(request["name"]))
                return {"entry": None if found is None else entry_to_json(_sound(system.entry(found)))}, b""
            case "list":
                return self._page(system, self._listing(name, system, id), int(request["start"])), b""
            case "runs":
                start = int(request["start"])
                runs = self._runs(name, system, id, again=start > 0)
                if runs is None:
                    return {"runs": None}, b""
                return {"runs": runs[start : start + PAGE_RUNS], "more": len(runs) > start + PAGE_RUNS}, b""
            case "read":
                return {}, system.read(id, int(request["offset"]), min(int(request["length"]), PAGE_CONTENT))
            case "xattrs":
                return {"xattrs": [[text_of(key), text_of(value)] for key, value in system.xattrs(id)]}, b""
        raise DiskFsError("answer", str(request["op"])[:40], "nobody knows what that is")

    def _runs(self, volume: bytes, system: FileSystem, id: Id, *, again: bool) -> list[Run] | None:
        """The runs of a file; `again`: a further page of them, so that they need not be put together once more."""
        if not again or self._last_runs[:2] != (volume, id):
            self._last_runs = volume, id, system.runs(id)
        return self._last_runs[2]

    def _listing(self, volume: bytes, system: FileSystem, id: Id) -> Listing:
        key = volume, id
        listing = self._listings.get(key)
        if listing is None:
            listing = self._listings[key] = Listing(system, id)
            total = sum(len(one.names) for one in self._listings.values())
            while total > _MAX_REMEMBERED and len(self._listings) > 1:
                total -= len(self._listings.popitem(last=False)[1].names)
        self._listings.move_to_end(key)
        return listing

    def _page(self, system: FileSystem, listing: Listing, start: int) -> dict[str, Any]:
        rows: list[Any] = []
        stop = min(start + PAGE_ENTRIES, len(listing.names))
        for name, id in zip(listing.names[start:stop], listing.ids[start:stop], strict=True):
            try:
                rows.append([text_of(name), entry_to_json(_sound(system.entry(id)))])
            except (MemoryError, Failed):
                raise
            except Exception as error:
                rows.append([text_of(name), reason(error)])
        return {"rows": rows, "more": stop < len(listing.names), "dropped": listing.dropped}


def _sound(entry: Entry) -> Entry:
    """`entry`, if a symlink leads anywhere.

    Raises:
        DiskFsError: it does not.
    """
    if entry.target is None:
        return entry
    target = entry.target.partition(b"\0")[0]
    if not target:
        raise DiskFsError("read", "symlink", "it leads nowhere")
    return entry._replace(target=target, size=len(target))


class Channel:
    """Frames over a socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, document: Any, data: bytes = b"") -> None:
        """Send a frame."""
        for piece in pack(document, data):
            self._end.sendall(piece)

    def receive(self) -> tuple[dict[str, Any], bytes] | None:
        """The next frame; None at the end."""
        import json

        header = self._exactly(HEADER.size)
        if header is None:
            return None
        length, size = lengths(header)
        text, data = self._exactly(length), self._exactly(size)
        if text is None or data is None:
            return None
        return json.loads(text), data

    def _exactly(self, length: int) -> bytes | None:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self._end.recv_into(view)
            if not count:
                return None
            view = view[count:]
        return bytes(buffer)


def confine() -> None:
    """Let this process do nothing but calculate and talk to its parent."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - pathlib costs 5 ms
    found = {place for place in (sys.prefix, sys.base_prefix, own, *sys.path) if place}
    places = tuple({f"{place}{os.sep}" for place in found | {os.path.realpath(place) for place in found}})

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            is_module = isinstance(path, str) and path.endswith(_MODULES) and path.startswith(places)
            if not is_module or flags & os.O_ACCMODE != os.O_RDONLY:
                raise PermissionError("the process that reads disk images opens no files")
        elif event.startswith(_FORBIDDEN) or (event == "ctypes.dlopen" and arguments[0] is not None):
            raise PermissionError(f"the process that reads disk images may not do this: {event}")

    sys.addaudithook(audit)


def overrun(number: int, frame: object) -> None:
    """The timer of a request went off."""
    raise Exhausted(f"it takes more than {CPU_S:.0f} s of a processor")


def main() -> int:
    """Answer until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to parent and child; the parent decides
    signal.signal(signal.SIGPROF, overrun)
    channel = Channel(socket.socket(fileno=0))
    confine()
    with contextlib.suppress(ImportError, PermissionError):
        import diskfs.ext  # noqa: F401 - most guests have one, and who asks is not ready yet
    try:
        beginning = channel.receive()
        if beginning is None:
            return 0
        server = Server(channel, [int(size) for size in beginning[0]["sizes"]], int(beginning[0]["number"]))
        while (request := channel.receive()) is not None:
            document, data = server.answer(request[0])
            channel.send(document, data)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
