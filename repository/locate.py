"""Finding one archive of a snapshot and comparing it with the manifest before anything of it is used."""

from dataclasses import dataclass

from core.errors import FormatError
from core.limits import in_cpu_thread
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import KeyNeededError
from datastore.index import ArchiveIndex
from datastore.keyfile import need_key, short_fingerprint
from datastore.manifest import Manifest, ManifestFile
from datastore.names import MANIFEST_NAME
from repository.interface import Reader


@dataclass(frozen=True, slots=True)
class Archive:
    """An index that is what the manifest says, and what is needed to read its chunks."""

    index: ArchiveIndex
    entry: ManifestFile
    zero: bytes | None  #: digest of a full chunk of zeros, None if it cannot be known (no key)

    @property
    def where(self) -> str:
        """The archive for messages."""
        return self.index.where

    def chunk_where(self, number: int) -> str:
        """Chunk `number` for messages: archive, offset and digest."""
        return f"{self.where} at {self.index.span(number)[0]}, chunk {self.index.digest(number).hex()}"


async def load_manifest(reader: Reader, codec: ChunkCodec) -> Manifest:
    """The manifest of the snapshot that `reader` reads, its signature checked if `codec` has a key.

    Raises:
        FormatError, KeyNeededError: as `Manifest.parse`.
    """
    where = f"{reader.snapshot}/{MANIFEST_NAME}"
    return Manifest.parse(await reader.manifest(), where=where, key=codec.key)


async def load_readable(
    reader: Reader, codec: ChunkCodec, *, must_be_signed: bool = False
) -> tuple[Manifest, ChunkCodec]:
    """The manifest of the snapshot that `reader` reads, and a codec that fits: without the key if that is another's.

    Unlike `load_manifest` it serves those who look at snapshots of many keys: the signature is checked if the key is
    the snapshot's; `signature_doubt` tells of what was not.

    Raises:
        FormatError: as `Manifest.parse`; or it `must_be_signed`, as it names the key, but its signature was removed.
    """
    where = f"{reader.snapshot}/{MANIFEST_NAME}"
    raw = await reader.manifest()
    manifest = Manifest.parse(raw, where=where)
    if codec.key is None or manifest.fingerprint not in (None, codec.key.fingerprint):
        return manifest, manifest.codec(None)
    if must_be_signed and manifest.lost_signature and manifest.fingerprint is not None:
        raise FormatError("check the signature of", where, "there is none, although it was made with this key")
    try:
        manifest = Manifest.parse(raw, where=where, key=codec.key)
    except KeyNeededError:
        # It names no key, as those of the first clients: another one's, as far as anybody can say.
        return manifest, manifest.codec(None)
    return manifest, manifest.codec(codec.key)


def signature_doubt(manifest: Manifest, codec: ChunkCodec, given: CryptKey | None) -> str | None:
    """Why the `manifest` may be altered although the key `given` was at hand; `codec` as `load_readable` chose it.

    None if its signature was checked, if there never was one, and without a key.
    """
    if given is None:
        return None
    if manifest.lost_signature:
        return f"{manifest.snapshot} has no signature, although it was made with a key: it may be altered"
    if codec.key is not None or manifest.signature is None:
        return None
    made_with = short_fingerprint(manifest.fingerprint) if manifest.fingerprint is not None else "unknown"
    return (
        f"the signature of {manifest.snapshot} was not checked: it was made with the key {made_with}, "
        f"given is {short_fingerprint(given.fingerprint)}"
    )


async def open_archive(reader: Reader, codec: ChunkCodec, manifest: Manifest, name: str) -> Archive:
    """Open the index `name` (full file name) and compare its size and checksum with the manifest.

    Raises:
        NotFoundError: the manifest does not list it, or the file is gone.
        FormatError: broken, or not what the manifest says.
        KeyNeededError: it is encrypted and `codec` has no key.
    """
    entry = manifest.file(name)
    if entry.crypt_mode is CryptMode.ENCRYPT and codec.key is None:
        raise need_key("read", f"{reader.snapshot}/{name}", manifest.fingerprint, None)
    index = await reader.open_index(name, size=entry.size)
    await check_index(index, entry)
    return Archive(index, entry, zero_digest(codec, entry.crypt_mode))


async def check_index(index: ArchiveIndex, entry: ManifestFile) -> None:
    """Compare `index` with its entry in the manifest.

    Raises:
        FormatError: size or checksum differ.
    """
    if index.size != entry.size:
        raise FormatError("read index", index.where, f"wrong size ({index.size} != {entry.size})")
    if await in_cpu_thread(lambda: index.csum) != entry.csum:
        raise FormatError("read index", index.where, f"wrong index checksum ({index.csum.hex()} != {entry.csum.hex()})")


def zero_digest(codec: ChunkCodec, mode: CryptMode) -> bytes | None:
    """Digest of a full chunk of zeros in an archive of `mode`, None if that needs a key that is not there."""
    if codec.mode is mode:
        return codec.zero_digest()
    if mode is CryptMode.ENCRYPT:
        return None if codec.key is None else ChunkCodec(codec.key, mode).zero_digest()
    return ChunkCodec().zero_digest()
