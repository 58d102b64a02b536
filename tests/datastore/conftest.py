"""Fixtures of the datastore's tests."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datastore.codec import CryptKey
from tests.support.golden_store import unpack_golden_store


@pytest.fixture(scope="session")
def golden_store(golden: Path) -> Iterator[Path]:
    """The datastore that a real PBS wrote, unpacked, without the chunk folders that hold nothing."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fleece-golden-", dir=memory if memory.is_dir() else None))
    try:
        unpack_golden_store(golden, folder)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def expected(golden: Path) -> dict[str, dict[str, Any]]:
    """What that PBS said of each file: snapshot path -> file name -> size, csum, crypt-mode, ..."""
    return json.loads((golden / "expected.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def golden_keys(golden: Path) -> dict[str, CryptKey]:
    """The keys of its encrypted and signed snapshots: snapshot path prefix -> key."""
    import base64
    import hashlib

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    plain = json.loads((golden / "keys/plain.key").read_text())
    wrapped = json.loads((golden / "keys/scrypt.key").read_text())
    scrypt = wrapped["kdf"]["Scrypt"]
    derived = hashlib.scrypt(
        b"gold-password",
        salt=base64.b64decode(scrypt["salt"]),
        n=scrypt["n"],
        r=scrypt["r"],
        p=scrypt["p"],
        maxmem=256 << 20,
        dklen=32,
    )
    data = base64.b64decode(wrapped["data"])
    raw = AESGCM(derived).decrypt(data[:16], data[32:] + data[16:32], None)
    first = CryptKey.from_raw(base64.b64decode(plain["data"]))
    return {"host/enc": first, "host/enc-legacy": first, "host/signed": first, "host/master": CryptKey.from_raw(raw)}
