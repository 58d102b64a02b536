"""Everything that talks to QEMU: live disks and image files as disk sources and targets.

Knows nothing of datastores: it implements the protocols of `core.disks` and hands over plain data. docs/hypervisor.md
tells what happens in a QEMU during a backup, and why.

    vm.py           `frozen_view`, `preview`, `cleanup`: all disks of a running VM at one instant
    flavours.py     `Flavour`: who makes that view, `stock.py` or `proxmox.py`; the disks it is made of
    provided.py     `provided_view`: a view that somebody else has made
    view.py         `FrozenView`: what a backup gets of all of them
    files.py        `open_source`: image files, block devices and NBD exports to back up
    targets.py      `open_target`, `StreamTarget`: what an image is restored to
    nbd_client.py   `open_nbd`, `NbdAddress`: reading and writing NBD exports with libnbd (by `nbd_connection.py`)
    nbd_devices.py  `NbdHost`: an NBD export as a block device /dev/nbdX; nbd_files.py: as a file
    nbd_server.py   `serve_disk`: a disk served by nbdkit (by `nbdkit_plugin.py`, which runs there)
    nbd_endpoint.py `Endpoint`: where clients find it
    replacement.py  `Replacement`: an image file that takes its name when it is whole
    live_restore.py `Streaming`: the disks of a machine that runs while they are restored
    rollback.py     `put_aside`: the disks of a running VM, to be written to
    dirty_regions.py  `open_regions`: what to read, for programs that read such a device or file
    stopped.py      `stopped_disks`, `held`: a VM whose QEMU does not run
    libvirt_host.py  `domain_state`, `monitor`, `define`: domains of libvirt, the only module that uses its bindings
    domain_address.py  `DomainAddress`: a domain where a QMP socket may be named as well
    domain_xml.py   `parse_domain`, `without_secrets`: how libvirt describes a domain; domain_rewrite.py: for a restore
    discovery.py    `capabilities`, `survey`, `list_disks`, `check_vm`: what a running VM has, and whether it can start
    guest_agent.py  `frozen`, `thaw_leftover`: the guest's file systems stand still (by `freeze_child.py`)
    pause.py        `paused`: the guest's processors stand still (by `resume_child.py`, of a domain `resume_domain.py`)
    server_in_qemu.py  `start_server`: QEMU's own NBD server, whatever user that QEMU has
    size_marks.py   `add_marks`, `unsure`: whether a disk was smaller since its bitmap began
    disk_names.py   `archive_name`, `image_path`: what disks are called
    cmdline.py      `command_line`: how QEMU was started, secrets masked
    efi.py          `efi_vars`: the EFI variables of a running VM
    tpm.py          `read_tpm_state`: the state of an emulated TPM
    machine.py      `from_files`, `command_line`, `start_script`: a VM out of what a backup says of it
    boot_trial.py   `try_boot`: whether a machine of a backup comes to life (by `boot_*.py`, `confined.py`)
    children.py     `running`: programs that end with this process
    qmp.py          `connect`, `Qmp`: QEMU's control socket, under trio
    unix_socket.py  `connect_unix`, `peer_of`: sockets, and who is behind them
    checked.py      `field`, `optional`, `objects`: JSON from outside, checked for its types
    errors.py       what can go wrong

The other modules are what these are made of: fleecing, dirty bitmaps, left-overs, NBD.

Nothing is imported here: asyncio and libnbd cost start-up time that `fleece --help` need not pay.
"""
