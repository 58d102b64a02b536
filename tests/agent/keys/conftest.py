"""Keys, files to back up, and what is asked of answers, for every module about encryption."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.codec import CryptKey
from datastore.keyfile import KeyFile
from datastore.master_key import create_pair
from datastore.private_files import write_new

from ..conftest import Answer, Fleece

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


@pytest.fixture(scope="session")
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


@pytest.fixture
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of default keys, empty; none of this host's variables."""
    for name in list(os.environ):
        if name.startswith(("PBS_", "FLEECE_NEW", "FLEECE_MASTER")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg"


@pytest.fixture(autouse=True)
def _no_leftover_secrets(tmp_path: Path) -> Iterator[None]:
    """No temporary file of a key stays behind."""
    yield
    assert [path for path in tmp_path.rglob(".*.key.*") if path.is_file()] == []
