"""What tests, the demo and benchmarks share: QEMU binaries, running QEMUs, a small Linux guest, a cache of downloads.

    cache.py          `cached(name, build)`: things that are made once per checkout and kept in `.cache/`
    apt.py            `AptRoot`: packages from the machine's own APT sources, unpacked and never installed
    qemu_binaries.py  `distribution_qemu()`, `backports_qemu()`: the QEMUs there are to test with
    running.py        `RunningQemu`, `RunningStorageDaemon`: one process with disks, bounded lifetime
    guest.py          `SmallGuest`: kernel and initramfs of a guest that obeys one shell line at a time

docs/development.md shows how a test uses them.
"""
