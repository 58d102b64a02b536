"""Backup, restore, verify and mount with the right key, another one and none."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.keys import (
    KEY_NAME,
)
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest
from tests.support.fuse import NEEDS_FUSE
from tests.support.stores import chunk_files

from ..conftest import Answer, Fleece
from .conftest import KEY, MIB, OTHER, OTHER_SHORT, PASSPHRASE, SHORT, failed, files


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
    chunks = {path.name for path in chunk_files(stored.repo)}
    assert keyed.hexdigest() in chunks
    assert digest.hexdigest() not in chunks
    assert len(chunks) == 3
    for path in [*chunk_files(stored.repo), stored.repo / snapshot / "vm.conf.blob"]:
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


@pytest.mark.parametrize("mode", ["encrypt", "sign-only"])
def test_a_signature_that_somebody_removed_is_missed_by_whoever_has_the_key(
    stored: Fleece, small: Path, key: Path, other_key: Path, mode: str
) -> None:
    report = stored.json(
        "backup", f"vm.conf:{small}", "--backup-id", "web", "--keyfile", key, "--crypt-mode", mode
    )  # fmt: skip
    assert stored.repo is not None
    path = stored.repo / report["snapshot"] / "index.json.blob"
    manifest = Manifest.parse(path.read_bytes(), where="x")
    manifest.signature = None
    path.write_bytes(bytes(manifest.encode()))
    answer = stored("restore", report["snapshot"], "vm.conf", "-", "--keyfile", key)
    assert (answer.code, answer.out) == (3, small.read_text())
    assert "has no signature, although it was made with a key" in answer.err
    failed(stored("verify", "--keyfile", key), "vouch")
    assert "there is none, although it was made with this key" in stored("verify", "--keyfile", key).out
    # Without the key, nobody can tell.
    for arguments in ((), ("--keyfile", other_key)):
        assert stored("verify", *arguments).code == 0


def test_a_signed_manifest_that_names_no_key_is_not_called_damaged_with_another(
    stored: Fleece, small: Path, key: Path, other_key: Path
) -> None:
    report = stored.json(
        "backup", f"vm.conf:{small}", "--backup-id", "web", "--keyfile", key, "--crypt-mode", "sign-only"
    )
    assert stored.repo is not None
    # As the first clients wrote it.
    path = stored.repo / report["snapshot"] / "index.json.blob"
    manifest = Manifest.parse(path.read_bytes(), where="x").with_unprotected({"key-fingerprint": None})
    path.write_bytes(bytes(manifest.encode()))
    for arguments in (("--keyfile", key), ("--keyfile", other_key), ()):
        assert stored.json("verify", *arguments)[0]["state"] == "ok"
    assert stored("restore", report["snapshot"], "vm.conf", "-", "--keyfile", key).out == small.read_text()
    failed(stored("restore", report["snapshot"], "vm.conf", "-", "--keyfile", other_key), "not one of", "another key")


def test_verify_with_the_key_finds_what_a_crc_cannot(stored: Fleece, image: Path, key: Path, other_key: Path) -> None:
    from datastore.blob import Blob
    from datastore.codec import ChunkCodec

    stored.json("backup", f"disk.img:{image}", "--backup-id", "web", "--keyfile", key)
    assert stored.repo is not None
    victim = max(chunk_files(stored.repo), key=lambda path: path.stat().st_size)
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
@NEEDS_FUSE
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
