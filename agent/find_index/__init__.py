"""The index of `fleece find`: which snapshots have a path, and how it was there, in one SQLite file per repository.

It is made of catalogs and metadata archives, is kept on the host that looks, and can be made anew at any time: nothing
depends on it but speed. An answer from it is the answer that the archives themselves would give; what it does not know
for certain (a snapshot that changed, an archive in no usual order, an encrypted one without its key) is read directly.

    files       where the file lies, its lock, opening it: whatever is wrong with one makes it unusable, never believed
    schema      what it holds
    recording   snapshots and what is known of their archives
    writing     an archive's entries: only what differs from the state before is written
    updating    follows a repository: new snapshots, changed ones, vanished ones
    conditions  patterns as conditions in SQL
    searching   entries that match, in the snapshots that are asked for
    answering   which snapshots it answers for, and how it is kept up

Documentation for users: docs/find.md.
"""
