"""Where encryption keys and their passphrases come from: options, environment, default files, the terminal.

Which mode results from which options is decided as `proxmox-backup-client` does it; docs/encryption.md has the table.
Keys are read before any work starts, so that a question at the terminal is never asked in the middle of it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from core.errors import FleeceError, FormatError, NotFoundError, UsageError, os_reason
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import PassphraseError
from datastore.keyfile import (
    KeyFile,
    check_passphrase,
    need_key,
    read_key_file,
    short_fingerprint,
)
from datastore.manifest import Manifest
from datastore.master_key import MasterPublicKey
from datastore.private_files import MAX_KEY_FILE_SIZE, read_small, readable_by_others

CryptModeText = Literal["encrypt", "sign-only", "none"]

#: The variable with the passphrase of the key; with `_FD`, `_FILE` or `_CMD` behind it: where that comes from.
PASSPHRASE_VARIABLE: Final = "PBS_ENCRYPTION_PASSWORD"
#: The passphrase that `change-passphrase` sets.
NEW_PASSPHRASE_VARIABLE: Final = "FLEECE_NEW_ENCRYPTION_PASSWORD"
#: The passphrase of the private master key.
MASTER_PASSPHRASE_VARIABLE: Final = "FLEECE_MASTER_KEY_PASSWORD"
KEY_NAME: Final = "encryption-key.json"
MASTER_PUBLIC_NAME: Final = "master-public.pem"

#: Bytes of a passphrase that are read from a file, descriptor or command.
_MAX_PASSPHRASE: Final = 64 << 10
#: Seconds for the command that prints a passphrase; it may ask somebody.
_COMMAND_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """What the command line says about keys."""

    keyfile: Path | None = None
    keyfd: int | None = None
    crypt_mode: CryptModeText | None = None
    master_pubkey_file: Path | None = None
    master_pubkey_fd: int | None = None
    default_keyfile: Path | None = None  #: in place of the default file, from the configuration
    default_master: Path | None = None  #: likewise
    default_mode: CryptModeText | None = None  #: of backups, from the configuration

    def check(self) -> None:
        """Refuse options that exclude each other.

        Raises:
            UsageError: they do.
        """
        if self.keyfile is not None and self.keyfd is not None:
            raise UsageError("use", "--keyfile and --keyfd", "one of them is enough")
        if self.master_pubkey_file is not None and self.master_pubkey_fd is not None:
            raise UsageError("use", "--master-pubkey-file and --master-pubkey-fd", "one of them is enough")
        if self.crypt_mode == "none" and (self.keyfile is not None or self.keyfd is not None):
            raise UsageError("use", "--crypt-mode none", "it excludes --keyfile and --keyfd")
        if self.crypt_mode == "none" and (self.master_pubkey_file is not None or self.master_pubkey_fd is not None):
            raise UsageError("use", "--crypt-mode none", "it excludes --master-pubkey-file and --master-pubkey-fd")


@dataclass(frozen=True, slots=True)
class BackupKeys:
    """What a backup is written with."""

    codec: ChunkCodec
    wrapped_key: bytes | None = None  #: the key under the master key, for `rsa-encrypted.key.blob`


@dataclass(frozen=True, slots=True)
class ReadingKey:
    """What snapshots are read with."""

    key: CryptKey | None = None
    unchecked: bool = False  #: `--crypt-mode none`: signed archives may be read without their signature's key
    note: str = ""  #: why there is no key although there is a default one

    def codec(self) -> ChunkCodec:
        """A codec that reads with the key."""
        return ChunkCodec(self.key)

    def codec_for(self, manifest: Manifest, where: str) -> ChunkCodec:
        """A codec for the snapshot of `manifest`, which was parsed without a key.

        Raises:
            KeyNeededError: the snapshot was made with a key that is not the one at hand.
        """
        needed = manifest.fingerprint
        encrypted = any(file.crypt_mode is CryptMode.ENCRYPT for file in manifest.files)
        if needed is None:
            if encrypted and self.key is None:
                raise need_key("read", where, None, None, note=self.note)
            return ChunkCodec(self.key)
        if self.key is not None and self.key.fingerprint == needed:
            return manifest.codec(self.key)
        if self.unchecked and not encrypted:
            return ChunkCodec()
        raise need_key("read", where, needed, self.key, note=self.note)


def key_folders() -> list[Path]:
    """Where default keys are looked for, in this order: Fleece's folder, then `proxmox-backup-client`'s.

    Fleece's is `$XDG_CONFIG_HOME/fleece` if that variable is set, else /etc/fleece for root and ~/.config/fleece for
    others. New keys go there.
    """
    named = os.environ.get("XDG_CONFIG_HOME", "")
    if named.startswith("/"):
        return [Path(named) / "fleece", Path(named) / "proxmox-backup"]
    try:
        own = Path.home() / ".config"
    except RuntimeError:  # no home: a service
        return [Path("/etc/fleece")]
    return [Path("/etc/fleece") if os.geteuid() == 0 else own / "fleece", own / "proxmox-backup"]


def default_file(name: str) -> Path | None:
    """The default file `name` if there is one.

    Raises:
        FleeceError: one of the places cannot be looked into.
    """
    for folder in key_folders():
        path = folder / name
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            # It must not count as missing: the backup would not be encrypted.
            raise FleeceError("look for the default key", str(path), os_reason(error)) from error
        return path
    return None


def new_default_file(name: str) -> Path:
    """Where the default file `name` is made."""
    return key_folders()[0] / name


# Passphrases.


def passphrase_from_environment(variable: str) -> bytes | None:
    """The passphrase that `variable` holds, or that `variable`_FD, _FILE or _CMD leads to; its first line only.

    Raises:
        FleeceError: it leads nowhere.
    """
    value = os.environb.get(variable.encode())
    if value is not None:
        return _first_line(value)
    if (text := os.environ.get(f"{variable}_FD")) is not None:
        return _first_line(read_descriptor(_descriptor(text, f"{variable}_FD"), f"{variable}_FD"))
    if (text := os.environ.get(f"{variable}_FILE")) is not None:
        return _first_line(read_small(Path(text), what="read the passphrase from", limit=_MAX_PASSPHRASE))
    if (text := os.environ.get(f"{variable}_CMD")) is not None:
        return _first_line(_output_of(text, f"{variable}_CMD"))
    return None


def _first_line(data: bytes) -> bytes:
    return data.split(b"\n", 1)[0].removesuffix(b"\r")


def _descriptor(text: str, where: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise UsageError("read", where, "it is no number of a file descriptor")
    return int(text)


def read_descriptor(descriptor: int, where: str, limit: int = _MAX_PASSPHRASE) -> bytes:
    """All that the open `descriptor` gives, which is closed then."""
    try:
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        why = os_reason(error) if isinstance(error, OSError) else str(error)
        raise UsageError("read", where, f"file descriptor {descriptor}: {why}") from error
    if len(data) > limit:
        raise FormatError("read", where, f"more than {limit} bytes")
    return data


def _output_of(command: str, where: str) -> bytes:
    import shlex
    import subprocess

    try:
        words = shlex.split(command)
        if not words:
            raise UsageError("run", where, "it names no command")
        # No shell, as PBS's client: what is in the variable is one command and its arguments.
        done = subprocess.run(words, stdout=subprocess.PIPE, timeout=_COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise FleeceError("run", where, f"no answer in {_COMMAND_TIMEOUT_S:.0f} seconds") from None
    except (OSError, ValueError) as error:
        why = os_reason(error) if isinstance(error, OSError) else "its quotes do not match"
        raise FleeceError("run", where, why) from None
    if done.returncode != 0:
        raise FleeceError("run", where, f"it ended with {done.returncode}")
    return done.stdout[:_MAX_PASSPHRASE]


def can_ask() -> bool:
    """Whether there is a terminal at which a passphrase can be asked for."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def ask(prompt: str) -> bytes:
    """Ask for a passphrase at the terminal, without echo.

    Raises:
        PassphraseError: there is no terminal, or it was closed.
    """
    import getpass

    if not can_ask():
        raise PassphraseError("ask for", "a passphrase", "there is no terminal", _ways(PASSPHRASE_VARIABLE))
    try:
        return getpass.getpass(prompt).encode("utf-8", "surrogateescape")
    except EOFError:
        raise PassphraseError("ask for", "a passphrase", "nothing was entered") from None


def _ways(variable: str) -> str:
    return f"set {variable}, or {variable}_FD, _FILE or _CMD"


def passphrase(variable: str, prompt: str, what: str, where: str, *, attended: bool = True) -> bytes:
    """A passphrase that exists already: from the environment, else (`attended`) from the terminal.

    Raises:
        PassphraseError: neither gives one.
    """
    found = passphrase_from_environment(variable)
    if found is not None:
        return found
    if not attended:
        raise PassphraseError(what, where, "it is protected by a passphrase, and nobody is asked here", _ways(variable))
    if not can_ask():
        raise PassphraseError(
            what, where, "it is protected by a passphrase, and there is no terminal to ask for it", _ways(variable)
        )
    return ask(prompt)


def new_passphrase(variable: str, prompt: str, what: str = "passphrase") -> bytes:
    """A passphrase to protect something with: from the environment, else from the terminal, entered twice.

    Raises:
        UsageError: too short, or entered in two ways.
        PassphraseError: neither gives one.
    """
    found = passphrase_from_environment(variable)
    if found is not None:
        return check_passphrase(found)
    if not can_ask():
        raise PassphraseError("ask for", f"the new {what}", "there is no terminal", _ways(variable))
    first = check_passphrase(ask(prompt))
    if ask("Once more: ") != first:
        raise UsageError(f"use the {what}", "given", "the two differ", "start again")
    return first


def unlock(file: KeyFile, where: str, *, attended: bool = True) -> CryptKey:
    """The key of `file`, asking for its passphrase if it has one and `attended`.

    Raises:
        PassphraseError, FormatError: as `KeyFile.unlock`.
    """
    if file.kdf is None:
        return file.unlock(None, where=where)
    file.kdf.check(where)
    hint = f", hint {file.hint!r}" if file.hint else ""
    prompt = f"Passphrase of {where}{hint}: "
    secret = passphrase(PASSPHRASE_VARIABLE, prompt, "unlock the key", where, attended=attended)
    return file.unlock(secret, where=where)


# Keys.


@dataclass(frozen=True, slots=True)
class _Found:
    """A key file and where it was found."""

    file: KeyFile
    where: str
    default: bool


def _find_key(options: KeyOptions) -> _Found | None:
    if options.keyfile is not None:
        return _Found(read_key_file(options.keyfile), str(options.keyfile), False)
    if options.keyfd is not None:
        where = f"file descriptor {options.keyfd}"
        text = read_descriptor(options.keyfd, "--keyfd", MAX_KEY_FILE_SIZE)
        return _Found(KeyFile.parse(text, where=where), where, False)
    path = options.default_keyfile or default_file(KEY_NAME)
    return None if path is None else _Found(read_key_file(path), str(path), True)


def _find_master(options: KeyOptions) -> MasterPublicKey | None:
    if options.master_pubkey_fd is not None:
        pem = read_descriptor(options.master_pubkey_fd, "--master-pubkey-fd", MAX_KEY_FILE_SIZE)
        return MasterPublicKey.parse(pem, where=f"file descriptor {options.master_pubkey_fd}")
    path = options.master_pubkey_file or options.default_master or default_file(MASTER_PUBLIC_NAME)
    if path is None:
        return None
    return MasterPublicKey.parse(read_small(path, what="read the master public key"), where=str(path))


def backup_keys(
    options: KeyOptions, say: Callable[[str], None] = lambda text: None, *, attended: bool = True
) -> BackupKeys:
    """How a backup is to be written.

    With a key (named, or a default one) data is encrypted unless `--crypt-mode` says otherwise.

    Args:
        options: of the command line.
        say: told which key is used.
        attended: whether a terminal may be asked for a passphrase.

    Raises:
        UsageError: options that exclude each other, or a mode that needs a key and no key.
        FleeceError: a key cannot be read or unlocked.
    """
    options.check()
    named = options.keyfile is not None or options.keyfd is not None
    # A key that is named outweighs a configured mode without one.
    wanted = options.crypt_mode or (None if named and options.default_mode == "none" else options.default_mode)
    if wanted == "none":
        return BackupKeys(ChunkCodec())
    found = _find_key(options)
    if found is None:
        for option, given in (
            (f"crypt mode {wanted}", wanted is not None),
            ("--master-pubkey-file", options.master_pubkey_file is not None),
            ("--master-pubkey-fd", options.master_pubkey_fd is not None),
        ):
            if given:
                raise UsageError(
                    "use", option, "there is no encryption key",
                    "name one with --keyfile, or make a default one with 'fleece key create'",
                )  # fmt: skip
        return BackupKeys(ChunkCodec())
    mode = CryptMode(wanted or CryptMode.ENCRYPT.value)
    master = _find_master(options)
    key = unlock(found.file, found.where, attended=attended)
    verb = "encrypting" if mode is CryptMode.ENCRYPT else "signing"
    kind = "default key" if found.default else "key"
    say(f"{verb} with the {kind} {short_fingerprint(key.fingerprint)} of {found.where}")
    if found.file.kdf is None and options.keyfd is None and readable_by_others(Path(found.where)):
        say(f"WARNING: {found.where} has no passphrase, and others can read it: chmod 600 {found.where}")
    wrapped = master.wrap(key, created=found.file.created) if master is not None else None
    return BackupKeys(ChunkCodec(key, mode), wrapped)


def reading_key(options: KeyOptions, *, may_ask: bool = True, attended: bool = True) -> ReadingKey:
    """The key to read snapshots with: the one that is named, else a default one, if there is one that can be unlocked.

    Args:
        options: of the command line.
        may_ask: whether the terminal may be asked for the passphrase of a default key.
        attended: whether it may be asked for anything.

    Raises:
        UsageError: options that exclude each other, or a mode that needs a key and no key.
        FleeceError: the key that is named, or a default one that is broken, cannot be used.
    """
    options.check()
    if options.crypt_mode == "none":
        return ReadingKey(unchecked=True, note="leave out --crypt-mode none and give it with --keyfile")
    found = _find_key(options)
    if found is None:
        if options.crypt_mode is not None:
            raise UsageError(
                "use", f"--crypt-mode {options.crypt_mode}", "there is no encryption key", "name one with --keyfile"
            )
        return ReadingKey()
    if found.default and found.file.kdf is not None:
        given = passphrase_from_environment(PASSPHRASE_VARIABLE)
        if given is not None:
            try:
                return ReadingKey(found.file.unlock(given, where=found.where))
            except PassphraseError as error:
                # The passphrase may belong to something else, and plain snapshots need no key at all.
                return ReadingKey(note=f"the default key was not used: {error}")
        if not (attended and may_ask and can_ask()):
            name = f" {short_fingerprint(found.file.fingerprint)}" if found.file.fingerprint else ""
            note = f"the default key{name} of {found.where} needs its passphrase: {_ways(PASSPHRASE_VARIABLE)}"
            return ReadingKey(note=note)
    return ReadingKey(unlock(found.file, found.where, attended=attended))


def find_existing(path: Path | None, configured: Path | None, name: str) -> Path:
    """The file that `fleece key` is to look at: `path`, else the one that backups use.

    Args:
        path: named on the command line.
        configured: named by the configuration in place of the default file.
        name: of the default file.

    Raises:
        NotFoundError: none is named, and there is no default one.
    """
    found = path or configured or default_file(name)
    if found is None:
        raise NotFoundError("find", name, f"there is none in {' or '.join(map(str, key_folders()))}", "name the file")
    return found
