"""The command with a datastore on a server: TLS on loopback, against the strict double."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.support.certificates import Certificate, make_certificate
from tests.support.fleece_command import FleeceCommand
from tests.support.pbs_double import PbsDouble
from tests.support.warm_command import WarmCommand

CHUNK = 4 << 20


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls") / "server.pem")


@pytest.fixture
async def double(certificate: Certificate) -> AsyncIterator[PbsDouble]:
    double = PbsDouble()
    async with trio.open_nursery() as nursery:
        double.nursery = nursery
        double.port = await double.listen(certificate.context())
        yield double
        nursery.cancel_scope.cancel()


@pytest.fixture
def fleece(double: PbsDouble, certificate: Certificate, tmp_path: Path, warm_command: WarmCommand) -> FleeceCommand:
    environment = {
        "FLEECE_REPOSITORY": f"root@pam!tok@127.0.0.1:{double.port}:store",
        "PBS_PASSWORD": double.secrets["root@pam!tok"],
        "PBS_FINGERPRINT": certificate.fingerprint,
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    return FleeceCommand(tmp_path / "f", tmp_path, environment, warm_command)


async def test_folders_images_and_files_go_to_a_server_and_come_back(
    fleece: FleeceCommand, double: PbsDouble, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(5):
        (folder / f"file{number}").write_bytes(os.urandom(300_000))
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(CHUNK + 5000))
    conf = tmp_path / "vm.conf"
    conf.write_text("name: x\n")
    named = ("--backup-id", "h", "--change-detection-mode")
    first = await fleece.json("backup", f"root.pxar:{folder}", f"disk.img:{image}", f"vm.conf:{conf}", *named, "legacy")
    for mode in ("data", "metadata", "metadata"):
        report = await fleece.json("backup", f"root.pxar:{folder}", f"disk.img:{image}", *named, mode)
    archives = {archive["name"]: archive for archive in report["archives"]}
    assert archives["root.ppxar"]["chunks-new"] == 0
    assert archives["disk.img"]["chunks-new"] == 0
    listed = await fleece.json("list")
    assert len(listed) == 4
    assert all(entry["owner"] == "root@pam!tok" for entry in listed)
    # The log goes along.
    (log,) = [
        folder.files["client.log.blob"] for key, folder in double.folders.items() if key[3] == listed[0]["backup-time"]
    ]
    assert len(log) > 12
    assert {"root.pxar.didx", "catalog.pcat1.didx", "disk.img.fidx", "vm.conf.blob"} <= {
        file["filename"] for file in listed[0]["files"]
    }
    out = tmp_path / "out"
    assert (await fleece.run("restore", first["snapshot"], "root.pxar", out / "legacy")).code == 0
    assert (await fleece.run("restore", report["snapshot"], "root.pxar", out / "split")).code == 0
    for name in ("legacy", "split"):
        for number in range(5):
            assert (out / name / f"file{number}").read_bytes() == (folder / f"file{number}").read_bytes()
    assert (await fleece.run("restore", report["snapshot"], "disk.img", out / "disk.raw")).code == 0
    assert (out / "disk.raw").read_bytes() == image.read_bytes()
    assert len(await fleece.json("ls", report["snapshot"], "root.pxar")) >= 5


async def test_a_server_verifies_and_collects_garbage(fleece: FleeceCommand, double: PbsDouble, tmp_path: Path) -> None:
    conf = tmp_path / "vm.conf"
    conf.write_text("name: x\n")
    await fleece.json("backup", f"vm.conf:{conf}", "--backup-id", "h", "--backup-time", "1000")
    double.folders["", "host", "h", 1000].failed = True
    outcome = await fleece.run("verify")
    assert outcome.code == 1
    assert outcome.document[0]["errors"][0] == "chunk aa was not loaded: verify failed"
    assert (await fleece.run("verify", "--max-bytes", "1M")).error["why"] == "a server decides that itself"
    assert (await fleece.run("verify", "--here")).code == 0
    assert (await fleece.json("gc"))["disk-chunks"] == 7


async def test_a_ticket_is_kept_between_login_and_logout(
    fleece: FleeceCommand, double: PbsDouble, tmp_path: Path
) -> None:
    environment = dict(fleece.environment)
    environment["FLEECE_REPOSITORY"] = f"root@pam@127.0.0.1:{double.port}:store"
    environment["PBS_PASSWORD"] = "geheim"
    user = FleeceCommand(tmp_path / "u", tmp_path, environment)
    assert (await user.run("login")).code == 0
    ticket = user.run_dir / "tickets.json"
    assert ticket.stat().st_mode & 0o777 == 0o600
    assert "geheim" not in ticket.read_text()
    del environment["PBS_PASSWORD"]
    logins = double.logins
    assert await user.json("list") == []
    assert double.logins == logins
    assert (await user.json("logout"))["forgotten"] is True
    outcome = await user.run("list")
    assert outcome.code == 1
    assert "no password" in outcome.error["why"]
    environment["PBS_PASSWORD"] = "wrong"
    outcome = await user.run("login")
    assert outcome.error["why"] == "permission check failed."
    assert "wrong" not in outcome.err


async def test_another_certificate_gets_no_byte(fleece: FleeceCommand, double: PbsDouble, tmp_path: Path) -> None:
    environment = {**fleece.environment, "PBS_FINGERPRINT": ":".join(["00"] * 32)}
    outcome = await FleeceCommand(tmp_path / "x", tmp_path, environment).run("list")
    assert outcome.code == 1
    assert "certificate is not accepted" in outcome.error["why"]
    assert "its fingerprint is" in outcome.error["why"]
    assert "PBS_FINGERPRINT" in outcome.error["hint"]
    assert double.asked == []
