"""File archives with a key, through the real command: stored, looked into, restored, mounted; and refused without."""

import os
from pathlib import Path

import pytest
import trio

from tests.support.fleece_command import FleeceCommand
from tests.support.warm_command import WarmCommand


@pytest.fixture
def fleece(store_folder: Path, tmp_path: Path, warm_command: WarmCommand) -> FleeceCommand:
    return FleeceCommand(tmp_path / "h", store_folder, warm=warm_command)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "etc").mkdir(parents=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (root / "big").write_bytes(os.urandom(3 << 20))
    return root


@pytest.mark.parametrize("crypt_mode", ["encrypt", "sign-only"])
@pytest.mark.parametrize("mode", ["legacy", "data", "metadata"])
async def test_archives_with_a_key(
    fleece: FleeceCommand, tree: Path, tmp_path: Path, mode: str, crypt_mode: str
) -> None:
    key, other = str(tmp_path / "k.key"), str(tmp_path / "other.key")
    for path in (key, other):
        assert (await fleece.run("key", "create", path, "--kdf", "none")).code in (0, 3)
    keyed = ["--keyfile", key]
    line = ["backup", f"root.pxar:{tree}", "--backup-id", "web", "--change-detection-mode", mode]
    line += ["--crypt-mode", crypt_mode, *keyed]
    await fleece.json(*line)
    document = await fleece.json(*line)
    assert document["file-archives"][0]["read"] == (0 if mode == "metadata" else (3 << 20) + 20)
    assert {result["state"] for result in await fleece.json("verify", *keyed)} == {"ok"}
    assert (await fleece.json("diff", *[info["snapshot"] for info in await fleece.json("list")], *keyed)) is not None
    found = await fleece.json("find", "hosts", "host/web/latest", *keyed)
    assert "hosts" in str(found)
    out = tmp_path / "out"
    await fleece.json("restore", "host/web/latest", "root.pxar", str(out), *keyed)
    assert (out / "etc/hosts").read_text() == "127.0.0.1 localhost\n"
    assert (out / "big").read_bytes() == (tree / "big").read_bytes()
    shown, given = [(await fleece.json("key", "show", path))["fingerprint"][:23] for path in (key, other)]
    if crypt_mode == "sign-only":
        outcome = await fleece.run("find", "hosts", "host/web/latest", "--keyfile", other)
        assert (outcome.code, "/etc/hosts" in outcome.out) == (3, True)
        assert f"was not checked: it was made with the key {shown}, given is {given}" in outcome.err
        return
    (tmp_path / "empty").mkdir()
    for wrong in ([], ["--keyfile", other]):
        for command in (
            ["restore", "host/web/latest", "root.pxar", str(tmp_path / "no")],
            ["ls", "host/web/latest", "root.pxar"],
            ["mount", "host/web/latest", "root.pxar", str(tmp_path / "empty"), "--foreground"],
        ):
            outcome = await fleece.run(*command, *wrong)
            assert outcome.code == 1, command
            assert f"the key {shown} is needed, {f'given is {given}' if wrong else 'none is given'}" in outcome.err


async def test_mount_of_an_encrypted_archive(fleece: FleeceCommand, tree: Path, tmp_path: Path) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be used here")
    key, point = str(tmp_path / "k.key"), tmp_path / "mnt"
    point.mkdir()
    await fleece.run("key", "create", key, "--kdf", "none")
    await fleece.json(
        "backup", f"root.pxar:{tree}", "--backup-id", "web", "--change-detection-mode", "data", "--keyfile", key
    )
    async with fleece.start("mount", str(point), "--foreground", "--keyfile", key) as running:
        with trio.fail_after(60):
            while not point.is_mount():  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.05)
        read = await trio.to_thread.run_sync((point / "host/web/latest/root.pxar/big").read_bytes)
        assert read == (tree / "big").read_bytes()
        running.process.terminate()
        with trio.fail_after(60):
            await running.process.wait()
