"""The lock and the state of a run on one QEMU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypervisor.errors import FleecingError, QmpAnswerError, VmStateError
from hypervisor.state import DiskState, Run, RunState, clean_dead, exclusive, started
from hypervisor.unix_socket import Peer, process_start_time

STATE = RunState(
    "/run/vm/qmp",
    "read",
    "0badcafe",
    5,
    1234,
    nbd_server=True,
    disks=[
        DiskState(0, "drive-d0.img", "/machine/peripheral/d0", "fmt0", "/scratch/fleece-1-2-0.raw", None, "fleece-x")
    ],
)


@pytest.fixture
def peer() -> Peer:
    """This process, in the part of QEMU."""
    return Peer(os.getpid(), 0, 0, process_start_time(os.getpid()))


async def test_what_is_saved_is_loaded(tmp_path: Path, peer: Peer) -> None:
    with exclusive(tmp_path, peer) as run:
        assert await run.load() is None
        await run.save(STATE)
        assert await run.load() == STATE
    with exclusive(tmp_path, peer) as run:
        assert await run.load() == STATE
        run.forget()
        assert await run.load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", range(0, len(STATE.pack()), 7))
async def test_a_damaged_state_counts_as_none(tmp_path: Path, peer: Peer, cut: int) -> None:
    whole = STATE.pack()
    for text in (whole[:cut], whole[:cut] + b"{" + whole[cut + 1 :]):
        with exclusive(tmp_path, peer) as run:
            (run.folder / "state.json").write_bytes(text)
            loaded = await run.load()
            assert loaded is None or isinstance(loaded, RunState)
            run.forget()


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"disks": 1}', b"\xff", b"[" * 100_000])
def test_state_that_is_none_is_told(text: bytes) -> None:
    with pytest.raises(QmpAnswerError, match=r"cannot understand state\.json"):
        RunState.parse(text, "state.json")


def test_a_second_run_is_told_who_has_the_vm(tmp_path: Path, peer: Peer) -> None:
    with exclusive(tmp_path, peer) as run:
        (run.folder / "state.json").write_bytes(STATE.pack())
        told = pytest.raises(
            VmStateError, match=r"another backup or clean-up of it runs \(process 1234\); 'fleece nbd list' "
        )
        with told, exclusive(tmp_path, peer):
            pass
        run.forget()
    with exclusive(tmp_path, peer):
        pass


def test_runs_on_different_qemus_do_not_meet(tmp_path: Path, peer: Peer) -> None:
    with exclusive(tmp_path, peer), exclusive(tmp_path, Peer(peer.pid, 0, 0, 1)) as other:
        assert other.folder.is_dir()


def test_a_killed_process_leaves_no_lock(tmp_path: Path, peer: Peer) -> None:
    code = (
        "import os, sys; from pathlib import Path; from hypervisor.state import exclusive;"
        "from hypervisor.unix_socket import Peer;"
        f"held = exclusive(Path(sys.argv[1]), Peer({peer.pid}, 0, 0, {peer.start_time}));"
        "held.__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=30).returncode == -9
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".lock"]
    with exclusive(tmp_path, peer):
        pass
    assert list(tmp_path.iterdir()) == []


async def test_only_files_of_processes_that_ended_are_cleaned(tmp_path: Path, peer: Peer) -> None:
    run_dir, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    mine, other, foreign = scratch / "fleece-77-1-0.raw", scratch / "fleece-88-1-0.raw", scratch / "precious.raw"
    for path in (mine, other, foreign):
        path.write_bytes(b"x")
    dead = Peer(77, 0, 0, 1)
    images = [str(mine), str(other), str(foreign)]
    disks = [DiskState(n, "drive-d0.img", "d", "r", image, None, None) for n, image in enumerate(images)]
    for process in (peer, dead):
        with exclusive(run_dir, process) as run:
            await run.save(RunState("/qmp", "read", "0badcafe", 5, 1, disks=disks))
    done = await clean_dead(run_dir)
    assert len(done) == 2
    # Its state cannot make us remove anything but its own images.
    assert sorted(scratch.iterdir()) == [other, foreign]
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {f"qemu-{peer.pid}-{peer.start_time}"}
    assert await clean_dead(run_dir) == []
    assert await clean_dead(tmp_path / "nothing") == []


def test_a_run_folder_whose_path_is_too_long_for_a_socket_is_refused_at_once(tmp_path: Path, peer: Peer) -> None:
    end = f"/qemu-{peer.pid}-{peer.start_time}/nbd"
    room = 107 - len(end) - len(str(tmp_path)) - 1
    with exclusive(tmp_path / ("x" * room), peer) as run:
        assert len(str(run.socket)) == 107
        assert str(run.socket).endswith(end)
    folder = tmp_path / ("x" * (room + 1))
    refused = pytest.raises(FleecingError, match=r"its path is too long for a socket .*; name a shorter one")
    with refused, exclusive(folder, peer):
        pass
    assert not folder.exists()


def test_a_run_folder_that_cannot_be_made_is_said(tmp_path: Path, peer: Peer) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FleecingError, match="cannot use the run folder"), exclusive(tmp_path / "file", peer):
        pass


def test_a_process_that_cannot_be_seen_does_not_count_as_ended(peer: Peer) -> None:
    assert peer.alive()
    assert not Peer(peer.pid, 0, 0, 1).alive()
    assert Peer(0, 0, 0, None).alive()  # in a container of its own


def test_the_start_of_a_process_is_known_in_seconds(peer: Peer) -> None:
    import time

    began = started(peer)
    assert began is not None
    assert 0 <= time.time() - began < 24 * 3600
    assert started(Peer(1, 0, 0, None)) is None
    assert Run(Path("/x"), peer).peer is peer
