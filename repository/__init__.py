"""Where snapshots live, and how data gets there and back.

interface.py   `Repository`, `BackupSession`, `Reader`: what a local datastore and a remote server have in common
local.py       `open_local`, `LocalRepository`: a datastore in a folder
backup.py      `SnapshotWriter`: disks and small files into a session, and the manifest at the end
planning.py    `plan_disks`: what a backup would read, and why (`--dry-run`); the decision for or against a base
pipeline.py    how chunks flow into a session: hashed, encoded, stored
disk_backup.py how a disk becomes chunks
stream_backup.py  how a stream that a thread writes becomes chunks; `arena.py` is its memory
stream_reference.py  `open_reference`: the previous file archive, for change detection
stored_bytes.py   `open_streams`: a stored file archive, read by a thread
restore.py     `restore_disk`, `restore_stream`, `restore_blob`: archives back to disks, streams and files
fetch.py       how chunks flow out of a repository
archive.py     `open_cache`, `open_archive_reader`: random access with a chunk cache and read-ahead, for mounts
verify.py      `verify`, `verify_snapshot`: is everything there, and is it what it was?
verify_chunks.py  what verify does with one file and its chunks
verify_modes.py   `verify_by`: by a bucket's listing, a sample, or a budget with a cursor
findings.py    what verify says about single chunks
users.py       `record_users`: which snapshots use the chunks that verify set aside
locate.py      `load_manifest`, `open_archive`: an archive compared with the manifest before it is used
report.py      `ArchiveReport`, `BackupReport`: the closing report
sync/          `sync`: push and pull between any two repositories
throttle.py    `Throttle`: `--bwlimit`
buffers.py     `shared_pool`: chunk buffers that are used again, the bound on a backup's memory
"""
