"""A program that mounts a local datastore, for tests: `python -m tests.fusefs.serving STORE MOUNTPOINT [options]`.

The session of pyfuse3 belongs to a process, so tests never mount in their own. Prints `ready` once the mount is usable.
"""

import argparse
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from core.errors import FleeceError
from datastore.blob import Blob
from datastore.codec import CryptKey
from datastore.names import Group, Namespace, Snapshot
from datastore.reader import LocalReader
from fusefs import mount as mounting
from fusefs import pool
from fusefs.mount import OneArchive, mount
from fusefs.options import MountOptions
from repository.interface import Repository
from repository.local import open_local


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--archive", nargs=2)
    parser.add_argument("--ns", default="")
    parser.add_argument("--key", default="")
    parser.add_argument("--idle", type=float, default=pool.IDLE_S)
    parser.add_argument("--watch", type=float, default=pool.WATCH_S)
    parser.add_argument("--hang", type=Path, help="a FIFO: reading a chunk waits until somebody writes to it")
    parser.add_argument("--signal-when-attached", type=int)
    parser.add_argument("-o", dest="options", default="")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")

    @asynccontextmanager
    async def open_repository() -> AsyncIterator[Repository]:
        repo = await open_local(arguments.store)
        try:
            yield repo
        finally:
            repo.close()

    ns = Namespace.parse(arguments.ns)
    archive = None
    if arguments.archive:
        what, name = arguments.archive
        group = what.removesuffix("/latest")
        archive = OneArchive(Group.parse(group, ns) if what != group else Snapshot.parse(what, ns), name)
    # Tests cannot wait as long as users do.
    mounting.serve.__kwdefaults__ = {**(mounting.serve.__kwdefaults__ or {}), "idle_s": arguments.idle}
    pool.WATCH_S = arguments.watch  # type: ignore[misc]
    if arguments.hang is not None:
        read = LocalReader.read_chunk_blocking

        def hang(self: LocalReader, digest: bytes) -> Blob:
            arguments.hang.read_bytes()
            return read(self, digest)

        LocalReader.read_chunk_blocking = hang  # type: ignore[method-assign]
    if arguments.signal_when_attached is not None:
        attach = mounting._attach

        def attach_and_signal(operations: object, mountpoint: Path, fuse_options: set[str]) -> None:
            attach(operations, mountpoint, fuse_options)
            os.kill(os.getpid(), arguments.signal_when_attached)

        mounting._attach = attach_and_signal
    try:
        mount(
            open_repository,
            arguments.mountpoint,
            key=CryptKey.from_raw(bytes.fromhex(arguments.key)) if arguments.key else None,
            ns=ns,
            archive=archive,
            options=MountOptions.parse(arguments.options),
            store=arguments.store,
            foreground=not arguments.background,
            on_ready=lambda: print("ready", flush=True),
        )
    except FleeceError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
