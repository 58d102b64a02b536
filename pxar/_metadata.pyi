from collections.abc import Sequence

from pxar.filesystem import Opened, Scanned, Seen

def scan(
    dir_fd: int, names: Sequence[bytes], features: int, types: bytes | None, skip_e2big: bool, /
) -> list[Scanned | int]: ...
def scan_tree(
    dir_fd: int,
    names: Sequence[bytes],
    features: int,
    skip_e2big: bool,
    dev: int,
    limit: int,
    last: bytes,
    helpers: int,
    /,
) -> tuple[list[Seen], list[tuple[int, int]]]: ...
def open_entry(dir_fd: int, name: bytes, features: int, type: int, skip_e2big: bool, /) -> Opened | int: ...
def describe(fd: int, features: int, skip_e2big: bool, /) -> Scanned | int: ...
def list_folder(fd: int, /) -> tuple[list[bytes], bytes]: ...
def filesystem_type(fd: int, /) -> int: ...
