"""File archives for the mount's tests."""

import os
from pathlib import Path

import trio

from datastore.names import ROOT as NO_NS
from pxar.format import Kind
from pxar.metadata import Acl, DefaultAcl, Metadata, Stat
from repository.local import open_local
from tests.fusefs.mounts import (
    FIRST,
    write,
)
from tests.pxar.archives import Item, archived, item

TIME = "2026-01-01T00:00:00Z"
STREAMS = {False: ["root.pxar.didx"], True: ["root.mpxar.didx", "root.ppxar.didx"]}


def files_of(root: Item, *, split: bool) -> dict[str, bytes]:
    return dict(zip(STREAMS[split], archived(root, split=split), strict=False))


def store_trees(store: Path, trees: dict[str, dict[str, bytes]]) -> None:
    """One snapshot for each group, with these streams."""

    async def fill() -> None:
        repo = await open_local(store)
        for group, files in trees.items():
            await write(repo, group, FIRST, files, ns=NO_NS)
        repo.close()

    trio.run(fill)


def listed(folder: Path) -> list[bytes]:
    return os.listdir(os.fsencode(folder))  # noqa: PTH208 - names are bytes


ALL_KINDS = item(
    0o41777,
    mtime=(FIRST, 1),
    children={
        b"acl": Item(
            Kind.DIRECTORY,
            Metadata(Stat(0o40750, 0, 1, 2, -2, 500_000_000), acl=Acl(
                default=DefaultAcl(7, 5, 0, (1 << 64) - 1), default_users=((1002, 7),), default_groups=((50, 1),),
            )),
            children={
                b"f": Item(Kind.FILE, Metadata(
                    Stat(0o100640, 0, 1000, 4_000_000_000, 5, 999_999_999),
                    xattrs=((b"user.a", b"1"), (b"user.b", b"")),
                    acl=Acl(((1003, 4), (1002, 6)), ((50, 5),), 4),
                    fcaps=bytes.fromhex("0100000200200000000000000000000000000000"),
                ), content=b"x"),
            },
        ),
        b"blk": item(0o60660, device=(8, 17)),
        b"chr": item(0o20600, device=(0xABCD1234, 0xDCBA5678)),
        b"empty": item(0o40000),
        b"fifo": item(0o10600),
        b"file": item(0o104755, content=b"first\n" * 1000),
        b"hard": Item(Kind.HARDLINK, Metadata(Stat(0)), target=b"file"),
        b"link": item(0o120777, target=b"/no/such/" + b"t" * 300),
        b"n" * 255: item(0o100600),
        b"sock": item(0o140700),
        b"w\xff\n": item(0o100000, content=b"odd name"),
        b"zhard": Item(Kind.HARDLINK, Metadata(Stat(0)), target=b"file"),
    },
)  # fmt: skip
