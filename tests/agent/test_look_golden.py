"""`fleece ls`, `find`, `diff` and `catalog dump` on archives, catalogs and images that a real PBS client wrote."""

import base64
from pathlib import Path
from typing import Any

import pytest

from .conftest import Fleece

DAY_1, DAY_2 = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
MIB = 1 << 20


@pytest.fixture
def pbs(fleece: Fleece, golden_store: Path) -> Fleece:
    """The command with that datastore as its repository."""
    fleece.repo = golden_store
    return fleece


def entries(pbs: Fleece, mode: str, path: str = "", *options: str) -> dict[str, Any]:
    listed = pbs.json("ls", f"host/tree-{mode}/{DAY_1}", f"root.pxar{path}", *options)
    return {entry.pop("path"): entry for entry in listed}


@pytest.mark.parametrize("mode", ["legacy", "data"])
def test_metadata_of_every_kind(pbs: Fleece, mode: str) -> None:
    types = entries(pbs, mode, "/types")
    assert (types["/types/null"]["type"], types["/types/null"]["major"], types["/types/null"]["minor"]) == ("c", 1, 3)
    assert (types["/types/loop"]["type"], types["/types/loop"]["minor"]) == ("b", 200)
    assert {types[f"/types/{name}"]["type"] for name in ("fifo", "socket")} == {"p", "s"}
    secret = types["/types/secret"]
    assert (secret["mode"], secret["uid"], secret["gid"], secret["size"]) == ("0000", 4_000_000_000, 65534, 7)
    assert types["/types/suid"]["mode"] == "4755"
    assert types["/types/sticky"]["mode"] == "1777"
    assert types["/types/link"]["target"] == "../docs/page-000.txt"
    assert (types["/types/hard-a"]["type"], types["/types/hard-a"]["target"]) == ("h", "/docs/hard-c")
    meta = entries(pbs, mode, "/meta")
    assert {attribute["name"]: attribute for attribute in meta["/meta/xattr"]["xattrs"]} == {
        "user.comment": {"name": "user.comment", "value": "kept"},
        "user.empty": {"name": "user.empty", "value": ""},
        "trusted.not-kept": {"name": "trusted.not-kept", "value": "trusted is left out"},
        "user.binary": {
            "name": "user.binary",
            "value": bytes(range(256)).decode("utf-8", "replace"),
            "value-base64": base64.b64encode(bytes(range(256))).decode(),
        },
    }
    assert meta["/meta/caps"]["capabilities"].startswith("01000002")
    assert meta["/meta/acl"]["acl"]["users"] == [{"id": 1001, "permissions": 4}, {"id": 1002, "permissions": 6}]
    assert meta["/meta/acl"]["acl"]["groups"] == [{"id": 2001, "permissions": 2}]
    assert meta["/meta/acl-dir"]["acl"]["default-users"] == [{"id": 1003, "permissions": 5}]
    names = entries(pbs, mode, "/names")
    assert names["/names/before-epoch"]["mtime"] == -2
    assert names["/names/before-epoch"]["mtime-ns"] == 500_000_000
    assert names["/names/far-future"]["mtime"] == 7_258_118_400
    assert "/names/new\nline" in names
    assert base64.b64decode(names["/names/latin-\ufffd\ufffd"]["path-base64"]) == b"/names/latin-\xe9\xff"
    lines = pbs("ls", f"host/tree-{mode}/{DAY_1}", "root.pxar/meta").out.splitlines()
    assert [line.split()[-1] for line in lines if line[10] == "+"] == ["acl", "acl-dir", "caps", "xattr"]


def test_the_catalog_says_what_archives_say(pbs: Fleece) -> None:
    dumped = pbs.json("catalog", "dump", f"host/tree-legacy/{DAY_1}")
    assert dumped.pop(0) == {"archive": "root.pxar", "path": "/", "type": "d", "size": None, "mtime": None}
    catalog = {entry["path"]: (entry["type"], entry["size"], entry["mtime"]) for entry in dumped}
    for mode in ("legacy", "data", "metadata"):
        listed = entries(pbs, mode, "", "--recursive")
        listed.pop("/.pxarexclude-cli", None)
        known = {
            path: (one["type"], *((one["size"], one["mtime"]) if one["type"] == "f" else (None, None)))
            for path, one in listed.items()
        }
        assert len(known) > 2000
        assert known == {path: one for path, one in catalog.items() if path != "/.pxarexclude-cli"}
    split = pbs.json("catalog", "dump", f"host/tree-data/{DAY_1}")
    assert {entry["path"]: (entry["type"], entry["size"]) for entry in split[1:] if entry["type"] == "f"} == {
        path: (kind, size) for path, (kind, size, _) in catalog.items() if kind == "f" and path != "/.pxarexclude-cli"
    }
    lines = pbs("catalog", "dump", f"host/tree-legacy/{DAY_1}").out.splitlines()
    assert lines[0] == 'd "./root.pxar.didx"'
    assert r'f "./root.pxar.didx/names/latin-\xe9\xff" 10 ' in "\n".join(lines)
    assert len(lines) == len(catalog) + 1


#: What stage 2 of make_tree.py does, by its own words.
STAGE_2 = {
    "/big/noise-renamed.bin": ("added",),
    "/big/noise.bin": ("removed",),
    "/big/text.log": ("changed", "content", "mtime"),
    "/docs/page-007.txt": ("changed", "mtime"),
    "/docs/page-008.txt": ("changed", "content", "mtime"),
    "/docs/page-009.txt": ("changed", "mode"),
    "/docs/page-010.txt": ("removed",),
    "/docs/page-011.txt": ("changed", "xattrs"),
    "/docs/page-900.txt": ("added",),
    "/fresh": ("added",),
    "/fresh/file": ("added",),
    "/types/hard-d": ("added",),
    **{f"/many/f{number:05d}": ("changed", "content", "mtime") for number in range(0, 300, 10)},
}


@pytest.mark.parametrize(
    ("before", "after"),
    [("legacy", "legacy"), ("data", "data"), ("metadata", "metadata"), ("legacy", "metadata")],
)
def test_what_a_stage_changed_is_found(pbs: Fleece, before: str, after: str) -> None:
    snapshots = [f"host/tree-{before}/{DAY_1}", f"host/tree-{after}/{DAY_2}"]
    changes = pbs.json("diff", *snapshots, "root.pxar", "--content")
    assert {change["path"]: (change["change"], *change.get("what", ())) for change in changes} == STAGE_2
    # Without reading the one page that was rewritten in its old size cannot be told from the one that was touched.
    quick = {change["path"]: change for change in pbs.json("diff", *snapshots, "root.pxar")}
    assert set(quick) == set(STAGE_2)
    assert quick["/docs/page-008.txt"]["what"] == ["mtime"]
    assert quick["/docs/page-008.txt"]["content"] == "unknown"


def test_snapshots_of_all_groups_and_namespaces_are_searched(pbs: Fleece, golden: Path) -> None:
    answer = pbs("find", "page-000.txt", "-r", "--output", "json")
    assert answer.code == 3  # two are encrypted
    assert [(one["ns"], one["snapshot"], one["path"]) for one in answer.document] == [
        ("", f"host/signed/{DAY_1}", "/docs/page-000.txt"),
        ("", f"host/tree-data/{DAY_2}", "/docs/page-000.txt"),
        ("", f"host/tree-legacy/{DAY_2}", "/docs/page-000.txt"),
        ("", "host/tree-metadata/2026-01-04T00:00:00Z", "/docs/page-000.txt"),
        ("a/b", f"host/deep/{DAY_1}", "/page-000.txt"),
    ]
    (versions,) = pbs.json("find", "/docs/page-020.txt", "host/tree-metadata", "--versions")
    assert [len(version["snapshots"]) for version in versions["versions"]] == [3, 1]
    key = golden / "keys/plain.key"
    found = pbs.json("find", "page-000.txt", "-r", "--keyfile", key)
    assert {one["snapshot"].split("/")[1] for one in found} >= {"enc", "enc-legacy", "signed"}
    listed = [
        pbs.json("ls", f"host/{group}/{DAY_1}", "root.pxar", "-r", "--keyfile", key)
        for group in ("enc", "enc-legacy", "signed")
    ]
    assert len(listed[0]) > 300
    assert listed[0] == listed[2] == [entry for entry in listed[1] if entry["path"] != "/.pxarexclude-cli"]
    answer = pbs("ls", f"host/enc/{DAY_1}", "root.pxar", "--output", "json")
    assert (answer.code, answer.out) == (1, "")
    assert "key" in answer.error["why"]


def test_ranges_of_images_are_those_that_differ(pbs: Fleece, tmp_path: Path) -> None:
    snapshots = [f"vm/100/{DAY_1}", f"vm/100/{DAY_2}"]
    for name in ("drive-scsi0.img", "drive-scsi1.img"):
        images = []
        for number, snapshot in enumerate(snapshots):
            target = tmp_path / f"{name}-{number}"
            assert pbs("restore", snapshot, name, target).code == 0
            images.append(target.read_bytes())
        for options, unit in (([], 4 * MIB), (["--content"], 4096)):
            differing = set()
            for change in pbs.json("diff", *snapshots, name, *options):
                differing |= set(range(change["offset"], change["offset"] + change["length"], unit))
            wanted = {
                offset
                for offset in range(0, len(images[0]), unit)
                if images[0][offset : offset + unit] != images[1][offset : offset + unit]
            }
            assert differing == wanted
            assert wanted
