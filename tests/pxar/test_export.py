"""Archives written as tar and zip: other programs unpack them to the same tree."""

import io
import os
import shutil
import stat
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from typing import Any

import pytest

from core.buffers import Buffer
from core.errors import FormatError, UsageError
from pxar import zip_stream
from pxar.accessor import ArchiveAccessor, Directory
from pxar.encoder import ArchiveEncoder
from pxar.export import write_content
from pxar.extract_report import ExtractOptions, ExtractReport
from pxar.features import DEFAULT, Features
from pxar.metadata import Acl, DefaultAcl, Metadata, Stat
from pxar.tar_stream import write_tar
from pxar.zip_stream import write_zip
from tests.pxar.archives import Item, MemoryBytes, archived, item
from tests.pxar.backups import back_up, ext4
from tests.pxar.restored import (
    AS_ROOT,
    FOLDER,
    LINK,
    Damaged,
    add_file,
    chain,
    described,
    file,
    folder,
    forged,
    hardlink,
    opened,
    patterns,
    sample,
)
from tests.pxar.restored import varied_tree as make_varied_tree

MIB = 1 << 20
BOTH = pytest.mark.parametrize("write", [write_tar, write_zip], ids=["tar", "zip"])
Exporter = Callable[..., ExtractReport]


def exported(
    write: Exporter, accessor: ArchiveAccessor, *arguments: object, **more: object
) -> tuple[bytes, ExtractReport]:
    out = io.BytesIO()
    report = write(accessor, out.write, *arguments, **more)
    return out.getvalue(), report


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive}


@AS_ROOT
def test_gnu_tar_unpacks_what_was_backed_up(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar")
    with ext4(tmp_path, 128 * MIB) as disk:
        root, target = disk / "source", disk / "target"
        make_varied_tree(root)
        data, report = exported(write_tar, back_up(root).accessor())
        assert (report.warnings, report.left_out) == ([], 1)
        target.mkdir()
        options = ["--xattrs", "--xattrs-include=*", "--acls", "--same-owner", "--same-permissions", "--numeric-owner"]
        done = subprocess.run(["tar", "-x", "-C", target, *options], input=data, capture_output=True)
        assert done.returncode == 0
        harmless = (b"implausibly old", b"unknown extended header keyword 'hdrcharset'")
        assert [line for line in done.stderr.splitlines() if not any(one in line for one in harmless)] == []
        wanted = described(root)
        del wanted[b"/socket"]
        found = described(target)
        assert found.keys() == wanted.keys()
        for path, row in wanted.items():
            assert found[path] == row, path


def test_headers_hold_what_does_not_fit_into_old_fields() -> None:
    metadata = Metadata(Stat(0o100640, 0, 3_000_000, 4_000_000_000, -2, 500_000_000), ((b"user.a=b%\n", b"\0\xff\n"),))
    root = folder(
        {b"a" * 200 + b"\xff": Item(file().kind, metadata, b"x"), b"dev": item(0o020600, device=(4000, 1000000))}
    )
    data, report = exported(write_tar, opened(root))
    assert report.warnings == []
    assert len(data) % 10240 == 0
    found = members(data)
    one = found["a" * 200 + "\udcff"]
    assert (one.uid, one.gid, one.mtime, one.size, one.mode) == (3_000_000, 4_000_000_000, -1.5, 1, 0o640)
    assert one.pax_headers["SCHILY.xattr.user.a%3Db%25\n"].encode("utf-8", "surrogateescape") == b"\0\xff\n"
    assert (found["dev"].devmajor, found["dev"].devminor) == (4000, 1_000_000)


def test_bsdtar_unpacks_names_that_are_no_text(tmp_path: Path) -> None:
    if shutil.which("bsdtar") is None:
        pytest.skip("no bsdtar")
    root = folder({b"\xff": file(b"raw"), b"link": item(0o120777, target=b"\xfe"), "ü".encode(): file(b"text")})
    data, _ = exported(write_tar, opened(root))
    headers = {name: member.pax_headers for name, member in members(data).items()}
    assert "hdrcharset" not in headers["ü"]
    assert headers["link"]["hdrcharset"] == headers["\udcff"]["hdrcharset"] == "BINARY"
    done = subprocess.run(["bsdtar", "-x", "-C", tmp_path], input=data, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / os.fsdecode(b"\xff")).read_bytes() == b"raw"
    assert os.readlink(os.fsencode(tmp_path / "link")) == b"\xfe"  # noqa: PTH115 - bytes


def test_files_of_gigabytes_have_their_size_in_a_record() -> None:
    class Huge(MemoryBytes):
        """A payload stream whose content is zeros."""

        @property
        def size(self) -> int:
            return 1 << 40

        def read(self, offset: int, length: int) -> Buffer:
            return super().read(offset, length) if offset < 32 else bytes(length)

    size = 9 << 30
    archive, payload = archived(folder({b"big": file(b"")}), split=True)
    at = archive.index((0x419D3D6BC4BA977E).to_bytes(8, "little")) + 24
    archive = archive[:at] + size.to_bytes(8, "little") + archive[at + 8 :]
    payload = payload[:24] + (16 + size).to_bytes(8, "little") + payload[32:]
    written = 0
    beginning = b""

    class EnoughError(Exception):
        pass

    def write(data: Buffer) -> None:
        nonlocal written, beginning
        written += len(data)
        beginning = beginning or bytes(data)
        if written > 10 * MIB:
            raise EnoughError

    with pytest.raises(EnoughError):
        write_tar(ArchiveAccessor(MemoryBytes(archive), Huge(payload)), write)
    assert b"size=9663676416\n" in beginning


@BOTH
def test_patterns_and_folders_choose(write: Exporter) -> None:
    def names(accessor: ArchiveAccessor, **more: object) -> set[str]:
        data, report = exported(write, accessor, **more)
        assert report.warnings == []
        if write is write_tar:
            return {name for name in members(data) if name != "."}
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name.rstrip("/") for name in archive.namelist()}

    assert names(opened(sample()), options=ExtractOptions(patterns(b"*.txt"))) == {"home", "home/me", "home/me/a.txt"}
    accessor = opened(sample())
    start = accessor.lookup(b"home")
    assert isinstance(start, Directory)
    assert names(accessor, start=start, prefix=b"/home/") == {"me", "me/a.tmp", "me/a.txt", "me/same"}
    chosen = ExtractOptions(patterns(b"!/home/me/*.t*"))
    assert names(accessor, start=start, prefix=b"home", options=chosen) == {"me", "me/same"}
    # A folder that is left out takes with it what patterns before it match below.
    pruned = ExtractOptions(patterns(b"*", b"!/etc/", b"!/home/", b"key"))
    var = {"var", "var/log", "var/log/messages"}
    assert names(accessor, options=pruned) == {"etc", "etc/ssh", "etc/ssh/key", *var}


@BOTH
def test_entries_lie_in_a_folder_if_it_has_a_name(write: Exporter) -> None:
    root = folder({b"home": folder({b"a": file(b"1"), b"b": hardlink(b"home/a"), b"c": folder({})})})
    accessor = opened(root)
    start = accessor.lookup(b"home")
    assert isinstance(start, Directory)
    data, report = exported(write, accessor, start=start, prefix=b"home", folder=b"home")
    assert report.warnings == []
    if write is write_tar:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert archive.getnames() == ["home", "home/a", "home/b", "home/c"]
            assert archive.getmember("home/b").linkname == "home/a"
        return
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        assert packed.namelist() == ["home/", "home/a", "home/b", "home/c/"]
        assert packed.read("home/b") == b"1"


def test_hard_links_lead_to_what_is_in_the_archive_or_become_files() -> None:
    root = folder(
        {b"a": file(b"1", ids=(7, 8)), b"b": hardlink(b"a"), b"c": hardlink(b"a"), b"d": folder({b"e": hardlink(b"a")})}
    )
    found = members(exported(write_tar, opened(root))[0])
    assert [found[name].linkname for name in ("b", "c", "d/e")] == ["a", "a", "a"]
    assert found["b"].uid == 7
    data, report = exported(write_tar, opened(root), ExtractOptions(patterns(b"!/a")))
    found = members(data)
    assert found["b"].isreg()
    assert [found[name].linkname for name in ("c", "d/e")] == ["b", "b"]
    assert (report.files, report.hardlinks) == (1, 2)


@pytest.mark.parametrize("stored", [b"../../etc/passwd", b"/etc/passwd", b"missing", b"d/../a", b"./a"])
def test_paths_of_hard_links_are_those_of_files_in_the_archive(stored: bytes) -> None:
    def write(encoder: ArchiveEncoder) -> None:
        position = add_file(encoder, b"a", b"1")
        encoder.directory(b"d", FOLDER)
        encoder.end_directory()
        encoder.hardlink(b"z", stored, position)

    found = members(exported(write_tar, forged(write))[0])
    assert found["z"].isreg()
    assert found["z"].size == 1


def test_what_is_not_wanted_stays_away() -> None:
    metadata = Metadata(Stat(0o106755), ((b"user.x", b"1"),), Acl(users=((1001, 4),), group_obj=4), b"caps", None)
    root = folder(
        {b"f": Item(file().kind, metadata, b""), b"fifo": item(0o010644), b"null": item(0o020644, device=(1, 3))}
    )
    plain = DEFAULT & ~Features.XATTRS & ~Features.ACL & ~Features.FIFOS & ~Features.DEVICE_NODES
    data, report = exported(write_tar, opened(root), ExtractOptions(features=plain, drop_setuid=True))
    found = members(data)
    assert set(found) == {".", "f"}
    assert (found["f"].mode, found["f"].pax_headers, report.left_out) == (0o755, {}, 2)
    found = members(exported(write_tar, opened(root))[0])
    assert found["f"].mode == 0o6755
    assert found["f"].pax_headers["SCHILY.acl.access"] == "user::rwx,user:1001:r--,group::r--,mask::r-x,other::r-x"
    assert set(found["f"].pax_headers) == {
        "SCHILY.acl.access",
        "SCHILY.xattr.user.x",
        "SCHILY.xattr.security.capability",
    }


def test_default_acls_are_written() -> None:
    acl = Acl(default=DefaultAcl(7, 5, 0, 5), default_users=((1003, 5),))
    root = folder({b"d": Item(folder().kind, Metadata(Stat(0o040750), (), acl))})
    assert members(exported(write_tar, opened(root))[0])["d"].pax_headers["SCHILY.acl.default"] == (
        "user::rwx,user:1003:r-x,group::r-x,mask::r-x,other::---"
    )


def zip_tree() -> Item:
    return folder(
        {
            "ümläut".encode(): file(b"utf-8", mtime=(1_700_000_001, 5), ids=(1000, 100)),
            b"\xff": file(b"raw"),
            b"big": file(os.urandom(2 * MIB) + bytes(2 * MIB), mode=0o4755),
            b"text": file(b"abc" * 50_000),
            b"empty": file(b""),
            b"link": item(0o120777, target=b"text"),
            b"too": hardlink(b"text"),
            b"sub": folder({b"deep": folder({b"x": file(b"x")})}, mode=0o701),
            b"fifo": item(0o010644),
            b"null": item(0o020644, device=(1, 3)),
        }
    )  # fmt: skip


def test_zip_archives_are_read_by_pythons_reader() -> None:
    data, report = exported(write_zip, opened(zip_tree()))
    assert (report.warnings, report.left_out, report.files, report.folders, report.others) == ([], 2, 7, 2, 1)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        root = zip_tree()
        for name, content in (
            ("ümläut", b"utf-8"),
            ("text", b"abc" * 50_000),
            ("too", b"abc" * 50_000),
            ("empty", b""),
        ):
            assert archive.read(name) == content
        assert archive.read("link") == b"text"
        assert len(archive.read("big")) == len(root.children[b"big"].content)
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        assert (modes["big"], modes["sub/"], modes["link"]) == (0o104755, 0o040701, 0o120777)
        assert archive.getinfo("ümläut").date_time == (2023, 11, 14, 22, 13, 20)
    assert len(data) < 3 * MIB
    data, _ = exported(write_zip, opened(zip_tree()), ExtractOptions(drop_setuid=True))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.getinfo("big").external_attr >> 16 == 0o100755


def test_unzip_unpacks_them(tmp_path: Path) -> None:
    if shutil.which("unzip") is None:
        pytest.skip("no unzip")
    tree = zip_tree()
    del tree.children[b"\xff"]  # which it does not take in this locale
    (tmp_path / "a.zip").write_bytes(exported(write_zip, opened(tree))[0])
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["unzip", "-q", "a.zip", "-d", "target"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    target = tmp_path / "target"
    assert (target / "big").read_bytes() == tree.children[b"big"].content
    assert (target / "ümläut").stat().st_mtime == 1_700_000_001
    assert (target / "link").readlink() == Path("text")
    assert stat.S_IMODE((target / "sub").stat().st_mode) == 0o701


def test_zip_archives_beyond_the_old_limits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_stream, "_LIMIT", 3 * MIB)
    monkeypatch.setattr(zip_stream, "_LARGE", 2 * MIB)
    # The fields that mean "see there" must be what readers expect.
    full = 0xFFFF_FFFF

    class Marked:
        def __init__(self, inner: Struct) -> None:
            self.inner = inner

        def pack(self, *fields: Any) -> bytes:
            return self.inner.pack(*[full if field == 3 * MIB else field for field in fields])

    for attribute in ("_LOCAL", "_CENTRAL", "_END"):
        monkeypatch.setattr(zip_stream, attribute, Marked(vars(zip_stream)[attribute]))
    content = {b"%d" % number: file(os.urandom(2 * MIB + 5)) for number in range(3)}
    content |= {b"large": file(os.urandom(4 * MIB)), b"small": file(b"x")}
    data, _ = exported(write_zip, opened(folder(content)))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        for name, one in content.items():
            assert archive.read(name.decode()) == one.content


def test_zip_archives_of_many_entries_are_read() -> None:
    data, report = exported(write_zip, opened(folder({b"%06d" % number: file(b"") for number in range(70_000)})))
    assert report.files == 70_000
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.infolist()) == 70_000


@BOTH
def test_entries_that_cannot_be_read_are_left_out(write: Exporter) -> None:
    archive, payload = archived(folder({b"a": file(b"a" * 100), b"b": file(b"b" * 100), b"c": file(b"c")}), split=True)
    accessor = ArchiveAccessor(
        MemoryBytes(archive), Damaged(payload, payload.index(b"b" * 100), payload.index(b"b" * 100) + 1)
    )
    data, report = exported(write, accessor)
    assert report.warnings == ["'b': left out: cannot read chunk 7: the digest does not match"]
    if write is write_tar:
        assert set(members(data)) == {".", "a", "c"}
    else:
        assert zipfile.ZipFile(io.BytesIO(data)).namelist() == ["a", "c"]


@BOTH
def test_a_file_that_ends_early_ends_the_output(write: Exporter) -> None:
    big = os.urandom(4 * MIB)
    archive, payload = archived(folder({b"big": file(big), b"c": file(b"c")}), split=True)
    middle = payload.index(big) + 3 * MIB
    out = io.BytesIO()
    with pytest.raises(FormatError, match=r"write to its end 'big': .*chunk 7.*--pattern with !"):
        write(ArchiveAccessor(MemoryBytes(archive), Damaged(payload, middle, middle + 1)), out.write)
    data = out.getvalue()
    with pytest.raises((tarfile.ReadError, zipfile.BadZipFile, EOFError)):
        if write is write_tar:
            with tarfile.open(fileobj=io.BytesIO(data)) as unpacked:
                unpacked.extractfile("big").read()  # type: ignore[union-attr]
        else:
            zipfile.ZipFile(io.BytesIO(data))


def test_one_file_is_written_as_it_is() -> None:
    big = os.urandom(2 * MIB + 7)
    accessor = opened(folder({b"big": file(big), b"link": hardlink(b"big"), b"d": folder()}))
    for path in (b"big", b"link"):
        out = io.BytesIO()
        node = accessor.lookup(path)
        assert node is not None
        assert write_content(accessor, node, out.write).size == len(big)
        assert out.getvalue() == big
    node = accessor.lookup(b"d")
    assert node is not None
    with pytest.raises(UsageError, match="it is no file"):
        write_content(accessor, node, io.BytesIO().write)


def test_paths_of_a_deep_tree_are_not_all_in_memory() -> None:
    accessor = chain(500, b"n" * 250)
    written = 0

    def write(data: Buffer) -> None:
        nonlocal written
        written += len(data)

    tracemalloc.start()
    try:
        report = write_tar(accessor, write)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.folders, report.files, report.warnings) == (500, 1, [])
    # All paths together have 31 MB.
    assert written > 31_000_000
    assert peak < 12 << 20


@BOTH
def test_a_second_entry_of_a_name_is_left_out(write: Exporter) -> None:
    """Unpacked, it would be written through the first one."""

    def forge(encoder: ArchiveEncoder) -> None:
        encoder.symlink(b"a", LINK, b"/etc")
        encoder.directory(b"a", FOLDER)
        add_file(encoder, b"evil", b"evil")
        encoder.end_directory()

    data, report = exported(write, forged(forge))
    assert b"evil" not in data
    assert report.failed == 1
    assert "a second entry named 'a'" in report.warnings[0]


@BOTH
def test_names_in_another_order_are_exported(write: Exporter) -> None:
    def reverse(encoder: ArchiveEncoder) -> None:
        for name in (b"c", b"b", b"a"):
            add_file(encoder, name, b"content of " + name)

    _, report = exported(write, forged(reverse))
    assert (report.files, report.failed) == (3, 0)
