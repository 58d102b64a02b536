"""`fleece ls`, `find`, `diff` and `catalog dump` on archives that Fleece made."""

import base64
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.stores import chunk_files

from .conftest import PATIENCE_S, Fleece

T0 = 1_700_000_000
#: Names that a terminal would act on, or that are no text, and how they are shown.
HOSTILE = {
    b"new\nline": r"new\nline",
    b"red\x1b[31m": r"red\x1b[31m",
    b"title\x1b]0;x\x07": r"title\x1b]0;x\x07",
    b"latin-\xe9\xff": r"latin-\xe9\xff",
    b"back\\slash": r"back\\slash",
    "csi\x9b31m".encode(): r"csi\u009b31m",
    "turned\u202etxt".encode(): r"turned\u202etxt",
    "\u00fcml\u00e4ut \U0001f980".encode(): "\u00fcml\u00e4ut \U0001f980",
}


def put(path: Path, data: bytes, *, seconds: int = T0, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    os.utime(path, (seconds, seconds))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    put(root / "etc/hosts", b"127.0.0.1\n")
    put(root / "etc/ssh/sshd.conf", b"Port 22\n", mode=0o600)
    put(root / "srv/app.conf", b"x = 1\n")
    (root / "etc/link").symlink_to("hosts")
    os.link(root / "etc/hosts", root / "srv/same")
    os.mkfifo(root / "fifo")
    (root / "empty").mkdir()
    return root


class Look:
    """The command, with backups at given days."""

    def __init__(self, fleece: Fleece) -> None:
        self.fleece = fleece

    def back_up(self, day: int, source: str, mode: str = "data", *options: str) -> str:
        arguments = ["--backup-id", "web", "--change-detection-mode", mode, *options]
        time = f"2026-01-{day:02}T00:00:00Z"
        document = self.fleece.json("backup", *source.split(), "--backup-time", time, *arguments)
        return str(document["snapshot"])

    def json(self, *arguments: str) -> Any:
        return self.fleece.json(*arguments)

    def lines(self, *arguments: str) -> list[str]:
        answer = self.fleece(*arguments, "-q")
        assert (answer.code, answer.err) == (0, ""), answer
        return answer.out.splitlines()

    def paths(self, *arguments: str) -> list[str]:
        return [entry["path"] for entry in self.json(*arguments)]


@pytest.fixture
def look(stored: Fleece) -> Look:
    stored.environment["TZ"] = "UTC"
    return Look(stored)


EVERYTHING = [
    "/empty", "/etc", "/etc/hosts", "/etc/link", "/etc/ssh", "/etc/ssh/sshd.conf", "/fifo", "/srv", "/srv/app.conf",
    "/srv/same",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["legacy", "data"])
def test_a_tree_is_listed(look: Look, tree: Path, mode: str) -> None:
    look.back_up(1, f"root.pxar:{tree}", mode)
    latest = "host/web/latest"
    lines = look.lines("ls", latest, "root.pxar/etc")
    owner = f"{os.getuid():>5} {os.getgid():>5}"
    assert lines[0] == f"-rw-r--r--  {owner}           10 2023-11-14 22:13:20  hosts"
    assert lines[1].endswith("  link -> hosts")
    assert lines[2].startswith("drwx")
    assert len(lines) == 3
    assert look.lines("ls", latest, "root/etc/ssh/sshd.conf")[0].endswith("  /etc/ssh/sshd.conf")
    (line,) = look.lines("ls", latest, "root.pxar/srv/same")
    assert line.startswith("hrw-r--r--")
    assert line.endswith(" 10 2023-11-14 22:13:20  /srv/same link to /etc/hosts")
    assert look.paths("ls", latest, "root.pxar", "--recursive") == EVERYTHING
    assert look.paths("ls", latest, "root.pxar") == ["/empty", "/etc", "/fifo", "/srv"]
    assert look.paths("ls", latest, "root.pxar", "-d") == ["/"]
    assert look.paths("ls", latest, "root.pxar/./etc/", "-d") == ["/etc"]
    assert look.json("ls", latest, "root.pxar/empty") == []
    assert look.lines("ls", latest, "root.pxar/empty") == []
    (entry,) = look.json("ls", latest, "root.pxar/srv/same")
    assert entry == {
        "path": "/srv/same", "type": "h", "mode": "0644", "uid": os.getuid(), "gid": os.getgid(), "mtime": T0,
        "mtime-ns": 0, "size": 10, "target": "/etc/hosts",
    }  # fmt: skip


def test_what_cannot_be_listed(look: Look, tree: Path, tmp_path: Path) -> None:
    put(tmp_path / "x.conf", b"text")
    snapshot = look.back_up(1, f"root.pxar:{tree} x.conf:{tmp_path}/x.conf")

    def error(*arguments: str) -> dict[str, str]:
        answer = look.fleece(*arguments, "--output", "json")
        assert (answer.code, answer.out) == (1, "")
        return answer.error

    assert error("ls", snapshot, "data.pxar")["hint"] == "its file archives are root.pxar"
    assert error("ls", snapshot, "x.conf")["why"] == "it is no file archive"
    assert error("ls", snapshot, "root.pxar/no\x1bne")["where"] == rf"{snapshot} root.pxar/no\x1bne"
    assert error("find", "x", "host/none")["why"] == "the group has no finished snapshot"
    assert error("find", "x", snapshot, "--archive", "other")["hint"] == "its file archives are root.pxar"
    assert error("diff", snapshot, snapshot, "other")["hint"] == "they have root.pxar, x.conf"
    assert error("diff", snapshot, snapshot, "root.pxar/none")["why"] == "the archive has no such entry"
    for wrong in (
        ["find", "!x"], ["find", "[x"], ["find", ""], ["find", "x", "--type", "z"], ["find", "x", "--type", ""],
        ["find", "x", snapshot, "--all-snapshots"], ["find", "x", "a/b/c/d"], ["ls", snapshot, "root.pxar/../x"],
        ["diff", snapshot, snapshot, "x.conf/y"],
    ):  # fmt: skip
        answer = look.fleece(*wrong, "--output", "json")
        assert (answer.code, answer.out) == (2, ""), wrong


@pytest.mark.parametrize("mode", ["legacy", "data"])
def test_patterns_find_names_paths_and_kinds(look: Look, tree: Path, mode: str) -> None:
    snapshot = look.back_up(1, f"root.pxar:{tree} etc.pxar:{tree}/etc", mode)
    root = ["find", "--archive", "root"]
    assert look.paths(*root, "*.conf") == ["/etc/ssh/sshd.conf", "/srv/app.conf"]
    assert look.paths(*root, "/srv/*.conf") == ["/srv/app.conf"]
    assert look.paths(*root, "/*.conf") == []
    assert look.paths(*root, "etc/**/*.conf") == ["/etc/ssh/sshd.conf"]
    assert look.paths(*root, "s*/") == ["/etc/ssh", "/srv"]
    assert look.paths(*root, "**", "--type", "hl") == ["/etc/link", "/srv/same"]
    assert look.paths(*root, "**") == EVERYTHING
    found = look.json("find", "hosts")
    assert [(one["archive"], one["path"]) for one in found] == [("root.pxar", "/etc/hosts"), ("etc.pxar", "/hosts")]
    assert found[0] == {
        "ns": "", "snapshot": snapshot, "archive": "root.pxar", "path": "/etc/hosts", "type": "f", "size": 10,
        "mtime": T0,
    }  # fmt: skip
    assert look.lines(*root, "hosts") == [f"{snapshot}  f            10  2023-11-14 22:13:20  root.pxar/etc/hosts"]
    assert look.json("find", "nothing") == []
    assert look.lines("find", "nothing") == []


def test_where_is_looked(look: Look, tree: Path) -> None:
    first = look.back_up(1, f"root.pxar:{tree}")
    put(tree / "etc/hosts", b"127.0.0.1 changed\n", seconds=T0 + 60)
    second = look.back_up(2, f"root.pxar:{tree}", "metadata")
    third = look.back_up(3, f"root.pxar:{tree}", "legacy")
    assert look.fleece("namespace", "create", "a").code == 0
    look.fleece.json("backup", f"root.pxar:{tree}", "--backup-id", "db", "--ns", "a")

    def where(*arguments: str) -> list[str]:
        return [one["snapshot"] for one in look.json("find", "hosts", *arguments)]

    assert where() == [third]
    assert where("--all-snapshots") == where("host/web") == [first, second, third]
    assert where(second, first) == [second, first]
    assert where(second, "host/web") == [second, first, third]
    assert [one["ns"] for one in look.json("find", "hosts", "-r")] == ["", "a"]
    assert look.lines("find", "hosts", "--ns", "a")[0].startswith("a: host/db/")
    (versions,) = look.json("find", "hosts", "--all-snapshots", "--versions")
    assert versions == {
        "ns": "", "group": "host/web", "archive": "root.pxar", "path": "/etc/hosts",
        "versions": [
            {"type": "f", "size": 10, "mtime": T0, "snapshots": [first]},
            {"type": "f", "size": 18, "mtime": T0 + 60, "snapshots": [second, third]},
        ],
    }  # fmt: skip
    assert look.lines("find", "hosts", "host/web", "--versions") == [
        "host/web  root.pxar/etc/hosts",
        "  f            10  2023-11-14 22:13:20  1 snapshot, 2026-01-01T00:00:00Z",
        "  f            18  2023-11-14 22:14:20  2 snapshots, 2026-01-02T00:00:00Z to 2026-01-03T00:00:00Z",
    ]


@pytest.mark.parametrize("mode", ["legacy", "data"])
def test_no_contents_are_read_to_find(look: Look, tree: Path, mode: str) -> None:
    look.back_up(1, f"root.pxar:{tree}", mode)
    assert look.fleece.repo is not None
    keep = set()
    for index in look.fleece.repo.glob("host/web/*/*.didx"):
        if index.name.startswith(("catalog", "root.mpxar")):
            data = index.read_bytes()[4096:]
            keep |= {data[at + 8 : at + 40].hex() for at in range(0, len(data), 40)}
    gone = [chunk for chunk in chunk_files(look.fleece.repo) if chunk.name not in keep]
    assert gone
    for chunk in gone:
        chunk.unlink()
    assert look.paths("find", "**") == EVERYTHING
    assert len(look.lines("catalog", "dump", "host/web/latest")) == len(EVERYTHING) + 1
    if mode == "data":
        assert look.paths("ls", "host/web/latest", "root.pxar", "-r") == EVERYTHING


def test_a_catalog_that_is_gone_is_replaced_by_the_archive(look: Look, tree: Path) -> None:
    look.back_up(1, f"root.pxar:{tree}", "legacy")
    assert look.fleece.repo is not None
    (catalog,) = look.fleece.repo.glob("host/web/*/catalog.pcat1.didx")
    catalog.unlink()
    answer = look.fleece("find", "**", "--output", "json")
    assert answer.code == 3
    assert [one["path"] for one in answer.document] == EVERYTHING
    (warning,) = json.loads(answer.err)["warnings"]
    assert "catalog" in warning
    assert warning.endswith("the archive itself is read")


def test_names_reach_no_terminal_raw_and_lose_nothing_in_json(look: Look, tmp_path: Path) -> None:
    files = [tmp_path / "odd" / os.fsdecode(name) for name in HOSTILE]
    for path in files:
        put(path, b"x")
    link = tmp_path / "odd" / os.fsdecode(b"\xff\xff")
    link.symlink_to("to\x1b[2J")
    one = look.back_up(1, f"root.pxar:{tmp_path}/odd")
    link.unlink()
    two = look.back_up(2, f"root.pxar:{tmp_path}/odd", "legacy")
    for path in files:
        os.utime(path, (T0, T0 + 1))
    three = look.back_up(3, f"root.pxar:{tmp_path}/odd")
    wanted = [HOSTILE[name] for name in sorted(HOSTILE)]
    lines = look.lines("ls", one, "root.pxar")
    assert [line.partition(":20  ")[2] for line in lines[:-1]] == wanted
    assert lines[-1].endswith(r"\xff\xff -> to\x1b[2J")
    for verb in (
        ["find", "**", one], ["find", "**", two], ["find", "**", one, "--versions"], ["catalog", "dump", one],
        ["catalog", "dump", two], ["diff", one, three], ["ls", two, "root.pxar", "-r"],
    ):  # fmt: skip
        lines = look.lines(*verb)
        assert all(line.isprintable() for line in lines), verb
        for name in wanted:
            assert any(name in line for line in lines), (verb, name)
    for verb in (["ls", one, "root.pxar"], ["find", "**", two], ["catalog", "dump", two]):
        for output in ("json", "json-pretty"):
            answer = look.fleece(*verb, "--output", output)
            assert all(line.isprintable() for line in answer.out.splitlines())
            paths = [
                base64.b64decode(entry["path-base64"]) if "path-base64" in entry else entry["path"].encode()
                for entry in answer.document
            ]
            assert paths[-len(HOSTILE) - (one in verb) :][: len(HOSTILE)] == [b"/" + name for name in sorted(HOSTILE)]


def test_every_difference_of_two_trees_is_named(look: Look, tree: Path) -> None:
    for name in ("touched", "moded", "longer", "sneaky", "retyped", "gone"):
        put(tree / "a" / name, b"0123456789" * 1000)
    put(tree / "old/deep/file", b"x")
    one = look.back_up(1, f"root.pxar:{tree}")
    os.utime(tree / "a/touched", (T0, T0 + 1))
    (tree / "a/moded").chmod(0o600)
    put(tree / "a/longer", b"0123456789" * 1001, seconds=T0 + 3)
    put(tree / "a/sneaky", b"9876543210" * 1000)  # same size and time
    (tree / "a/retyped").unlink()
    put(tree / "a/retyped/inside", b"x")
    (tree / "a/gone").unlink()
    put(tree / "a/added", b"new")
    (tree / "etc/link").unlink()
    (tree / "etc/link").symlink_to("hosts2")
    os.utime(tree / "etc/link", (T0, T0), follow_symlinks=False)
    for path in (tree / "old/deep/file", tree / "old/deep", tree / "old"):
        path.unlink() if path.is_file() else path.rmdir()
    (tree / "empty").chmod(0o700)
    two = look.back_up(2, f"root.pxar:{tree}", "metadata")
    three = look.back_up(3, f"root.pxar:{tree}", "legacy")

    def changes(*arguments: str) -> dict[str, Any]:
        return {
            change["path"]: (change["change"], *change.get("what", ()), change.get("content"))
            for change in look.json("diff", *arguments)
        }

    found = changes(one, two)
    assert found.pop("/etc/link")[1] == "target"
    expected = {
        "/a/added": ("added", None),
        "/a/gone": ("removed", None),
        "/a/longer": ("changed", "content", "mtime", "different"),
        "/a/moded": ("changed", "mode", "unknown"),
        "/a/retyped": ("changed", "type", None),
        "/a/retyped/inside": ("added", None),
        "/a/touched": ("changed", "mtime", "unknown"),
        "/empty": ("changed", "mode", None),
        "/old": ("removed", None),
        "/old/deep": ("removed", None),
        "/old/deep/file": ("removed", None),
    }
    assert found == expected
    found = changes(one, two, "--content")
    assert found["/a/touched"] == ("changed", "mtime", "same")
    assert found["/a/moded"] == ("changed", "mode", "same")
    assert changes(one, three, "--content")["/a/sneaky"] == ("changed", "content", "different")
    assert changes(two, three) == {}
    backwards = changes(two, one)
    assert backwards["/a/added"] == ("removed", None)
    assert backwards["/a/retyped/inside"] == ("removed", None)
    assert set(changes(one, two, "root.pxar/a")) == {path for path in expected if path.startswith("/a/")}
    assert changes(one, two, "root/a/longer") == {"/a/longer": expected["/a/longer"]}
    assert changes(one, two, "root.pxar/old/deep") == {
        "/old/deep": ("removed", None), "/old/deep/file": ("removed", None)
    }  # fmt: skip
    lines = look.lines("diff", one, two)
    assert (
        "~ root.pxar/a/longer  (content, size 10000 -> 10010, mtime 2023-11-14 22:13:20 -> 2023-11-14 22:13:23)"
        in lines
    )
    assert "~ root.pxar/a/moded  (mode 0644 -> 0600)" in lines
    assert "~ root.pxar/a/retyped/  (type file -> directory)" in lines
    assert "- root.pxar/old/deep/" in lines
    (touched,) = [line for line in lines if "touched" in line]
    assert touched.endswith(", content not compared)")
    answer = look.fleece("diff", one, two)
    assert answer.err == "2 added, 4 removed, 6 changed\n"
    assert look.fleece("diff", two, two).err == "no differences\n"


def test_equal_chunks_prove_that_a_touched_file_is_the_same(look: Look, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    put(root / "big", os.urandom(12 << 20))
    one = look.back_up(1, f"root.pxar:{root}")
    os.utime(root / "big", (T0, T0 + 1))
    two = look.back_up(2, f"root.pxar:{root}")
    (change,) = look.json("diff", one, two)
    assert (change["what"], change["content"]) == (["mtime"], "same")
    assert change["before"]["mtime"] == T0
    assert change["after"]["mtime"] == T0 + 1


def test_images_small_files_and_archives_that_come_and_go(look: Look, tree: Path, tmp_path: Path) -> None:
    image, conf = tmp_path / "disk.raw", tmp_path / "x.conf"
    data = bytearray(os.urandom(20 << 20))
    image.write_bytes(data)
    put(conf, b"one")
    one = look.back_up(1, f"disk.img:{image} x.conf:{conf} y.conf:{conf}")
    data[5 << 20 : (9 << 20) + 10] = os.urandom((4 << 20) + 10)
    data[-1] ^= 1
    image.write_bytes(data + bytes(1 << 20))
    put(conf, b"two")
    two = look.back_up(2, f"disk.img:{image} x.conf:{conf} root.pxar:{tree}")
    changes = look.json("diff", one, two)
    ranges = [(c["change"], c["offset"], c["length"]) for c in changes if "offset" in c]
    mib = 1 << 20
    assert ranges == [("changed", 4 * mib, 8 * mib), ("changed", 16 * mib, 4 * mib), ("added", 20 * mib, mib)]
    others = [(c["archive"], c["change"]) for c in changes if "offset" not in c]
    assert sorted(others) == [("root.pxar", "added"), ("x.conf", "changed"), ("y.conf", "removed")]
    assert look.lines("diff", one, two, "disk.img", "--content") == [
        f"~ disk.img  bytes {5 * mib}-{9 * mib + 4095} (4.00 MiB)",
        f"~ disk.img  bytes {20 * mib - 4096}-{20 * mib - 1} (4096 B)",
        f"+ disk.img  bytes {20 * mib}-{21 * mib - 1} (1.00 MiB)",
    ]
    assert look.json("diff", two, two) == []
    assert look.json("find", "**", one) == []


def test_keys_are_needed_for_names_but_not_for_ranges(look: Look, tree: Path, tmp_path: Path) -> None:
    image, key = tmp_path / "disk.raw", tmp_path / "key"
    assert look.fleece("key", "create", key, "--kdf", "none").code == 0
    image.write_bytes(os.urandom(8 << 20))
    plain = look.back_up(1, f"root.pxar:{tree} disk.img:{image}")
    sealed = look.back_up(2, f"root.pxar:{tree} disk.img:{image}", "data", "--keyfile", str(key))
    image.write_bytes(os.urandom(4 << 20) + image.read_bytes()[4 << 20 :])
    put(tree / "etc/hosts", b"more than before\n")
    later = look.back_up(3, f"root.pxar:{tree} disk.img:{image}", "data", "--keyfile", str(key))
    for verb in (
        ["ls", sealed, "root.pxar"],
        ["find", "**", sealed],
        ["catalog", "dump", sealed],
        ["diff", sealed, later],
    ):
        answer = look.fleece(*verb, "--output", "json")
        assert (answer.code, answer.out) == (1, "")
        assert "--keyfile" in answer.error["hint"]
    other = tmp_path / "other"
    assert look.fleece("key", "create", other, "--kdf", "none").code == 0
    answer = look.fleece("ls", sealed, "disk.img", "--keyfile", other, "--output", "json")
    assert answer.code == 1
    assert "is needed, given is " in answer.error["why"]
    (change,) = look.json("diff", sealed, later, "disk.img")
    assert (change["offset"], change["length"]) == (0, 4 << 20)
    assert look.paths("ls", sealed, "root.pxar", "-r", "--keyfile", str(key)) == EVERYTHING
    assert [c["path"] for c in look.json("diff", plain, later, "root", "--keyfile", str(key))] == [
        "/etc/hosts",
        "/srv/same",
    ]
    answer = look.fleece("find", "hosts", "--all-snapshots", "--output", "json")
    assert answer.code == 3
    assert [one["snapshot"] for one in answer.document] == [plain]
    assert len(json.loads(answer.err)["warnings"]) == 2
    assert len(look.json("find", "hosts", "--all-snapshots", "--keyfile", str(key))) == 3
    answer = look.fleece("diff", plain, sealed, "disk.img", "--output", "json")
    assert (answer.code, answer.document) == (3, [])
    assert len(look.json("diff", plain, later, "disk.img", "--content", "--keyfile", str(key))) == 1


def test_a_reader_that_has_seen_enough_is_no_error(look: Look, tree: Path) -> None:
    look.back_up(1, f"root.pxar:{tree}")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "agent.main", "find", "**"], stdout=write, stderr=subprocess.PIPE, check=False,
        timeout=PATIENCE_S, env=look.fleece._environment(),
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("options", [[], ["--output", "json"]])
def test_a_reader_that_reads_nothing_does_not_keep_it_from_ending(
    look: Look, tmp_path: Path, ended: "Callable[[subprocess.Popen[str]], subprocess.Popen[str]]", options: list[str]
) -> None:
    for number in range(600):
        put(tmp_path / "tree" / f"{number:0200}", b"")
    look.back_up(1, f"root.pxar:{tmp_path}/tree")
    process = ended(look.fleece.start("find", "**", *options))
    assert process.stdout is not None
    deadline = time.monotonic() + PATIENCE_S
    waiting = 0
    while waiting < 60_000:  # the pipe is full
        assert time.monotonic() < deadline
        time.sleep(0.05)
        (waiting,) = struct.unpack("i", fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) in (1, -signal.SIGTERM)
