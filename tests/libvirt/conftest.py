"""Fixtures of the tests with a real libvirtd."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cache import Unavailable
from tests.support.fleece_command import FleeceCommand
from tests.support.libvirtd import Libvirtd, libvirtd
from tests.support.qemu_binaries import backports_qemu, distribution_qemu
from tests.support.warm_command import WarmCommand


@pytest.fixture(scope="session")
def started_libvirtd(request: pytest.FixtureRequest) -> Iterator[Libvirtd]:
    """A libvirtd for all tests of this process: the distribution's, as its QEMU; with the parameter `newer` those of
    its backports."""
    newer = getattr(request, "param", "") == "newer"
    try:
        qemu = backports_qemu() if newer else distribution_qemu()
    except Unavailable as reason:
        pytest.skip(str(reason))  # both QEMUs come from the distribution, which may be out of reach
    with libvirtd(qemu, newer=newer) as daemon:
        yield daemon


@pytest.fixture
def host(started_libvirtd: Libvirtd) -> Iterator[Libvirtd]:
    """The libvirtd, without domains."""
    try:
        yield started_libvirtd
    finally:
        started_libvirtd.forget()


@pytest.fixture
def fleece(host: Libvirtd, store_folder: Path, warm_command: WarmCommand) -> FleeceCommand:
    """The command, with the domain `web` as its VM of that name."""
    home = host.disks / "h"
    home.mkdir()
    home.chmod(0o700)  # QEMU's user cannot reach scratch images or sockets by their paths
    (home / "fleece.toml").write_text(
        f'[vm.web]\nlibvirt = "web"\nconnect = "{host.uri}"\nscratch = "{home}/scratch"\nscratch-beside-disks = true\n'
    )
    return FleeceCommand(home, store_folder, warm=warm_command)


@pytest.fixture
def pair(host: Libvirtd) -> tuple[Path, Path]:
    """Images for two disks, qcow2 and raw, empty."""
    import subprocess

    qcow2, raw = host.disks / "a.qcow2", host.disks / "b.raw"
    subprocess.run([distribution_qemu().img, "create", "-q", "-f", "qcow2", qcow2, "24M"], check=True)
    with raw.open("wb") as file:
        file.truncate(10 << 20)
    shutil.chown(raw, 0, 0)
    return qcow2, raw
