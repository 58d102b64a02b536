"""Ground floor: what every other room may use and what knows none of them.

- `core.errors`: `FleeceError` (what, where, why, hint), its few general subclasses, `ExitCode`.
- `core.units`: sizes, rates and durations as people write and read them.
- `core.progress`: progress as events; `core.render`: who shows them (bars at a terminal, lines elsewhere).
- `core.limits`: how many threads do the heavy work.
- `core.disks`: `DiskSource` and `DiskTarget`, what a disk is to the rooms that share disks.
- `core.tls`: a TLS connection that reads into the caller's memory; `core.dial` makes connections.
- `core.buffers`: names for bytes-like objects.
"""
