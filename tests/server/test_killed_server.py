"""`fleece serve` as a process on a socket of systemd: killed in the middle of a backup, and started again."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from agent.main import run
from core.dial import TlsPin
from core.errors import FleeceError
from datastore.codec import ChunkCodec
from datastore.names import Group
from repository.remote.address import RemoteAddress
from repository.remote.opening import RemoteOptions, open_remote
from server.access.acl import AclEntry
from server.access.auth_ids import AuthId
from server.access.store import AccessStore
from server.certificate import own_certificate
from server.tasks import OK, UNKNOWN, TaskFiles
from tests.support.cache import ROOT
from tests.support.remote import Known
from tests.support.snapshots import put_all, read_image, write_snapshot

TOKEN = AuthId("u@pbs", "t")
CHUNK = 4 << 20
GROUP = Group.parse("host/web")
BASE = bytes(CHUNK) + b"a" * 5000


@contextmanager
def serving(listening: socket.socket, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ready; ended by SIGTERM unless it is dead already."""
    environment = {
        **os.environ, "FLEECE_STATE_DIR": str(folder), "FLEECE_RUN_DIR": str(folder / "run"), "LISTEN_FDS": "1",
        "NOTIFY_SOCKET": str(folder / "notify"),
    }  # fmt: skip
    program = f'LISTEN_PID=$$ exec "{sys.executable}" -m agent.main serve --drain 0'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        (folder / "notify").unlink(missing_ok=True)
        systemd.bind(str(folder / "notify"))
        systemd.settimeout(1)

        def hand_over() -> None:  # between fork and exec: the descriptor's number is what systemd uses
            os.dup2(listening.fileno(), 3)

        os.set_inheritable(3, True)  # if it was that already

        process = subprocess.Popen(
            ["/bin/sh", "-c", program], env=environment, cwd=ROOT, preexec_fn=hand_over, close_fds=False,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            told = b""
            while b"READY=1" not in told:
                assert process.poll() is None
                with suppress(TimeoutError):
                    told = systemd.recv(4096)
            yield process
            process.terminate()
            assert process.wait() in (0, -signal.SIGKILL)
        finally:
            process.kill()
            process.wait()


def test_a_backup_in_flight_is_gone_when_the_server_was_killed_and_the_next_one_has_the_same_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path))
    monkeypatch.setattr("repository.remote.session._GONE_S", 0.5)  # the socket of the killed one takes connections
    assert run(["datastore", "create", str(tmp_path / "store"), "--name", "main"]) == 0
    access = AccessStore(tmp_path / "server")
    access.add_user(AuthId(TOKEN.user))
    secret = access.add_token(TOKEN)
    for who in (TOKEN.user, str(TOKEN)):
        access.set_right(AclEntry("/datastore/main", who, "DatastorePowerUser"))
    options = RemoteOptions(TlsPin.parse(own_certificate(tmp_path / "server").fingerprint), secrets=Known(secret))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = RemoteAddress.parse(f"{TOKEN}@127.0.0.1:{listening.getsockname()[1]}:main")

        async def killed(process: subprocess.Popen[bytes]) -> None:
            async with open_remote(address, options, name="remote") as remote:
                await write_snapshot(remote, GROUP, 1000, {"a.img.fidx": BASE}, chunk_size=CHUNK)
                with pytest.raises(FleeceError):
                    async with remote.backup(GROUP.at(2000)) as session:
                        # All of it is there but `finish`.
                        await put_all(session, {"a.img.fidx": b"b" * CHUNK, "b.conf.blob": b"x"}, chunk_size=CHUNK)
                        process.kill()
                        await session.finish()

        async def restarted() -> None:
            async with open_remote(address, options, name="remote") as remote:
                assert [one.snapshot.ctime for one in await remote.snapshots()] == [1000]
                async with remote.backup(GROUP.at(2000)) as session:  # the same second, too
                    assert session.base == GROUP.at(1000)
                    index = await session.previous_index("a.img.fidx")
                    assert index is not None
                    assert session.knows(ChunkCodec().digest_many([bytes(CHUNK)])[0])
                    await put_all(session, {"a.img.fidx": BASE + b"c"}, chunk_size=CHUNK)
                    await session.finish()
                found = await remote.snapshots(unfinished=True)
                assert [one.snapshot.ctime for one in found] == [1000, 2000]
                assert {file.filename for file in found[1].files} == {"a.img.fidx", "index.json.blob"}
                assert await read_image(remote, GROUP.at(2000), "a.img.fidx") == BASE + b"c"

        with serving(listening, tmp_path) as process:
            trio.run(killed, process)
        files = TaskFiles(tmp_path / "server" / "tasks")
        assert [task.status for task in files.listed().values() if task.upid.kind == "backup"] == [OK, UNKNOWN]
        with serving(listening, tmp_path):
            trio.run(restarted)
    ended = [task for task in files.load().values() if task.upid.kind == "backup"]
    assert [task.status for task in ended] == [OK, UNKNOWN, OK]
    # What the killed one had logged is kept.
    assert "starting new backup" in "\n".join(files.log_lines(str(ended[1].upid))[0])
