"""Backup and restore over the wire, against the strict double."""

import os

from datastore.names import MANIFEST_NAME, Group
from tests.support.pbs_double import PbsDouble
from tests.support.remote import remote
from tests.support.snapshots import read_image, write_snapshot

CHUNK = 4 << 20
GROUP = Group.parse("vm/100")
IMAGE = bytes(CHUNK) + os.urandom(1000) + bytes(CHUNK - 1000) + b"tail" * 1000


async def test_what_is_backed_up_reads_back() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        files = {"disk.img.fidx": IMAGE, "vm.conf.blob": b"name: test\n"}
        snapshot = await write_snapshot(repo, GROUP, 1000, files, chunk_size=CHUNK)
        (info,) = await repo.snapshots()
        assert [file.filename for file in info.files] == ["disk.img.fidx", "vm.conf.blob", MANIFEST_NAME]
        assert (info.finished, info.owner) == (True, "root@pam!tok")
        assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE
