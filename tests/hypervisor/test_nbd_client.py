"""The NBD client: right bytes, and an error instead of a hang or a crash whatever the server does."""

import errno
import gc
import os
import random
import struct
from pathlib import Path

import pytest
import trio

from core.errors import SourceError, TargetError, UsageError
from core.units import GIB, MIB
from hypervisor.nbd_client import (
    COMPAT_PIECE,
    NbdAddress,
    NbdSourceError,
    NbdTargetError,
    StatusExtent,
    is_nbd_uri,
    open_nbd,
)
from tests.support.nbd_servers import BLOCK_STATUS, READ, Request, ScriptedServer, nbdkit, status, structured, zeros
from tests.support.waiting import cancelled_when

ALLOCATION = ("base:allocation",)


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://host/x", "scheme"),
        ("nbd+vsock://2/x", "scheme"),
        ("nbd:///x", "no host"),
        ("nbd://host:99999/x", "[Pp]ort"),
        ("nbd://user:secret@host/x", "password"),
        ("nbd+unix:///x", "socket"),
        ("nbd+unix://host/x?socket=/s", "socket"),
        ("nbds://host/x?tls-psk-file=/etc/shadow", "tls-psk-file"),
        ("nbds://host/x?tls-certificates=/root", "tls-certificates"),
        ("nbd+unix:///x?socket=/" + "s" * 200, "longer"),
        ("nbd+unix:///%00?socket=/s", "zero byte"),
    ],
)
def test_a_uri_that_asks_for_more_than_an_export_is_refused(uri: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        NbdAddress.parse(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["nbd://host", "nbd://[::1]:10809/a%20b", "nbds://host/x", "nbd+unix:///x?socket=/s"])
def test_plain_uris_are_taken(uri: str) -> None:
    assert str(NbdAddress.parse(uri)) == uri
    assert is_nbd_uri(uri)


def test_a_file_name_is_no_uri() -> None:
    assert not is_nbd_uri("/srv/nbd.img")
    assert not is_nbd_uri("nbd")


def test_the_address_of_a_socket_is_shown_as_the_uri_that_names_it() -> None:
    address = NbdAddress.unix("/run/a b", "disk/0")
    assert str(address) == "nbd+unix:///disk%2F0?socket=/run/a%20b"
    NbdAddress.parse(str(address))


async def test_reads_land_in_the_callers_buffer(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(9 * MIB + 512)
    (tmp_path / "disk").write_bytes(content)
    async with nbdkit("file", str(tmp_path / "disk")) as server, open_nbd(server.address) as pool:
        assert pool.size == len(content)
        buffer = bytearray(len(content) - 3)
        await pool.read_into(3, buffer)
        assert buffer == content[3:]
        part = memoryview(bytearray(3 * MIB))
        await pool.read_into(MIB - 5, part)
        assert part == content[MIB - 5 : 4 * MIB - 5]


async def test_compat_reads_never_cross_a_piece() -> None:
    script = ScriptedServer()
    async with script.serving() as address, open_nbd(address, connections=1) as pool:
        await pool.pread_pieces(COMPAT_PIECE - 512, bytearray(5 * COMPAT_PIECE))
    assert len(script.requests) == 6
    for request in script.requests:
        assert request.offset // COMPAT_PIECE == (request.offset + request.length - 1) // COMPAT_PIECE


async def test_requests_keep_to_what_the_server_announces() -> None:
    script = ScriptedServer(blocks=(4096, 4096, 65536))
    async with script.serving() as address, open_nbd(address, connections=1) as pool:
        assert pool.block == 4096
        await pool.read_into(5000, bytearray(300_000))
    assert all(request.offset % 4096 == 0 and request.length % 4096 == 0 for request in script.requests)
    assert all(request.length <= 65536 for request in script.requests)


async def test_unaligned_reads_of_a_server_with_large_blocks_are_right() -> None:
    def pattern(request: Request) -> bytes:
        data = b"".join(
            struct.pack(">I", n) for n in range(request.offset // 4, (request.offset + request.length) // 4)
        )
        return structured(request, 1, struct.pack(">Q", request.offset) + data)

    script = ScriptedServer(blocks=(4096, 4096, 65536), answer=pattern)
    async with script.serving() as address, open_nbd(address) as pool:
        buffer = bytearray(200_000)
        await pool.read_into(4 * 1001, buffer)
    assert buffer == b"".join(struct.pack(">I", n) for n in range(1001, 1001 + 50_000))


async def test_extents_are_merged_and_cover_the_range() -> None:
    async with (
        nbdkit("data", "data=@5242880 0xff*70000", "size=3G") as server,
        open_nbd(server.address, contexts=ALLOCATION) as pool,
    ):
        extents = await pool.block_status(0, pool.size, "base:allocation")
    assert extents[0] == StatusExtent(0, extents[1].offset, 3)
    assert extents[0].length <= 5 * MIB
    assert [extent.flags for extent in extents] == [3, 0, 3]
    assert sum(extent.length for extent in extents) == 3 * GIB


async def test_the_map_is_asked_in_steps_of_at_most_1_gib() -> None:
    script = ScriptedServer(size=5 * GIB // 2)
    async with script.serving() as address, open_nbd(address, contexts=ALLOCATION) as pool:
        assert await pool.block_status(0, pool.size, "base:allocation") == [StatusExtent(0, pool.size, 0)]
    assert [request.length for request in script.requests] == [GIB, GIB, GIB // 2]


async def test_an_extent_longer_than_asked_is_cut() -> None:
    script = ScriptedServer(answer=lambda request: status(request, [(4096, 1), (2**32 - 4096, 2)]))
    async with script.serving() as address, open_nbd(address, contexts=ALLOCATION) as pool:
        found = await pool.block_status(0, 65536, "base:allocation")
    assert found == [StatusExtent(0, 4096, 1), StatusExtent(4096, 61440, 2)]


@pytest.mark.parametrize(
    "extents", [[(0, 0)], [(0, 0), (0, 1)], []], ids=["of length zero", "several of length zero", "none"]
)
async def test_a_map_that_does_not_advance_is_an_error(extents: list[tuple[int, int]]) -> None:
    script = ScriptedServer(answer=lambda request: status(request, extents))
    async with script.serving() as address, open_nbd(address, contexts=ALLOCATION) as pool:
        with pytest.raises(SourceError, match="cannot read the map of"):
            await pool.block_status(0, pool.size, "base:allocation")


async def test_a_context_that_the_server_lacks_is_an_error() -> None:
    async with nbdkit("memory", "1M") as server, open_nbd(server.address, contexts=("qemu:dirty-bitmap:b",)) as pool:
        assert not pool.has_context("qemu:dirty-bitmap:b")
        with pytest.raises(SourceError, match="does not offer 'qemu:dirty-bitmap:b'"):
            await pool.block_status(0, pool.size, "qemu:dirty-bitmap:b")


@pytest.mark.parametrize("size", [0, 2**63 - 1, 2**63, 2**64 - 1, 1024**5 + 512])
async def test_a_nonsense_size_is_refused(size: int) -> None:
    async with ScriptedServer(size=size).serving() as address:
        with pytest.raises(NbdSourceError, match=r"it is empty|it claims to have \d+ bytes"):
            async with open_nbd(address):
                pass


@pytest.mark.parametrize("blocks", [(3, 4096, 65536), (2**31, 2**31, 2**31), (65536, 65536, 1), (0, 0, 0), (1, 1, 1)])
async def test_nonsense_limits_do_not_keep_reads_from_working(blocks: tuple[int, int, int]) -> None:
    async with ScriptedServer(blocks=blocks).serving() as address, open_nbd(address, timeout_s=10) as pool:
        buffer = bytearray(b"\xff" * 8192)
        await pool.read_into(0, buffer)
        assert buffer == bytes(8192)


async def test_a_server_that_speaks_another_protocol_is_an_error() -> None:
    async def babble(stream: trio.SocketStream) -> bool:
        await stream.send_all(b"220 mail.example.org ESMTP\r\n" * 10)
        return False

    async with ScriptedServer(handshake=babble).serving() as address:
        with pytest.raises(NbdSourceError, match="connect to nbd"):
            async with open_nbd(address):
                pass


async def test_a_server_that_never_greets_is_given_up() -> None:
    async def silence(_stream: trio.SocketStream) -> bool:
        await trio.sleep_forever()

    async with ScriptedServer(handshake=silence).serving() as address:
        with trio.fail_after(60), pytest.raises(NbdSourceError, match="does not answer") as caught:
            async with open_nbd(address, timeout_s=0.5):
                pass
        assert caught.value.lost


async def test_a_server_that_stops_answering_is_given_up_and_breaks_the_pool() -> None:
    async with nbdkit("memory", "16M") as server, open_nbd(server.address, timeout_s=2.0) as pool:
        await pool.read_into(0, bytearray(MIB))
        server.stop_answering()
        with trio.fail_after(60), pytest.raises(NbdSourceError, match="does not answer") as caught:
            await pool.read_into(0, bytearray(MIB))
        assert caught.value.lost
        with trio.fail_after(60), pytest.raises(NbdSourceError, match="does not answer"):
            await pool.read_into(0, bytearray(MIB))


async def test_a_server_killed_in_the_middle_is_an_error_for_all_who_read() -> None:
    failures: list[NbdSourceError] = []
    async with nbdkit("memory", "64M", "rdelay=20ms", filters=["delay"]) as server, open_nbd(server.address) as pool:

        async def read_on() -> None:
            try:
                while True:
                    await pool.read_into(0, bytearray(4 * MIB))
            except NbdSourceError as error:
                failures.append(error)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(read_on)
                await trio.sleep(0.2)
                await server.kill()
    assert len(failures) == 3
    assert all(error.lost and "lost" in str(error) for error in failures)


async def test_an_error_of_the_server_is_told_and_the_connection_stays_usable(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    async with (
        nbdkit(
            "memory", "16M", "error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={fault}", filters=["error"]
        ) as server,
        open_nbd(server.address) as pool,
    ):
        await pool.read_into(0, bytearray(4 * MIB))
        fault.touch()
        with pytest.raises(NbdSourceError, match="Input/output error") as caught:
            await pool.read_into(0, bytearray(4 * MIB))
        assert (caught.value.errno, caught.value.lost) == (errno.EIO, False)
        fault.unlink()
        await pool.read_into(0, bytearray(4 * MIB))


async def test_a_reply_of_nonsense_is_an_error_not_a_crash() -> None:
    script = ScriptedServer(answer=lambda request: os.urandom(64) if request.type == READ else zeros(request))
    async with script.serving() as address, open_nbd(address, timeout_s=5) as pool:
        with trio.fail_after(60), pytest.raises(NbdSourceError):
            await pool.read_into(0, bytearray(MIB))


async def test_a_reply_for_another_place_does_not_pass() -> None:
    def wrong_place(request: Request) -> bytes:
        return structured(request, 1, struct.pack(">Q", request.offset + 512) + bytes(request.length))

    async with ScriptedServer(answer=wrong_place).serving() as address, open_nbd(address, timeout_s=5) as pool:
        with pytest.raises(NbdSourceError):
            await pool.read_into(0, bytearray(MIB))


async def test_a_cancelled_read_ends_soon_and_leaves_buffer_and_pool_alone() -> None:
    silent = True
    script = ScriptedServer(answer=lambda request: None if silent else zeros(request))
    async with script.serving() as address, open_nbd(address) as pool:
        buffer = bytearray(b"\x77" * MIB)
        async with cancelled_when(lambda: script.requests):
            await pool.read_into(0, buffer)
        silent = False
        fresh = bytearray(b"\x77" * MIB)
        await pool.read_into(0, fresh)
        assert fresh == bytes(MIB)
        assert buffer == b"\x77" * MIB


async def test_no_connection_stays_open_after_the_block_even_while_a_traceback_lives() -> None:
    kept: list[BaseException] = []
    async with nbdkit("memory", "16M") as server:
        before = open_files()
        try:
            async with open_nbd(server.address) as pool:
                assert open_files() == before + 2
                server.stop_answering()
                with trio.move_on_after(0.1):
                    await pool.read_into(0, bytearray(MIB))
                raise RuntimeError("something else")
        except RuntimeError as error:
            kept.append(error)
        assert open_files() == before


async def test_one_connection_where_the_server_offers_no_more() -> None:
    async with nbdkit("memory", "1M", "multi-conn-mode=disable", filters=["multi-conn"]) as server:
        before = open_files()
        async with open_nbd(server.address, connections=4):
            assert open_files() == before + 1
        async with open_nbd(server.address, connections=1):
            assert open_files() == before + 1


async def test_nobody_listens() -> None:
    with pytest.raises(NbdSourceError, match="No such file"):
        async with open_nbd(NbdAddress.unix("/nonexistent/socket", "x")):
            pass
    with pytest.raises(NbdTargetError, match="refused"):
        async with open_nbd(NbdAddress.parse("nbd://127.0.0.1:9/x"), writable=True):
            pass


async def test_an_export_that_is_not_there() -> None:
    async with nbdkit("memory", "1M", "exportname=here", "exportname-strict=true", filters=["exportname"]) as server:
        with pytest.raises(NbdSourceError, match="connect to"):
            async with open_nbd(NbdAddress.unix(server.address.socket, "elsewhere")):
                pass


async def test_writes_zeros_and_trims_arrive() -> None:
    async with nbdkit("memory", "16M") as server, open_nbd(server.address, writable=True) as pool:
        data = random.Random(4).randbytes(5 * MIB)
        await pool.write(MIB, data)
        await pool.zero(2 * MIB, MIB)
        await pool.trim(3 * MIB, MIB)
        await pool.flush()
        buffer = bytearray(16 * MIB)
        await pool.read_into(0, buffer)
    assert buffer == bytes(MIB) + data[:MIB] + bytes(2 * MIB) + data[3 * MIB :] + bytes(10 * MIB)


async def test_trims_are_exact_and_at_most_1_gib() -> None:
    script = ScriptedServer(size=4 * GIB + 512, flags=1 | 1 << 5 | 1 << 8)
    async with script.serving() as address, open_nbd(address) as pool:
        await pool.trim(4 * MIB, 3 * GIB)
        await pool.trim(4 * GIB, 512)
    ranges = [(request.offset, request.length) for request in script.requests]
    assert ranges == [(4 * MIB, GIB - 4 * MIB), (GIB, GIB), (2 * GIB, GIB), (3 * GIB, 4 * MIB), (4 * GIB, 512)]


async def test_a_read_only_export_is_no_target() -> None:
    async with ScriptedServer(flags=1 | 2 | 1 << 8).serving() as address:
        with pytest.raises(TargetError, match="read-only"):
            async with open_nbd(address, writable=True):
                pass


async def test_a_full_server_is_a_target_error() -> None:
    full = ("error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    async with (
        nbdkit("memory", "16M", *full, filters=["error"]) as server,
        open_nbd(server.address, writable=True) as pool,
    ):
        with pytest.raises(NbdTargetError, match="No space left") as caught:
            await pool.write(0, bytes(MIB))
        assert caught.value.errno == errno.ENOSPC


async def test_an_export_that_changes_its_size_between_two_connections() -> None:
    script = ScriptedServer(answer=lambda request: None)
    async with script.serving() as address, open_nbd(address, connections=1, timeout_s=10) as pool:
        with trio.move_on_after(0.1):
            await pool.read_into(0, bytearray(512))
        script.size += 512
        with pytest.raises(NbdSourceError, match="size changed"):
            await pool.read_into(0, bytearray(512))


async def test_a_range_outside_the_disk_never_reaches_the_server() -> None:
    script = ScriptedServer(flags=1 | 1 << 5 | 1 << 6 | 1 << 8)
    async with script.serving() as address, open_nbd(address, contexts=ALLOCATION) as pool:
        for call in (
            lambda: pool.read_into(pool.size - 512, bytearray(1024)),
            lambda: pool.trim(pool.size, 512),
            lambda: pool.zero(-512, 512),
            lambda: pool.block_status(0, pool.size + 1, "base:allocation"),
        ):
            with pytest.raises(SourceError, match="outside"):
                await call()
    assert not script.requests


async def test_a_status_for_another_context_is_not_taken() -> None:
    def other(request: Request) -> bytes:
        if request.type != BLOCK_STATUS:
            return zeros(request)
        return structured(request, 5, struct.pack(">III", 99, request.length, 0))

    async with ScriptedServer(answer=other).serving() as address, open_nbd(address, contexts=ALLOCATION) as pool:
        with pytest.raises(SourceError, match="cannot read the map of"):
            await pool.block_status(0, pool.size, "base:allocation")


async def test_no_buffer_is_kept_after_its_request() -> None:
    """libnbd 1.14 keeps what an `nbd.Buffer` holds for ever: hundreds of MiB for each backup of a process."""
    async with nbdkit("memory", "16M") as server, open_nbd(server.address, writable=True) as pool:
        for step in (pool.read_into, pool.pread_pieces, pool.write):
            buffer = bytearray(4 * MIB)
            await step(0, buffer)
            gc.collect()
            # Who still holds a view of it keeps it from being resized.
            buffer.clear()
