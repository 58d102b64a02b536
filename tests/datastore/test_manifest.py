import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError, FormatError, NotFoundError, UsageError
from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec, CryptKey, decode_plain, encode_plain
from datastore.crypt_mode import CryptMode
from datastore.errors import KeyNeededError
from datastore.manifest import MAX_MANIFEST_SIZE, Manifest, ManifestFile, canonical_json
from datastore.names import BackupType, Group, Namespace, Snapshot

WHERE = "vm/100/2023-11-14T22:13:20Z/index.json.blob"
KEY = CryptKey.from_raw(bytes(range(32)))
OTHER_KEY = CryptKey.from_raw(bytes(32))
FINGERPRINT = KEY.fingerprint_text
# The worked example of the format.
SIGNATURE = "77a48945ab5fbd102bd098e43f1c2a81d5c3ee698dd285ed8d47a3da1dc0816d"
CANONICAL = (
    '{"backup-id":"100","backup-time":1700000000,"backup-type":"vm","files":['
    f'{{"crypt-mode":"encrypt","csum":"{"a" * 64}","filename":"drive-scsi0.img.fidx","size":8392704}},'
    f'{{"crypt-mode":"encrypt","csum":"{"b" * 64}","filename":"qemu-server.conf.blob","size":50}}]}}'
).encode()


def example() -> Manifest:
    manifest = Manifest.new(Group(BackupType.VM, "100").at(1_700_000_000))
    manifest.add(ManifestFile("drive-scsi0.img.fidx", CryptMode.ENCRYPT, 8_392_704, b"\xaa" * 32))
    manifest.add(ManifestFile("qemu-server.conf.blob", CryptMode.ENCRYPT, 50, b"\xbb" * 32))
    return manifest


def document(**changes: Any) -> dict[str, Any]:
    """The example as others write it, with `changes`; a value of ... removes the key."""
    value = {**json.loads(CANONICAL), "signature": None, "unprotected": {}}
    value.update({name.replace("_", "-"): change for name, change in changes.items()})
    return {name: item for name, item in value.items() if item is not ...}


def stored(value: object) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return bytes(encode_plain(text))


def parse(value: object, key: CryptKey | None = None) -> Manifest:
    return Manifest.parse(stored(value), where=WHERE, key=key)


def text_of(blob: Blob) -> dict[str, Any]:
    return json.loads(decode_plain(bytes(blob), max_size=1 << 20, where=WHERE))  # type: ignore[no-any-return]


# ---- signing ----


def test_worked_example_of_canonical_form_and_signature() -> None:
    assert example().canonical() == CANONICAL
    assert KEY.sign(CANONICAL).hex() == SIGNATURE
    blob = example().encode(ChunkCodec(KEY, CryptMode.ENCRYPT))
    assert text_of(blob)["signature"] == SIGNATURE
    assert text_of(blob)["unprotected"] == {"key-fingerprint": FINGERPRINT}
    assert Manifest.parse(bytes(blob), where=WHERE, key=KEY).signature == SIGNATURE


def test_upstreams_own_vector() -> None:
    import hashlib

    raw = hashlib.scrypt(b"test", salt=b"", n=65536, r=8, p=1, maxmem=128 << 20, dklen=32)
    manifest = Manifest.new(Snapshot.parse("host/elsa/2020-06-26T13:56:05Z"))
    manifest.add(ManifestFile("test1.img.fidx", CryptMode.ENCRYPT, 200, b"\1" * 32))
    manifest.add(ManifestFile("abc.blob", CryptMode.NONE, 200, b"\2" * 32))
    signature = text_of(manifest.encode(ChunkCodec(CryptKey.from_raw(raw), CryptMode.ENCRYPT)))["signature"]
    assert signature == "d7b446fb7db081662081d4b40fedd858a1d6307a5aff4ecff7d5bf4fd35679e9"


@pytest.mark.parametrize("mode", list(CryptMode))
def test_whoever_has_a_key_signs_whatever_the_mode(mode: CryptMode) -> None:
    assert text_of(example().encode(ChunkCodec(KEY, mode)))["signature"] == SIGNATURE


def test_canonical_form_escapes_as_little_as_possible_and_sorts_by_bytes() -> None:
    value = {"b": 'é/"\\\x08\x0c\n\r\t\x01\x1f\x7f', "a": [-1, True, 1 << 63], "\U0001f411": 1, "\uffff": 2, "B": {}}
    text = r'"é/\"\\\b\f\n\r\t\u0001\u001f' + "\x7f"
    expected = '{"B":{},"a":[-1,true,9223372036854775808],"b":' + text + '","\uffff":2,"\U0001f411":1}'
    assert canonical_json(value, where=WHERE) == expected.encode()


@pytest.mark.parametrize("value", [None, 1.5, 1 << 64, -(1 << 63) - 1, float("nan"), ["\ud800"]])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        canonical_json({"x": value}, where=WHERE)


def test_every_change_of_a_signed_manifest_is_found() -> None:
    signed = document(signature=SIGNATURE, unprotected={"key-fingerprint": FINGERPRINT})
    assert parse(signed, KEY).signature == SIGNATURE
    for changes in (
        {"backup_id": "101"},
        {"backup_time": 1_700_000_001},
        {"backup_type": "ct"},
        {"files": signed["files"][:1]},
        {"files": signed["files"][::-1]},
        {"files": [{**signed["files"][0], "size": 1}, signed["files"][1]]},
        {"files": [{**signed["files"][0], "crypt-mode": "none"}, signed["files"][1]]},
        {"extra": "unknown to us"},
        {"signature": "0" * 64},
    ):
        altered = {**signed, **{name.replace("_", "-"): value for name, value in changes.items()}}
        with pytest.raises(FormatError, match=r"cannot check the signature of .*: it does not match"):
            parse(altered, KEY)
        parse(altered)  # without a key nobody can tell


def test_keys_unknown_to_us_are_covered_by_the_signature_and_written_again() -> None:
    value = document(unprotected={"key-fingerprint": FINGERPRINT})
    value["future"] = {"list": [1, "zwei"], "on": True}
    value["files"][0]["more"] = "from a later version"
    del value["files"][1]["crypt-mode"]
    signed = {name: item for name, item in value.items() if name not in ("signature", "unprotected")}
    value["signature"] = KEY.sign(canonical_json(signed, where=WHERE)).hex()
    manifest = parse(value, KEY)
    assert manifest.files[1].crypt_mode is CryptMode.NONE
    again = Manifest.parse(bytes(manifest.with_unprotected({"notes": "x"}).encode()), where=WHERE, key=KEY)
    assert text_of(again.encode()) == {**value, "unprotected": {"key-fingerprint": FINGERPRINT, "notes": "x"}}


def test_an_upper_case_signature_counts() -> None:
    assert parse(document(signature=SIGNATURE.upper()), KEY).files


def test_another_key_is_told_with_both_fingerprints() -> None:
    signed = document(signature=SIGNATURE, unprotected={"key-fingerprint": FINGERPRINT})
    with pytest.raises(
        KeyNeededError, match=f"signed with the key {FINGERPRINT}, given is {OTHER_KEY.fingerprint_text}"
    ):
        parse(signed, OTHER_KEY)


def test_without_a_fingerprint_another_key_does_not_match_either() -> None:
    with pytest.raises(
        KeyNeededError, match=f"names no key, and its signature is not one of {OTHER_KEY.fingerprint_text}"
    ):
        parse(document(signature=SIGNATURE), OTHER_KEY)


@pytest.mark.parametrize("signature", [None, ...])
def test_unsigned_manifests_pass_with_a_key(signature: object) -> None:
    assert parse(document(signature=signature), KEY).signature is None


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({}, True),  # its files are encrypted
        ({"signature": SIGNATURE}, False),
        ({"files": []}, False),
        ({"files": [], "unprotected": {"key-fingerprint": FINGERPRINT}}, True),
        ({"signature": SIGNATURE, "unprotected": {"key-fingerprint": FINGERPRINT}}, False),
    ],
)
def test_a_signature_that_is_missing_where_every_writer_puts_one_is_noticed(
    changes: dict[str, Any], lost: bool
) -> None:
    assert parse(document(**changes)).lost_signature is lost


def test_its_codec_names_the_key_that_is_needed() -> None:
    codec = parse(document(unprotected={"key-fingerprint": FINGERPRINT})).codec(None)
    blob = ChunkCodec(KEY, CryptMode.ENCRYPT).encode(b"x")
    with pytest.raises(KeyNeededError, match=FINGERPRINT):
        codec.decode(blob, digest=None, size=None, crypt_mode=None, where="x")


# ---- writing ----


def test_it_is_written_plain_pretty_sorted_and_compressed() -> None:
    blob = example().encode()
    assert blob.kind is BlobKind.PLAIN_ZSTD
    text = decode_plain(bytes(blob), max_size=1 << 20, where=WHERE).decode()
    assert text == json.dumps(document(), indent=2, sort_keys=True)
    assert '\n  "signature": null,\n  "unprotected": {}\n}' in text
    assert text.startswith('{\n  "backup-id": "100",\n  "backup-time": 1700000000,')


def test_an_encrypted_backups_manifest_is_not_encrypted() -> None:
    assert not example().encode(ChunkCodec(KEY, CryptMode.ENCRYPT)).kind.encrypted


def test_reading_gives_what_was_written() -> None:
    again = Manifest.parse(bytes(example().encode()), where=WHERE)
    assert (again.type, again.id, again.ctime) == (BackupType.VM, "100", 1_700_000_000)
    assert str(again.snapshot) == "vm/100/2023-11-14T22:13:20Z"
    assert again.files == example().files
    assert again.file("qemu-server.conf.blob") == ManifestFile(
        "qemu-server.conf.blob", CryptMode.ENCRYPT, 50, b"\xbb" * 32
    )


def test_the_namespace_is_not_part_of_it() -> None:
    snapshot = Group(BackupType.VM, "100", Namespace.parse("a/b")).at(1_700_000_000)
    assert Manifest.new(snapshot).canonical() == Manifest.new(Group(BackupType.VM, "100").at(1_700_000_000)).canonical()


def test_a_file_that_is_not_listed_is_not_found_and_the_message_says_what_is() -> None:
    with pytest.raises(NotFoundError, match=r"absent\.blob: the snapshot holds drive-scsi0\.img\.fidx, qemu-server"):
        example().file("absent.blob")


@pytest.mark.parametrize(
    "name", ["../x.blob", "a/b.blob", "x", ".hidden.blob", "", ".blob", "index.json.blob", "client.log.blob"]
)
def test_unsafe_or_reserved_names_cannot_be_added(name: str) -> None:
    with pytest.raises(UsageError):
        example().add(ManifestFile(name, CryptMode.NONE, 1, bytes(32)))


def test_a_name_is_listed_once_and_sizes_and_csums_are_possible_ones() -> None:
    with pytest.raises(FleeceError, match="listed already"):
        example().add(ManifestFile("qemu-server.conf.blob", CryptMode.NONE, 1, bytes(32)))
    for size, csum in ((-1, bytes(32)), (1 << 64, bytes(32)), (1, bytes(31))):
        with pytest.raises(FleeceError):
            example().add(ManifestFile("x.blob", CryptMode.NONE, size, csum))


def test_adding_a_file_drops_the_old_signature() -> None:
    manifest = parse(document(signature=SIGNATURE), KEY)
    manifest.add(ManifestFile("x.blob", CryptMode.NONE, 1, bytes(32)))
    assert text_of(manifest.encode())["signature"] is None
    signed = manifest.encode(ChunkCodec(KEY, CryptMode.ENCRYPT))
    assert [file.filename for file in Manifest.parse(bytes(signed), where=WHERE, key=KEY).files][-1] == "x.blob"


# ---- the unprotected part ----


def test_the_unprotected_part_changes_without_touching_the_signature() -> None:
    signed = Manifest.parse(bytes(example().encode(ChunkCodec(KEY, CryptMode.ENCRYPT))), where=WHERE)
    stats = {"count": 3, "size": 8_392_754, "compressed_size": 4321, "duplicates": 1}
    changed = signed.with_unprotected(
        {"notes": "first line\nsecond", "verify_state": {"state": "ok", "upid": "UPID:x"}, "chunk_upload_stats": stats}
    )
    again = Manifest.parse(bytes(changed.encode()), where=WHERE, key=KEY)  # written without the key, still signed
    assert again.notes == "first line\nsecond"
    assert again.verify_state == {"state": "ok", "upid": "UPID:x"}
    assert again.chunk_upload_stats == stats
    assert again.fingerprint == KEY.fingerprint
    assert (signed.notes, signed.verify_state, signed.chunk_upload_stats) == ("", None, None)
    assert again.with_unprotected({"notes": None}).notes == ""


@pytest.mark.parametrize(
    "change", [{"notes": 1}, {"verify_state": "ok"}, {"notes": "\ud800"}, {"x": b"bytes"}, {"key-fingerprint": "zz"}]
)
def test_an_unprotected_value_that_could_not_be_read_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        example().with_unprotected(change)


def test_missing_or_null_parts_count_as_empty() -> None:
    for value in (document(unprotected=...), document(unprotected=None), document(unprotected={"notes": None})):
        manifest = parse(value)
        assert (manifest.unprotected, manifest.notes, manifest.fingerprint) == ({}, "", None)


def test_fingerprints_may_lack_colons_and_be_upper_case() -> None:
    text = KEY.fingerprint.hex().upper()
    assert (
        parse(document(signature=SIGNATURE, unprotected={"key-fingerprint": text}), KEY).fingerprint == KEY.fingerprint
    )


def test_unknown_unprotected_values_of_any_kind_are_kept() -> None:
    value = {"float": 1.5, "null": None, "deep": [{"x": [1, None, 1e300]}], "huge": 1 << 80}
    assert text_of(parse(document(unprotected=value)).encode())["unprotected"] == value


# ---- hostile input ----

FILE = {"filename": "x.fidx", "crypt-mode": "none", "size": 1, "csum": "a" * 64}
NO_CSUM = {name: value for name, value in FILE.items() if name != "csum"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backup_type": ...}, "'backup-type' is none of vm, ct, host"),
        ({"backup_type": "qemu"}, "'backup-type' is none of"),
        ({"backup_type": ["vm"]}, "'backup-type' is none of"),
        ({"backup_id": ...}, "'backup-id' is missing or unsafe"),
        ({"backup_id": 100}, "'backup-id' is missing or unsafe"),
        ({"backup_id": "../../etc"}, "'backup-id' is missing or unsafe"),
        ({"backup_id": "100\n"}, "'backup-id' is missing or unsafe"),
        ({"backup_time": ...}, "'backup-time' is missing or no time"),
        ({"backup_time": "1700000000"}, "'backup-time' is missing or no time"),
        ({"backup_time": 1.7e9}, "'backup-time' is missing or no time"),
        ({"backup_time": True}, "'backup-time' is missing or no time"),
        ({"backup_time": 0}, "'backup-time' is missing or no time"),
        ({"backup_time": 1 << 62}, "'backup-time' is missing or no time"),
        ({"files": ...}, "'files' is missing or no list"),
        ({"files": {}}, "'files' is missing or no list"),
        ({"files": ["x.fidx"]}, "file 0 is no object"),
        ({"files": [FILE, 5]}, "file 1 is no object"),
        ({"files": [{"size": 1}]}, "file 0 has no name"),
        ({"files": [{**FILE, "filename": 5}]}, "file 0 has no name"),
        ({"files": [{**FILE, "filename": "../x.fidx"}]}, "the name of file 0"),
        ({"files": [{**FILE, "filename": "/etc/passwd"}]}, "the name of file 0"),
        ({"files": [{**FILE, "filename": "x.txt"}]}, "the name of file 0"),
        ({"files": [{**FILE, "filename": "x.fidx\0"}]}, "the name of file 0"),
        ({"files": [{**FILE, "filename": "index.json.blob"}]}, "it lists index.json.blob, which no writer does"),
        ({"files": [FILE, FILE]}, "a file is listed twice"),
        ({"files": [{**FILE, "crypt-mode": "rot13"}]}, "x.fidx has an unknown crypt mode"),
        ({"files": [{**FILE, "crypt-mode": None}]}, "x.fidx has an unknown crypt mode"),
        ({"files": [{**FILE, "crypt-mode": {}}]}, "x.fidx has an unknown crypt mode"),
        ({"files": [{**FILE, "size": -1}]}, "the size of x.fidx is missing or no 64-bit number"),
        ({"files": [{**FILE, "size": 1 << 64}]}, "the size of x.fidx is missing or no 64-bit number"),
        ({"files": [{**FILE, "size": 1.0}]}, "the size of x.fidx is missing or no 64-bit number"),
        ({"files": [{**FILE, "size": "1"}]}, "the size of x.fidx is missing or no 64-bit number"),
        ({"files": [{**FILE, "size": False}]}, "the size of x.fidx is missing or no 64-bit number"),
        ({"files": [NO_CSUM]}, "the csum of x.fidx is not 64 hex digits"),
        ({"files": [{**FILE, "csum": "a" * 63}]}, "the csum of x.fidx is not 64 hex digits"),
        ({"files": [{**FILE, "csum": "g" * 64}]}, "the csum of x.fidx is not 64 hex digits"),
        ({"files": [{**FILE, "csum": "a" * 64 + "\n"}]}, "the csum of x.fidx is not 64 hex digits"),
        ({"signature": 5}, "its signature is not 64 hex digits"),
        ({"signature": "abc"}, "its signature is not 64 hex digits"),
        ({"unprotected": []}, "'unprotected' is no object"),
        ({"unprotected": {"notes": ["x"]}}, "'notes' in its unprotected part has the wrong type"),
        ({"unprotected": {"verify_state": "ok"}}, "'verify_state' in its unprotected part has the wrong type"),
        ({"unprotected": {"key-fingerprint": "abc"}}, "'key-fingerprint': 32 pairs of hex digits are needed"),
    ],
)
def test_content_that_no_writer_makes_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as error:
        parse(document(**changes))
    assert str(error.value).startswith(f"cannot read manifest {WHERE}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"[]", "its JSON is no object"),
        (b"null", "its JSON is no object"),
        (b"5", "its JSON is no object"),
        (b'{"files": NaN}', "NaN is no JSON number"),
        (b'{"unprotected": {"x": -Infinity}}', "-Infinity is no JSON number"),
        (b'{"files": [], "files": []}', "a key appears twice"),
        (b'{"a": {"b": 1, "b": 2}}', "a key appears twice"),
        (b'{"x": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"x": "\xff"}', "no valid JSON"),
        (b"\xef\xbb\xbf{}", "no valid JSON"),
        (b'{"x": "\\ud800"}', "a text in it is no Unicode"),
        (b'{"\\udc00": 1}', "a text in it is no Unicode"),
        ('{"files": []}'.encode("utf-16"), "no valid JSON"),
        (b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than 128 levels"),
        (b'{"x": ' + b"[" * 1_000_000, "nested too deep"),
        (b'{"x": ' + b'{"y":' * 100_000, "nested too deep"),
    ],
)
def test_broken_json_is_refused_in_words(text: bytes, message: str) -> None:
    with pytest.raises(FormatError) as error:
        parse(text)
    assert message in str(error.value)


def test_a_signed_null_is_refused_and_an_unsigned_one_is_not() -> None:
    value = document(signature=SIGNATURE)
    value["future"] = None
    assert parse(value).files
    with pytest.raises(FormatError, match="a null or a fraction in its signed part"):
        parse(value, KEY)


def test_an_encrypted_manifest_is_refused() -> None:
    raw = bytes(ChunkCodec(KEY, CryptMode.ENCRYPT).encode(CANONICAL))
    with pytest.raises(FormatError, match="encrypted, and this kind of file never is"):
        Manifest.parse(raw, where=WHERE, key=KEY)


def test_a_manifest_of_absurd_length_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(FormatError, match=f"at most {MAX_MANIFEST_SIZE} are allowed"):
        parse(b" " * (MAX_MANIFEST_SIZE + 1))


def test_a_manifest_of_empty_lists_takes_bounded_memory() -> None:
    """A blob of a kilobyte; every command that lists snapshots reads it."""
    text = b'{"x": [' + b"[]," * ((MAX_MANIFEST_SIZE - 10) // 3) + b"0]}"
    blob = bytes(encode_plain(text))
    assert len(blob) < 2000
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="'backup-type' is none of"):
            Manifest.parse(blob, where="vm/100")
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_every_truncation_and_every_flipped_bit_of_the_stored_blob_is_a_format_error() -> None:
    raw = bytes(example().encode())
    for length in range(len(raw)):
        with pytest.raises(FormatError):
            Manifest.parse(raw[:length], where=WHERE)
    for position in range(len(raw) * 8):
        broken = bytearray(raw)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError):
            Manifest.parse(broken, where=WHERE)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(["backup-type", "backup-id", "backup-time", "files", "signature", "unprotected", "new"]),
        JSON_VALUES,
        max_size=3,
    )
)
def test_any_json_in_any_place_is_read_or_refused(changes: dict[str, Any]) -> None:
    text = json.dumps({**document(), **changes}).encode()
    for key in (None, KEY):
        try:
            manifest = parse(text, key)
        except FormatError:
            continue
        again = Manifest.parse(bytes(manifest.encode()), where=WHERE)
        assert (again.snapshot, again.files, again.signature) == (
            manifest.snapshot,
            manifest.files,
            manifest.signature,
        )


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(
        st.builds(
            ManifestFile,
            st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._\-]{0,12}\.(fidx|didx|blob)", fullmatch=True).filter(
                lambda name: name not in ("index.json.blob", "client.log.blob")
            ),
            st.sampled_from(CryptMode),
            st.integers(0, (1 << 64) - 1),
            st.binary(min_size=32, max_size=32),
        ),
        unique_by=lambda file: file.filename,
        max_size=6,
    ),
    ctime=st.integers(1, 253_402_300_799),
    notes=st.text(max_size=40).filter(bool),
    signed=st.booleans(),
)
def test_any_manifest_goes_round(files: list[ManifestFile], ctime: int, notes: str, signed: bool) -> None:
    manifest = Manifest.new(Group(BackupType.HOST, "a").at(ctime))
    for file in files:
        manifest.add(file)
    try:
        manifest = manifest.with_unprotected({"notes": notes})
    except FormatError:
        assert any("\ud800" <= letter <= "\udfff" for letter in notes)
        return
    codec = ChunkCodec(KEY, CryptMode.SIGN_ONLY) if signed else ChunkCodec()
    again = Manifest.parse(bytes(manifest.encode(codec)), where=WHERE, key=KEY)
    assert (again.files, again.ctime, again.notes, again.signature is not None) == (files, ctime, notes, signed)
