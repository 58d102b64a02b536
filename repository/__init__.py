"""Where snapshots live, and the ways of data into and out of them.

    interface.py    `Repository`, `BackupSession`, `Reader`: local or remote, callers see no difference
    local.py        `open_local`: a datastore on this host
    backup.py       `SnapshotWriter`: disks and small files into one new snapshot
    restore.py      `restore_disk`, `restore_blob`: an archive back to a target
    archive.py      `open_archive_reader`: any range of an image, through a cache of chunks
    verify.py       `verify`: manifest, indexes and every chunk checked
    report.py       `BackupReport`: what a backup tells at its end

Nothing is imported here, so that a caller pays only for what it uses.
"""
