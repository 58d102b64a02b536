"""Defining a restored machine in libvirt: `fleece vm restore --libvirt`. docs/libvirt.md, "Restoring a domain"."""

import os
import pwd
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent.libvirt_vm import TPM_FILES, tpm_folder
from agent.snapshot_archives import OpenSnapshot
from agent.vm_restore import PlannedDisk, RestoredVm, read_small_files, small_files
from core.errors import BusyError, NotFoundError, TargetError, UsageError, os_reason
from core.limits import in_io_thread
from core.progress import Progress
from datastore.manifest import ManifestFile
from hypervisor.domain_address import DomainAddress
from hypervisor.domain_rewrite import NewDisk, NewDomain, Rewritten, new_uuid, rewrite
from hypervisor.domain_xml import DOMAIN_XML_NAME, LIVE_XML_NAME, DomainDescription, parse_domain
from hypervisor.efi import EFI_VARS_NAME
from hypervisor.libvirt_host import define, look_around
from hypervisor.qemu_tools import qcow2_of

#: libvirt's configuration of QEMU domains, which says as whom swtpm runs.
_QEMU_CONF: Final = Path("/etc/libvirt/qemu.conf")
_SWTPM_USER: Final = re.compile(r'^\s*swtpm_user\s*=\s*"\+?([^"]+)"', re.MULTILINE)


@dataclass(slots=True, kw_only=True)
class LibvirtDefiner:
    """Defines a machine; `check` comes before the restore, the call after it."""

    uri: str
    name: str | None = None  #: of the domain; None: as it was called
    new_identity: bool = False  #: another UUID and other MAC addresses even if nobody has the old ones
    trusted: bool = False  #: keep what reaches into the host
    start: bool = False
    force: bool = False  #: replace a domain that does not run
    _domain: DomainDescription | None = field(default=None, init=False)
    _uuid: str = field(default="", init=False)
    _changed: bool = field(default=False, init=False)

    async def check(self, opened: OpenSnapshot, planned: Sequence[PlannedDisk]) -> None:
        """Refuse what cannot be done, before anything is written.

        Raises:
            NotFoundError: the snapshot holds no domain.
            FormatError: what it holds cannot be read.
            BusyError: a domain of that name runs, or is defined and is not to be replaced; another has a disk.
            UsageError: a disk goes where no domain can have it.
            LibvirtError: libvirt cannot be asked.
        """
        where = str(opened.snapshot)
        texts = await read_small_files(opened, _descriptions(small_files(opened)))
        if DOMAIN_XML_NAME not in texts:
            raise NotFoundError(
                "define a domain from", where, "it holds no domain of libvirt",
                "without --libvirt the disks are restored, with a script that starts the machine",
            )  # fmt: skip
        self._domain = domain = parse_domain(texts[DOMAIN_XML_NAME], f"{where}, {DOMAIN_XML_NAME}")
        self.name = self.name or domain.name
        known = await look_around(self.uri, self.name, domain.uuid)
        address = str(DomainAddress(self.uri, self.name))
        if known.taken is not None:
            if known.taken.active:
                raise BusyError("replace the domain", address, "it runs", "shut it down, or give another --name")
            if not self.force:
                raise BusyError(
                    "define the domain", address, "there is one", "--name gives it another name, --force replaces it"
                )
        taken = known.uuid_taken_by is not None and known.uuid_taken_by != self.name
        self._changed = self.new_identity or taken or not domain.uuid
        self._uuid = new_uuid() if self._changed else domain.uuid
        if known.taken is not None:
            self._uuid = known.taken.uuid  # a name has one UUID
        for disk in planned:
            if disk.kind == "nbd":
                raise UsageError("restore disk", disk.archive, "a domain cannot have it behind an NBD export")
            user = known.users.get(await in_io_thread(os.path.realpath, disk.target))
            if user is not None and user != self.name and not self.force:
                raise BusyError(
                    "restore to", disk.target, f"the domain {user} has this disk", "--force overwrites it all the same"
                )
        # What cannot be rewritten must not be found out after hours of restoring.
        self._rewritten(
            texts, [_new(disk.archive, disk.target, disk.kind, disk.format) for disk in planned], None, where
        )

    async def __call__(self, vm: RestoredVm, progress: Progress) -> None:
        """Define the domain, with the TPM's state where libvirt looks for it.

        Raises:
            TargetError: that, or EFI variables in the format that the firmware needs, cannot be written.
            FormatError, LibvirtError: libvirt refuses.
        """
        assert self.name is not None
        texts = {name: await in_io_thread(path.read_bytes) for name, path in vm.files.items() if name in _XML}
        disks = [_new(disk.archive, disk.target, disk.kind, disk.format) for disk in vm.disks]
        nvram = vm.files.get(EFI_VARS_NAME)
        assert self._domain is not None
        if nvram is not None and self._domain.nvram_format == "qcow2":
            nvram = await qcow2_of(nvram, force=self.force)
        result = self._rewritten(texts, disks, None if nvram is None else str(nvram), vm.snapshot)
        for warning in result.warnings:
            progress.warn(warning)
        await in_io_thread(self._place_tpm, vm)
        await define(self.uri, result.xml, self.name, start=self.start)
        state = "defined and started" if self.start else "defined"
        identity = ", with another UUID and other MAC addresses" if self._changed else ""
        vm.definitions.append(
            {
                "type": "libvirt",
                "connect": self.uri,
                "name": self.name,
                "uuid": self._uuid,
                "started": self.start,
                "disks": dict(result.disks),
                "line": f"the domain {self.name} is {state} in {self.uri}{identity}",
            }
        )

    def _rewritten(self, texts: dict[str, bytes], disks: Sequence[NewDisk], nvram: str | None, where: str) -> Rewritten:
        assert self.name is not None
        wanted = NewDomain(
            name=self.name,
            uuid=self._uuid,
            new_identity=self._changed,
            disks=disks,
            nvram=nvram,
            trusted=self.trusted,
        )
        return rewrite(texts[DOMAIN_XML_NAME], wanted, where=where, live=texts.get(LIVE_XML_NAME))

    def _place_tpm(self, vm: RestoredVm) -> None:
        file = next((one for one in TPM_FILES.values() if Path(one).name in vm.files), None)
        if file is None:
            return
        target = tpm_folder(self.uri) / self._uuid / file
        user = _swtpm_user(self.uri)
        try:
            content = vm.files[target.name].read_bytes()
            for folder, mode in ((target.parent.parent, 0o711), (target.parent, 0o700)):
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.fleece")
            partial.unlink(missing_ok=True)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:  # noqa: PTH123
                out.write(content)
            if user is not None:
                for path in (target.parent, partial):
                    os.chown(path, user.pw_uid, user.pw_gid)
            partial.replace(target)
        except OSError as error:
            raise TargetError("restore the state of the TPM to", str(target), os_reason(error)) from error


_XML: Final = (DOMAIN_XML_NAME, LIVE_XML_NAME)


def _descriptions(files: Sequence[ManifestFile]) -> list[ManifestFile]:
    return [file for file in files if file.filename.removesuffix(".blob") in _XML]


def _new(archive: str, target: str, kind: str, format: str) -> NewDisk:
    return NewDisk(archive, target, "block" if kind == "device" else "file", format)


def _swtpm_user(uri: str) -> pwd.struct_passwd | None:
    """As whom the libvirt of the host runs swtpm; None for a user's own."""
    if "/session" in uri or os.geteuid() != 0:
        return None
    try:
        found = _SWTPM_USER.search(_QEMU_CONF.read_text(errors="replace"))
    except OSError:
        found = None
    try:
        return pwd.getpwnam(found[1] if found is not None else "tss")
    except KeyError:
        return None
