"""The disks of a running VM: which there are, what their archives are called, and whether a backup may start.

docs/hypervisor.md, "Disks and their names".
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from hypervisor import checked
from hypervisor.block_graph import nodes_of_jobs
from hypervisor.disk_names import MAX_NAME, archive_name, base_name, given_name, image_path
from hypervisor.errors import DiskNameError, QmpAnswerError, QmpCommandError, VmStateError, VmUnsupportedError
from hypervisor.qmp import Qmp

#: Names of everything Fleece adds to a QEMU begin so.
OUR_PREFIX: Final = "fleece-"

_PERIPHERAL: Final = "/machine/peripheral/"
_FLASH: Final = "/machine/system.flash"

#: How devices are called for people, by their QOM type.
_DEVICE_TYPES: Final = {
    "virtio-blk-device": "virtio-blk",
    "scsi-hd": "scsi-hd",
    "ide-hd": "ide-hd",
    "nvme": "nvme",
    "nvme-ns": "nvme",
}
#: Devices whose guest talks to the hardware by itself: its writes pass by every filter and bitmap of QEMU.
_PASS_THROUGH: Final = frozenset({"scsi-generic", "scsi-block"})

#: Devices whose disks another program serves to the guest: QEMU knows nothing of them.
_SERVED_PAST: Final = ("child<vhost-user-blk", "child<vhost-user-scsi", "child<vhost-scsi")

#: Why no dirty bitmap of this QEMU tells what changed on a disk that others write to as well.
SHAREABLE: Final = "the disk is shareable: what other machines write to it is in no dirty bitmap"

#: Run states in which the disks belong to somebody else, or a write of the guest is waiting to be repeated.
_REFUSED_STATES: Final = {
    "inmigrate": "it is being migrated to this host",
    "finish-migrate": "it is being migrated away",
    "postmigrate": "it was migrated away",
    "io-error": "it is paused after an I/O error",
}

#: States of a migration that is under way: QEMU would fail it at its end, when a backup runs.
_MIGRATING: Final = frozenset(
    {
        "setup",
        "cancelling",
        "active",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
        "postcopy-recover-setup",
        "colo",
        "pre-switchover",
        "device",
        "wait-unplug",
    }
)

#: Commands of stock QEMU that a backup is made of.
_NEEDED_COMMANDS: Final = (
    "block-dirty-bitmap-add",
    "block-export-add",
    "block-export-del",
    "blockdev-add",
    "blockdev-del",
    "blockdev-reopen",
    "nbd-server-start",
    "nbd-server-stop",
    "qom-set",
    "query-block-exports",
    "query-iothreads",
    "query-named-block-nodes",
    "transaction",
    "x-debug-query-block-graph",
)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that a device of the guest uses, as it was when it was listed."""

    name: str  #: the archive's name without its type extension: `drive-scsi0.img`
    device: str  #: the device's id, else its path; for people
    qom_path: str  #: the device's path, whose property `drive` is switched
    node: str  #: the root: the block node that the device uses
    size: int  #: bytes
    driver: str  #: of the root: `raw`, `qcow2`, ...
    file: str | None  #: path of the image, as QEMU knows it (it may be relative to QEMU's folder)
    device_type: str  #: `virtio-blk`, `scsi-hd`, `ide-hd`, `nvme`, `usb-storage`, else the QOM type
    persistent_bitmaps_possible: bool
    """The root is qcow2 of version 3, and has no internal snapshots: a bitmap in the image would keep them from being
    loaded, and libvirt ends the VM before it finds that out."""
    bitmaps: Sequence[dict[str, Any]] = field(default=(), repr=False)
    """Named dirty bitmaps of the root: `name`, `count`, `granularity`, `recording`, `busy`, `persistent`, and
    `inconsistent`, which is False where QEMU leaves it out."""
    backend: str = ""  #: name of the `-drive`, else empty
    aliases: frozenset[str] = field(default=frozenset(), repr=False)  #: what the configuration may call it
    active: bool = True  #: False after a migration until the VM goes on: the disk is still the former host's
    written_past: str = ""  #: why dirty bitmaps cannot tell what changed, in words; mostly empty


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A block device of the VM that is no disk to be backed up, or was excluded."""

    device: str
    reason: str  #: "read-only", "a CD-ROM drive", ...
    aliases: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True, slots=True)
class Survey:
    """Every block device of a VM: the disks of a backup, and the others with the reason."""

    disks: Sequence[Disk]
    left_out: Sequence[LeftOut]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What may be asked of a QEMU without hurting its guest. docs/hypervisor.md, "Versions"."""

    version: tuple[int, int, int]
    flavour: str  #: `stock`, or `proxmox` for a QEMU with Proxmox VE's additions
    compat: bool
    """Before 8.2: reads of the frozen view must lie inside one cluster of 64 KiB, and its allocation map is that of the
    live disk."""

    @property
    def allocation_map(self) -> bool:
        """Whether `base:allocation` of the frozen view is about the frozen view."""
        return not self.compat

    @property
    def cbw_timeout_s(self) -> int:
        """Seconds a guest write may wait for the fleecing image: 45 (Windows gives up after 60); before 9.1 more than
        4 overflows."""
        return 45 if self.version >= (9, 1, 0) else 4


async def capabilities(qmp: Qmp, *, what: str = "back up") -> Capabilities:
    """What this QEMU can do; `what` is to be done with its VM, for errors.

    Raises:
        VmUnsupportedError: too old, without a needed command, or older than 9.1 with I/O threads.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    version = qmp.version
    text = ".".join(map(str, version))
    if version < (7, 2, 0):
        raise VmUnsupportedError(f"{what} the VM at", qmp.where, f"its QEMU is {text}", "7.2 is the oldest supported")
    missing = [command for command in _NEEDED_COMMANDS if command not in qmp.commands]
    if missing:
        raise VmUnsupportedError(f"{what} the VM at", qmp.where, f"its QEMU lacks {', '.join(missing)}")
    iothreads = bool(checked.of_type(await qmp.execute("query-iothreads"), list, f"{qmp.where}, query-iothreads"))
    if iothreads and version < (9, 1, 0):
        raise VmUnsupportedError(
            f"{what} the VM at",
            qmp.where,
            f"it has I/O threads, and QEMU {text} aborts when a backup of such a VM ends",
            "use QEMU 9.1 or newer, or remove the iothread objects",
        )
    return Capabilities(
        version=version,
        flavour="proxmox" if "backup-access-setup" in qmp.commands else "stock",
        compat=version < (8, 2, 0),
    )


async def list_disks(
    qmp: Qmp,
    *,
    names: Mapping[str, str] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> list[Disk]:
    """The disks of a backup, in QEMU's order; arguments and errors as those of `survey`."""
    return list((await survey(qmp, names=names, include=include, exclude=exclude)).disks)


async def survey(
    qmp: Qmp,
    *,
    names: Mapping[str, str] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    instead: Mapping[str, str] | None = None,
    flash: bool = False,
    also: Sequence[Disk] = (),
) -> Survey:
    """Find the disks of a VM.

    `names` gives disks another name (`{"virtio0": "system"}` makes `drive-system.img`), `include` (None: all) and
    `exclude` choose. All three call a disk by its device id, device path, `-drive` name, node name, image path or
    archive name; include and exclude also by a pattern (`scsi*`). Exclude wins. `instead` names the node that counts as
    the root where a device uses another one (`{"fleece-p0": "fmt0"}`). With `flash` writable flash memory is a disk;
    `also` are disks that no device uses, chosen by the same rules.

    Raises:
        DiskNameError: two disks of one name, a name that cannot be used, or an `include` that chooses no disk.
        VmUnsupportedError: a chosen device's guest writes pass QEMU by (`scsi-generic`, `vhost-user-blk` and the like).
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    names = dict(names or {})
    wanted = None if include is None else list(include)
    unwanted = list(exclude)
    found: list[Disk] = []
    left_out: list[LeftOut] = []
    where = f"{qmp.where}, query-block"
    nodes = await _named_nodes(qmp, instead) if instead else {}
    for entry in checked.objects(await qmp.execute("query-block"), where):
        device = _BlockDevice.parse(entry, where)
        if device is None:
            continue
        device = replace(device, inserted=nodes.get(device.node, device.inserted))
        aliases = frozenset(device.aliases())
        reason = device.no_disk(flash=flash)
        name = ""
        if reason is None:
            name = device.archive(names, aliases)
            aliases |= {name, name.removesuffix(".img")}
        chosen = wanted is None or _matches(aliases, wanted)
        if reason is None and (not chosen or _matches(aliases, unwanted)):
            reason = "excluded"
        if reason is not None:
            left_out.append(LeftOut(device.label, reason, aliases))
            continue
        found.append(await device.disk(qmp, name, aliases))
    for past in await _served_past(qmp):
        if (wanted is None or _matches(past.aliases, wanted)) and not _matches(past.aliases, unwanted):
            # Left out without a word, nobody would notice that it is missing.
            raise VmUnsupportedError("back up disk", past.device, past.reason, "exclude it")
        left_out.append(replace(past, reason="excluded"))
    for disk in also:
        if (wanted is None or _matches(disk.aliases, wanted)) and not _matches(disk.aliases, unwanted):
            found.append(disk)
        else:
            left_out.append(LeftOut(disk.device, "excluded", disk.aliases))
    _check_wanted(qmp, wanted or (), found, left_out)
    _check_clashes(qmp, found)
    return Survey(tuple(found), tuple(left_out))


async def _served_past(qmp: Qmp) -> list[LeftOut]:
    """The devices of which QEMU has no block node."""
    found: list[LeftOut] = []
    if "qom-list" not in qmp.commands:
        return found
    for folder in (_PERIPHERAL, "/machine/peripheral-anon/"):
        where = f"{qmp.where}, qom-list {folder}"
        for entry in checked.objects(await qmp.execute("qom-list", {"path": folder.rstrip("/")}), where):
            if not checked.field(entry, "type", str, where).startswith(_SERVED_PAST):
                continue
            name = checked.field(entry, "name", str, where)
            path = folder + name
            label = checked.printable(name if folder == _PERIPHERAL else path)
            why = "another program serves it to the guest, past QEMU (vhost)"
            found.append(LeftOut(label, why, frozenset({name, path})))
    return found


async def _named_nodes(qmp: Qmp, instead: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What `query-block` would say of the roots `instead`, by the names of those that are there."""
    where = f"{qmp.where}, query-named-block-nodes"
    entries = checked.objects(await qmp.execute("query-named-block-nodes", {"flat": True}), where)
    nodes = {checked.field(entry, "node-name", str, where): entry for entry in entries}
    return {root: nodes[other] for root, other in instead.items() if other in nodes}


async def check_vm(qmp: Qmp, disks: Sequence[Disk], *, what: str = "back up") -> None:
    """Refuse where no backup of `disks` may start now, nor a rollback (`what`, for errors).

    Raises:
        VmStateError: the VM migrates, or has stopped at an I/O error, a block job works on one of the disks, or the
            disk is still switched to a node of ours.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, query-status"
    status = checked.field(checked.of_type(await qmp.execute("query-status"), dict, where), "status", str, where)
    if status in _REFUSED_STATES:
        hint = "if it is still here, 'cont' over QMP or 'virsh resume' lets it go on" if status == "postmigrate" else ""
        raise VmStateError(f"{what} the VM at", qmp.where, f"{_REFUSED_STATES[status]} (status {status})", hint)
    where = f"{qmp.where}, query-migrate"
    migration = checked.of_type(await qmp.execute("query-migrate"), dict, where)
    if (migrates := checked.optional(migration, "status", str, where) or "") in _MIGRATING:
        raise VmStateError(
            f"{what} the VM at",
            qmp.where,
            f"a migration of it is under way (status {migrates})",
            "try again when it has ended",
        )
    for disk in disks:
        if not disk.active:
            raise VmStateError(
                f"{what} disk",
                disk.device,
                "the VM has migrated here and not gone on yet, so that its QEMU may not use the disk",
                "'cont' over QMP lets it go on",
            )
        if disk.node.startswith(OUR_PREFIX):
            raise VmStateError(
                f"{what} disk",
                disk.device,
                f"it is switched to {checked.printable(disk.node)}: another backup runs, or one was killed",
                "'fleece vm cleanup' undoes what a killed one left",
            )
    jobs = {
        checked.field(job, "device", str, where): checked.printable(str(job.get("type", "")), 40)
        for job in checked.objects(await qmp.execute("query-block-jobs"), f"{qmp.where}, query-block-jobs")
    }
    if jobs:
        busy = await nodes_of_jobs(qmp)
        for disk in disks:
            for job in sorted(busy.get(disk.node, ())):
                raise VmStateError(
                    f"{what} disk",
                    disk.device,
                    f"the block job '{checked.printable(job)}' ({jobs.get(job) or 'unknown'}) works on it",
                )


@dataclass(frozen=True, slots=True)
class _BlockDevice:
    """One entry of `query-block` that belongs to a device."""

    qdev: str
    backend: str
    removable: bool
    inserted: Mapping[str, Any] | None
    where: str

    @classmethod
    def parse(cls, entry: dict[str, Any], where: str) -> "_BlockDevice | None":
        """None for a `-drive` that no device uses."""
        qdev = checked.optional(entry, "qdev", str, where)
        if not qdev:
            return None
        return cls(
            qdev,
            checked.optional(entry, "device", str, where) or "",
            checked.field(entry, "removable", bool, where),
            checked.optional(entry, "inserted", dict, where),
            f"{where}, device {qdev}",
        )

    @property
    def device_id(self) -> str:
        """The id that the user gave the device; empty without one."""
        if not self.qdev.startswith("/"):
            return self.qdev
        # Parts of a device (virtio-backend, the disk of a USB stick) lie below it.
        return self.qdev.removeprefix(_PERIPHERAL).split("/")[0] if self.qdev.startswith(_PERIPHERAL) else ""

    @property
    def qom_path(self) -> str:
        return self.qdev if self.qdev.startswith("/") else _PERIPHERAL + self.qdev

    @property
    def label(self) -> str:
        return checked.printable(self.device_id or self.backend or self.qdev)

    @property
    def node(self) -> str:
        return "" if self.inserted is None else checked.field(dict(self.inserted), "node-name", str, self.where)

    @property
    def image_name(self) -> str:
        """QEMU's name of the image: a path, a URL, or `json:{...}`."""
        return (checked.optional(dict(self.inserted), "file", str, self.where) or "") if self.inserted else ""

    def no_disk(self, *, flash: bool = False) -> str | None:
        """Why this is no disk to be backed up; None if it is one."""
        if self.qdev.startswith(_FLASH) and not flash:
            return "flash memory"
        if self.removable:
            return "a removable medium"
        if self.inserted is None:
            return "empty"
        if checked.field(dict(self.inserted), "ro", bool, self.where):
            return "read-only"
        return None

    def own_name(self) -> str:
        """The name the archive gets unless the configuration gives one."""
        user_node = "" if self.node.startswith(("#", OUR_PREFIX)) else self.node
        if self.qdev.startswith(_FLASH):  # `drive-efidisk0` of Proxmox VE
            return (self.backend or user_node).removeprefix("drive-") or base_name(self.image_name) or self.qdev
        return self.device_id or self.backend or user_node or base_name(self.image_name) or self.qdev

    def aliases(self) -> Iterator[str]:
        yield self.qdev
        yield self.qom_path
        yield from filter(None, (self.device_id, self.backend, self.image_name, image_path(self.image_name) or ""))
        if self.inserted is not None and not self.node.startswith("#"):
            yield self.node
        if self.qdev.startswith(_FLASH):
            yield self.own_name()

    def archive(self, names: Mapping[str, str], aliases: frozenset[str]) -> str:
        """The archive's name: what the configuration gives, else the device's own."""
        own = archive_name(self.own_name()[:MAX_NAME])
        known = aliases | {own, own.removesuffix(".img")}
        given = next((names[alias] for alias in sorted(known) if alias in names), None)
        return own if given is None else given_name(given)

    async def disk(self, qmp: Qmp, name: str, aliases: frozenset[str]) -> Disk:
        kind = checked.of_type(await qmp.qom_get(self.qom_path, "type"), str, f"{self.where}, type")
        if kind in _PASS_THROUGH:
            raise VmUnsupportedError(
                "back up disk",
                self.label,
                f"what the guest writes to a {kind} device passes QEMU by",
                "exclude it, or use scsi-hd",
            )
        try:
            shareable = await qmp.qom_get(self.qom_path, "share-rw") is True
        except QmpCommandError:  # an SD card cannot be shared
            shareable = False
        inserted = dict(self.inserted or {})
        driver = checked.field(inserted, "drv", str, self.where)
        image = checked.field(inserted, "image", dict, self.where)
        size = checked.field(image, "virtual-size", int, self.where)
        if not 0 < size < 1 << 63:
            raise QmpAnswerError("back up", self.where, f"a disk of {size} bytes", "exclude it")
        return Disk(
            name=name,
            device=self.label,
            qom_path=self.qom_path,
            node=self.node,
            size=size,
            driver=driver,
            file=image_path(self.image_name),
            device_type="usb-storage" if "/legacy[" in self.qdev else _DEVICE_TYPES.get(kind, kind),
            persistent_bitmaps_possible=driver == "qcow2"
            and _qcow2_compat(image) not in (None, "0.10")
            and not image.get("snapshots"),
            bitmaps=tuple(_bitmaps(inserted, self.where)),
            backend=self.backend,
            aliases=aliases,
            active=checked.optional(inserted, "active", bool, self.where) is not False,
            written_past=SHAREABLE if shareable else "",
        )


def _qcow2_compat(image: dict[str, Any]) -> object:
    specific = image.get("format-specific")
    data = specific.get("data") if isinstance(specific, dict) else None
    return data.get("compat") if isinstance(data, dict) else None


def _bitmaps(inserted: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    where = f"{where}, dirty bitmap"
    for bitmap in checked.objects(inserted.get("dirty-bitmaps", []), where):
        name = checked.optional(bitmap, "name", str, where)
        if not name:
            continue  # belongs to a filter or a job
        yield {
            "name": name,
            "count": checked.field(bitmap, "count", int, where),
            "granularity": checked.field(bitmap, "granularity", int, where),
            "recording": checked.field(bitmap, "recording", bool, where),
            "busy": checked.field(bitmap, "busy", bool, where),
            "persistent": checked.field(bitmap, "persistent", bool, where),
            "inconsistent": bool(checked.optional(bitmap, "inconsistent", bool, where)),
        }


def _matches(aliases: frozenset[str], patterns: Iterable[str]) -> bool:
    return any(
        pattern in aliases or any(fnmatchcase(alias, pattern) for alias in aliases if not alias.startswith("json:"))
        for pattern in patterns
    )


def _check_wanted(qmp: Qmp, wanted: Sequence[str], found: Sequence[Disk], left_out: Sequence[LeftOut]) -> None:
    for pattern in wanted:
        if any(_matches(disk.aliases, [pattern]) for disk in found):
            continue
        other = next((device for device in left_out if _matches(device.aliases, [pattern])), None)
        if other is not None:
            raise DiskNameError("include disk", repr(pattern), f"it is left out: {other.reason}")
        known = ", ".join(disk.device for disk in found) or "none"
        raise DiskNameError("include disk", repr(pattern), f"the VM at {qmp.where} has no such disk (chosen: {known})")


def _check_clashes(qmp: Qmp, found: Sequence[Disk]) -> None:
    by_name: dict[str, Disk] = {}
    by_node: dict[str, Disk] = {}
    for disk in found:
        other = by_name.setdefault(disk.name, disk)
        if other is not disk:
            raise DiskNameError(
                "name the disks of",
                qmp.where,
                f"{other.device} ({other.qom_path}) and {disk.device} ({disk.qom_path}) would both be {disk.name}",
                "give one a name in the configuration, in [vm.NAME.names]",
            )
        other = by_node.setdefault(disk.node, disk)
        if other is not disk:
            raise DiskNameError(
                "back up the disks of",
                qmp.where,
                f"{other.device} and {disk.device} are one disk (node {checked.printable(disk.node)})",
                "exclude both: QEMU freezes no disk that another device writes to",
            )
