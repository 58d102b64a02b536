"""Checks of uploaded chunks, in batches: digests of many side by side cost a fraction of one after the other."""

from collections import deque
from dataclasses import dataclass, replace
from typing import Final

import trio
from trio.lowlevel import ParkingLot, RunVar

from core.errors import FleeceError
from core.limits import cpu_count, in_cpu_thread
from datastore.blob import Blob
from datastore.checksums import crc32
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode

#: Chunks, and their plain bytes, that one thread takes at a time.
BATCH: Final = 16
BATCH_BYTES: Final = 64 << 20
#: Chunks that are worth waiting for, and seconds that the first of them waits: less than the pair saves.
COMPANY: Final = 2
LINGER_S: Final = 0.02


@dataclass(slots=True, eq=False)
class _Item:
    blob: Blob
    digest: bytes
    size: int
    result: Blob | FleeceError | None = None
    waits: bool = True  #: for somebody to check it; False: it is in a batch


class ChunkChecker:
    """Takes chunks of all sessions; at most one batch per core is at work."""

    def __init__(self) -> None:
        self._waiting: deque[_Item] = deque()
        self._workers: Final = trio.Semaphore(cpu_count())
        self._done: Final = ParkingLot()  # of those whose chunk is in somebody else's batch
        self._came: Final = ParkingLot()  # of the one that waits for company
        self._under_way = 0
        #: Whoever sends one chunk after the other, and waits for each answer, is not made to wait for company.
        self._several = False
        self._codec: Final = ChunkCodec()

    async def check(self, blob: Blob, digest: bytes, size: int) -> Blob:
        """The blob with its CRC computed anew, if it is the chunk `digest` of `size` plain bytes.

        Of an encrypted one nothing else can be checked.

        Raises:
            FormatError: it cannot be decoded, or length or digest differ.
        """
        item = _Item(blob, digest, size)
        self._waiting.append(item)
        self._several = self._under_way > 0
        self._under_way += 1
        self._came.unpark_all()
        try:
            while item.result is None:
                if not item.waits:
                    await self._done.park()
                    continue
                async with self._workers:
                    if item.waits and self._several and len(self._waiting) < COMPANY:
                        with trio.move_on_after(LINGER_S):
                            await self._came.park()
                    if item.waits:
                        await self._work()
        except BaseException:
            if item.waits:
                self._waiting.remove(item)
            raise
        finally:
            self._under_way -= 1
        if isinstance(item.result, FleeceError):
            raise item.result
        return item.result

    async def _work(self) -> None:
        """Do one batch, of those who have waited longest."""
        batch: list[_Item] = []
        total = 0
        while self._waiting and len(batch) < BATCH and (not batch or total + self._waiting[0].size <= BATCH_BYTES):
            total += self._waiting[0].size
            item = self._waiting.popleft()
            item.waits = False
            batch.append(item)
        try:
            await in_cpu_thread(self._run, batch)
        finally:
            # Cancelled before the thread began: others do it.
            for item in reversed(batch):
                if item.result is None:
                    item.waits = True
                    self._waiting.appendleft(item)
            self._done.unpark_all()

    def _run(self, batch: list[_Item]) -> None:
        plain: list[tuple[_Item, Blob]] = []
        for item in batch:
            # PBS repairs a wrong CRC silently, too: the digest is what counts.
            blob = replace(item.blob, crc=crc32(item.blob.payload))
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
