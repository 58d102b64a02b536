"""Archive streams out of the datastore that a real PBS wrote, read without Fleece's datastore."""

import tarfile
from functools import lru_cache
from pathlib import Path
from struct import Struct

import zstandard

_ROW = Struct("<Q32s")
_COMPRESSED = bytes([49, 185, 88, 66, 111, 182, 163, 127])
_PLAIN = bytes([66, 171, 56, 7, 190, 131, 112, 161])


@lru_cache(maxsize=1)
def _members(store: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(store) as archive:
        return {member.name.removeprefix("./"): member for member in archive}


def stream(store: Path, path: str) -> bytes:
    """The decoded stream of the dynamic index at `path` in the datastore that `store` holds."""
    members = _members(store)
    parts = []
    with tarfile.open(store) as archive:

        def read(name: str) -> bytes:
            file = archive.extractfile(members[name])
            assert file is not None
            return file.read()

        for _, digest in _ROW.iter_unpack(read(path)[4096:]):
            blob = read(f".chunks/{digest.hex()[:4]}/{digest.hex()}")
            assert blob[:8] in (_COMPRESSED, _PLAIN)
            parts.append(zstandard.decompress(blob[12:]) if blob[:8] == _COMPRESSED else blob[12:])
    return b"".join(parts)
