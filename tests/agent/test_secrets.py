import os
from pathlib import Path

import pytest

from agent.secrets import SecretStore, Source
from core.errors import FleeceError, NotFoundError, UsageError

SECRET = "top/secret+KEY"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SecretStore:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    return SecretStore(tmp_path / "state/secrets")


def test_what_was_stored_is_read_back_and_is_for_its_owner_alone(store: SecretStore) -> None:
    store.write("s3-aws", SECRET)
    assert store.read("s3-aws", hint="") == SECRET
    assert store.source("s3-aws") is Source.STORED
    assert (store.folder / "s3-aws").stat().st_mode & 0o7777 == 0o600
    assert store.folder.stat().st_mode & 0o7777 == 0o700
    assert [path.name for path in store.folder.iterdir()] == ["s3-aws"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_secret_that_others_may_read_or_write_is_refused(store: SecretStore, mode: int) -> None:
    store.write("s3-aws", SECRET)
    (store.folder / "s3-aws").chmod(mode)
    with pytest.raises(FleeceError, match=f"mode is {mode:04o}") as caught:
        store.read("s3-aws", hint="")
    assert SECRET not in str(caught.value)
    assert store.source("s3-aws") is Source.UNSAFE


def test_a_link_in_the_folder_of_secrets_is_not_followed(store: SecretStore, tmp_path: Path) -> None:
    store.write("s3-other", SECRET)
    (store.folder / "s3-aws").symlink_to(store.folder / "s3-other")
    with pytest.raises(FleeceError, match="s3-aws"):
        store.read("s3-aws", hint="")


def test_a_pipe_in_its_place_does_not_hang(store: SecretStore) -> None:
    store.write("s3-other", SECRET)
    os.mkfifo(store.folder / "s3-aws", 0o600)
    with pytest.raises(FleeceError, match="no regular file"):
        store.read("s3-aws", hint="")


@pytest.mark.parametrize("text", ["", "two\nlines", "nul\0", "x" * 5000])
def test_what_cannot_be_a_secret_is_refused_without_being_shown(store: SecretStore, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        store.write("s3-aws", text)
    assert not text or text not in str(caught.value)
    assert store.source("s3-aws") is Source.MISSING


def test_a_credential_of_systemd_comes_first(
    store: SecretStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    store.write("s3-aws", SECRET)
    assert store.read("s3-aws", hint="") == SECRET
    (credentials / "s3-aws").write_text("of systemd")
    (credentials / "s3-aws").chmod(0o440)  # as systemd has them
    assert store.read("s3-aws", hint="") == "of systemd"
    assert store.source("s3-aws") is Source.CREDENTIAL


def test_a_missing_secret_says_what_to_do(store: SecretStore) -> None:
    with pytest.raises(NotFoundError, match="store it"):
        store.read("s3-aws", hint="store it")
    assert store.stamp("s3-aws") is None


def test_the_stamp_changes_with_the_secret(store: SecretStore) -> None:
    store.write("s3-aws", SECRET)
    first = store.stamp("s3-aws")
    assert store.stamp("s3-aws") == first
    store.write("s3-aws", SECRET[::-1])
    assert store.stamp("s3-aws") != first


@pytest.mark.parametrize("name", ["../x", "a/b", ""])
def test_a_name_that_leads_elsewhere_is_refused(store: SecretStore, name: str) -> None:
    with pytest.raises(UsageError):
        store.write(name, SECRET)
