"""The file archive: codec, directory walk, change detection, extraction.

Empty so far: Fleece stores disk images and small files today. It imports `core/` only and will hand over plain data:
stream blocks, suggested boundaries, ranges to reuse.
"""
