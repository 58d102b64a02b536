"""The state of a TPM: what is taken of a folder or file, and what is not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import NotFoundError, SourceError
from hypervisor.tpm import MAX_SIZE, read_tpm_state


def test_the_permanent_state_of_a_folder_is_taken_and_nothing_else(tmp_path: Path) -> None:
    for name in ("tpm2-00.permall", "tpm2-00.volatilestate", ".lock", "TMP2-00.permall", "tpm2-00.permall.old"):
        (tmp_path / name).write_bytes(name.encode())
    assert read_tpm_state(tmp_path) == [("tpm2-00.permall.blob", b"tpm2-00.permall")]
    (tmp_path / "tpm-00.permall").write_bytes(b"1.2")
    assert read_tpm_state(tmp_path / "tpm-00.permall") == [("tpm-00.permall.blob", b"1.2")]


def test_a_state_in_one_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "vm-100-tpm").write_bytes(b"linear")
    assert read_tpm_state(tmp_path / "vm-100-tpm") == [("tpm-state.bin.blob", b"linear")]


def _too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_SIZE + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "Too many levels of symbolic links"),
        (_too_large, "more than 4194304 bytes"),
        (lambda path: os.mkfifo(path), "it is no file"),
        (lambda path: path.with_name("other").write_bytes(b""), "no state of swtpm is in that folder"),
    ],
)
def test_what_is_no_state_is_not_read(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "tpm2-00.permall")
    with pytest.raises(SourceError, match=message):
        read_tpm_state(tmp_path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="gone"):
        read_tpm_state(tmp_path / "gone")
