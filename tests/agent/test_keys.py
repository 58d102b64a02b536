"""Encryption as a person uses it: `fleece key`, and every command that reads or writes with a key."""

import base64
import hashlib
import json
import os
import pty
import select
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.keys import (
    KEY_NAME,
    MASTER_PUBLIC_NAME,
    KeyOptions,
    backup_keys,
    default_file,
    passphrase_from_environment,
    reading_key,
)
from core.errors import FleeceError, FormatError, NotFoundError, UsageError
from datastore.codec import CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import PassphraseError
from datastore.keyfile import KeyFile, write_new
from datastore.master_key import create_pair, unwrap_key
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.stores import StorePool

from .conftest import Answer, Fleece

MIB = 1 << 20
KEY = CryptKey.from_raw(bytes(range(32)))
OTHER = CryptKey.from_raw(bytes(32))
SHORT, OTHER_SHORT = KEY.fingerprint_text[:23], OTHER.fingerprint_text[:23]
PASSPHRASE = "a secret sentence"


def key_file(path: Path, key: CryptKey = KEY, passphrase: str | None = None) -> Path:
    file = KeyFile.make(key, passphrase.encode() if passphrase else None, kdf="scrypt" if passphrase else "none")
    write_new(path, file.encode(), what="make")
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return key_file(tmp_path / "a.key")


@pytest.fixture
def other_key(tmp_path: Path) -> Path:
    return key_file(tmp_path / "other.key", OTHER)


@pytest.fixture
def locked_key(tmp_path: Path) -> Path:
    return key_file(tmp_path / "locked.key", passphrase=PASSPHRASE)


@pytest.fixture(scope="module")
def master() -> tuple[bytes, bytes]:
    return create_pair(b"master-password")


@pytest.fixture
def image(tmpfs: Path) -> Path:
    """9 MiB: data, 4 MiB of zeros, a short last chunk."""
    path = tmpfs / "disk.raw"
    path.write_bytes(os.urandom(4 * MIB) + bytes(4 * MIB) + os.urandom(MIB))
    return path


@pytest.fixture
def small(tmpfs: Path) -> Path:
    path = tmpfs / "vm.conf"
    path.write_text("memory: 512 # of a very secret machine\n")
    return path


def files(fleece: Fleece, snapshot: str) -> dict[str, str]:
    return {file["filename"]: file["crypt-mode"] for file in fleece.json("show", snapshot)["files"]}


def failed(answer: Answer, *words: str, code: int = 1) -> None:
    assert answer.code == code, answer
    for word in words:
        assert word in answer.err, answer.err


# ---- which mode results from which options ----


@pytest.fixture
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of default keys, empty; none of this host's variables."""
    for name in list(os.environ):
        if name.startswith(("PBS_", "FLEECE_NEW", "FLEECE_MASTER")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg"


@pytest.mark.parametrize(
    ("named", "default", "mode", "expected"),
    [
        (False, False, None, CryptMode.NONE),
        (False, False, "none", CryptMode.NONE),
        (True, False, None, CryptMode.ENCRYPT),
        (True, False, "encrypt", CryptMode.ENCRYPT),
        (True, False, "sign-only", CryptMode.SIGN_ONLY),
        (False, True, None, CryptMode.ENCRYPT),
        (False, True, "encrypt", CryptMode.ENCRYPT),
        (False, True, "sign-only", CryptMode.SIGN_ONLY),
        (False, True, "none", CryptMode.NONE),
        (True, True, None, CryptMode.ENCRYPT),
    ],
)
def test_modes_follow_from_options_and_default_key_as_in_proxmox_backup_client(
    config_home: Path, key: Path, named: bool, default: bool, mode: Any, expected: CryptMode
) -> None:
    if default:
        key_file(config_home / "fleece" / KEY_NAME, OTHER)
    keys = backup_keys(KeyOptions(keyfile=key if named else None, crypt_mode=mode))
    assert keys.codec.mode is expected
    # A named key counts before the default one.
    used = None if expected is CryptMode.NONE else KEY if named else OTHER
    assert keys.codec.key == used
    assert keys.wrapped_key is None


@pytest.mark.parametrize(
    "options",
    [
        KeyOptions(crypt_mode="encrypt"),
        KeyOptions(crypt_mode="sign-only"),
        KeyOptions(master_pubkey_file=Path("m.pem")),
        KeyOptions(master_pubkey_fd=5),
        KeyOptions(keyfile=Path("a"), crypt_mode="none"),
        KeyOptions(keyfd=5, crypt_mode="none"),
        KeyOptions(master_pubkey_file=Path("m.pem"), crypt_mode="none"),
        KeyOptions(keyfile=Path("a"), keyfd=5),
        KeyOptions(master_pubkey_file=Path("m.pem"), master_pubkey_fd=5),
    ],
)
def test_options_that_need_a_key_or_exclude_each_other_are_wrong_usage(config_home: Path, options: KeyOptions) -> None:
    with pytest.raises(UsageError):
        backup_keys(options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, CryptMode.ENCRYPT),
        ({"default_mode": "sign-only"}, CryptMode.SIGN_ONLY),
        ({"default_mode": "none"}, CryptMode.NONE),
        ({"default_mode": "none", "crypt_mode": "encrypt"}, CryptMode.ENCRYPT),
        ({"default_mode": "sign-only", "crypt_mode": "none"}, CryptMode.NONE),
    ],
)
def test_the_configuration_replaces_the_defaults_and_the_command_line_comes_first(
    config_home: Path, key: Path, other_key: Path, options: dict[str, Any], expected: CryptMode
) -> None:
    keys = backup_keys(KeyOptions(default_keyfile=key, **options))
    assert keys.codec.mode is expected
    assert keys.codec.key == (None if expected is CryptMode.NONE else KEY)
    if options.get("crypt_mode") != "none":
        named = backup_keys(KeyOptions(keyfile=other_key, default_keyfile=key, **options)).codec
        assert named.key == OTHER
        assert named.mode is (CryptMode.ENCRYPT if expected is CryptMode.NONE else expected)


def test_a_configured_key_that_is_gone_or_a_mode_without_a_key_is_no_plain_backup(config_home: Path) -> None:
    with pytest.raises(NotFoundError):
        backup_keys(KeyOptions(default_keyfile=Path("/nonexistent")))
    with pytest.raises(UsageError, match="crypt mode sign-only"):
        backup_keys(KeyOptions(default_mode="sign-only"))


def test_default_keys_are_found_in_both_programs_places_fleeces_first(config_home: Path) -> None:
    assert default_file(KEY_NAME) is None
    theirs = key_file(config_home / "proxmox-backup" / KEY_NAME)
    assert default_file(KEY_NAME) == theirs
    ours = key_file(config_home / "fleece" / KEY_NAME, OTHER)
    assert default_file(KEY_NAME) == ours


def test_a_default_key_that_cannot_be_used_never_means_an_unencrypted_backup(config_home: Path) -> None:
    path = config_home / "fleece" / KEY_NAME
    path.parent.mkdir(parents=True)
    path.symlink_to("/nonexistent")
    with pytest.raises(NotFoundError):
        backup_keys(KeyOptions())
    path.unlink()
    path.write_text("{}")
    with pytest.raises(FormatError):
        backup_keys(KeyOptions())
    path.write_bytes(KeyFile.make(KEY, b"some passphrase").encode())
    os.environ["PBS_ENCRYPTION_PASSWORD"] = "another one"
    try:
        with pytest.raises(PassphraseError):
            backup_keys(KeyOptions())
    finally:
        del os.environ["PBS_ENCRYPTION_PASSWORD"]


def test_the_default_master_key_goes_with_any_key(config_home: Path, key: Path, master: tuple[bytes, bytes]) -> None:
    write_new(config_home / "fleece" / MASTER_PUBLIC_NAME, master[1], what="make")
    assert backup_keys(KeyOptions()).wrapped_key is None
    wrapped = backup_keys(KeyOptions(keyfile=key)).wrapped_key
    assert wrapped is not None
    found = unwrap_key(wrapped, master[0], b"master-password", where="x", master="m")
    assert found.unlock(None, where="x") == KEY


def test_reading_goes_on_without_a_default_key_whose_passphrase_is_not_there(
    config_home: Path, locked_key: Path
) -> None:
    path = config_home / "fleece" / KEY_NAME
    path.parent.mkdir(parents=True)
    locked_key.rename(path)
    found = reading_key(KeyOptions(), may_ask=False)
    assert found.key is None
    assert SHORT in found.note
    assert "PBS_ENCRYPTION_PASSWORD" in found.note


# ---- passphrases from the environment ----


def test_a_passphrase_comes_from_the_variable_a_descriptor_a_file_or_a_command(
    config_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passphrase_from_environment("PBS_X") is None
    monkeypatch.setenv("PBS_X_CMD", "printf '%s\\n' 'from a command' second")
    assert passphrase_from_environment("PBS_X") == b"from a command"
    (tmp_path / "p").write_bytes(b"from a file\r\nsecond line\n")
    monkeypatch.setenv("PBS_X_FILE", str(tmp_path / "p"))
    assert passphrase_from_environment("PBS_X") == b"from a file"
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe")
    os.close(writing)
    monkeypatch.setenv("PBS_X_FD", str(reading))
    assert passphrase_from_environment("PBS_X") == b"from a pipe"
    monkeypatch.setenv("PBS_X", "from the variable\nsecond line")
    assert passphrase_from_environment("PBS_X") == b"from the variable"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FD", "x"), ("FD", "-1"), ("FD", "987654"), ("FD", "9" * 30), ("FILE", "/nonexistent"),
        ("CMD", ""), ("CMD", "/nonexistent"), ("CMD", "false"), ("CMD", "'"),
    ],
)  # fmt: skip
def test_a_way_to_a_passphrase_that_leads_nowhere_is_an_error(
    config_home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"PBS_X_{name}", value)
    with pytest.raises(FleeceError, match=f"PBS_X_{name}" if name != "FILE" else "nonexistent"):
        passphrase_from_environment("PBS_X")


# ---- the terminal ----


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, fleece: Fleece, *arguments: str | Path) -> None:
        self.ours, theirs = pty.openpty()
        self.shown = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, "-m", "agent.main", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, env=fleece._environment(),
        )  # fmt: skip
        os.close(theirs)

    def expect(self, text: str) -> None:
        """Wait until `text` was shown."""
        end = time.monotonic() + 60
        while text.encode() not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.ours, 4096)
                except OSError:
                    pytest.fail(f"it ended: {self.shown!r}")

    def type(self, text: str) -> None:
        self.shown = b""
        time.sleep(0.1)  # getpass throws away what was typed before it asked
        os.write(self.ours, text.encode() + b"\n")

    def end(self) -> int:
        while True:
            try:
                if not (data := os.read(self.ours, 4096)):
                    break
                self.shown += data
            except OSError:
                break
        os.close(self.ours)
        return self.process.wait(60)


def test_a_passphrase_is_asked_for_twice_and_never_shown(fleece: Fleece, tmp_path: Path) -> None:
    terminal = Terminal(fleece, "key", "create", tmp_path / "n.key", "--hint", "red")
    terminal.expect("New passphrase: ")
    terminal.type(PASSPHRASE)
    terminal.expect("Once more: ")
    assert PASSPHRASE.encode() not in terminal.shown
    terminal.type(PASSPHRASE)
    terminal.expect("all backups made with it are lost")
    assert terminal.end() == 0
    assert PASSPHRASE.encode() not in terminal.shown
    file = KeyFile.parse((tmp_path / "n.key").read_bytes(), where="x")
    assert (file.hint, file.unlock(PASSPHRASE.encode(), where="x").fingerprint) == ("red", file.fingerprint)


@pytest.mark.parametrize(("typed", "why"), [(["four"], "at least 5 bytes"), (["first one", "other one"], "differ")])
def test_a_short_passphrase_and_two_different_ones_make_no_key(
    fleece: Fleece, tmp_path: Path, typed: list[str], why: str
) -> None:
    terminal = Terminal(fleece, "key", "create", tmp_path / "n.key")
    for prompt, text in zip(("New passphrase: ", "Once more: "), typed, strict=False):
        terminal.expect(prompt)
        terminal.type(text)
    terminal.expect(why)
    assert terminal.end() == 2
    assert not (tmp_path / "n.key").exists()


def test_a_backup_asks_for_the_passphrase_of_its_key(stored: Fleece, locked_key: Path, small: Path) -> None:
    terminal = Terminal(stored, "backup", f"vm.conf:{small}", "--backup-id", "web", "--keyfile", locked_key)
    terminal.expect("Passphrase of ")
    terminal.type(PASSPHRASE)
    terminal.expect("host/web/")
    assert terminal.end() == 0
    assert files(stored, "host/web/latest")["vm.conf.blob"] == "encrypt"


def test_without_a_terminal_nothing_is_asked_but_the_ways_are_told(
    stored: Fleece, locked_key: Path, small: Path, tmp_path: Path
) -> None:
    for arguments in (("key", "create", tmp_path / "n.key"), ("backup", f"vm.conf:{small}", "--keyfile", locked_key)):
        done = subprocess.run(
            ["setsid", "--wait", sys.executable, "-m", "agent.main", *map(str, arguments)],
            env=stored._environment(), input="typed passphrase\n" * 3, capture_output=True, text=True, check=False,
        )  # fmt: skip
        failed(Answer(done.returncode, done.stdout, done.stderr), "no terminal", "PBS_ENCRYPTION_PASSWORD")
    assert not (tmp_path / "n.key").exists()
    assert stored.json("list") == []


# ---- fleece key ----


def test_a_created_key_warns_that_its_loss_loses_everything_and_is_private(fleece: Fleece, tmp_path: Path) -> None:
    fleece.environment["PBS_ENCRYPTION_PASSWORD"] = PASSPHRASE
    answer = fleece("key", "create", "--quiet")
    assert answer.code == 0
    assert "WARNING" in answer.err
    assert "all backups made with it are lost" in answer.err
    path = tmp_path / "config/fleece" / KEY_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert content.startswith(b'{"kdf":{"Scrypt":{"n":65536,"r":8,"p":1,"salt":"')
    assert b"\n" not in content
    failed(fleece("key", "create"), "there is a file already")
    assert path.read_bytes() == content
    document = fleece.json("key", "show")
    assert set(document) == {"path", "kdf", "created", "modified", "fingerprint"}
    assert (document["path"], document["kdf"]) == (str(path), "scrypt")
    assert abs(document["created"] - time.time()) < 120


def test_json_has_the_warning_but_no_secret(fleece: Fleece, tmp_path: Path) -> None:
    document = fleece.json("key", "create", tmp_path / "n.key", "--kdf", "none")
    assert "are lost" in document["warning"]
    data = json.loads((tmp_path / "n.key").read_text())["data"]
    assert len(base64.b64decode(data)) == 32
    shown = fleece("key", "show", tmp_path / "n.key")
    assert data not in json.dumps(document) + shown.out + shown.err
    assert "protected by: nothing" in shown.out


def test_a_hint_does_not_talk_to_the_terminal(fleece: Fleece, locked_key: Path) -> None:
    document = json.loads(locked_key.read_text()) | {"hint": "\x1b[2Jred"}
    locked_key.write_text(json.dumps(document))
    fleece.environment["PBS_ENCRYPTION_PASSWORD"] = "wrong passphrase"
    for command in ("show", "change-passphrase"):
        answer = fleece("key", command, locked_key)
        assert "\x1b" not in answer.out + answer.err
        assert "x1b[2Jred" in answer.out + answer.err


def test_a_hint_needs_a_passphrase(fleece: Fleece, tmp_path: Path) -> None:
    failed(fleece("key", "create", tmp_path / "n.key", "--kdf", "none", "--hint", "x"), "--hint", code=2)


def test_a_changed_passphrase_opens_the_same_key_and_the_old_one_does_not(fleece: Fleece, locked_key: Path) -> None:
    before = KeyFile.parse(locked_key.read_bytes(), where="x")
    fleece.environment |= {"PBS_ENCRYPTION_PASSWORD": PASSPHRASE, "FLEECE_NEW_ENCRYPTION_PASSWORD": "another sentence"}
    document = fleece.json("key", "change-passphrase", locked_key, "--hint", "blue")
    assert document["hint"] == "blue"
    after = KeyFile.parse(locked_key.read_bytes(), where="x")
    assert after.unlock(b"another sentence", where="x") == KEY
    assert after.created == before.created
    assert stat.S_IMODE(locked_key.stat().st_mode) == 0o600
    failed(fleece("key", "change-passphrase", locked_key), "the passphrase is wrong", "blue")
    fleece.environment["PBS_ENCRYPTION_PASSWORD"] = "another sentence"
    assert fleece.json("key", "change-passphrase", locked_key, "--kdf", "none")["kdf"] == "none"
    assert KeyFile.parse(locked_key.read_bytes(), where="x").unlock(None, where="x") == KEY


def test_show_refuses_a_false_fingerprint_and_shows_hostile_parameters_without_deriving(
    fleece: Fleece, key: Path, locked_key: Path
) -> None:
    document = json.loads(key.read_text()) | {"fingerprint": OTHER.fingerprint_text}
    key.write_text(json.dumps(document))
    failed(fleece("key", "show", key), SHORT, OTHER_SHORT)
    document = json.loads(locked_key.read_text())
    document["kdf"]["Scrypt"]["n"] = 1 << 50
    locked_key.write_text(json.dumps(document))
    assert fleece.json("key", "show", locked_key)["kdf"] == "scrypt"
    fleece.environment["PBS_ENCRYPTION_PASSWORD"] = PASSPHRASE
    started = time.monotonic()
    failed(fleece("key", "change-passphrase", locked_key), "1025 MiB")
    assert time.monotonic() - started < 30


def test_a_master_key_recovers_the_key_of_a_backup_whose_key_is_lost(
    stored: Fleece, key: Path, image: Path, tmp_path: Path
) -> None:
    stored.environment["FLEECE_MASTER_KEY_PASSWORD"] = "master-password"
    (tmp_path / "keys").mkdir()
    made = stored.json("key", "create-master-key", tmp_path / "keys")
    assert stat.S_IMODE(Path(made["private"]).stat().st_mode) == 0o600
    failed(stored("key", "create-master-key", tmp_path / "keys"), "there is a file already")
    imported = stored.json("key", "import-master-pubkey", made["public"])
    assert imported["path"] == str(tmp_path / "config/fleece" / MASTER_PUBLIC_NAME)
    assert stored("key", "import-master-pubkey", made["public"]).code == 0
    shown = stored.json("key", "show-master-pubkey")
    assert (shown["length"], shown["exponent"], len(shown["modulus"])) == (512, "65537", 1024)

    report = stored.json("backup", f"disk.img:{image}", "--backup-id", "web", "--keyfile", key)
    assert files(stored, report["snapshot"]) == {
        "disk.img.fidx": "encrypt", "rsa-encrypted.key.blob": "encrypt", "index.json.blob": "sign-only",
    }  # fmt: skip
    assert stored.repo is not None
    assert (stored.repo / report["snapshot"] / "rsa-encrypted.key.blob").stat().st_size == 524
    (result,) = stored.json("verify")
    assert (result["state"], result["errors"]) == ("ok", [])
    key.unlink()

    assert stored("restore", "host/web/latest", "rsa-encrypted.key", tmp_path / "wrapped").code == 0
    assert (tmp_path / "wrapped").stat().st_size == 512
    recover = ("key", "import-with-master-key", tmp_path / "new.key", "--master-keyfile", made["private"],
               "--encrypted-keyfile", tmp_path / "wrapped")  # fmt: skip
    document = stored.json(*recover, "--kdf", "none")
    assert document["fingerprint"] == KEY.fingerprint_text
    answer = stored("restore", "host/web/latest", "disk.img", tmp_path / "out.raw", "--keyfile", tmp_path / "new.key")
    assert answer.code == 0
    assert (tmp_path / "out.raw").read_bytes() == image.read_bytes()

    (tmp_path / "new.key").unlink()
    stored.environment["FLEECE_MASTER_KEY_PASSWORD"] = "master-passwort"
    failed(stored(*recover, "--kdf", "none"), "the passphrase is wrong")
    assert not (tmp_path / "new.key").exists()


def test_a_default_master_key_is_not_replaced(fleece: Fleece, tmp_path: Path, master: tuple[bytes, bytes]) -> None:
    (tmp_path / "a.pem").write_bytes(master[1])
    (tmp_path / "b.pem").write_bytes(create_pair(b"another one")[1])
    assert fleece("key", "import-master-pubkey", tmp_path / "a.pem").code == 0
    failed(fleece("key", "import-master-pubkey", tmp_path / "b.pem"), "there is a file already")
    (tmp_path / "c.pem").write_text("nothing")
    failed(fleece("key", "import-master-pubkey", tmp_path / "c.pem"), "no PEM file of a public key")


def test_paper_keys_have_qr_codes_where_the_program_is_there_and_never_in_arguments(
    fleece: Fleece, tmp_path: Path, key: Path, master: tuple[bytes, bytes]
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    fleece.environment["PATH"] = str(tools)
    plain = fleece("key", "paperkey", key)
    assert plain.code == 0
    assert "qrencode is not installed" in plain.err
    lines = plain.out.splitlines()
    begin = lines.index("-----BEGIN PROXMOX BACKUP KEY-----")
    paper = "\n".join(lines[begin : lines.index("-----END PROXMOX BACKUP KEY-----") + 1])
    assert KeyFile.parse(paper.encode(), where="x").unlock(None, where="x") == KEY

    # A stand-in that keeps what it was called with.
    program = tools / "qrencode"
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/arguments\necho "<svg>code</svg>"\n')
    program.chmod(0o755)
    page = fleece("key", "paperkey", key, "--subject", "host <db1>")
    assert page.err == ""
    assert "<h1>host &lt;db1&gt;</h1>" in page.out
    assert f'src="data:image/svg+xml;base64,{base64.b64encode(b"<svg>code</svg>" + bytes([10])).decode()}"' in page.out
    text = fleece("key", "paperkey", key, "--output-format", "text")
    assert "<svg>code</svg>" in text.out
    assert paper in text.out
    called = (tmp_path / "arguments").read_text()
    assert called.split() == ["-t", "SVG", "-m", "2", "-o", "-", "-t", "UTF8", "-m", "2", "-o", "-"]

    (tmp_path / "private.pem").write_bytes(master[0])
    pages = fleece("key", "paperkey", tmp_path / "private.pem").out
    assert pages.count("<img") == -(-len(master[0].splitlines()) // 20)
    program.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    failed(fleece("key", "paperkey", key), "broken")
    failed(fleece("key", "paperkey", program), "no valid JSON")


# ---- backup and restore with keys ----


def test_an_encrypted_backup_comes_back_with_its_key_only(
    stored: Fleece, image: Path, small: Path, key: Path, other_key: Path, tmp_path: Path
) -> None:
    report = stored.json("backup", f"disk.img:{image}", f"vm.conf:{small}", "--backup-id", "web", "--keyfile", key)
    snapshot = report["snapshot"]
    assert files(stored, snapshot) == {
        "disk.img.fidx": "encrypt", "vm.conf.blob": "encrypt", "index.json.blob": "sign-only",
    }  # fmt: skip
    assert stored.json("show", snapshot)["fingerprint"] == KEY.fingerprint_text
    assert KEY.fingerprint_text in stored("show", snapshot).out

    # Nothing plain is in the store.
    assert stored.repo is not None
    chunk = image.read_bytes()[: 4 * MIB]
    digest, keyed = hashlib.sha256(chunk), hashlib.sha256(chunk + KEY.id_key)
    chunks = {path.name for path in (stored.repo / ".chunks").glob("*/*")}
    assert keyed.hexdigest() in chunks
    assert digest.hexdigest() not in chunks
    assert len(chunks) == 3
    for path in [*(stored.repo / ".chunks").glob("*/*"), stored.repo / snapshot / "vm.conf.blob"]:
        assert path.read_bytes()[:8].hex() in ("7b6785be222d4cf0", "e6591bbf0bbfd80b")
        assert chunk[:64] not in path.read_bytes()
    assert b"very secret" not in (stored.repo / snapshot / "vm.conf.blob").read_bytes()

    for arguments, given in (((), "none is given"), (("--keyfile", other_key), f"given is {OTHER_SHORT}")):
        for what in (("disk.img", tmp_path / "no.raw"), ("vm.conf", "-"), ("--all", tmp_path / "no")):
            failed(stored("restore", snapshot, *what, *arguments), f"the key {SHORT} is needed, {given}")
            assert not (tmp_path / "no.raw").exists()
            assert not (tmp_path / "no").exists()
    assert stored("restore", snapshot, "--all", tmp_path / "yes", "--keyfile", key).code == 0
    assert (tmp_path / "yes/disk.img").read_bytes() == image.read_bytes()
    assert (tmp_path / "yes/vm.conf").read_bytes() == small.read_bytes()


def test_the_same_key_reuses_chunks_and_another_or_none_does_not(
    stored: Fleece, image: Path, key: Path, other_key: Path
) -> None:
    def new(*arguments: str | Path) -> int:
        # Two backups of one group cannot have the same second.
        number[0] += 10
        report = stored.json(
            "backup", f"disk.img:{image}", "--backup-id", "web", "--backup-time", str(number[0]), *arguments
        )
        chunks: int = report["archives"][0]["chunks-new"]
        return chunks

    number = [1_700_000_000]
    with_key, with_other = ("--keyfile", key), ("--keyfile", other_key)
    assert new(*with_key) == 3
    assert new(*with_key) == 0
    assert new(*with_other) == 3
    assert new() == 3
    # Signed data is plain data.
    assert new(*with_key, "--crypt-mode", "sign-only") == 0
    assert new(*with_key) == 0
    assert [result["state"] for result in stored.json("verify")] == ["ok"] * 6
    assert [result["state"] for result in stored.json("verify", "--keyfile", key)] == ["ok"] * 6


def test_a_signed_backup_is_plain_but_its_manifest_is_vouched_for(
    stored: Fleece, image: Path, small: Path, key: Path, other_key: Path, tmp_path: Path
) -> None:
    report = stored.json(
        "backup", f"disk.img:{image}", f"vm.conf:{small}", "--backup-id", "web", "--keyfile", key,
        "--crypt-mode", "sign-only",
    )  # fmt: skip
    snapshot = report["snapshot"]
    assert files(stored, snapshot)["disk.img.fidx"] == files(stored, snapshot)["vm.conf.blob"] == "sign-only"
    for arguments in ((), ("--keyfile", other_key)):
        failed(stored("restore", snapshot, "disk.img", tmp_path / "no.raw", *arguments), f"the key {SHORT} is needed")
    # Whoever lost the key may have the data, unchecked, if they say so.
    unchecked = stored("restore", snapshot, "vm.conf", "-", "--crypt-mode", "none")
    assert (unchecked.code, unchecked.out) == (3, small.read_text())
    assert "the signature" in unchecked.err
    assert stored("restore", snapshot, "disk.img", tmp_path / "yes.raw", "--keyfile", key).code == 0
    assert (tmp_path / "yes.raw").read_bytes() == image.read_bytes()


def test_a_manifest_that_somebody_altered_is_refused_by_whoever_has_the_key(
    stored: Fleece, image: Path, key: Path, tmp_path: Path
) -> None:
    from datastore.codec import decode_plain, encode_plain

    report = stored.json("backup", f"disk.img:{image}", "--backup-id", "web", "--keyfile", key)
    assert stored.repo is not None
    path = stored.repo / report["snapshot"] / "index.json.blob"
    document = json.loads(decode_plain(path.read_bytes(), where="x", max_size=MIB))
    document["files"][0]["size"] += 1
    path.write_bytes(bytes(encode_plain(json.dumps(document).encode())))
    failed(stored("restore", report["snapshot"], "disk.img", tmp_path / "x", "--keyfile", key), "altered")
    (result,) = Answer(1, stored("verify", "--keyfile", key, "--output", "json").out, "").document
    assert result["state"] == "failed"
    assert "signature" in result["errors"][0]


def test_verify_with_the_key_finds_what_a_crc_cannot(stored: Fleece, image: Path, key: Path, other_key: Path) -> None:
    from datastore.blob import Blob
    from datastore.codec import ChunkCodec

    stored.json("backup", f"disk.img:{image}", "--backup-id", "web", "--keyfile", key)
    assert stored.repo is not None
    victim = max((stored.repo / ".chunks").glob("*/*"), key=lambda path: path.stat().st_size)
    # Well encrypted, of the right length, but other data.
    forged = ChunkCodec(KEY, CryptMode.ENCRYPT).encode(os.urandom(4 * MIB))
    victim.write_bytes(bytes(forged))
    assert Blob.parse(victim.read_bytes(), where="x").kind.encrypted
    assert stored.json("verify")[0]["state"] == "ok"
    assert stored.json("verify", "--keyfile", other_key)[0]["state"] == "ok"
    answer = stored("verify", "--keyfile", key, "--output", "json")
    assert (answer.code, answer.document[0]["state"]) == (1, "failed")
    assert victim.name in answer.document[0]["errors"][0]


def test_a_key_comes_through_a_descriptor(stored: Fleece, small: Path, locked_key: Path) -> None:
    reading, writing = os.pipe()
    secret, secret_writing = os.pipe()
    os.write(writing, locked_key.read_bytes())
    os.write(secret_writing, PASSPHRASE.encode() + b"\n")
    os.close(writing)
    os.close(secret_writing)
    done = subprocess.run(
        [sys.executable, "-m", "agent.main", "backup", f"vm.conf:{small}", "--backup-id=web", f"--keyfd={reading}"],
        env=stored._environment() | {"PBS_ENCRYPTION_PASSWORD_FD": str(secret)},
        pass_fds=(reading, secret), capture_output=True, text=True, check=False,
    )  # fmt: skip
    os.close(reading)
    os.close(secret)
    assert done.returncode == 0, done.stderr
    assert SHORT in done.stderr
    assert PASSPHRASE not in done.stdout + done.stderr
    assert files(stored, "host/web/latest")["vm.conf.blob"] == "encrypt"


def test_a_default_key_encrypts_unless_it_is_told_not_to(stored: Fleece, small: Path, tmp_path: Path) -> None:
    stored.json("key", "create", "--kdf", "none")
    stored.json("backup", f"vm.conf:{small}", "--backup-id", "a")
    stored.json("backup", f"vm.conf:{small}", "--backup-id", "b", "--crypt-mode", "none")
    assert files(stored, "host/a/latest")["vm.conf.blob"] == "encrypt"
    assert files(stored, "host/b/latest")["vm.conf.blob"] == "none"
    for name in ("a", "b"):
        assert stored("restore", f"host/{name}/latest", "vm.conf", "-").out == small.read_text()


def test_the_configuration_names_key_mode_and_master_key(
    stored: Fleece, small: Path, key: Path, other_key: Path, master: tuple[bytes, bytes], tmp_path: Path
) -> None:
    (tmp_path / "m.pem").write_bytes(master[1])
    (tmp_path / "fleece.toml").write_text(
        f'keyfile = "{key}"\nmaster-pubkey-file = "{tmp_path}/m.pem"\n'
        f'[repository.secret]\npath = "{stored.repo}"\nkeyfile = "{other_key}"\ncrypt-mode = "sign-only"\n'
    )
    stored.json("backup", f"vm.conf:{small}", "--backup-id", "a")
    stored.json("backup", f"vm.conf:{small}", "--backup-id", "b", "--repo", "secret")
    a, b = (stored.json("show", f"host/{name}/latest") for name in "ab")
    assert (a["fingerprint"], b["fingerprint"]) == (KEY.fingerprint_text, OTHER.fingerprint_text)
    assert files(stored, "host/a/latest")["rsa-encrypted.key.blob"] == "encrypt"
    assert files(stored, "host/b/latest")["vm.conf.blob"] == "sign-only"
    assert stored("restore", "host/b/latest", "vm.conf", "-", "--repo", "secret").out == small.read_text()
    failed(stored("restore", "host/b/latest", "vm.conf", "-"), OTHER_SHORT)


def test_a_locked_default_key_does_not_stand_in_the_way_of_plain_snapshots(
    stored: Fleece, small: Path, locked_key: Path, tmp_path: Path
) -> None:
    stored.json("backup", f"vm.conf:{small}", "--backup-id", "plain")
    (tmp_path / "config/fleece").mkdir(parents=True)
    locked_key.rename(tmp_path / "config/fleece" / KEY_NAME)
    stored.environment["PBS_ENCRYPTION_PASSWORD"] = PASSPHRASE
    stored.json("backup", f"vm.conf:{small}", "--backup-id", "secret")
    stored.environment["PBS_ENCRYPTION_PASSWORD"] = "not the right one"
    assert stored("restore", "host/plain/latest", "vm.conf", "-").out == small.read_text()
    failed(stored("restore", "host/secret/latest", "vm.conf", "-"), SHORT, "the passphrase is wrong")


# ---- mounts ----


@pytest.mark.fuse
@pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no usable /dev/fuse on this machine")
def test_a_mount_shows_encrypted_archives_with_their_key_only(
    stored: Fleece, image: Path, small: Path, key: Path, other_key: Path, tmp_path: Path
) -> None:
    stored.json("backup", f"disk.img:{image}", f"vm.conf:{small}", "--backup-id", "web", "--keyfile", key)
    folder = tmp_path / "mnt"
    folder.mkdir()
    for arguments, shown in (
        ((), set()),
        (("--keyfile", other_key), set()),
        (("--keyfile", key), {"disk.img", "vm.conf"}),
    ):
        log = tmp_path / f"log-{len(arguments)}-{len(shown)}"
        stored.json("mount", folder, "-o", f"log={log}", *arguments)
        try:
            latest = folder / "host/web/latest"
            assert {path.name for path in latest.iterdir()} == shown
            if shown:
                assert (latest / "disk.img").read_bytes() == image.read_bytes()
                assert (latest / "vm.conf").read_bytes() == small.read_bytes()
        finally:
            subprocess.run(["fusermount3", "-u", folder], check=True)
        lines = [line for line in log.read_text().splitlines() if "not shown" in line] if log.exists() else []
        assert len(lines) == (0 if shown else 1)
        assert all(SHORT in line for line in lines)
    failed(stored("mount", "host/web/latest", "disk.img", folder), SHORT)


# ---- virtual machines ----


@pytest.mark.qemu
async def test_the_backup_of_a_vm_is_incremental_with_the_same_key_and_full_with_another(
    distribution: QemuBinary, stored: Fleece, tmpfs: Path, key: Path, other_key: Path
) -> None:
    async def run(*arguments: str | Path) -> Any:
        answer = await trio.to_thread.run_sync(lambda: stored(*arguments, "--output", "json"))
        assert answer.code == 0, answer.err
        return answer.document

    (tmpfs / "scratch").mkdir()
    (stored.home / "fleece.toml").write_text(f'[vm.web]\nscratch = "{tmpfs}/scratch"\nscratch-beside-disks = true\n')
    await trio.run_process([distribution.img, "create", "-q", "-f", "qcow2", str(tmpfs / "a.qcow2"), "24M"])
    disk = VmDisk(tmpfs / "a.qcow2", "disk0", format="qcow2")
    async with RunningQemu.start(distribution, [disk], memory_mib=64) as vm:
        await vm.qemu_io("disk0", "write -P 0x11 0 10M")
        target = ("--qmp", vm.qmp, "--id", "web")

        async def backup(*arguments: str | Path) -> tuple[str, str, str | None]:
            # Backups of one group have different seconds.
            await trio.sleep(1.1)
            shown = await run("vm", "show", *target, *arguments)
            report = await run("vm", "backup", *target, *arguments)
            archive = next(one for one in report["archives"] if one["name"] == "drive-disk0.img")
            after = shown["disks"][0]["next"]
            assert (after["mode"], after["reason"]) == (archive["mode"], archive["reason"])
            snapshot: str = report["snapshot"]
            return snapshot, archive["mode"], archive["reason"]

        assert (await backup("--keyfile", key))[1] == "full"
        await vm.qemu_io("disk0", "write -P 0x22 5M 64k")
        snapshot, mode, reason = await backup("--keyfile", key)
        assert (mode, reason) == ("incremental", None)
        out = tmpfs / "out.raw"
        await trio.to_thread.run_sync(lambda: stored("restore", snapshot, "drive-disk0.img", out, "--keyfile", key))
        wanted = b"\x11" * (5 * MIB) + b"\x22" * 65536 + b"\x11" * (5 * MIB - 65536) + bytes(14 * MIB)
        assert out.read_bytes() == wanted
        assert (await backup("--keyfile", other_key))[1:] == ("full", "key changed")
        assert (await backup())[1:] == ("full", "key changed")
        assert (await backup("--keyfile", key, "--crypt-mode", "sign-only"))[1:] == ("full", "key changed")
        assert (await backup("--keyfile", key))[1:] == ("full", "crypt mode changed")
    assert {one["filename"]: one["crypt-mode"] for one in stored.json("list")[0]["files"]}[
        "drive-disk0.img.fidx"
    ] == "encrypt"


# ---- a datastore of PBS ----


@pytest.fixture(scope="module")
def golden_store(golden: Path, store_pool: StorePool) -> Iterator[Path]:
    base = store_pool.lend()
    try:
        with tarfile.open(golden / "store.tar") as archive:
            for member in archive:
                if member.isfile():
                    data = archive.extractfile(member)
                    assert data is not None
                    target = base / member.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data.read())
        yield base
    finally:
        store_pool.take_back(base)


@pytest.fixture
def at_golden(fleece: Fleece, golden_store: Path) -> Fleece:
    fleece.repo = golden_store
    return fleece


@pytest.fixture
def content(golden: Path) -> str:
    """SHA-256 of the image that all of these snapshots hold."""
    expected = json.loads((golden / "expected.json").read_text())
    digest: str = expected["host/signed/2026-01-01T00:00:00Z"]["data.img.fidx"]["content-sha256"]
    return digest


@pytest.mark.parametrize(
    ("group", "file", "passphrase"),
    [
        ("host/enc", "plain.key", None),
        ("host/enc-legacy", "plain.key", None),
        ("host/signed", "plain.key", None),
        ("host/master", "scrypt.key", "gold-password"),
    ],
)
def test_what_pbs_encrypted_and_signed_is_read_with_its_key_and_refused_without(
    at_golden: Fleece, golden: Path, content: str, tmp_path: Path, group: str, file: str, passphrase: str | None
) -> None:
    right, wrong = golden / "keys" / file, golden / "keys" / ("scrypt.key" if file == "plain.key" else "plain.key")
    needed = json.loads(right.read_text())["fingerprint"]
    image = f"{group}/latest", "data.img", tmp_path / "out.raw"
    assert at_golden.json("show", f"{group}/latest")["fingerprint"] == needed
    at_golden.environment["PBS_ENCRYPTION_PASSWORD"] = "gold-password"
    failed(at_golden("restore", *image), f"the key {needed[:23]} is needed, none is given", needed)
    failed(at_golden("restore", *image, "--keyfile", wrong), f"the key {needed[:23]} is needed, given is ")
    if passphrase is not None:
        at_golden.environment["PBS_ENCRYPTION_PASSWORD"] = passphrase + "x"
        failed(at_golden("restore", *image, "--keyfile", right), "the passphrase is wrong")
        at_golden.environment["PBS_ENCRYPTION_PASSWORD"] = passphrase
    assert at_golden("restore", *image, "--keyfile", right).code == 0
    assert hashlib.sha256((tmp_path / "out.raw").read_bytes()).hexdigest() == content
    for result in at_golden.json("verify", group, "--keyfile", right):
        assert (result["state"], result["errors"]) == ("ok", [])


def test_the_key_in_a_snapshot_of_pbs_is_recovered_and_reads_it(
    at_golden: Fleece, golden: Path, content: str, tmp_path: Path
) -> None:
    assert at_golden("restore", "host/master/latest", "rsa-encrypted.key", tmp_path / "wrapped").code == 0
    at_golden.environment["FLEECE_MASTER_KEY_PASSWORD"] = "master-password"
    document = at_golden.json(
        "key", "import-with-master-key", tmp_path / "new.key", "--kdf", "none",
        "--master-keyfile", golden / "keys/master-private.pem", "--encrypted-keyfile", tmp_path / "wrapped",
    )  # fmt: skip
    assert document["fingerprint"] == json.loads((golden / "keys/scrypt.key").read_text())["fingerprint"]
    answer = at_golden(
        "restore", "host/master/latest", "data.img", tmp_path / "out.raw", "--keyfile", tmp_path / "new.key"
    )
    assert answer.code == 0
    assert hashlib.sha256((tmp_path / "out.raw").read_bytes()).hexdigest() == content


def test_our_encryption_names_the_chunks_as_pbs_did(
    at_golden: Fleece, golden: Path, tmp_path: Path, store_folder: Path
) -> None:
    key = golden / "keys/plain.key"
    assert at_golden("restore", "host/enc/latest", "data.img", tmp_path / "data.raw", "--keyfile", key).code == 0
    theirs = at_golden.repo
    at_golden.repo = store_folder
    report = at_golden.json("backup", f"data.img:{tmp_path}/data.raw", "--backup-id", "enc", "--keyfile", key)
    assert theirs is not None
    index = (theirs / "host/enc/2026-01-01T00:00:00Z/data.img.fidx").read_bytes()
    ours = (store_folder / report["snapshot"] / "data.img.fidx").read_bytes()
    # Behind the header with its times: the digests, and before them their checksum.
    assert ours[4096:] == index[4096:]
    assert ours[32:64] == index[32:64]


@pytest.fixture(autouse=True)
def _no_leftover_secrets(tmp_path: Path) -> Iterator[None]:
    """No temporary file of a key stays behind."""
    yield
    assert [path for path in tmp_path.rglob(".*.key.*") if path.is_file()] == []
