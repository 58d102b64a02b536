"""Names for bytes-like objects (Python 3.11 has no `collections.abc.Buffer`)."""

from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
#: A buffer that is filled by the callee.
WritableBuffer: TypeAlias = bytearray | memoryview
