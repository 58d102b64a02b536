"""What the index holds.

Names are bytes, stored as SQL text so that GLOB works on them; Python sees bytes. An entry is stored once for a run of
states, not once for each: `first` is the state in which it appeared as it is, `last` the last one that has it so, or
`OPEN`. States are numbered in the order in which they were indexed, over the whole file, and a number is never used
again; runs mean states of the entry's own stream. So a run may be longer than the states that are still there, and a
state that was never finished (`complete` 0) harms nothing: no snapshot refers to it, and the next state is compared
with what is open then, whatever it is.
"""

from typing import Final

#: Marks the file as ours: "FlFi".
APPLICATION_ID: Final = 0x466C4669
#: Changes whenever a table, or the meaning of a value, does; other versions are made anew.
VERSION: Final = 3
#: `entry.last` of what the newest state has.
OPEN: Final = (1 << 63) - 1
#: `entry.kind` counts from 0 in these.
LETTERS: Final = "dflhbcps"

#: `entry.size` of a directory that is a volume of a disk or a volume group; of others it is null.
VOLUME: Final = 1

TABLES: Final = {
    # Facts about the file itself: 'repository' it belongs to, 'encrypted' if names of encrypted archives may be here.
    "about": "CREATE TABLE about(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # One archive of one group through time.
    "stream": "CREATE TABLE stream(id INTEGER PRIMARY KEY, ns TEXT NOT NULL, grp TEXT NOT NULL, archive TEXT NOT NULL,"
    " root INTEGER NOT NULL, UNIQUE(ns, grp, archive))",
    # What a stream once was; source is what it was read from, as a digest.
    "state": "CREATE TABLE state(id INTEGER PRIMARY KEY AUTOINCREMENT, stream INTEGER NOT NULL, source BLOB NOT NULL,"
    " complete INTEGER NOT NULL, entries INTEGER NOT NULL)",
    # mark is a digest of what a listing says; checked the fingerprint of the key the manifest was checked with.
    "snapshot": "CREATE TABLE snapshot(id INTEGER PRIMARY KEY, ns TEXT NOT NULL, grp TEXT NOT NULL, time TEXT NOT NULL,"
    " mark BLOB NOT NULL, checked BLOB NOT NULL, UNIQUE(ns, grp, time))",
    # A snapshot's archives in order; without a state it must be read itself, see `recording.Part`.
    "part": "CREATE TABLE part(snapshot INTEGER NOT NULL, position INTEGER NOT NULL, archive TEXT NOT NULL,"
    " state INTEGER, encrypted INTEGER NOT NULL, why TEXT NOT NULL, PRIMARY KEY(snapshot, position)) WITHOUT ROWID",
    "dir": "CREATE TABLE dir(id INTEGER PRIMARY KEY, stream INTEGER NOT NULL, parent INTEGER, name TEXT NOT NULL,"
    " UNIQUE(parent, name))",
    # size and mtime are null where they are unknown; sizes from 2^63 on are stored less 2^64. child: of directories.
    "entry": "CREATE TABLE entry(dir INTEGER NOT NULL, name TEXT NOT NULL, first INTEGER NOT NULL,"
    " last INTEGER NOT NULL, kind INTEGER NOT NULL, size INTEGER, mtime INTEGER, child INTEGER,"
    " PRIMARY KEY(dir, name, first)) WITHOUT ROWID",
}
INDEXES: Final = {
    "state_source": "CREATE INDEX state_source ON state(stream, source)",
    "part_state": "CREATE INDEX part_state ON part(state)",
    "entry_ended": f"CREATE INDEX entry_ended ON entry(last) WHERE last < {OPEN}",
}
#: Made when the first update ends: twice as quick as keeping it up while a million names come in.
NAME_INDEX: Final = "CREATE INDEX entry_name ON entry(name)"
