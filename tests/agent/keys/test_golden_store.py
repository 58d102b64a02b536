"""A datastore that a real Proxmox Backup Server wrote, with its keys."""

import hashlib
import json
from pathlib import Path

import pytest

from ..conftest import Fleece
from .conftest import failed


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
