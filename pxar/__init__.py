"""The file archive: codec, directory walk, change detection, extraction.

It imports `core/` only and hands over plain data through the protocols of `sinks`: stream blocks, suggested boundaries,
ranges to reuse. Everything here is synchronous, for one worker thread of the caller.

create.py      `create_archive`: a folder becomes an archive; `measure_archive` only says what would be read
detection.py   which old payloads are taken over; `reference.py` is the previous archive
extract.py     an archive becomes a folder again; `export.py` makes tar and zip of it
encoder.py, decoder.py, accessor.py   the format: written, read front to back, read at any place
metadata.py, format.py, goodbye.py    its parts
filesystem.py  metadata of files, read by one C call; `features.py` says what a file system has
patterns.py    what is left out, and what is chosen
sinks.py       what the caller provides
"""
