"""The state of an emulated TPM (swtpm), which goes along as small file beside the disks.

QEMU does not know it: a program of its own keeps it in a folder (`--tpmstate dir=`) or a file
(`--tpmstate backend-uri=file://`). The permanent state is what a machine starts with after a power cut; the volatile
one, of a machine that was suspended, is of no use beside the disks of one that ran. If swtpm encrypts the state
(`--key`), what is stored is encrypted as well. docs/hypervisor.md, "What goes along".
"""

import os
import re
import stat
from pathlib import Path
from typing import Final

from core.errors import NotFoundError, SourceError, os_reason

#: Bytes of a state; swtpm's have some ten KiB.
MAX_SIZE: Final = 4 * 1024 * 1024
#: What swtpm calls its permanent state: TPM 2.0 and 1.2.
STATE_NAME: Final = re.compile(r"tpm2?-[0-9]{2}\.permall")
#: The blob of a state that is one file with a header, without `.blob`.
FILE_NAME: Final = "tpm-state.bin"


def read_tpm_state(path: Path) -> list[tuple[str, bytes]]:
    """Names (with `.blob`) and contents of what is stored of the TPM whose state is the folder or file `path`. Blocks.

    swtpm writes a folder's states to new files, which it renames: whichever is read is whole.

    Raises:
        NotFoundError: there is nothing.
        SourceError: it cannot be read, or is no state of a TPM.
    """
    try:
        if not path.is_dir():
            name = path.name if STATE_NAME.fullmatch(path.name) else FILE_NAME
            return [(f"{name}.blob", _read(path))]
        names = sorted(entry.name for entry in path.iterdir() if STATE_NAME.fullmatch(entry.name))
    except OSError as error:
        raise SourceError("read the state of the TPM in", str(path), os_reason(error)) from error
    if not names:
        raise SourceError("read the state of the TPM in", str(path), "no state of swtpm is in that folder")
    return [(f"{name}.blob", _read(path / name)) for name in names]


def _read(path: Path) -> bytes:
    try:
        # Whoever may write to the folder must not make us read another file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SourceError("read the state of the TPM in", str(path), "it is no file")
            state = file.read(MAX_SIZE + 1)
    except FileNotFoundError as error:
        raise NotFoundError("read the state of the TPM in", str(path), os_reason(error)) from error
    except OSError as error:
        raise SourceError("read the state of the TPM in", str(path), os_reason(error)) from error
    if len(state) > MAX_SIZE:
        raise SourceError("read the state of the TPM in", str(path), f"it has more than {MAX_SIZE} bytes")
    return state
