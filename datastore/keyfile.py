"""Key file: one backup encryption key as JSON, bare or under a passphrase.

Format: docs/formats.md, "Key file". This module is its only description in code. Everything in a file is checked before
it sizes memory or work, and nothing that is secret gets into a message.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from core.errors import FormatError, UsageError
from datastore.codec import KEY_SIZE, CryptKey, format_fingerprint, parse_fingerprint
from datastore.errors import KeyNeededError, PassphraseError
from datastore.private_files import MAX_KEY_FILE_SIZE, read_small

#: Bytes a passphrase must have.
MIN_PASSPHRASE: Final = 5
#: Characters of a hint.
MAX_HINT: Final = 64
#: Bytes that one derivation may take: PBS's own limit (1 GiB and a little).
MAX_SCRYPT_MEMORY: Final = 1025 << 20
#: Steps n * r * p of one derivation, 128 times PBS's own parameters: about half a minute. Memory alone bounds p so
#: weakly that a hostile file could keep a processor busy for days.
MAX_SCRYPT_WORK: Final = 1 << 26
#: Rounds of PBKDF2, 150 times PBS's own: some seconds.
MAX_PBKDF2_ROUNDS: Final = 10_000_000

#: The lines around a key file on paper.
PAPER_BEGIN: Final = b"-----BEGIN PROXMOX BACKUP KEY-----"
PAPER_END: Final = b"-----END PROXMOX BACKUP KEY-----"

_IV_SIZE: Final = 16
_TAG_SIZE: Final = 16
_WRAPPED_SIZE: Final = _IV_SIZE + _TAG_SIZE + KEY_SIZE
_SALT_SIZE: Final = 32
_MAX_SALT: Final = 1024
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")
_U64: Final = 1 << 64

#: How a new key file is protected.
KdfName = Literal["scrypt", "pbkdf2", "none"]


def short_fingerprint(fingerprint: bytes | str) -> str:
    """The first 8 bytes of a fingerprint, which people are shown as the key's id."""
    text = fingerprint if isinstance(fingerprint, str) else format_fingerprint(fingerprint)
    return text[:23]


@dataclass(frozen=True, slots=True)
class Scrypt:
    """Parameters of scrypt; the defaults are those PBS writes and need 64 MiB."""

    salt: bytes
    n: int = 65536  #: a power of two
    r: int = 8
    p: int = 1

    name = "scrypt"

    def check(self, where: str) -> None:
        """Refuse parameters that no writer makes, before anything is derived.

        Raises:
            FormatError: no power of two, too much memory or too much work.
        """
        n, r, p = self.n, self.r, self.p
        # Beyond 2^(16 r) the function is not defined.
        if n < 2 or n & (n - 1) or r < 1 or p < 1 or n.bit_length() - 1 >= 16 * r:
            raise _error(where, "its scrypt parameters are none (n is a power of two, r and p at least 1)")
        if r * p >= 1 << 30:
            raise _error(where, "its scrypt parameters are none (r * p is too large)")
        # Its table, and for each of p lanes a block that the last step copies once more.
        memory = 128 * r * (n + 2 * p)
        if memory > MAX_SCRYPT_MEMORY:
            raise _error(where, f"its passphrase would take {memory >> 20} MiB to check, more than 1025 MiB")
        if n * r * p > MAX_SCRYPT_WORK:
            raise _error(where, "its passphrase would take minutes to check: p is too large")

    def derive(self, passphrase: bytes) -> bytes:
        """The 32-byte key of `passphrase`; takes about 0.2 s with the default parameters."""
        memory = 128 * self.r * (self.n + self.p + 2) + (1 << 20)
        return hashlib.scrypt(
            passphrase, salt=self.salt, n=self.n, r=self.r, p=self.p, maxmem=memory, dklen=KEY_SIZE
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The value of `kdf`."""
        return {"Scrypt": {"n": self.n, "r": self.r, "p": self.p, "salt": _base64(self.salt)}}


@dataclass(frozen=True, slots=True)
class Pbkdf2:
    """Parameters of PBKDF2-HMAC-SHA256, which old clients wrote."""

    salt: bytes
    rounds: int = 65535

    name = "pbkdf2"

    def check(self, where: str) -> None:
        """As `Scrypt.check`."""
        if not 1 <= self.rounds <= MAX_PBKDF2_ROUNDS:
            raise _error(where, f"its PBKDF2 rounds are not within 1 to {MAX_PBKDF2_ROUNDS}")

    def derive(self, passphrase: bytes) -> bytes:
        """The 32-byte key of `passphrase`."""
        return hashlib.pbkdf2_hmac("sha256", passphrase, self.salt, self.rounds, KEY_SIZE)

    def to_json(self) -> dict[str, Any]:
        """The value of `kdf`."""
        return {"PBKDF2": {"iter": self.rounds, "salt": _base64(self.salt)}}


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A key file, parsed. Its key is had by `unlock`."""

    kdf: Scrypt | Pbkdf2 | None  #: None: the key lies bare in `data`
    created: datetime  #: with offset
    modified: datetime  #: with offset
    data: bytes = field(repr=False)  #: the key, or IV, tag and encrypted key
    fingerprint: bytes | None = None  #: 32 bytes, of the key
    hint: str | None = None  #: for the passphrase

    @classmethod
    def parse(cls, text: bytes, *, where: str) -> Self:
        """Read the content of a key file; `where` is its path.

        Raises:
            FormatError: no key file, or one that no writer makes.
        """
        if len(text) > MAX_KEY_FILE_SIZE:
            raise _error(where, f"it has more than {MAX_KEY_FILE_SIZE} bytes")
        # As it comes back from paper.
        text = text.strip().removeprefix(PAPER_BEGIN).removesuffix(PAPER_END)
        document = _load(text, where)
        kdf = _kdf(document.get("kdf"), where)
        data = _bytes(document.get("data"), "data", where)
        expected = KEY_SIZE if kdf is None else _WRAPPED_SIZE
        if len(data) != expected:
            raise _error(where, f"'data' has {len(data)} bytes instead of {expected}")
        fingerprint = document.get("fingerprint")
        if fingerprint is not None:
            try:
                fingerprint = parse_fingerprint(fingerprint if isinstance(fingerprint, str) else "")
            except UsageError as error:
                raise _error(where, f"'fingerprint': {error.why}") from None
        hint = document.get("hint")
        if hint is not None and (not isinstance(hint, str) or not 1 <= len(hint) <= MAX_HINT):
            raise _error(where, f"'hint' is no text of 1 to {MAX_HINT} characters")
        if hint is not None and any("\ud800" <= letter <= "\udfff" for letter in hint):
            raise _error(where, "'hint' is no Unicode")
        return cls(
            kdf, _time(document, "created", where), _time(document, "modified", where), data, fingerprint, hint
        )  # fmt: skip

    @classmethod
    def make(
        cls,
        key: CryptKey,
        passphrase: bytes | None,
        *,
        kdf: KdfName = "scrypt",
        hint: str | None = None,
        created: datetime | None = None,
        now: datetime | None = None,
    ) -> Self:
        """A new file for `key`, encrypted with `passphrase` (None if `kdf` is `none`).

        Args:
            key: what it holds.
            passphrase: at least 5 bytes.
            kdf: how the passphrase becomes a key.
            hint: 1 to 64 characters that help to remember the passphrase; anybody can read them.
            created: when the key was made, if that was not now.
            now: with offset; else the clock's.

        Raises:
            UsageError: passphrase, kdf and hint do not go together.
        """
        now = (datetime.now(UTC).astimezone() if now is None else now).replace(microsecond=0)
        if hint is not None and (not 1 <= len(hint) <= MAX_HINT or not hint.isprintable()):
            raise UsageError("use the hint", "given", f"it has 1 to {MAX_HINT} printable characters")
        function = None if kdf == "none" else {"scrypt": Scrypt, "pbkdf2": Pbkdf2}[kdf](secrets.token_bytes(_SALT_SIZE))
        if function is None:
            if hint is not None:
                raise UsageError("use the hint", "given", "there is no passphrase without a --kdf")
            data = key.raw
        else:
            data = wrap_key(key, function, check_passphrase(passphrase or b""))
        return cls(function, created or now, now, data, key.fingerprint, hint)

    def unlock(self, passphrase: bytes | None, *, where: str) -> CryptKey:
        """The key. Takes about 0.2 s if there is a passphrase.

        Raises:
            PassphraseError: the passphrase is missing, too short or wrong.
            FormatError: parameters beyond all bounds, or the key is not the one of the fingerprint.
        """
        raw = self.data
        if self.kdf is not None:
            if passphrase is None:
                raise PassphraseError("unlock the key", where, "it is protected by a passphrase")
            self.kdf.check(where)
            if len(passphrase) < MIN_PASSPHRASE:
                raise PassphraseError(
                    "unlock the key", where, f"a passphrase has at least {MIN_PASSPHRASE} bytes", self._hint()
                )
            iv, tag = raw[:_IV_SIZE], raw[_IV_SIZE : _IV_SIZE + _TAG_SIZE]
            decryptor = Cipher(AES(self.kdf.derive(passphrase)), GCM(iv, tag)).decryptor()
            raw = decryptor.update(raw[_IV_SIZE + _TAG_SIZE :])
            try:
                decryptor.finalize()
            except InvalidTag:
                raise PassphraseError("unlock the key", where, "the passphrase is wrong", self._hint()) from None
        key = CryptKey.from_raw(raw)
        if self.fingerprint is not None and self.fingerprint != key.fingerprint:
            raise _error(
                where,
                f"it holds the key {short_fingerprint(key.fingerprint)}, "
                f"its fingerprint says {short_fingerprint(self.fingerprint)}",
            )
        return key

    def _hint(self) -> str:
        return f"its hint is {self.hint!r}" if self.hint is not None else ""

    def document(self) -> dict[str, Any]:
        """The file as a JSON object, fields in PBS's order; holds the key."""
        document: dict[str, Any] = {
            "kdf": None if self.kdf is None else self.kdf.to_json(),
            "created": self.created.isoformat(timespec="seconds"),
            "modified": self.modified.isoformat(timespec="seconds"),
            "data": _base64(self.data),
        }
        if self.fingerprint is not None:
            document["fingerprint"] = format_fingerprint(self.fingerprint)
        if self.hint is not None:
            document["hint"] = self.hint
        return document

    def encode(self) -> bytes:
        """The content of the file: one line, without an end of line, as PBS writes it."""
        return json.dumps(self.document(), separators=(",", ":"), ensure_ascii=False).encode()


def check_passphrase(passphrase: bytes) -> bytes:
    """Return `passphrase` if a key may be protected with it.

    Raises:
        UsageError: shorter than 5 bytes.
    """
    if len(passphrase) < MIN_PASSPHRASE:
        raise UsageError("use the passphrase", "given", f"it has at least {MIN_PASSPHRASE} bytes")
    return passphrase


def wrap_key(key: CryptKey, kdf: Scrypt | Pbkdf2, passphrase: bytes, *, iv: bytes | None = None) -> bytes:
    """The 64 bytes that hold `key` under `passphrase`: IV (16 random bytes unless given), tag, encrypted key."""
    iv = os.urandom(_IV_SIZE) if iv is None else iv
    encryptor = Cipher(AES(kdf.derive(passphrase)), GCM(iv)).encryptor()
    encrypted = encryptor.update(key.raw) + encryptor.finalize()
    return iv + encryptor.tag + encrypted


def read_key_file(path: Path) -> KeyFile:
    """The key file `path`.

    Raises:
        NotFoundError, FleeceError: it cannot be read.
        FormatError: it is no key file.
    """
    return KeyFile.parse(read_small(path, what="read the key file"), where=str(path))


# Parsing.


def _load(text: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise _error(where, "its JSON is nested too deep") from None
    except UnicodeDecodeError:
        raise _error(where, "it is no text") from None
    except json.JSONDecodeError as error:
        # The error's own text has a place, but nothing of the content.
        raise _error(where, f"it is no valid JSON ({error.msg} at character {error.pos})") from None
    except ValueError as error:
        raise _error(where, f"it is no valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise _error(where, "its JSON is no object")
    return document


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return document


def _kdf(value: object, where: str) -> Scrypt | Pbkdf2 | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1:
        raise _error(where, "'kdf' is neither null nor one function")
    ((name, fields),) = value.items()
    if name not in ("Scrypt", "PBKDF2") or not isinstance(fields, dict):
        raise _error(where, "'kdf' is none of null, Scrypt, PBKDF2")
    salt = _bytes(fields.get("salt"), "salt", where)
    if len(salt) > _MAX_SALT:
        raise _error(where, f"'salt' has more than {_MAX_SALT} bytes")
    if name == "PBKDF2":
        return Pbkdf2(salt, _integer(fields, "iter", where))
    return Scrypt(salt, *(_integer(fields, field, where) for field in ("n", "r", "p")))


def _integer(fields: dict[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _U64:
        raise _error(where, f"'{name}' is missing or no 64-bit number")
    return value


def _bytes(value: object, name: str, where: str) -> bytes:
    if not isinstance(value, str):
        raise _error(where, f"'{name}' is missing or no text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise _error(where, f"'{name}' is no base64") from None


def _time(document: dict[str, Any], name: str, where: str) -> datetime:
    value = document.get(name)
    if not isinstance(value, str) or _TIME.fullmatch(value) is None:
        raise _error(where, f"'{name}' is missing or no RFC 3339 time with offset")
    # Python takes six digits of a fraction at most, and PBS writes none.
    text = re.sub(r"\.\d+", "", value.upper())
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise _error(where, f"'{name}' is no time") from None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _error(where: str, why: str) -> FormatError:
    return FormatError("read the key file", where, why)


def need_key(what: str, where: str, needed: bytes | None, given: CryptKey | None, *, note: str = "") -> KeyNeededError:
    """The error that names the key which is needed (`needed`, None if unknown) and the one that was given."""
    name = f"the key {short_fingerprint(needed)}" if needed is not None else "the key of its backup"
    why = f"{name} is needed, " + (
        "none is given" if given is None else f"given is {short_fingerprint(given.fingerprint)}"
    )
    hint = note or "give it with --keyfile"
    if needed is not None:
        hint += f"; the full fingerprint is {format_fingerprint(needed)}"
    return KeyNeededError(what, where, why, hint)
