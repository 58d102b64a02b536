"""Which key and mode result from options, configuration and default files."""

import os
from pathlib import Path
from typing import Any

import pytest

from agent.keys import (
    KEY_NAME,
    MASTER_PUBLIC_NAME,
    KeyOptions,
    backup_keys,
    default_file,
    reading_key,
)
from core.errors import FormatError, NotFoundError, UsageError
from datastore.crypt_mode import CryptMode
from datastore.errors import PassphraseError
from datastore.keyfile import KeyFile
from datastore.master_key import unwrap_key
from datastore.private_files import write_new

from .conftest import KEY, OTHER, SHORT, key_file


@pytest.mark.parametrize(
    ("named", "default", "mode", "expected"),
    [
        (False, False, None, CryptMode.NONE),
        (False, False, "none", CryptMode.NONE),
        (True, False, None, CryptMode.ENCRYPT),
        (True, False, "encrypt", CryptMode.ENCRYPT),
        (True, False, "sign-only", CryptMode.SIGN_ONLY),
        (False, True, None, CryptMode.ENCRYPT),
        (False, True, "encrypt", CryptMode.ENCRYPT),
        (False, True, "sign-only", CryptMode.SIGN_ONLY),
        (False, True, "none", CryptMode.NONE),
        (True, True, None, CryptMode.ENCRYPT),
    ],
)
def test_modes_follow_from_options_and_default_key_as_in_proxmox_backup_client(
    config_home: Path, key: Path, named: bool, default: bool, mode: Any, expected: CryptMode
) -> None:
    if default:
        key_file(config_home / "fleece" / KEY_NAME, OTHER)
    keys = backup_keys(KeyOptions(keyfile=key if named else None, crypt_mode=mode))
    assert keys.codec.mode is expected
    # A named key counts before the default one.
    used = None if expected is CryptMode.NONE else KEY if named else OTHER
    assert keys.codec.key == used
    assert keys.wrapped_key is None


@pytest.mark.parametrize(
    "options",
    [
        KeyOptions(crypt_mode="encrypt"),
        KeyOptions(crypt_mode="sign-only"),
        KeyOptions(master_pubkey_file=Path("m.pem")),
        KeyOptions(master_pubkey_fd=5),
        KeyOptions(keyfile=Path("a"), crypt_mode="none"),
        KeyOptions(keyfd=5, crypt_mode="none"),
        KeyOptions(master_pubkey_file=Path("m.pem"), crypt_mode="none"),
        KeyOptions(keyfile=Path("a"), keyfd=5),
        KeyOptions(master_pubkey_file=Path("m.pem"), master_pubkey_fd=5),
    ],
)
def test_options_that_need_a_key_or_exclude_each_other_are_wrong_usage(config_home: Path, options: KeyOptions) -> None:
    with pytest.raises(UsageError):
        backup_keys(options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, CryptMode.ENCRYPT),
        ({"default_mode": "sign-only"}, CryptMode.SIGN_ONLY),
        ({"default_mode": "none"}, CryptMode.NONE),
        ({"default_mode": "none", "crypt_mode": "encrypt"}, CryptMode.ENCRYPT),
        ({"default_mode": "sign-only", "crypt_mode": "none"}, CryptMode.NONE),
    ],
)
def test_the_configuration_replaces_the_defaults_and_the_command_line_comes_first(
    config_home: Path, key: Path, other_key: Path, options: dict[str, Any], expected: CryptMode
) -> None:
    keys = backup_keys(KeyOptions(default_keyfile=key, **options))
    assert keys.codec.mode is expected
    assert keys.codec.key == (None if expected is CryptMode.NONE else KEY)
    if options.get("crypt_mode") != "none":
        named = backup_keys(KeyOptions(keyfile=other_key, default_keyfile=key, **options)).codec
        assert named.key == OTHER
        assert named.mode is (CryptMode.ENCRYPT if expected is CryptMode.NONE else expected)


def test_a_configured_key_that_is_gone_or_a_mode_without_a_key_is_no_plain_backup(config_home: Path) -> None:
    with pytest.raises(NotFoundError):
        backup_keys(KeyOptions(default_keyfile=Path("/nonexistent")))
    with pytest.raises(UsageError, match="crypt mode sign-only"):
        backup_keys(KeyOptions(default_mode="sign-only"))


def test_default_keys_are_found_in_both_programs_places_fleeces_first(config_home: Path) -> None:
    assert default_file(KEY_NAME) is None
    theirs = key_file(config_home / "proxmox-backup" / KEY_NAME)
    assert default_file(KEY_NAME) == theirs
    ours = key_file(config_home / "fleece" / KEY_NAME, OTHER)
    assert default_file(KEY_NAME) == ours


def test_a_default_key_that_cannot_be_used_never_means_an_unencrypted_backup(config_home: Path) -> None:
    path = config_home / "fleece" / KEY_NAME
    path.parent.mkdir(parents=True)
    path.symlink_to("/nonexistent")
    with pytest.raises(NotFoundError):
        backup_keys(KeyOptions())
    path.unlink()
    path.write_text("{}")
    with pytest.raises(FormatError):
        backup_keys(KeyOptions())
    path.write_bytes(KeyFile.make(KEY, b"some passphrase").encode())
    os.environ["PBS_ENCRYPTION_PASSWORD"] = "another one"
    try:
        with pytest.raises(PassphraseError):
            backup_keys(KeyOptions())
    finally:
        del os.environ["PBS_ENCRYPTION_PASSWORD"]


def test_the_default_master_key_goes_with_any_key(config_home: Path, key: Path, master: tuple[bytes, bytes]) -> None:
    write_new(config_home / "fleece" / MASTER_PUBLIC_NAME, master[1], what="make")
    assert backup_keys(KeyOptions()).wrapped_key is None
    wrapped = backup_keys(KeyOptions(keyfile=key)).wrapped_key
    assert wrapped is not None
    found = unwrap_key(wrapped, master[0], b"master-password", where="x", master="m")
    assert found.unlock(None, where="x") == KEY


def test_reading_goes_on_without_a_default_key_whose_passphrase_is_not_there(
    config_home: Path, locked_key: Path
) -> None:
    path = config_home / "fleece" / KEY_NAME
    path.parent.mkdir(parents=True)
    locked_key.rename(path)
    found = reading_key(KeyOptions(), may_ask=False)
    assert found.key is None
    assert SHORT in found.note
    assert "PBS_ENCRYPTION_PASSWORD" in found.note


def test_a_bare_key_that_others_can_read_is_used_with_a_word(config_home: Path, key: Path) -> None:
    said: list[str] = []
    backup_keys(KeyOptions(keyfile=key), said.append)
    key.chmod(0o640)
    assert len(said) == 1
    backup_keys(KeyOptions(keyfile=key), said.append)
    assert said[2] == f"WARNING: {key} has no passphrase, and others can read it: chmod 600 {key}"
