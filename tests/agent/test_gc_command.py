"""`fleece gc` as a person runs it."""

import os
import time
from pathlib import Path

from datastore.files import Owner
from datastore.locks import ProcessLocker
from tests.support.stores import chunk_files

from .conftest import Fleece


def test_removed_snapshots_give_their_space_back_after_a_day(stored: Fleece, tmp_path: Path) -> None:
    conf = tmp_path / "x.conf"
    conf.write_bytes(b"name: x\n")
    image = tmp_path / "x.raw"
    image.write_bytes(os.urandom(5 << 20))
    snapshot = stored.json("backup", f"x.conf:{conf}", f"x.img:{image}", "--backup-id", "x")["snapshot"]
    stored.json("forget", snapshot)
    time.sleep(1.1)  # what was written within the second in which it starts counts as in use
    report = stored.json("gc")
    assert (report["pending-chunks"], report["removed-chunks"], report["dry-run"]) == (2, 0, False)
    assert stored.repo is not None
    for path in chunk_files(stored.repo):
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    rehearsal = stored.json("garbage-collect", "--dry-run")
    assert (rehearsal["removed-chunks"], rehearsal["dry-run"]) == (2, True)
    answer = stored("gc")
    assert answer.code == 0
    assert "in 2 chunks" in answer.out
    assert stored.json("gc")["removed-chunks"] == 0


def test_errors_are_explained(stored: Fleece) -> None:
    assert stored.repo is not None
    assert stored("gc", "--cutoff", "1s").code == 2
    assert stored("gc", "--lock-wait", "soon").code == 2
    (stored.repo / "broken.fidx").write_bytes(b"?")
    answer = stored("gc", "--output", "json")
    assert answer.code == 1
    assert answer.error["why"].startswith("broken.fidx cannot be read as an index")
    (stored.repo / "broken.fidx").unlink()
    locker = ProcessLocker(stored.repo, Owner.of(stored.repo))
    descriptor = os.open(stored.repo / ".lock", os.O_RDWR)
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_SH)  # as a backup of PBS does
        answer = stored("gc", "--lock-wait", "0.1s", "--output", "json")
        assert answer.code == 1
        assert f"process {os.getpid()} holds its lock" in answer.error["why"]
    finally:
        os.close(descriptor)
    assert locker.writers() == []
