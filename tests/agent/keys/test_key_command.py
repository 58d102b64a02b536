"""`fleece key`: keys made, changed, shown, printed and recovered."""

import base64
import json
import os
import stat
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.cli_key import _warn_if_exposed, create_master_key
from agent.invocation import Invocation
from agent.keys import KEY_NAME, MASTER_PUBLIC_NAME
from core.errors import FleeceError
from datastore.keyfile import KeyFile
from datastore.master_key import create_pair

from ..conftest import Fleece
from .conftest import KEY, OTHER, OTHER_SHORT, PASSPHRASE, SHORT, failed, files, key_file


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


def test_a_key_on_a_file_system_without_modes_comes_with_a_warning(key: Path) -> None:
    invocation = Invocation()
    _warn_if_exposed(invocation, key)
    assert invocation.warnings == []
    key.chmod(0o755)  # as FAT shows every file
    _warn_if_exposed(invocation, key)
    assert invocation.warnings == [f"others can read {key}: its file system keeps no modes"]


def test_half_a_master_key_does_not_stay(
    config_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, master: tuple[bytes, bytes]
) -> None:
    monkeypatch.setenv("FLEECE_MASTER_KEY_PASSWORD", "master-password")
    monkeypatch.setattr("datastore.master_key.create_pair", lambda passphrase: master)
    real = os.fsync
    written = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 3:  # private half, its folder, public half
            raise OSError(28, os.strerror(28))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FleeceError, match=r"master-public\.pem: No space left"):
        create_master_key(Invocation(), tmp_path / "safe")
    assert list((tmp_path / "safe").iterdir()) == []


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

    # Also where the configuration still names the lost key.
    (tmp_path / "fleece.toml").write_text(f'keyfile = "{key}"\n')
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
    # Two thousand bits, which hold no key: every backup would fail.
    short = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    (tmp_path / "d.pem").write_bytes(short.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "config/fleece" / MASTER_PUBLIC_NAME).unlink()
    failed(fleece("key", "import-master-pubkey", tmp_path / "d.pem"), "it cannot hold 255 bytes", code=2)
    assert not (tmp_path / "config/fleece" / MASTER_PUBLIC_NAME).exists()


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


def test_without_a_file_the_key_is_meant_that_backups_use(
    fleece: Fleece, tmp_path: Path, key: Path, master: tuple[bytes, bytes]
) -> None:
    theirs = key_file(tmp_path / "config/proxmox-backup" / KEY_NAME, OTHER)
    assert fleece.json("key", "show")["path"] == str(theirs)
    (tmp_path / "m.pem").write_bytes(master[1])
    (tmp_path / "fleece.toml").write_text(f'keyfile = "{key}"\nmaster-pubkey-file = "{tmp_path}/m.pem"\n')
    for command in (("show",), ("change-passphrase", "--kdf", "none")):
        assert fleece.json("key", *command)["fingerprint"] == KEY.fingerprint_text
    assert KEY.fingerprint_text in fleece("key", "paperkey").out
    assert fleece.json("key", "show-master-pubkey")["path"] == f"{tmp_path}/m.pem"
    # A named file needs no valid configuration.
    (tmp_path / "fleece.toml").write_text("nonsense = 1\n")
    assert fleece.json("key", "show", theirs)["fingerprint"] == OTHER.fingerprint_text


def test_a_new_default_key_says_which_one_it_replaces(fleece: Fleece, tmp_path: Path, key: Path) -> None:
    theirs = key_file(tmp_path / "config/proxmox-backup" / KEY_NAME)
    answer = fleece("key", "create", "--kdf", "none")
    assert answer.code == 3
    assert f"backups used the key {theirs} until now" in answer.err
    (tmp_path / "config/fleece" / KEY_NAME).unlink()
    (tmp_path / "fleece.toml").write_text(f'keyfile = "{key}"\n')
    answer = fleece("key", "create", "--kdf", "none")
    assert answer.code == 3
    assert f"backups go on to use {key}" in answer.err
