"""`fleece serve-nbd`: a disk of a backup for any NBD client, in the background and in the foreground."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.nbd_servers import NEEDS_NBDKIT_PYTHON

from .conftest import Fleece

pytestmark = NEEDS_NBDKIT_PYTHON

MIB = 1 << 20
CONTENT = os.urandom(5 * MIB) + bytes(7 * MIB) + os.urandom(512)


@pytest.fixture
def snapshot(stored: Fleece, tmpfs: Path) -> str:
    (tmpfs / "a.raw").write_bytes(CONTENT)
    words = [f"drive-scsi0.img:{tmpfs}/a.raw", "--backup-id", "web", "--backup-type", "vm"]
    return str(stored.json("backup", *words)["snapshot"])


def test_it_is_served_until_it_is_disconnected(stored: Fleece, snapshot: str, tmpfs: Path) -> None:
    told = stored.json("serve-nbd", "vm/web/latest", "drive-scsi0.img", "--overlay-file", tmpfs / "o.qcow2")
    uri = told["uri"]
    try:
        assert told == {
            "uri": uri, "size": len(CONTENT), "snapshot": snapshot, "name": "drive-scsi0.img", "read-only": False,
            "overlay": f"{tmpfs}/o.qcow2", "pid": told["pid"], "expires": None, "warnings": [],
        }  # fmt: skip
        mapped = subprocess.run(["nbdinfo", "--map", "--json", uri], check=True, capture_output=True).stdout
        assert [extent["type"] for extent in json.loads(mapped)] == [0, 3, 0]
        subprocess.run(["nbdcopy", uri, str(tmpfs / "copy")], check=True)
        assert (tmpfs / "copy").read_bytes()[: len(CONTENT)] == CONTENT
        (listed,) = stored.json("nbd", "list")
        assert (listed["state"], listed["disks"][0]["uri"]) == ("held", uri)
        assert stored("forget", snapshot).code == 1
    finally:
        assert stored.json("nbd", "disconnect", uri) == {"disconnected": [uri]}
    assert stored.json("nbd", "list") == []
    assert subprocess.run(["nbdinfo", uri], capture_output=True).returncode


def test_in_the_foreground_it_ends_with_the_signal(stored: Fleece, snapshot: str, tmpfs: Path) -> None:
    path = tmpfs / "web.nbd"
    running = stored.start("serve-nbd", snapshot, "drive-scsi0.img", "--socket", path, "--foreground", "-q")
    assert running.stdout is not None
    assert running.stdout.readline() == f"nbd+unix:///?socket={path}\n"
    assert int(subprocess.run(["nbdinfo", "--size", f"nbd+unix:///?socket={path}"], capture_output=True).stdout) == len(
        CONTENT
    )
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert not path.exists()


def test_in_the_foreground_a_warning_comes_while_it_is_served(stored: Fleece, snapshot: str) -> None:
    running = stored.start("serve-nbd", snapshot, "drive-scsi0.img", "--listen", "0.0.0.0:0", "--foreground", "-q")
    assert running.stderr is not None
    assert running.stderr.readline() == "Warning:\n"
    assert "can read the disk" in running.stderr.readline()
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--listen", "10809"], "it is not ADDRESS:PORT"),
        (["--listen", "storage:10809"], "it is not ADDRESS:PORT"),
        (["--listen", "127.0.0.1:70000"], "it is not ADDRESS:PORT"),
        (["--listen", "127.0.0.1:0", "--socket", "x"], "serve at one of them"),
        (["--overlay", "--overlay-file", "x"], "one of the two"),
        (["--time-limit", "0s"], "shorter than a second"),
    ],
)
def test_wrong_options_are_told(stored: Fleece, options: list[str], why: str) -> None:
    answer = stored("serve-nbd", "vm/web/latest", "drive-scsi0.img", *options)
    assert answer.code == 2
    assert why in answer.err
