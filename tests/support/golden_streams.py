"""Whole streams out of the datastore that a real PBS wrote."""

from pathlib import Path

from core.errors import FleeceError
from datastore.blob import Blob
from datastore.codec import ChunkCodec, CryptKey
from datastore.dynamic_index import DynamicIndex

_BATCH = 8


def open_stream(store: Path, path: Path, keys: dict[str, CryptKey]) -> tuple[DynamicIndex, bytes]:
    """The index `path` below `store`, and the whole stream behind it, decrypted with the key of its group."""
    group = path.relative_to(store).parent.parent.as_posix()
    index = DynamicIndex.open(path)
    codec = ChunkCodec(keys.get(group))
    out = bytearray()
    for first in range(0, index.count, _BATCH):
        batch = []
        for number in range(first, min(first + _BATCH, index.count)):
            name = index.digest(number).hex()
            blob = Blob.parse((store / ".chunks" / name[:4] / name).read_bytes(), where=name)
            batch.append((blob, index.digest(number), index.span(number)[1]))
        for chunk in codec.decode_many(batch, crypt_mode=None, where=index.where):
            if isinstance(chunk, FleeceError):
                raise chunk
            out += chunk
    return index, bytes(out)
