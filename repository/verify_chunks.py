"""What verify does with one file and its chunks: look, look again, repair, set aside; what a run has seen so far."""

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, FormatError
from core.limits import in_cpu_thread
from core.progress import Progress, Task
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.digests import DigestSet
from datastore.errors import ChunkNotFoundError, KeyNeededError
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest, ManifestFile
from datastore.names import ArchiveKind, Snapshot, archive_kind
from datastore.s3.errors import S3BackendError, S3BudgetError
from repository.fetch import fetch
from repository.findings import Lines, is_system_error
from repository.interface import BlockingReads, ChunkRepairer, OriginReads, Reader, VerifyRecorder
from repository.locate import Archive, check_index

#: Chunks in a row that the system cannot read before the run stops: it is the disk, not the chunks.
MAX_SYSTEM_ERRORS: Final = 20
#: Chunks in a row that come from afar wrong, or not at all, before the run stops: it is the store (R43).
MAX_BAD_IN_A_ROW: Final = 20


@dataclass(slots=True)
class Seen:
    """Chunks that one run has checked already."""

    plain: DigestSet = field(default_factory=DigestSet)  #: good ones
    encrypted: DigestSet = field(default_factory=DigestSet)  #: good ones; none of them is what a plain archive needs
    bad: dict[bytes, str] = field(default_factory=dict)  #: digest -> what is wrong with it
    set_aside: dict[bytes, str] = field(default_factory=dict)  #: digest -> name it has now
    system_errors: int = 0  #: in a row
    bad_in_a_row: int = 0  #: from afar
    #: Corrupt chunks from afar, with what sets each aside: once a sound one has come, or at the end.
    waiting: dict[bytes, Callable[[], Awaitable[object]]] = field(default_factory=dict)
    bytes: int = 0  #: plain bytes of chunks read

    def good(self, *, encrypted: bool) -> DigestSet:
        """Chunks of that kind which are right."""
        return self.encrypted if encrypted else self.plain


async def set_waiting_aside(seen: Seen) -> None:
    """Set aside the corrupt chunks that waited for this: it is them, not the store."""
    while seen.waiting:
        _, set_aside = seen.waiting.popitem()
        await set_aside()


@dataclass(slots=True)
class Record:
    """Writes down what is found about one snapshot."""

    recorder: VerifyRecorder
    snapshot: Snapshot
    upid: str
    written: str = ""  #: the state that the manifest has from us
    _writing: trio.Lock = field(default_factory=trio.Lock)

    async def state(self, state: str) -> None:
        """Record `ok` or `failed`; errors as `VerifyRecorder.record_verification`."""
        async with self._writing:  # several chunks are counted at the same time
            if self.written != state:
                await self.recorder.record_verification(self.snapshot, state, self.upid)
                self.written = state

    async def set_aside(self, digest: bytes, wrong: Callable[[Blob], bool]) -> str | None:
        """Set a chunk aside; before that the snapshot counts as failed, so that a crash leaves no base without it."""
        await self.state("failed")
        return await self.recorder.quarantine(digest, wrong)


@dataclass(slots=True)
class Check:
    """Checks the files of one snapshot."""

    reader: Reader
    codec: ChunkCodec
    manifest: Manifest
    progress: Progress
    seen: Seen
    record: Record | None = None
    part: Callable[[bytes], bool] | None = None

    async def file(self, entry: ManifestFile) -> list[str]:
        """What is wrong with one file."""
        try:
            if archive_kind(entry.filename) is ArchiveKind.BLOB:
                await self._blob(entry)
                return []
            index = await self.reader.open_index(entry.filename, size=entry.size)
            await check_index(index, entry)
        except FleeceError as error:
            return [str(error)]
        return await self._chunks(index, entry)

    async def _blob(self, entry: ManifestFile) -> None:
        where = f"{self.reader.snapshot}/{entry.filename}"
        raw = await self.reader.read_blob(entry.filename, limit=entry.size)
        if len(raw) != entry.size:
            raise FormatError("verify", where, f"wrong size ({len(raw)} != {entry.size})")

        def check() -> None:
            csum = hashlib.sha256(raw).digest()
            if csum != entry.csum:
                raise FormatError("verify", where, f"wrong checksum ({csum.hex()} != {entry.csum.hex()})")
            # Without the key the CRC, which is looked at first, is all that can be said.
            with suppress(KeyNeededError):
                self.codec.decode_blob(raw, crypt_mode=None, where=where)

        await in_cpu_thread(check)

    async def _chunks(self, index: ArchiveIndex, entry: ManifestFile) -> list[str]:
        archive = Archive(index, entry, None)
        errors = Lines(index.where)
        encrypted = entry.crypt_mode is CryptMode.ENCRYPT
        numbers = list(self._unseen(index, self.seen.good(encrypted=encrypted), errors))
        total = sum(index.span(number)[1] for number in numbers)
        with self.progress.task(f"{self.reader.snapshot}/{entry.filename}", total) as task:

            async def consume(number: int, data: Buffer | FleeceError) -> None:
                await self._count(archive, number, data, errors, task)

            await fetch(self.reader, self.codec, archive, numbers, consume)
        return errors.all()

    def _unseen(self, index: ArchiveIndex, good: DigestSet, errors: Lines) -> Iterator[int]:
        """Numbers of chunks that are to be read, each digest once; known faults go to `errors`."""
        here: dict[bytes, int] = {}
        for number in range(index.count):
            digest, (offset, length) = index.digest(number), index.span(number)
            if self.part is not None and not self.part(digest):
                continue
            size = good.size_of(digest)
            if size is None:
                size = here.get(digest)
            if size is None and digest not in self.seen.bad:
                here[digest] = length
                yield number
            elif size is None:
                errors.add(f"{index.where} at {offset}: {self.seen.bad[digest]}")
            elif size != length:
                errors.add(f"{index.where} at {offset}: chunk {digest.hex()} has {size} bytes, not {length}")

    async def _count(
        self, archive: Archive, number: int, data: Buffer | FleeceError, errors: Lines, task: Task
    ) -> None:
        digest, (_, length) = archive.index.digest(number), archive.index.span(number)
        task.advance(length)
        self.seen.bytes += length
        encrypted = archive.entry.crypt_mode is CryptMode.ENCRYPT
        good = self.seen.good(encrypted=encrypted)
        if not isinstance(data, FleeceError) or (isinstance(data, KeyNeededError) and encrypted):
            self.seen.system_errors = 0
            good.add(digest, length)
            await self._store_is_sound()
            return
        if isinstance(data, S3BackendError | S3BudgetError):
            raise data  # nothing in the bucket can be read, which says nothing about the chunk (R43)
        if isinstance(data, FormatError | ChunkNotFoundError):
            again = await self._look_again(archive, number, data)
            if again is None:
                good.add(digest, length)
                await self._store_is_sound()
                return
            data = again
            self._count_bad(data)
        if errors.add(str(data)):
            self.progress.log(str(data))
        if is_system_error(data):
            # Not remembered as bad: the next snapshot that has it asks again.
            self.seen.system_errors += 1
            if self.seen.system_errors >= MAX_SYSTEM_ERRORS:
                raise FleeceError(
                    "verify",
                    str(self.reader.snapshot),
                    f"{MAX_SYSTEM_ERRORS} chunks in a row could not be read, the last one: {data.why}",
                    "look after the disk or the rights first",
                ) from data
            return
        self.seen.system_errors = 0
        if digest not in self.seen.plain and digest not in self.seen.encrypted:
            self.seen.bad[digest] = data.why

    @property
    def _from_afar(self) -> bool:
        """Chunks come from a bucket, with a cache in front."""
        here = isinstance(self.reader, BlockingReads) and self.reader.reads_block_briefly
        return isinstance(self.reader, OriginReads) and not here

    async def _store_is_sound(self) -> None:
        """A good chunk has come."""
        self.seen.bad_in_a_row = 0
        await set_waiting_aside(self.seen)

    def _count_bad(self, data: FleeceError) -> None:
        """Stop if a store far away gives nothing but wrong chunks: then nothing is set aside."""
        if not self._from_afar or not isinstance(data, FormatError | ChunkNotFoundError):
            return
        self.seen.bad_in_a_row += 1
        if self.seen.bad_in_a_row > MAX_BAD_IN_A_ROW:
            self.seen.waiting.clear()
            raise FleeceError(
                "verify",
                str(self.reader.snapshot),
                f"{self.seen.bad_in_a_row} chunks in a row are missing or wrong, the last one: {data.why}",
                "none of them was set aside; is it the right bucket, and does the provider have a problem?",
            ) from data

    async def _look_again(
        self, archive: Archive, number: int, first: FormatError | ChunkNotFoundError
    ) -> FleeceError | None:
        """Read a chunk that is wrong or missing a second time, and set it aside if it is wrong again.

        Returns:
            what is wrong, None if it is right now. A chunk that only does not fit its archive (encrypted or not, its
            length) is good in itself.
        """
        digest, (_, length) = archive.index.digest(number), archive.index.span(number)
        where = archive.chunk_where(number)
        try:
            blob = await self.reader.read_chunk(digest)
        except ChunkNotFoundError as error:
            if await self._repaired(digest, where):
                return None
            return ChunkNotFoundError("read", where, error.why)
        except FormatError:
            if await self._repaired(digest, where):
                return None
            return await self._set_aside(digest, first)
        except FleeceError as error:
            return error
        size = await in_cpu_thread(self._plain_size, blob, digest)
        if size is None:
            if await self._repaired(digest, where):
                return None
            return await self._set_aside(digest, first)
        mode = archive.entry.crypt_mode
        if size in (0, length) and blob.kind.encrypted is (mode is CryptMode.ENCRYPT):
            self.progress.warn(f"{where} was wrong at the first look ({first.why}) and right at the second")
            return None
        self.seen.good(encrypted=blob.kind.encrypted).add(digest, size or length)
        return first

    async def _repaired(self, digest: bytes, where: str) -> bool:
        """Try to put a good copy of the chunk in its place, where there may be one (R42)."""
        if self.record is None or not isinstance(self.record.recorder, ChunkRepairer):
            return False
        try:
            if not await self.record.recorder.repair(digest, partial(self._is_wrong, digest)):
                return False
        except FleeceError as failure:
            self.progress.warn(str(failure))
            return False
        self.progress.warn(f"{where} was missing or corrupt, and is repaired from another copy")
        return True

    def _plain_size(self, blob: Blob, digest: bytes) -> int | None:
        """Plain bytes of the chunk, 0 if only its key tells; None if it is wrong."""
        try:
            return len(self.codec.decode(blob, digest=digest, size=None, crypt_mode=None, where=digest.hex()))
        except KeyNeededError:
            return 0
        except FleeceError:
            return 0 if self._may_be_another_key(blob) else None

    def _may_be_another_key(self, blob: Blob) -> bool:
        """True if the chunk is whole, and nothing says that our key is the one it was encrypted with."""
        try:
            blob.check(where="")
        except FormatError:
            return False
        key = self.codec.key
        return blob.kind.encrypted and (key is None or self.manifest.fingerprint != key.fingerprint)

    async def _set_aside(self, digest: bytes, error: FleeceError) -> FleeceError:
        if self.record is None:
            return error
        if self._from_afar:
            try:
                await self.record.state("failed")
            except (S3BackendError, S3BudgetError):
                raise
            except FleeceError as failure:
                # Nobody may take it for an error of reading the snapshot, which would then count as skipped.
                self.progress.warn(str(failure))
                return error
            self.seen.waiting[digest] = partial(self._set_aside_now, digest)
            return error
        name = await self._set_aside_now(digest)
        if name is None:
            return error
        return type(error)(error.what, error.where, f"{error.why}; the chunk is set aside as {name}", error.hint)

    async def _set_aside_now(self, digest: bytes) -> str | None:
        assert self.record is not None
        # The chunk's lock is held for a last look: a backup may have stored it anew since.
        wrong = partial(self._is_wrong, digest)
        try:
            name = await self.record.set_aside(digest, wrong)
        except FleeceError as failure:
            self.progress.warn(str(failure))
            return None
        if name is not None:
            self.seen.set_aside[digest] = name
            if self._from_afar:
                self.progress.log(f"the corrupt chunk {digest.hex()} is set aside as {name}")
        return name

    def _is_wrong(self, digest: bytes, blob: Blob) -> bool:
        return self._plain_size(blob, digest) is None
