"""Looking into disk images: partitions, volume groups and file systems, as plain entries and places on the disk.

It imports `core/` only: whoever uses it hands over disks that can be read at any place (`client.Source`) and gets
volumes, entries, extended attributes and content (`client.LookedInto`). Images are hostile until shown otherwise, and
the libraries that know file systems trust them. So they run in a process of their own, one for each image that is
looked into, with bounds on memory, time and reading, which can open no file (`worker.py`, docs/disk-images.md).

client.py      `look_into`: the asking side, under trio; starts, asks and ends the process
process.py     the process, as the asking side has it
worker.py      the process itself: `python -m diskfs.worker`
frames.py      what the two say to each other
entries.py     volumes, entries, runs: plain data
image.py       partitions and volumes of one disk, within the process
blocks.py      disks and parts of disks, mapped back to the disk
tables.py, lvm.py, probe.py                   what lies where, and what it is
ext.py, xfs.py, btrfs.py, ntfs.py, fat.py     the file systems, by the libraries `dissect.*`
ext_inodes.py, ext_journal.py, xfs_log.py, xfs_extents.py, xfs_attributes.py   parts of them
errors.py      `DiskFsError`, `NotReadError`, `ImageLibraryError`
"""
