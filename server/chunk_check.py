"""Checks of uploaded chunks, in batches: digests of many side by side cost a fraction of one after the other."""

from collections import deque
from dataclasses import dataclass, replace
from typing import Final

import trio
from isal import isal_zlib
from trio.lowlevel import RunVar

from core.errors import FleeceError
from core.limits import cpu_count, in_cpu_thread
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode

#: Chunks, and their plain bytes, that one thread takes at a time.
BATCH: Final = 16
BATCH_BYTES: Final = 64 << 20


@dataclass(slots=True, eq=False)
class _Item:
    blob: Blob
    digest: bytes
    size: int
    result: Blob | FleeceError | None = None


class ChunkChecker:
    """Takes chunks of all sessions; at most one batch per core is at work."""

    def __init__(self) -> None:
        self._waiting: deque[_Item] = deque()
        self._workers: Final = trio.Semaphore(cpu_count())
        self._codec: Final = ChunkCodec()

    async def check(self, blob: Blob, digest: bytes, size: int) -> Blob:
        """The blob with its CRC computed anew, if it is the chunk `digest` of `size` plain bytes.

        Of an encrypted one nothing else can be checked.

        Raises:
            FormatError: it cannot be decoded, or length or digest differ.
        """
        item = _Item(blob, digest, size)
        self._waiting.append(item)
        try:
            async with self._workers:
                if item.result is None:
                    await self._work()
        except BaseException:
            if item.result is None and item in self._waiting:
                self._waiting.remove(item)
            raise
        if isinstance(item.result, FleeceError):
            raise item.result
        assert item.result is not None
        return item.result

    async def _work(self) -> None:
        """Do one batch; the caller's own item is among the first or was done meanwhile."""
        batch: list[_Item] = []
        total = 0
        while self._waiting and len(batch) < BATCH and (not batch or total + self._waiting[0].size <= BATCH_BYTES):
            total += self._waiting[0].size
            batch.append(self._waiting.popleft())
        try:
            await in_cpu_thread(self._run, batch)
        finally:
            # Cancelled before the thread began: others do it.
            self._waiting.extendleft(reversed([item for item in batch if item.result is None]))

    def _run(self, batch: list[_Item]) -> None:
        plain: list[tuple[_Item, Blob]] = []
        for item in batch:
            # PBS repairs a wrong CRC silently, too: the digest is what counts.
            blob = replace(item.blob, crc=isal_zlib.crc32(item.blob.payload))
            if blob.kind.encrypted:
                item.result = blob
            else:
                plain.append((item, blob))
        decoded = self._codec.decode_many(
            [(blob, item.digest, item.size) for item, blob in plain], crypt_mode=CryptMode.NONE, where="upload"
        )
        for (item, blob), result in zip(plain, decoded, strict=True):
            item.result = result if isinstance(result, FleeceError) else blob


_checker: RunVar[ChunkChecker] = RunVar("chunk checker")


def chunk_checker() -> ChunkChecker:
    """The one of this trio loop."""
    try:
        return _checker.get()
    except LookupError:
        _checker.set(ChunkChecker())
        return _checker.get()
