"""Fixtures of the mount's tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from datastore.names import Namespace
from repository.local import open_local
from tests.fusefs.mounts import ARCHIVE, CONF, FIRST, IMAGE, KEY, SECOND, write
from tests.support.stores import StorePool


@pytest.fixture(scope="session")
def fuse() -> None:
    """Skips where the kernel offers no FUSE."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/fuse")


async def _fill(base: Path) -> None:
    repo = await open_local(base)
    files = {"drive-scsi0.img.fidx": IMAGE, "qemu-server.conf.blob": CONF}
    await write(repo, "vm/100", FIRST, files)
    await write(repo, "vm/100", SECOND, {**files, "root.pxar.didx": ARCHIVE, "catalog.pcat1.didx": bytes(100)})
    await write(repo, "host/web", FIRST, {"data.img.fidx": IMAGE, "note.conf.blob": CONF}, key=KEY)
    await write(repo, "vm/100", FIRST, {"qemu-server.conf.blob": b"other"}, ns=Namespace(("a", "b")))
    repo.close()


@pytest.fixture
def store(store_folder: Path) -> Path:
    """Two snapshots of vm/100, an encrypted one of host/web, and one of vm/100 in the namespace a/b."""
    trio.run(_fill, store_folder)
    return store_folder


@pytest.fixture(scope="module")
def shared_store(store_pool: StorePool) -> Iterator[Path]:
    """The same as `store`, for tests that change nothing."""
    base = store_pool.lend()
    try:
        trio.run(_fill, base)
        yield base
    finally:
        store_pool.take_back(base)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    return tmp_path / "mnt"
