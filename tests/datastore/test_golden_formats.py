"""The formats against a datastore that a real PBS wrote."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import FleeceError, FormatError
from datastore.blob import Blob
from datastore.codec import ChunkCodec, CryptKey, decode_plain
from datastore.crypt_mode import CryptMode
from datastore.digests import DigestSet
from datastore.dynamic_index import DynamicIndex, DynamicIndexWriter
from datastore.errors import CorruptChunkError, KeyNeededError
from datastore.fixed_index import FixedIndex, FixedIndexWriter
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest
from datastore.names import MANIFEST_NAME, MASTER_KEY_NAME, ArchiveKind, archive_kind
from tests.support.stores import chunk_files

Expected = dict[str, dict[str, Any]]


def key_of(keys: dict[str, CryptKey], snapshot: str) -> CryptKey | None:
    return keys.get(snapshot.rpartition("/")[0])


def open_index(path: Path) -> FixedIndex | DynamicIndex:
    kind: type[FixedIndex] | type[DynamicIndex] = FixedIndex if path.suffix == ".fidx" else DynamicIndex
    return kind.open(path)


def read_chunk(store: Path, digest: bytes) -> Blob:
    name = digest.hex()
    return Blob.parse((store / ".chunks" / name[:4] / name).read_bytes(), where=name)


def archives(expected: Expected) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for snapshot, files in expected.items():
        for name, file in files.items():
            yield snapshot, name, file


def decoded(store: Path, index: ArchiveIndex, codec: ChunkCodec, mode: CryptMode) -> Iterator[bytes]:
    """The archive's chunks in order, in batches as the pipelines read them."""
    for first in range(0, index.count, 8):
        numbers = range(first, min(first + 8, index.count))
        batch = [
            (read_chunk(store, index.digest(number)), index.digest(number), index.span(number)[1]) for number in numbers
        ]
        for chunk in codec.decode_many(batch, crypt_mode=mode, where=index.where):
            assert not isinstance(chunk, FleeceError), chunk
            yield bytes(chunk)


def test_every_index_has_the_csum_size_and_number_of_chunks_that_pbs_says(
    golden_store: Path, expected: Expected
) -> None:
    seen = 0
    for snapshot, name, file in archives(expected):
        if archive_kind(name) is ArchiveKind.BLOB:
            continue
        index = open_index(golden_store / snapshot / name)
        digests = {index.digest(number) for number in range(index.count)}
        assert (index.size, index.csum.hex(), index.count, len(digests)) == (
            file["size"],
            file["csum"],
            file["chunks"],
            file["distinct-chunks"],
        )
        assert index.header.csum == index.csum
        known = DigestSet()
        known.add_index(index)
        assert len(known) == len(digests)
        seen += 1
    assert seen == 32


def test_every_manifest_lists_what_pbs_says_and_its_signature_matches(
    golden_store: Path, expected: Expected, golden_keys: dict[str, CryptKey]
) -> None:
    signed = 0
    for snapshot, files in expected.items():
        key = key_of(golden_keys, snapshot)
        raw = (golden_store / snapshot / MANIFEST_NAME).read_bytes()
        manifest = Manifest.parse(raw, where=snapshot, key=key)
        assert snapshot.endswith(str(manifest.snapshot))
        assert {file.filename: (file.size, file.csum.hex(), file.crypt_mode.value) for file in manifest.files} == {
            name: (file["size"], file["csum"], file["crypt-mode"]) for name, file in files.items()
        }
        assert (manifest.signature is not None) == (key is not None)
        assert manifest.fingerprint == (key.fingerprint if key else None)
        assert manifest.verify_state is not None
        assert manifest.verify_state["state"] == "ok"
        assert manifest.chunk_upload_stats is not None
        if key is not None:
            signed += 1
            with pytest.raises(FleeceError, match="is signed with the key"):
                Manifest.parse(raw, where=snapshot, key=CryptKey.from_raw(bytes(32)))
            # Signed by us, the signature is the same.
            again = Manifest.parse(bytes(manifest.encode(ChunkCodec(key, CryptMode.ENCRYPT))), where=snapshot, key=key)
            assert again.signature == manifest.signature
    assert signed == 4


def test_what_we_write_again_is_what_pbs_wrote(golden_store: Path, expected: Expected) -> None:
    """The same JSON to the last byte: PBS's key order, indent and escapes."""
    for snapshot in expected:
        raw = (golden_store / snapshot / MANIFEST_NAME).read_bytes()
        ours = decode_plain(bytes(Manifest.parse(raw, where=snapshot).encode()), max_size=1 << 20, where=snapshot)
        assert ours == decode_plain(raw, max_size=1 << 20, where=snapshot)


def test_every_chunk_decodes_to_its_digest_and_archives_have_their_content(
    golden_store: Path, expected: Expected, golden_keys: dict[str, CryptKey]
) -> None:
    contents = 0
    for snapshot, name, file in archives(expected):
        if archive_kind(name) is ArchiveKind.BLOB:
            continue
        index = open_index(golden_store / snapshot / name)
        state, size = hashlib.sha256(), 0
        codec = ChunkCodec(key_of(golden_keys, snapshot))
        for chunk in decoded(golden_store, index, codec, CryptMode(file["crypt-mode"])):
            state.update(chunk)
            size += len(chunk)
        assert size == file["size"]
        if "content-sha256" in file:
            assert state.hexdigest() == file["content-sha256"]
            contents += 1
    assert contents == 25


def test_every_chunk_in_the_store_belongs_to_its_name(golden_store: Path, golden_keys: dict[str, CryptKey]) -> None:
    """Each chunk passes with one of the keys or without; encrypted and plain ones are never taken for each other."""
    codecs = [ChunkCodec(key) for key in {key.fingerprint: key for key in golden_keys.values()}.values()]
    encrypted = 0
    for path in chunk_files(golden_store):
        digest = bytes.fromhex(path.name)
        blob = Blob.parse(path.read_bytes(), where=path.name)
        encrypted += blob.kind.encrypted
        passed = 0
        for codec in codecs:
            try:
                data = codec.decode(blob, digest=digest, size=None, crypt_mode=None, where=path.name)
            except CorruptChunkError:
                continue
            passed += 1
            plain_digest = hashlib.sha256(data).digest()
            assert (plain_digest == digest) != blob.kind.encrypted
        assert passed == (1 if blob.kind.encrypted else len(codecs))
        if blob.kind.encrypted:
            with pytest.raises(KeyNeededError):
                ChunkCodec().decode(blob, digest=digest, size=None, crypt_mode=None, where=path.name)
    assert encrypted > 5


def test_our_encoding_of_the_same_chunks_decodes_to_the_same(
    golden_store: Path, expected: Expected, golden_keys: dict[str, CryptKey]
) -> None:
    for snapshot, name in (
        ("host/enc/2026-01-01T00:00:00Z", "root.mpxar.didx"),
        ("vm/100/2026-01-01T00:00:00Z", "drive-scsi1.img.fidx"),
    ):
        mode = CryptMode(expected[snapshot][name]["crypt-mode"])
        codec = ChunkCodec(key_of(golden_keys, snapshot), mode)
        index = open_index(golden_store / snapshot / name)
        for number, chunk in enumerate(decoded(golden_store, index, codec, mode)):
            assert codec.digest(chunk) == index.digest(number)
            blob = Blob.parse(bytes(codec.encode(chunk)), where="ours")
            assert blob.kind is read_chunk(golden_store, index.digest(number)).kind
            again = codec.decode(blob, digest=index.digest(number), size=len(chunk), crypt_mode=mode, where="ours")
            assert bytes(again) == chunk


def test_our_index_of_the_same_chunks_is_the_same_file(golden_store: Path, expected: Expected, tmp_path: Path) -> None:
    for snapshot, name, file in archives(expected):
        path, ours = golden_store / snapshot / name, tmp_path / "ours"
        writer: FixedIndexWriter | DynamicIndexWriter
        if path.suffix == ".fidx":
            fixed = FixedIndex.open(path)
            header = fixed.header
            writer = FixedIndexWriter(ours, fixed.size, fixed.chunk_size, ctime=header.ctime, index_uuid=header.uuid)
            writer.set_many((number, fixed.digest(number)) for number in reversed(range(fixed.count)))
        elif path.suffix == ".didx":
            dynamic = DynamicIndex.open(path)
            writer = DynamicIndexWriter(ours, ctime=dynamic.header.ctime, index_uuid=dynamic.header.uuid)
            for number in range(dynamic.count):
                writer.append(*dynamic.span(number), dynamic.digest(number))
        else:
            continue
        assert writer.close().hex() == file["csum"]
        assert ours.read_bytes() == path.read_bytes()


def test_blobs_are_the_files_that_the_manifest_says_and_decode_to_their_content(
    golden_store: Path, expected: Expected, golden_keys: dict[str, CryptKey]
) -> None:
    seen = []
    for snapshot, name, file in archives(expected):
        if archive_kind(name) is not ArchiveKind.BLOB:
            continue
        raw = (golden_store / snapshot / name).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (file["size"], file["csum"])
        codec = ChunkCodec(key_of(golden_keys, snapshot))
        # The master key's blob is listed as encrypted and is plain: it is RSA that protects it.
        mode = CryptMode.NONE if name == MASTER_KEY_NAME else CryptMode(file["crypt-mode"])
        data = codec.decode_blob(raw, crypt_mode=mode, where=name)
        if "content-sha256" in file:
            assert hashlib.sha256(data).hexdigest() == file["content-sha256"]
        if mode is CryptMode.ENCRYPT:
            with pytest.raises(KeyNeededError):
                ChunkCodec().decode_blob(raw, crypt_mode=mode, where=name)
        seen.append(name)
    assert sorted(seen) == ["note.conf.blob", "qemu-server.conf.blob", "qemu-server.conf.blob", MASTER_KEY_NAME]


def test_client_logs_are_blobs_as_well(golden_store: Path, golden_keys: dict[str, CryptKey]) -> None:
    for path in golden_store.rglob("client.log.blob"):
        snapshot = path.parent.relative_to(golden_store).as_posix()
        codec = ChunkCodec(key_of(golden_keys, snapshot))
        assert codec.decode_blob(path.read_bytes(), crypt_mode=None, where=str(path))


def test_the_larger_indexes_have_their_csums_too(golden: Path) -> None:
    folder = golden / "bulk"
    bulk: Expected = json.loads((folder / "expected.json").read_text())
    for snapshot, name, file in archives(bulk):
        index = open_index(folder / snapshot / name)
        assert (index.size, index.csum.hex(), index.count) == (file["size"], file["csum"], file["chunks"])
    for snapshot in bulk:
        manifest = Manifest.parse((folder / snapshot / MANIFEST_NAME).read_bytes(), where=snapshot)
        assert {file.filename for file in manifest.files} == set(bulk[snapshot])


@pytest.mark.parametrize("name", ["drive-scsi1.img.fidx", MANIFEST_NAME, "qemu-server.conf.blob"])
def test_every_truncation_of_a_real_file_is_a_format_error(golden_store: Path, name: str) -> None:
    raw = (golden_store / "vm/100/2026-01-01T00:00:00Z" / name).read_bytes()
    for length in range(len(raw)):
        with pytest.raises(FormatError):
            if name == MANIFEST_NAME:
                Manifest.parse(raw[:length], where=name)
            elif name.endswith(".fidx"):
                FixedIndex.from_bytes(raw[:length], where=name)
            else:
                ChunkCodec().decode_blob(raw[:length], crypt_mode=CryptMode.NONE, where=name)
