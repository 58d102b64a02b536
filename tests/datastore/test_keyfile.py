import base64
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import FleeceError, FormatError, NotFoundError, UsageError
from datastore.codec import CryptKey
from datastore.errors import KeyNeededError, PassphraseError
from datastore.keyfile import (
    KeyFile,
    Pbkdf2,
    Scrypt,
    need_key,
    read_key_file,
    short_fingerprint,
    wrap_key,
)
from datastore.private_files import MAX_KEY_FILE_SIZE

# On a busy machine the first text that hypothesis makes takes seconds.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
RAW = bytes(range(32))
KEY = CryptKey.from_raw(RAW)
FINGERPRINT = "0e:ab:d4:46:0b:6e:b9:ca:34:50:23:de:e2:b7:78:c7:90:e5:4a:16:83:b9:65:9c:0a:57:ae:19:90:90:15:9b"
PASSPHRASE = b"fleece-pass"
SALT = b"\x11" * 32
SALT_TEXT = base64.b64encode(SALT).decode()
NOW = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
# The worked example of the format: K under `fleece-pass`, scrypt with PBS's parameters.
WRAPPED = "AAECAwQFBgcICQoLDA0OD/odQhDV1vHUogbUY1R6fYo480ypkZePaTxlDHJEFhcQTe+kShUCJ3lfkhbTmhItSw=="
BARE = (
    '{"kdf":null,"created":"2023-11-14T22:13:20+00:00","modified":"2023-11-14T22:13:20+00:00",'
    '"data":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","fingerprint":"' + FINGERPRINT + '"}'
)  # fmt: skip


def text(**changes: Any) -> bytes:
    document = json.loads(BARE)
    for name, value in changes.items():
        if value is ...:
            del document[name]
        else:
            document[name] = value
    return json.dumps(document).encode()


def protected(**parameters: Any) -> bytes:
    return text(kdf={"Scrypt": {"n": 65536, "r": 8, "p": 1, "salt": SALT_TEXT, **parameters}}, data=WRAPPED)


# ---- the worked examples ----


def test_worked_example_of_a_file_without_passphrase_in_both_directions() -> None:
    assert len(BARE) == 255
    assert KeyFile.make(KEY, None, kdf="none", now=NOW).encode() == BARE.encode()
    assert KeyFile.parse(BARE.encode(), where="x").unlock(None, where="x") == KEY


def test_worked_example_of_scrypt() -> None:
    assert Scrypt(SALT).derive(PASSPHRASE).hex() == "d036dcd70091c9f7997f7b63a4e5df9796c3f107bab9d253e2e9603625b96d5b"
    assert base64.b64encode(wrap_key(KEY, Scrypt(SALT), PASSPHRASE, iv=bytes(range(16)))).decode() == WRAPPED
    assert KeyFile.parse(protected(), where="x").unlock(PASSPHRASE, where="x") == KEY


def test_worked_example_of_pbkdf2_is_derived_and_read() -> None:
    kdf = Pbkdf2(SALT)
    assert kdf.derive(PASSPHRASE).hex() == "8e3f1c1e8aaa3f65e34882e4525cbd8b5e673b8c6c2089773d44d9b07d6df8a2"
    data = base64.b64encode(wrap_key(KEY, kdf, PASSPHRASE)).decode()
    file = KeyFile.parse(text(kdf={"PBKDF2": {"iter": 65535, "salt": SALT_TEXT}}, data=data), where="x")
    assert file.kdf == kdf
    assert file.unlock(PASSPHRASE, where="x") == KEY


def test_upstreams_own_vector_with_an_empty_salt() -> None:
    assert Scrypt(b"").derive(b"test").hex() == "28cdb1a3bef39396c3860e00d448fe7a0efd8244486ab6feb30457681d31597e"


def test_files_that_pbs_wrote(golden: Path) -> None:
    bare = read_key_file(golden / "keys/plain.key")
    assert (bare.kdf, bare.created.isoformat()) == (None, "2026-11-21T01:23:11+00:00")
    assert bare.unlock(None, where="x").fingerprint == bare.fingerprint
    path = golden / "keys/scrypt.key"
    file = read_key_file(path)
    assert isinstance(file.kdf, Scrypt)
    assert (file.kdf.n, file.kdf.r, file.kdf.p, len(file.kdf.salt)) == (65536, 8, 1, 32)
    assert file.unlock(b"gold-password", where="x").fingerprint == file.fingerprint
    # Read and written again they are what they were.
    assert file.encode() == path.read_bytes()
    with pytest.raises(PassphraseError, match="the passphrase is wrong"):
        file.unlock(b"gold-passwort", where="x")


# ---- round trips ----


@UNHURRIED
@given(raw=st.binary(min_size=32, max_size=32), hint=st.none() | st.text("abc ü", min_size=1, max_size=64))
def test_a_file_holds_what_it_was_made_with(raw: bytes, hint: str | None) -> None:
    key = CryptKey.from_raw(raw)
    kdf = Scrypt(SALT, n=4, r=1)
    file = KeyFile(kdf, NOW, NOW, wrap_key(key, kdf, PASSPHRASE), key.fingerprint, hint)
    read = KeyFile.parse(file.encode(), where="x")
    assert read == file
    assert read.unlock(PASSPHRASE, where="x") == key


def test_a_new_file_has_a_new_salt_and_iv_and_the_local_offset() -> None:
    one, two = (KeyFile.make(KEY, PASSPHRASE, hint="red") for _ in range(2))
    assert isinstance(one.kdf, Scrypt)
    assert isinstance(two.kdf, Scrypt)
    assert one.kdf.salt != two.kdf.salt
    assert len(one.kdf.salt) == 32
    assert one.data[:16] != two.data[:16]
    assert list(json.loads(one.encode())) == ["kdf", "created", "modified", "data", "fingerprint", "hint"]
    assert one.created == one.modified
    assert one.created.utcoffset() is not None
    assert "." not in json.loads(one.encode())["created"]


@pytest.mark.parametrize("zone", ["Z", "z", "+00:00", ".123456789Z", "-03:30"])
def test_times_with_any_offset_are_read(zone: str) -> None:
    file = KeyFile.parse(text(created=f"2023-11-14T22:13:20{zone}"), where="x")
    expected = NOW.replace(tzinfo=timezone(-timedelta(hours=3, minutes=30))) if zone == "-03:30" else NOW
    assert file.created == expected
    assert KeyFile.parse(file.encode(), where="x").created == expected


def test_fields_of_others_and_missing_optional_ones_are_no_error() -> None:
    file = KeyFile.parse(text(fingerprint=..., kdf=..., extra=[1]), where="x")
    assert (file.fingerprint, file.hint, file.kdf) == (None, None, None)
    assert file.unlock(None, where="x") == KEY


def test_the_lines_around_a_key_on_paper_do_not_disturb() -> None:
    paper = b"\n-----BEGIN PROXMOX BACKUP KEY-----\n" + BARE.encode() + b"\n-----END PROXMOX BACKUP KEY-----\n"
    assert KeyFile.parse(paper, where="x").unlock(None, where="x") == KEY


# ---- hostile files ----


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n": 65535}, "power of two"),
        ({"n": 0}, "power of two"),
        ({"n": 1}, "power of two"),
        ({"r": 0}, "power of two"),
        ({"p": 0}, "power of two"),
        ({"n": 1 << 16, "r": 1}, "power of two"),  # not defined: n < 2^(16 r)
        ({"n": 1 << 24}, "MiB"),
        ({"n": 1 << 63}, "MiB"),
        ({"n": 1 << 20, "r": 9}, "1152 MiB"),
        ({"n": 2, "r": 1 << 40}, "r \\* p"),
        ({"n": 2, "r": 1 << 20, "p": 1 << 10}, "r \\* p"),
        # Little to look up, but blocks of p lanes that take gigabytes.
        ({"r": 1, "n": 2, "p": 1 << 25}, "8192 MiB"),
        ({"r": 1 << 22, "n": 2, "p": 1}, "2048 MiB"),
        ({"r": 1, "n": 1 << 15, "p": (1 << 30) - 1}, "MiB"),
        ({"r": 1, "n": 1 << 15, "p": 1 << 12}, "minutes"),
        ({"p": 1 << 12}, "minutes"),
    ],
)
def test_parameters_beyond_the_bounds_are_refused_before_anything_is_derived(changes: dict[str, int], why: str) -> None:
    file = KeyFile.parse(protected(**changes), where="x.key")
    with pytest.raises(FormatError, match=rf"x\.key: .*{why}"):
        file.unlock(PASSPHRASE, where="x.key")


def test_the_largest_parameters_that_pbs_takes_pass_the_check() -> None:
    Scrypt(SALT, n=1 << 20, r=8).check("x")


@pytest.mark.parametrize("rounds", [0, 1 << 32])
def test_pbkdf2_rounds_beyond_the_bounds_are_refused(rounds: int) -> None:
    with pytest.raises(FormatError, match="rounds"):
        KeyFile.parse(text(kdf={"PBKDF2": {"iter": rounds, "salt": ""}}, data=WRAPPED), where="x").unlock(
            PASSPHRASE, where="x"
        )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no valid JSON"),
        (b"[]", "no object"),
        (b"\xff\xfe", "no text"),
        (b"[" * 60000, "nested too deep|no valid JSON"),
        (BARE.encode()[:-30], "no valid JSON"),
        (BARE.encode().replace(b'"kdf":null,', b'"kdf":null,"kdf":null,'), "twice"),
        (b" " * (MAX_KEY_FILE_SIZE + 1), "more than"),
        (text(data=...), "'data' is missing"),
        (text(data="AAE"), "'data' is no base64"),
        (text(data="AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8_"), "'data' is no base64"),
        (text(data="AAECAw=="), "'data' has 4 bytes instead of 32"),
        (text(data=WRAPPED), "'data' has 64 bytes instead of 32"),
        (text(kdf="Scrypt"), "'kdf'"),
        (text(kdf={}), "'kdf'"),
        (text(kdf={"Argon2": {}}), "'kdf' is none of"),
        (text(kdf={"Scrypt": []}), "'kdf' is none of"),
        (protected(n=True), "'n' is missing"),
        (protected(n=-4), "'n' is missing"),
        (protected(p=1 << 64), "'p' is missing"),
        (protected(r="8"), "'r' is missing"),
        (protected(salt="!"), "'salt' is no base64"),
        (protected(salt="A" * 4096), "'salt' has more than"),
        (text(created=...), "'created' is missing"),
        (text(modified="2023-11-14 22:13"), "'modified' is missing or no"),
        (text(modified="2023-11-14T22:13:20"), "no RFC 3339 time with offset"),
        (text(modified="2023-13-14T22:13:20Z"), "'modified' is no time"),
        (text(fingerprint="0e:ab"), "'fingerprint'"),
        (text(fingerprint=7), "'fingerprint'"),
        (text(hint=""), "'hint'"),
        (text(hint="x" * 65), "'hint'"),
    ],
)
def test_what_no_writer_makes_is_refused_with_its_reason(content: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        KeyFile.parse(content, where="x.key")


@UNHURRIED
@given(
    changes=st.dictionaries(
        st.sampled_from(["kdf", "created", "modified", "data", "fingerprint", "hint"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(WRAPPED),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["Scrypt", "PBKDF2", "n", "r", "p", "iter", "salt"]), inner, max_size=4
                )
            ),
            max_leaves=6,
        ),
    )
)
def test_any_other_content_is_read_or_refused_and_what_is_read_can_be_written(changes: dict[str, Any]) -> None:
    try:
        file = KeyFile.parse(text(**changes), where="x")
    except FormatError:
        return
    assert KeyFile.parse(file.encode(), where="x").data == file.data


@UNHURRIED
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        KeyFile.parse(content, where="x")


def test_a_hint_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(FormatError, match="no Unicode"):
        KeyFile.parse(text(hint="\ud800"), where="x")


def test_a_fingerprint_of_another_key_is_refused() -> None:
    other = CryptKey.from_raw(bytes(32)).fingerprint_text
    with pytest.raises(FormatError, match=f"holds the key {FINGERPRINT[:23]}, its fingerprint says {other[:23]}"):
        KeyFile.parse(text(fingerprint=other), where="x").unlock(None, where="x")


@pytest.mark.parametrize("passphrase", [None, b"", b"four", b"fleece-pasS"])
def test_a_missing_short_or_wrong_passphrase_is_told_with_the_hint_but_not_repeated(passphrase: bytes | None) -> None:
    document = json.loads(protected())
    document["hint"] = "red notebook"
    file = KeyFile.parse(json.dumps(document).encode(), where="x.key")
    with pytest.raises(PassphraseError) as caught:
        file.unlock(passphrase, where="x.key")
    assert passphrase is None or "red notebook" in str(caught.value)
    assert not passphrase or passphrase.decode() not in str(caught.value)


def test_a_flipped_bit_in_the_encrypted_key_is_found() -> None:
    data = bytearray(base64.b64decode(WRAPPED))
    data[40] ^= 1
    kdf = {"Scrypt": {"n": 65536, "r": 8, "p": 1, "salt": SALT_TEXT}}
    file = KeyFile.parse(text(kdf=kdf, data=base64.b64encode(data).decode()), where="x")
    with pytest.raises(PassphraseError):
        file.unlock(PASSPHRASE, where="x")


def test_no_text_of_a_file_shows_its_key() -> None:
    file = KeyFile.parse(BARE.encode(), where="x")
    for shown in (repr(file), str(file), repr(KEY)):
        assert "AAECAwQF" not in shown
        assert repr(RAW)[2:-1] not in shown


# ---- making ----


@pytest.mark.parametrize(
    ("passphrase", "options"),
    [
        (b"four", {}),
        (None, {}),
        (None, {"kdf": "none", "hint": "x"}),
        (PASSPHRASE, {"hint": ""}),
        (PASSPHRASE, {"hint": "x" * 65}),
        (PASSPHRASE, {"hint": "a\nb"}),
    ],
)
def test_passphrase_kdf_and_hint_must_go_together(passphrase: bytes | None, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        KeyFile.make(KEY, passphrase, **options)


# ---- files and names of keys ----


def test_missing_and_endless_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.key: there is no such file"):
        read_key_file(tmp_path / "none.key")
    with pytest.raises(FormatError, match="more than"):
        read_key_file(Path("/dev/zero"))
    with pytest.raises(FleeceError, match="Is a directory"):
        read_key_file(tmp_path)


def test_the_error_names_the_key_that_is_needed_and_the_one_that_is_given() -> None:
    other = CryptKey.from_raw(bytes(32))
    error = need_key("read", "vm/1", KEY.fingerprint, other)
    assert isinstance(error, KeyNeededError)
    assert f"the key {FINGERPRINT[:23]} is needed, given is {other.fingerprint_text[:23]}" in str(error)
    assert FINGERPRINT in error.hint
    assert "none is given" in str(need_key("read", "vm/1", None, None))
    assert short_fingerprint(FINGERPRINT) == short_fingerprint(KEY.fingerprint) == "0e:ab:d4:46:0b:6e:b9:ca"
