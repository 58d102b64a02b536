"""What a backup makes of libvirt's description of a domain, with descriptions written by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent import libvirt_vm
from agent.config import Config
from agent.vm_backup import _of_stopped
from agent.vm_settings import VmOptions, VmSettings, resolve_vm
from core.errors import FleeceError
from hypervisor.domain_address import DomainAddress
from hypervisor.libvirt_host import DomainState
from tests.support.qemu_binaries import distribution_qemu

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
SERVED = (
    "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/><source type='unix' path='/run/x'/>"
    "<target dev='vdb' bus='virtio'/><alias name='virtio-disk1'/></disk>"
)
PART = (
    "<disk type='file'><source file='/a'><slices><slice type='storage' offset='0' size='9'/></slices></source>"
    "<target dev='vdb'/></disk>"
)
ONE = "<disk type='file'><source file='/b'/><target dev='vda'/></disk>"


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[..., VmSettings]:
    """Settings of a domain `web` of these devices."""

    def of(devices: str, *, active: bool, system: str = "", exclude: tuple[str, ...] = ()) -> VmSettings:
        inner = f"<name>web</name><uuid>{UUID}</uuid><os>{system}</os><devices>{devices}</devices>"
        xml = f"<domain type='kvm'>{inner}</domain>"
        state = DomainState("web", UUID, active, True, xml, xml if active else None, saved=not active)

        async def answer(_address: DomainAddress) -> DomainState:
            return state

        monkeypatch.setattr(libvirt_vm, "domain_state", answer)
        return resolve_vm(Config(), VmOptions(libvirt="web", connect="qemu:///system", exclude=exclude))

    return of


async def test_a_disk_that_qemu_does_not_see_is_never_missing_in_silence(
    described: Callable[..., VmSettings],
) -> None:
    with pytest.raises(FleeceError, match=r"another program serves it to the guest.*exclude it"):
        await described(ONE + SERVED, active=True).looked_up()
    for pattern in ("vdb", "vd[b-z]", "drive-vdb.img"):
        assert (await described(ONE + SERVED, active=True, exclude=(pattern,)).looked_up()).libvirt is not None


async def test_a_part_of_a_file_is_not_read_as_the_whole_file(described: Callable[..., VmSettings]) -> None:
    with pytest.raises(FleeceError, match="it is only a part of its file"):
        await described(ONE + PART, active=False).looked_up()
    assert (await described(ONE + PART, active=True).looked_up()).libvirt is not None


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["vars.fd", "vars.qcow2"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_efi_variables_of_a_domain_that_is_off_are_read_in_the_format_that_libvirt_names(
    described: Callable[..., VmSettings], tmp_path: Path, name: str, format: str
) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"EFI!" * 16384)
    line = [distribution_qemu().img, "convert", "-f", "raw", "-O", format, str(plain), str(tmp_path / name)]
    await trio.run_process(line)
    system = f"<loader format='{format}'>/usr/share/x</loader><nvram>{tmp_path / name}</nvram>"
    settings = await described(ONE, active=False, system=system).looked_up()
    assert settings.libvirt is not None
    assert settings.libvirt.saved
    ((blob, content),) = await _of_stopped(settings)
    assert (blob, content) == ("efivars.fd.blob", b"EFI!" * 16384)
