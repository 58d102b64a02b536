"""The pipe of a restore of a container: a stream that is cut off, wherever, is no archive to whoever reads it."""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import trio

from agent.provider.tar_guard import TarStream
from agent.provider.tar_pipe import open_tar_pipe
from core.errors import TargetError
from hypervisor.unix_socket import process_start_time
from tests.support.cache import ROOT
from tests.support.waiting import until

BLOCK = 512


def archive() -> bytes:
    """Every kind of block: records, contents of all lengths, entries without any, and the end."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, size in (("a", 0), ("b", 1), ("c", BLOCK), ("d", 10240), ("e" * 150, 700), ("f/ü", 20000)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, 1.5  # which needs a record
            tar.addfile(info, io.BytesIO(b"x" * size))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.LNKTYPE, "d"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        large = tarfile.TarInfo("large")
        large.size, large.pax_headers = 3000, {"size": "3000"}
        tar.addfile(large, io.BytesIO(b"y" * 3000))
    return packed.getvalue()


ARCHIVE = archive()
#: Where its end begins.
END = len(ARCHIVE.rstrip(b"\0")) + -len(ARCHIVE.rstrip(b"\0")) % BLOCK


def shown(data: bytes, choose: random.Random) -> tuple[TarStream, bytes]:
    """What is handed on of `data`, which comes in pieces."""
    stream, out = TarStream(), b""
    while data:
        count = choose.choice((1, 7, BLOCK - 1, BLOCK, 4096, 65536))
        out += stream.take(data[:count])
        data = data[count:]
    return stream, out


def extracts(data: bytes, folder: Path) -> bool:
    return not subprocess.run(["tar", "xf", "-", "-C", folder], input=data, capture_output=True, timeout=60).returncode


def test_a_whole_stream_comes_through_but_its_end_only_when_it_is_said_to_be_whole(tmp_path: Path) -> None:
    for seed in range(10):
        stream, out = shown(ARCHIVE, random.Random(seed))
        assert out[:END] == ARCHIVE[:END]
        assert out + stream.end == ARCHIVE
        assert not out[END:].strip(b"\0")
        assert len(out) < END + BLOCK
    assert extracts(ARCHIVE, tmp_path)


def test_wherever_a_stream_is_cut_off_it_cannot_be_read(tmp_path: Path) -> None:
    choose = random.Random(1)
    places = {offset for edge in range(0, END + 1, BLOCK) for offset in (edge - 1, edge, edge + 1) if offset >= 0}
    places |= {choose.randrange(END) for _ in range(20)} | {END + BLOCK, END + 2 * BLOCK, len(ARCHIVE)}
    for place in [*choose.sample(sorted(places), 40), 0, END, END + BLOCK, len(ARCHIVE)]:
        stream, out = shown(ARCHIVE[:place], choose)
        assert ARCHIVE.startswith(out)
        assert not extracts(out + stream.nonsense(), tmp_path), place


def test_what_is_no_tar_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="no size"):
        TarStream().take(b"\xff" * BLOCK)
    for more in (bytes(40 * BLOCK), b"x"):
        with pytest.raises(ValueError, match="behind the end"):
            TarStream().take(ARCHIVE + more)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    (tmp_path / "of-one").mkdir()
    return tmp_path / "of-one/root.tar"


async def test_a_reader_gets_whole_blocks(pipe: Path) -> None:
    """GNU tar takes nothing else from a pipe."""
    async with open_tar_pipe(pipe) as opened:
        reader = await trio.to_thread.run_sync(os.open, pipe, os.O_RDONLY)
        await opened.reader()
        sent = got = b""
        for start in range(0, END, 1000):
            await opened.send(ARCHIVE[start : start + 1000])
            sent += ARCHIVE[start : start + 1000]
            while len(sent) - len(got) > 2 * BLOCK:
                got += await trio.to_thread.run_sync(os.read, reader, 10240)
                assert len(got) % BLOCK == 0
        assert ARCHIVE.startswith(got)
        os.close(reader)


async def test_the_reader_gets_all_of_it(pipe: Path, tmp_path: Path) -> None:
    async with open_tar_pipe(pipe) as opened, trio.open_nursery() as nursery:
        nursery.start_soon(trio.run_process, ["tar", "xf", str(pipe), "-C", str(tmp_path)])
        await opened.reader()
        for start in range(0, len(ARCHIVE), 1000):
            await opened.send(ARCHIVE[start : start + 1000])
        await opened.finish()
    assert (tmp_path / "f/ü").read_bytes() == b"x" * 20000


async def test_a_reader_that_goes_is_noticed_and_one_that_never_comes_is_not_waited_for(pipe: Path) -> None:
    async with open_tar_pipe(pipe) as opened:
        reader = await trio.to_thread.run_sync(os.open, pipe, os.O_RDONLY)
        await opened.reader()
        os.close(reader)
        large = tarfile.TarInfo("large")
        large.size = 1 << 40
        await opened.send(large.tobuf())
        with pytest.raises(TargetError, match="who reads the archive has gone"), trio.fail_after(60):
            while True:
                await opened.send(b"x" * 65536)
    assert not pipe.parent.exists()
    pipe.parent.mkdir()
    with trio.fail_after(60):
        async with open_tar_pipe(pipe):
            pass


#: Sends half of an archive to where it can be read, says so, and does nothing more.
SENDER = """
import sys, trio
from pathlib import Path
from agent.provider.tar_pipe import open_tar_pipe
async def main():
    async with open_tar_pipe(Path(sys.argv[1])) as pipe:
        print(pipe._guard.pid, flush=True)
        if sys.argv[2] == "waiting":
            await trio.sleep_forever()
        await pipe.reader()
        await pipe.send(Path(sys.argv[2]).read_bytes())
        print("sent", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("when", ["between two entries", "before anybody reads"])
def test_a_sender_that_is_killed_does_not_look_like_one_that_is_done(pipe: Path, tmp_path: Path, when: str) -> None:
    (tmp_path / "part").write_bytes(ARCHIVE[:BLOCK])  # an empty file, and nothing more
    (tmp_path / "target").mkdir()
    argument = "waiting" if when == "before anybody reads" else tmp_path / "part"
    line = [sys.executable, "-c", SENDER, str(pipe), str(argument)]
    sender = subprocess.Popen(line, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert sender.stdout is not None
    guard = int(sender.stdout.readline())
    reader = None
    if argument != "waiting":
        reader = subprocess.Popen(["tar", "xf", pipe, "-C", tmp_path / "target"], stderr=subprocess.DEVNULL)
        assert sender.stdout.readline() == b"sent\n"
    os.killpg(sender.pid, signal.SIGKILL)
    sender.wait(60)
    sender.stdout.close()
    if reader is None:
        reader = subprocess.Popen(["tar", "xf", pipe, "-C", tmp_path / "target"], stderr=subprocess.DEVNULL)
    assert reader.wait(60) != 0
    trio.run(until, lambda: process_start_time(guard) is None)
    assert not pipe.parent.exists()
