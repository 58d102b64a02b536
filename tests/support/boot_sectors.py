"""Disks that a BIOS boots: a sector of code of our own, for guests that start in a tenth of a second.

say(serial=..., screen=...)   writes texts, then rests as an idle system does
then="halt"                   ... or stops with interrupts off, as a boot loader that gives up
then="spin"                   ... or runs in a circle, as a kernel that panics
then="write"                  ... or writes to its disk for ever
then="reset"                  ... or starts anew
silent()                      a disk that can be booted and does nothing
"""

from typing import Final

SECTOR: Final = 512
#: Where a BIOS puts the first sector.
_ORIGIN: Final = 0x7C00

#: `cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00; cld`
_BEGIN: Final = bytes.fromhex("fa31c08ed88ec08ed0bc007cfc")
#: `lodsb; test al,al; jz out; mov dx,0x3f8; out dx,al; jmp` back
_SERIAL: Final = bytes.fromhex("ac84c07406baf803eeebf5")
#: `lodsb; test al,al; jz out; mov ah,0x0e; xor bx,bx; int 0x10; jmp` back
_SCREEN: Final = bytes.fromhex("ac84c07408b40e31dbcd10ebf3")
_THEN: Final = {
    "rest": bytes.fromhex("fbf4ebfd"),  # sti; hlt; jmp to hlt
    "halt": bytes.fromhex("faf4ebfd"),
    "spin": bytes.fromhex("fbebfe"),
    "reset": bytes.fromhex("b0fee664f4"),  # mov al,0xfe; out 0x64,al; hlt
    # Sectors from 64 on, each with what lies at 0:0x8000, by the BIOS's extended write; the address counts up.
    "write": bytes.fromhex(
        "be007bc7041000c7440240 00c74404 0080c744060000c74408 4000c7440a0000c7440c0000c7440e0000".replace(" ", "")
    )
    + bytes.fromhex("fbb443b280b000cd138344084083540a00ebee"),
}


def say(*, serial: str = "", screen: str = "", then: str = "rest", size: int = 1 << 20) -> bytes:
    """A disk of `size` bytes whose boot sector writes the texts."""
    texts = b""
    code = _BEGIN
    length = len(_BEGIN) + 3 + len(_SERIAL) + 3 + len(_SCREEN) + len(_THEN[then])
    for text, loop in ((serial, _SERIAL), (screen, _SCREEN)):
        where = _ORIGIN + length + len(texts)
        code += b"\xbe" + where.to_bytes(2, "little") + loop  # mov si, where
        texts += text.replace("\n", "\r\n").encode() + b"\0"
    sector = code + _THEN[then] + texts
    assert len(sector) <= SECTOR - 2, f"{len(sector)} bytes"
    return (sector.ljust(SECTOR - 2, b"\0") + b"\x55\xaa").ljust(size, b"\0")


def silent(size: int = 1 << 20) -> bytes:
    """A disk that is booted, and then nothing happens: `jmp` to itself."""
    return (b"\xeb\xfe".ljust(SECTOR - 2, b"\0") + b"\x55\xaa").ljust(size, b"\0")
