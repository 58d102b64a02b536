"""Signs of life, and of the contrary, of a machine that starts: what it says and shows. docs/test-boot.md, "Signs".

What a guest says is hostile: it is bounded, and what steers a terminal is taken out.
"""

import re
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Bytes of the serial port that are kept, of its beginning and its end.
KEPT: Final = 512 * 1024
#: Characters in which a text is looked for.
_WINDOW: Final = 8192
#: What steers a terminal.
_CONTROL: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Za-z0-9]|\x1b[^\[\]]|[\0\a\b\r]")

#: A login prompt, or a system that has reached its goal.
LOGIN: Final = re.compile(
    r"(?m)^[^\n]{0,80}\blogin: ?$|Reached target[^\n]{0,20} (?:multi-user\.target|Multi-User System)"
)

#: After these no guest comes to life. Each with what it means.
FAILURES: Final[Sequence[tuple[re.Pattern[str], str]]] = tuple(
    (re.compile(pattern), meaning)
    for pattern, meaning in (
        (r"Kernel panic - not syncing", "the kernel panics"),
        (r"VFS: Unable to mount root fs", "the kernel does not find its root file system"),
        (r"No bootable device|No bootable option or device was found", "the firmware finds nothing to boot from"),
        (r"No bootable medium|Boot failed: could not read the boot disk", "the firmware finds nothing to boot from"),
        (r"(?i)(?:missing|no) operating system|operating system not found", "there is no operating system"),
        (r"(?i)error loading operating system|invalid partition table", "the disk's boot code fails"),
        (r"(?i)non-system disk", "there is no operating system"),
        (r"(?:BOOTMGR|NTLDR|LILO) is (?:missing|compressed)", "the boot loader is missing"),
        (r"Windows failed to start|Your PC(?:/Device)? needs to be repaired", "Windows does not start"),
        (r"grub rescue>|Entering rescue mode\.\.\.", "GRUB does not find its files"),
        (r"Minimal BASH-like line editing is supported", "GRUB has nothing to boot"),
        (r"(?m)^ ?\(initramfs\)", "the initial RAM disk ends in a shell"),
        (r"(?:Dropping to a shell!|Gave up waiting for (?:root|suspend))", "the root file system is not found"),
        (r"(?i)you are in (?:emergency|rescue) mode", "the system ends in an emergency shell"),
        (r"(?i)entering emergency mode", "the system ends in an emergency shell"),
        (r"Give root password for maintenance|Cannot open access to console, the root account is locked",
         "the system ends in an emergency shell"),
        (r"(?m)^dracut:/# ?$|Starting Dracut Emergency Shell", "the initial RAM disk ends in a shell"),
        (r"UEFI Interactive Shell|(?m:^Shell> ?$)", "the firmware ends in its shell"),
    )
)  # fmt: skip
#: A question for the passphrase of a disk, which nobody will answer: neither life nor, where a key may come by itself,
#: death.
_PASSPHRASE: Final = re.compile(
    r"(?i)(?:enter passphrase|enter password|unlock disk|passphrase for|password for)[^\n]{0,120}:?"
    r"|enter the (?:pin|password|recovery key)[^\n]{0,80}"
)
#: Characters at the end of what was said in which it is looked for.
_QUESTION: Final = 400
#: A boot loader that waits for somebody: neither life nor death.
_NOT_YET: Final = re.compile(r"GNU GRUB|Press any key to boot|Use the .{0,40} keys to select|Boot Menu")
#: Lines of firmware.
_FIRMWARE: Final = re.compile(
    r"^\s*(?:SeaBIOS|iPXE|gPXE|Machine UUID|Press ESC|Select boot|TianoCore|Booting from|Boot failed)|^\s*$"
)


def plain(text: str) -> str:
    """`text` without what steers a terminal."""
    return _CONTROL.sub("", text)


def failure_in(text: str) -> str | None:
    """What `text` says of a failed start, in words; None if nothing."""
    for pattern, meaning in FAILURES:
        if (match := pattern.search(text)) is not None:
            return f"{meaning} ({' '.join(match[0].split())[:80]!r})"
    return None


def passphrase_in(text: str) -> str | None:
    """The question for a passphrase with which `text` ends; None if there is none, or it has been answered."""
    found = None
    for match in _PASSPHRASE.finditer(text.rstrip()[-_QUESTION:]):
        found = match
    if found is None or LOGIN.search(found.string, found.end()) is not None:
        return None
    return " ".join(found[0].split())[:80]


def only_firmware(text: str) -> bool:
    """Whether a screen of text shows nothing but firmware, or a boot loader that waits."""
    return _NOT_YET.search(text) is not None or all(_FIRMWARE.search(line) for line in text.splitlines())


class Serial:
    """What a machine has said on its serial port."""

    def __init__(self) -> None:
        self._head = b""
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = 0
        self._window = ""

    def hear(self, data: bytes) -> str:
        """Take more; returns the text in which to look."""
        text = self._window + data.decode("utf-8", "replace")
        self._window = text[-_WINDOW:]
        room = KEPT - len(self._head)
        self._head += data[:room]
        if rest := data[room:]:
            self._tail.append(rest)
            self._tail_size += len(rest)
            while self._tail_size - len(self._tail[0]) > KEPT:
                self._dropped += len(self._tail[0])
                self._tail_size -= len(self._tail.popleft())
        return plain(text)

    @property
    def log(self) -> bytes:
        """What was said, as it came; of very much the beginning and the end."""
        gap = f"\n[{self._dropped} bytes left out]\n".encode() if self._dropped else b""
        return self._head + gap + b"".join(self._tail)


# -- what it shows ----------------------------------------------------------------------------------------------------

#: Pixels of one side of a picture.
_MAX_SIDE: Final = 8192
#: Bytes of a picture file as QEMU writes it.
MAX_PICTURE: Final = 3 * 4096 * 4096 + 64
#: A cursor that blinks: not more than so many pixels wide and high.
_CURSOR: Final = (10, 20)
#: Screens of text have these sizes in pixels.
_TEXT_SIZES: Final = {(720, 400), (640, 400)}
#: A text screen has 80 columns.
COLUMNS: Final = 80


@dataclass(frozen=True)
class Picture:
    """A picture of a screen."""

    pixels: "npt.NDArray[np.uint8]"  #: height, width, 3

    @classmethod
    def parse(cls, data: bytes) -> "Picture | None":
        """A binary PPM file, as QEMU writes it; None if it is none."""
        import numpy as np

        match = re.match(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s", data)
        if match is None:
            return None
        width, height = int(match[1]), int(match[2])
        size = 3 * width * height
        if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE) or len(data) < match.end() + size:
            return None
        return cls(np.frombuffer(data, np.uint8, size, match.end()).reshape(height, width, 3))

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.pixels.shape[0])

    @property
    def blank(self) -> bool:
        """Whether it is of one colour, but for a cursor."""
        return self._changed(self.pixels != self.pixels[-1, -1]) is None

    @property
    def is_text(self) -> bool:
        """Whether it has the size of a screen of text."""
        return (self.width, self.height) in _TEXT_SIZES

    def same(self, other: "Picture") -> bool:
        """Whether nothing but a cursor is different."""
        if self.pixels.shape != other.pixels.shape:
            return False
        return self._changed(self.pixels != other.pixels) is None

    @staticmethod
    def _changed(different: "npt.NDArray[np.bool_]") -> tuple[int, int] | None:
        """Width and height of what is different; None if that is no more than a cursor."""
        import numpy as np

        rows = np.flatnonzero(different.any(axis=(1, 2)))
        if not len(rows):
            return None
        columns = np.flatnonzero(different.any(axis=(0, 2)))
        extent = (int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1)
        return None if extent[0] <= _CURSOR[0] and extent[1] <= _CURSOR[1] else extent

    def png(self) -> bytes:
        """It as a PNG file."""
        import numpy as np

        # Every row begins with the number of its filter: none.
        rows = np.zeros((self.height, 1 + 3 * self.width), np.uint8)
        rows[:, 1:] = self.pixels.reshape(self.height, 3 * self.width)
        header = self.width.to_bytes(4, "big") + self.height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
            for kind, data in parts
        )


def screen_text(words: str) -> str:
    """The text in a text screen's memory, as the monitor's `xp /NNNhx` prints it: character and colour in each word."""
    letters = [int(word[-2:], 16) for word in re.findall(r"0x[0-9a-fA-F]{4}\b", words)]
    text = "".join(chr(letter) if 32 <= letter < 127 else " " for letter in letters)
    return "\n".join(text[start : start + COLUMNS].rstrip() for start in range(0, len(text), COLUMNS))


def processors(registers: str) -> list[tuple[bool, bool]]:
    """Of each processor in what the monitor's `info registers -a` prints: whether it rests, and may be interrupted."""
    found = []
    for part in re.split(r"(?m)^CPU#\d+", registers):
        flags = re.search(r"\b[RE]FL=([0-9a-fA-F]+)", part)
        halted = re.search(r"\bHLT=([01])", part)
        if flags is not None and halted is not None:
            found.append((halted[1] == "1", bool(int(flags[1], 16) & 0x200)))
    return found
