"""What a machine that starts says and shows: signs of life, signs of failure, pictures."""

import zlib

import numpy as np
import pytest

from hypervisor.boot_signs import (
    FAILURES,
    KEPT,
    LOGIN,
    Picture,
    Serial,
    failure_in,
    only_firmware,
    passphrase_in,
    plain,
    processors,
    screen_text,
)


def ppm(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def picture(width: int = 100, height: int = 80, *, seed: int = 1) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    found = Picture.parse(ppm(pixels))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "text",
    [
        "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
        "Boot failed: not a bootable disk\n\nNo bootable device.\n",
        "Operating system not found",
        "Missing operating system",
        "BOOTMGR is missing\nPress Ctrl+Alt+Del to restart",
        "error: no such partition.\nEntering rescue mode...\ngrub rescue> ",
        "   Minimal BASH-like line editing is supported. For the first word, TAB lists",
        "ALERT!  UUID=1 does not exist.  Dropping to a shell!",
        "BusyBox v1.35.0 built-in shell (ash)\n(initramfs) ",
        "You are in emergency mode. After logging in, type",
        "Give root password for maintenance\n(or press Control-D to continue): ",
        "Entering emergency mode. Exit the shell to continue.",
        "BdsDxe: No bootable option or device was found.",
        "UEFI Interactive Shell v2.2\nEDK II",
    ],
)
def test_texts_of_guests_that_do_not_come_to_life(text: str) -> None:
    assert failure_in(text) is not None
    assert failure_in(plain("\x1b[0;31m" + text + "\x1b[0m")) is not None


@pytest.mark.parametrize(
    "text",
    [
        "Debian GNU/Linux 12 web ttyS0\n\nweb login: ",
        "Boot failed: not a bootable disk\n\nBooting from DVD/CD...\n",  # there are other disks
        "[  OK  ] Reached target multi-user.target - Multi-User System.",
        "Loading Linux 6.1.0-18-amd64 ...\nLoading initial ramdisk ...",
        "[  OK  ] Started emergency.service watcher",
    ],
)
def test_texts_of_guests_that_may(text: str) -> None:
    assert failure_in(text) is None


def test_every_pattern_can_be_named_for_people() -> None:
    assert all(meaning and pattern.search("\n" * 20_000) is None for pattern, meaning in FAILURES)


def test_a_login_prompt_is_one_at_the_end_of_a_line_only() -> None:
    assert LOGIN.search("Debian GNU/Linux 12 web ttyS0\n\nweb login: ")
    assert LOGIN.search("[  OK  ] Reached target multi-user.target - Multi-User System.")
    assert not LOGIN.search("systemd-logind.service - User Login Management")
    assert not LOGIN.search("Last login: Sat Nov 28")


def test_a_text_that_comes_in_pieces_is_found_and_a_flood_is_bounded() -> None:
    serial = Serial()
    serial.hear(b"\x1b[1mweb lo")
    assert LOGIN.search(serial.hear(b"gin: \x1b[0m"))
    for number in range(100):
        serial.hear(b"%05d" % number + b"x" * 65536)
    log = serial.log
    assert log.startswith(b"\x1b[1mweb login: ")
    assert log.endswith(b"x")
    assert b"bytes left out]" in log
    assert len(log) < 2 * KEPT + 100_000


def test_a_screen_of_firmware_or_of_a_waiting_boot_loader_is_no_life() -> None:
    assert only_firmware("SeaBIOS (version 1.16.2-debian)\n\nBooting from Hard Disk...\n")
    assert only_firmware("                GNU GRUB  version 2.06\n  *Debian GNU/Linux")
    assert not only_firmware("SeaBIOS (version 1.16.2)\nBooting from Hard Disk...\nweb login: ")


@pytest.mark.parametrize(
    "text",
    [
        "Please unlock disk vda3_crypt: ",
        "Begin: Waiting.\nPlease enter passphrase for disk QEMU_HARDDISK (root): ",
        "Attempting to decrypt master key...\nEnter passphrase for hd0,msdos1 (88296): ",
        "Enter passphrase for /dev/vda3: \n\n",
    ],
)
def test_a_question_for_a_passphrase_is_one_until_it_is_answered(text: str) -> None:
    assert (passphrase_in(text) or "nothing") in " ".join(text.split())
    assert failure_in(text) is None
    assert passphrase_in(text + "secret\nDebian 12\nweb login: ") is None
    assert passphrase_in(text + "\n[  OK  ] Started something.service\n" * 20) is None


@pytest.mark.parametrize(
    "text", ["", "web login: ", "Password: ", "Forward Password Requests to Wall Directory Watch."]
)
def test_what_is_no_question_for_a_passphrase(text: str) -> None:
    assert passphrase_in(text) is None


def test_the_memory_of_a_text_screen_is_read() -> None:
    words = [0x0700 | ord(letter) for letter in "web login:".ljust(80)] + [0x0700] * 80 + [0x1F21]
    rows = [
        f"{0xB8000 + 2 * start:016x}: " + " ".join(f"0x{word:04x}" for word in words[start : start + 8])
        for start in range(0, len(words), 8)
    ]
    assert screen_text("\r\n".join(rows)) == "web login:\n\n!"


def test_processors_that_rest_and_those_that_will_for_ever() -> None:
    first = "CPU#0\r\nEAX=00 EFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n"
    text = f"\r\n{first}\r\nCPU#1\r\nRIP=0 RFL=00000046 HLT=1\r\n"
    assert processors(text) == [(True, True), (True, False)]
    assert processors("nonsense") == []


@pytest.mark.parametrize(
    "data",
    [
        b"", b"P6", b"P5\n1 1\n255\n\0\0\0", b"P6\n2 2\n255\n\0", b"P6\n99999 99999\n255\n", b"P6\n0 1\n255\n",
        b"P6\n1 1\n65535\n" + bytes(6), b"P6\n9999999999 1\n255\n", b"P6\n8193 1\n255\n" + bytes(3 * 8193),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_none(data: bytes) -> None:
    assert Picture.parse(data) is None


def test_a_blinking_cursor_is_no_change_but_a_letter_is() -> None:
    one = picture()
    pixels = one.pixels.copy()
    pixels[50:66, 20:29] ^= 255
    assert one.same(Picture(pixels))
    pixels[10, 10] ^= 255
    assert not one.same(Picture(pixels))
    assert not one.same(picture(101))


def test_a_blank_screen_with_a_cursor_is_blank() -> None:
    pixels = np.zeros((400, 720, 3), np.uint8)
    pixels[14:16, 0:9] = 170
    assert Picture(pixels).blank
    pixels[14:16, 0:18] = 170
    assert not Picture(pixels).blank
    assert Picture(pixels).is_text
    assert not picture().is_text


def test_a_png_holds_the_same_pixels() -> None:
    one = picture(31, 17)
    png = one.png()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks: dict[bytes, bytes] = {}
    position = 8
    while position < len(png):
        size = int.from_bytes(png[position : position + 4], "big")
        kind, data = png[position + 4 : position + 8], png[position + 8 : position + 8 + size]
        assert zlib.crc32(kind + data) == int.from_bytes(png[position + 8 + size : position + 12 + size], "big")
        chunks[kind] = data
        position += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"] == (31).to_bytes(4, "big") + (17).to_bytes(4, "big") + b"\x08\x02\0\0\0"
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(17, 1 + 3 * 31)
    assert not rows[:, 0].any()
    assert (rows[:, 1:].reshape(17, 31, 3) == one.pixels).all()
