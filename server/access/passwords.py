"""Passwords and token secrets, kept as scrypt hashes. For worker threads: each takes some 50 ms and 16 MiB."""

import base64
import hmac
import os
from binascii import Error as Base64Error
from typing import Final

from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

_SALT: Final = 16
_LENGTH: Final = 32
#: Cost: 2^14 blocks of 8 * 128 bytes.
_N, _R, _P = 1 << 14, 8, 1
#: Bytes of a password that are looked at; longer ones are refused.
MAX_PASSWORD: Final = 1024


def hash_password(password: str) -> str:
    """The text to keep: `scrypt$N$R$P$SALT$KEY`."""
    salt = os.urandom(_SALT)
    key = Scrypt(salt=salt, length=_LENGTH, n=_N, r=_R, p=_P).derive(password.encode())
    return f"scrypt${_N}${_R}${_P}${_text(salt)}${_text(key)}"


def verify_password(password: str, kept: str | None) -> bool:
    """Compare; without a kept hash as much work is done as with one, so that time tells nothing."""
    if kept is None:
        Scrypt(salt=bytes(_SALT), length=_LENGTH, n=_N, r=_R, p=_P).derive(password.encode("utf-8", "replace"))
        return False
    try:
        kind, n, r, p, salt, key = kept.split("$")
        if kind != "scrypt" or not hmac.compare_digest(f"{n}.{r}.{p}", f"{_N}.{_R}.{_P}"):
            return False
        scrypt = Scrypt(salt=base64.b64decode(salt), length=_LENGTH, n=_N, r=_R, p=_P)
        scrypt.verify(password.encode("utf-8", "replace"), base64.b64decode(key))
    except (InvalidKey, ValueError, Base64Error):
        return False
    return True


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
