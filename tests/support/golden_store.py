"""The datastore that a real Proxmox Backup Server wrote (`store.tar` of the golden data), and its keys."""

import json
import tarfile
from base64 import b64decode
from pathlib import Path


def unpack_golden_store(golden: Path, base: Path) -> None:
    """Put it into the folder `base`; the tar archive leaves out the chunk folders that hold nothing."""
    with tarfile.open(golden / "store.tar") as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(base)


def golden_key(golden: Path) -> bytes:
    """The 32 bytes of the key of `host/enc` and `host/signed`, which has no passphrase."""
    return b64decode(json.loads((golden / "keys/plain.key").read_text())["data"])
