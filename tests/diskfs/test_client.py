"""The process that reads images, and what asks it."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from core.errors import FormatError
from diskfs import worker
from diskfs.client import LookedInto, look_into
from diskfs.entries import Entry
from diskfs.errors import DiskFsError
from tests.diskfs.reading import Files, memory_for_this_process
from tests.support.disk_images import MadeImage
from tests.support.waiting import until


async def entry_at(image: LookedInto, path: bytes) -> Entry:
    entry = await image.entry(b"raw")
    for name in path.split(b"/"):
        found = await image.lookup(b"raw", entry.id, name)
        assert found is not None, name
        entry = found
    return entry


async def test_a_file_is_found_listed_and_read_in_parts(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    source = files(made("ext4").path)
    async with look_into(source, 0, "vm/100/latest disk.img") as image:
        assert [volume.kind for volume in await image.volumes()] == ["ext4"]
        directory = await entry_at(image, b"many")
        names: list[bytes] = []
        more = True
        while more:
            page = await image.page(b"raw", directory.id, len(names))
            names += [row.name for row in page.rows]
            more = page.more
        assert names == sorted(b"file-with-a-long-name-%d" % n for n in range(900) if n % 3)
        assert await image.lookup(b"raw", directory.id, b"absent") is None
        sparse = await entry_at(image, b"deep/a/b/c/d/sparse")
        content = await image.content(b"raw", sparse)
        assert bytes(await content.read(0, 10)) == b"begin" + bytes(5)
        whole = bytes(await content.read(0, sparse.size + 100))
        assert len(whole) == sparse.size == 9 << 20
        assert whole[4_000_000:6_000_000] == bytes(await content.read(4_000_000, 2_000_000))
        assert content.blocks * 512 < 200_000
        assert dict(await image.xattrs(b"raw", (await entry_at(image, b"etc/tiny")).id))[b"user.a"] == b"1"


async def test_packed_content_is_unpacked_a_piece_at_a_time(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    async with look_into(files(made("btrfs-zstd").path), 0, "disk.img") as image:
        entry = await entry_at(image, b"deep/text")
        content = await image.content(b"raw", entry)
        assert content.extents() is None
        text = b"the quick brown fox " * 20_000
        assert bytes(await content.read(0, len(text))) == text
        assert bytes(await content.read(131_000, 400)) == text[131_000:131_400]
        assert content.read_cached(200_000, 20) == text[200_000:200_020]


async def test_who_is_cancelled_ends_the_process_and_the_next_question_starts_another(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    source = files(made("ext4").path)
    async with look_into(source, 0, "disk.img") as image:
        await image.volumes()
        running = image._running
        assert running is not None

        class Waiting:
            size = source.sizes[0]

            def read_cached(self, offset: int, length: int) -> None:
                return None

            async def read(self, offset: int, length: int) -> bytes:
                scope.cancel()
                await trio.sleep_forever()
                raise AssertionError

        async def waiting(number: int) -> Waiting:
            return Waiting()

        honest, source.open = source.open, waiting  # type: ignore[method-assign,assignment]
        with trio.CancelScope() as scope:
            await image.entry(b"raw")
        assert running.process.returncode == -signal.SIGKILL
        source.open = honest  # type: ignore[method-assign]
        assert (await entry_at(image, b"etc/fstab")).size == 14


async def test_a_part_of_the_disk_that_cannot_be_read_is_that_error_and_may_be_read_later(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    source = files(made("ext4").path)
    async with look_into(source, 0, "disk.img") as image:
        await image.volumes()
        source.broken = range(0, 1 << 40)
        with pytest.raises(FormatError, match="cannot read chunk: it is damaged") as caught:
            await image.entry(b"raw")
        assert not isinstance(caught.value, DiskFsError)
        source.broken = None
        assert (await image.entry(b"raw")).is_directory


async def test_a_process_that_is_killed_is_an_error_and_the_next_question_starts_another(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    async with look_into(files(made("ext4").path), 0, "disk.img") as image:
        await image.volumes()
        assert image._running is not None
        os.kill(image._running.process.pid, signal.SIGKILL)
        with pytest.raises(DiskFsError, match=r"disk\.img/raw: the process that reads it ended \(-9\)"):
            await image.entry(b"raw")
        assert (await image.entry(b"raw")).is_directory


async def test_the_process_ends_with_who_asked(made: Callable[[str], MadeImage], files: Callable[..., Files]) -> None:
    async with look_into(files(made("ext4").path), 0, "disk.img") as image:
        await image.volumes()
        assert image._running is not None
        process = image._running.process
        # As if this process had been killed: its end of the socket is closed.
        image._running.stream.socket.close()
        await until(lambda: process.poll() is not None)
        assert process.returncode == 0


def test_the_process_opens_no_file_connects_nowhere_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.py"
    secret.write_text("x = 1")
    child = os.fork()
    if not child:
        code = 1
        try:
            monkeypatch.setattr(worker, "MAX_MEMORY", memory_for_this_process())
            worker.confine()
            refused = 0
            for forbidden in (
                lambda: Path("/etc/passwd").read_text(),
                lambda: secret.read_text(),
                lambda: os.open(worker.__file__, os.O_RDWR),
                lambda: os.execv("/bin/true", ["true"]),
                lambda: os.fork(),
                lambda: __import__("subprocess").run(["true"]),
                lambda: __import__("socket").create_connection(("127.0.0.1", 1)),
                lambda: os.unlink(secret),  # noqa: PTH108 - the call itself
                lambda: bytearray(2 << 30),
            ):
                try:
                    forbidden()
                except (PermissionError, MemoryError):
                    refused += 1
            code = 0 if refused == 9 else 100 + refused
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert secret.exists()


class _Endless:
    """A file system with a library that never comes back, in different ways."""

    kind, label, root = "endless", "", (1, 0)

    def __init__(self, name: str) -> None:
        self._name = name

    def entry(self, id: tuple[int, int]) -> Entry:
        if self._name == "loop":
            while True:
                try:
                    sum(range(1000))
                except Exception:  # a library may catch what it did not raise
                    continue
        if self._name == "call":
            sum(range(1 << 62))  # one call, in which no signal is heard
        if self._name == "memory":
            held = []
            while True:
                held.append(bytes(64 << 20))
        return self.entry(id)


def test_a_panic_of_a_library_in_rust_is_an_error_of_the_image_and_ends_nothing() -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        root = (2, 0)

        def entry(self, id: object) -> Entry:
            raise PanicException("index out of bounds: the len is 433 but the index is 18446744073709550000")

    server = worker.Server(None, [1 << 20], 0)  # type: ignore[arg-type]
    server._image._systems[b"raw"] = Panicking()  # type: ignore[assignment]
    server._image._parts = {}
    answer, _ = server.answer({"op": "entry", "volume": "raw"})
    assert answer["error"] == "disk"
    assert answer["why"].startswith("it is damaged: PanicException: index out of bounds")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("loop", "it takes more than 0 s of a processor; it may be damaged"),
        ("memory", r"it takes more than \d+ MiB of memory"),
        ("deep", "it is damaged: it leads to itself"),
        ("call", ""),
    ],
)
def test_what_asks_for_too_much_is_an_error_of_its_own(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        answer = ""
        try:
            monkeypatch.setattr(worker, "CPU_S", 0.3 if name in ("loop", "call") else 60.0)
            signal.signal(signal.SIGPROF, worker.overrun)
            server = worker.Server(None, [1 << 20], 0)  # type: ignore[arg-type]
            server._image._systems[b"raw"] = _Endless(name)  # type: ignore[assignment]
            server._image._parts = {}
            monkeypatch.setattr(worker, "MAX_MEMORY", memory_for_this_process())
            worker.confine()
            answer = server.answer({"op": "entry", "volume": "raw"})[0]["why"]
        finally:
            os.write(write, answer.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert re.fullmatch(why, pipe.read())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGVTALRM if name == "call" else 0)
