"""Trees whose archives are known byte for byte."""

from pxar.format import Kind
from pxar.metadata import NO_PERMISSIONS, Acl, DefaultAcl, Metadata, Stat
from tests.pxar.archives import Item, item

T = 1_700_000_000
OURS = (1000, 1000)


def example() -> Item:
    """The tree of the worked examples."""
    folder = {
        b"a.txt": item(0o100644, ids=OURS, mtime=(T + 2, 0), content=b"hello\n"),
        b"b.txt": item(0o100644, ids=OURS, mtime=(T + 3, 0), content=b"world!\n"),
    }
    root = {
        b"d": item(0o040755, ids=OURS, mtime=(T + 1, 500), children=folder),
        b"h": Item(Kind.HARDLINK, Metadata(Stat(0)), target=b"d/a.txt"),
        b"s": item(0o120777, ids=OURS, mtime=(T + 4, 0), target=b"d/b.txt"),
    }
    return item(0o040755, ids=OURS, mtime=(T, 0), children=root)


def every_kind() -> Item:
    """A tree with an entry of each kind and an attribute of each."""
    acl = Acl(((1002, 6), (1003, 4)), ((50, 5),), 4)
    caps = bytes.fromhex("0100000200200000000000000000000000000000")
    file = Metadata(
        Stat(0o100640, 0x420000, 1000, 1001, -2, 500_000_000), ((b"user.a", b"1"), (b"user.b", b"")), acl, caps, 7
    )
    folder = item(0o040750, children={b"f": Item(Kind.FILE, file, b"x")})
    default = Acl(default=DefaultAcl(7, 5, 0, NO_PERMISSIONS), default_users=((1002, 7),), default_groups=((50, 1),))
    folder.metadata = Metadata(folder.metadata.stat, acl=default)
    children = {
        b"acl": folder,
        b"blk": item(0o060660, device=(8, 17)),
        b"chr": item(0o020600, device=(0xABCD1234, 0xDCBA5678)),
        b"fifo": item(0o010600),
        b"sock": item(0o140700),
    }
    children |= {b"n%d" % number: item(0o100600) for number in range(10)}
    return item(0o041777, children=children)
