"""Default ACLs of the folders that are restored to: what is restored has the rights that it had, and no others."""

import os
from pathlib import Path

import pytest

from core.buffers import Buffer
from pxar.extract import extract_entry, extract_folder
from pxar.extract_report import ExtractOptions
from pxar.features import DEFAULT, Features
from pxar.filesystem import acl_values
from pxar.metadata import Acl, DefaultAcl, Metadata, Stat
from tests.pxar.archives import Item, item
from tests.pxar.restored import REPLACE, file, folder, hardlink, opened, patterns

_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
#: Rights of user 7 on everything that is made in a folder with it.
_FOREIGN = acl_values(0o040755, Acl(default=DefaultAcl(7, 5, 5, 7), default_users=((7, 7),))).default
_OWN = Acl(users=((1001, 4),), group_obj=4)


def _acls(path: Path) -> tuple[bytes | None, bytes | None]:
    found: list[Buffer | None] = []
    for name in (_ACCESS, _DEFAULT):
        try:
            found.append(os.getxattr(path, name, follow_symlinks=False))
        except OSError:
            found.append(None)
    return found[0], found[1]  # type: ignore[return-value]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder whose default ACL lets user 7 do everything."""
    path = tmp_path / "shared"
    path.mkdir()
    assert _FOREIGN is not None
    try:
        os.setxattr(path, _DEFAULT, _FOREIGN)
    except OSError:
        pytest.skip("no ACLs in this file system")
    return path


def _tree() -> Item:
    root = folder(
        {
            b"big": file(b"x" * (300 << 10), 0o640),
            b"fifo": item(0o010640),
            b"own": item(0o100640, content=b"own"),
            b"plain": file(b"plain", 0o640),
            b"sub": folder({b"below": file(b"below", 0o664), b"other": hardlink(b"plain")}, 0o775),
        }
    )
    own = root.children[b"own"]
    own.metadata = Metadata(Stat(0o100660, 0, os.getuid(), os.getgid(), 5, 6), (), _OWN)
    return root


def _check(target: Path) -> None:
    for name in ("big", "fifo", "plain", "sub", "sub/below", "sub/other"):
        assert _acls(target / name) == (None, None), name
    assert _acls(target / "own") == (acl_values(0o100660, _OWN).access, None)
    modes = {name: (target / name).stat().st_mode & 0o777 for name in ("big", "fifo", "plain", "sub", "sub/below")}
    assert modes == {"big": 0o640, "fifo": 0o640, "plain": 0o640, "sub": 0o775, "sub/below": 0o664}


def test_a_new_target_gets_no_acl_of_the_folder_it_lies_in(shared: Path) -> None:
    assert extract_folder(opened(_tree()), str(shared / "new")).warnings == []
    _check(shared / "new")
    assert _acls(shared / "new") == (None, None)


def test_a_target_loses_its_default_acl_and_hands_it_to_nothing(shared: Path) -> None:
    assert extract_folder(opened(_tree()), str(shared)).warnings == []
    _check(shared)
    assert _acls(shared) == (None, None)


def test_over_folders_with_default_acls(tmp_path: Path, shared: Path) -> None:
    assert _FOREIGN is not None
    extract_folder(opened(_tree()), str(shared))
    os.setxattr(shared, _DEFAULT, _FOREIGN)
    os.setxattr(shared / "sub", _DEFAULT, _FOREIGN)
    assert extract_folder(opened(_tree()), str(shared), REPLACE).warnings == []
    _check(shared)


def test_a_folder_that_only_holds_what_patterns_chose_keeps_its_default_acl(shared: Path) -> None:
    assert _FOREIGN is not None
    options = ExtractOptions(patterns=patterns(b"/plain", b"/sub/below"), allow_existing=True)
    (shared / "sub").mkdir()
    assert extract_folder(opened(_tree()), str(shared), options).warnings == []
    assert [_acls(shared / name) for name in ("plain", "sub/below")] == [(None, None)] * 2
    assert [_acls(path)[1] for path in (shared, shared / "sub")] == [_FOREIGN] * 2


def test_one_file_gets_no_acl_of_its_folder(shared: Path) -> None:
    accessor = opened(_tree())
    node = accessor.lookup(b"plain")
    assert node is not None
    assert extract_entry(accessor, node, str(shared), b"one").warnings == []
    assert _acls(shared / "one") == (None, None)
    assert (shared / "one").stat().st_mode & 0o777 == 0o640


def test_without_acls_the_folder_decides(shared: Path) -> None:
    options = ExtractOptions(features=DEFAULT & ~Features.ACL)
    assert extract_folder(opened(_tree()), str(shared / "new"), options).warnings == []
    assert None not in _acls(shared / "new/sub")
    assert _acls(shared / "new/plain")[0] is not None
