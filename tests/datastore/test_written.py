"""What a session says it wrote, and what it is told it wrote."""

import pytest

from core.errors import FormatError, UsageError
from datastore.blob import MAX_CHUNK_SIZE, Blob, BlobKind
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group
from datastore.written import WrittenFiles, check_csum, check_extent, named_blob

CODEC = ChunkCodec()
SNAPSHOT = Group.parse("vm/100").at(1000)
BLOB = CODEC.encode_blob(b"name: x")
CSUM = bytes(range(32))


def manifest(size: int = 10, csum: bytes = CSUM, *more: ManifestFile) -> Manifest:
    made = Manifest.new(SNAPSHOT)
    made.add(ManifestFile("disk.img.fidx", CryptMode.NONE, size, csum))
    for file in more:
        made.add(file)
    return made


def written() -> WrittenFiles:
    files = WrittenFiles()
    files.add_index("disk.img.fidx", 10, CSUM)
    files.add_blob("vm.conf.blob", BLOB)
    return files


def test_a_manifest_lists_what_was_written_or_less() -> None:
    (conf,) = [file for name, file in written().items() if name == "vm.conf.blob"]
    whole = manifest(10, CSUM, ManifestFile("vm.conf.blob", CryptMode.NONE, conf.size, conf.csum))
    for one in (manifest(), whole):
        assert written().check_manifest(one.encode(CODEC), SNAPSHOT).files == one.files
    kept = WrittenFiles()
    kept.add_kept(manifest().files[0])
    assert kept.check_manifest(manifest().encode(CODEC), SNAPSHOT).files == manifest().files


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (manifest(11), "disk.img.fidx is not what was stored"),
        (manifest(10, bytes(32)), "disk.img.fidx is not what was stored"),
        (manifest(10, CSUM, ManifestFile("other.blob", CryptMode.NONE, 1, CSUM)), "other.blob is not what was stored"),
        (Manifest.new(Group.parse("vm/101").at(1000)), "that of another snapshot"),
        (Manifest.new(Group.parse("vm/100").at(1001)), "that of another snapshot"),
    ],
)
def test_any_other_manifest_is_refused(wrong: Manifest, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        written().check_manifest(wrong.encode(CODEC), SNAPSHOT)


def test_blobs_are_whole_named_like_blobs_and_not_too_long() -> None:
    assert bytes(named_blob("vm.conf.blob", bytes(BLOB), "x")) == bytes(BLOB)
    with pytest.raises(UsageError, match=r"does not end in \.blob"):
        named_blob("vm.conf.fidx", BLOB, "x")
    with pytest.raises(FormatError, match="CRC"):
        named_blob("vm.conf.blob", bytes(BLOB)[:-1] + b"y", "x")
    with pytest.raises(UsageError, match="a blob has at most"):
        named_blob("vm.conf.blob", Blob.make(BlobKind.PLAIN, bytes(MAX_CHUNK_SIZE + 100)), "x")


def test_who_closes_an_index_must_know_what_is_in_it() -> None:
    check_extent((3, 10), (3, 10), "x")
    check_csum(CSUM, CSUM, "x")
    with pytest.raises(UsageError, match="it has 3 chunks of 10 bytes, announced are 2 of 10"):
        check_extent((3, 10), (2, 10), "x")
    with pytest.raises(UsageError, match=r"its checksum is 00.*, announced is ff"):
        check_csum(CSUM, b"\xff" * 32, "x")
