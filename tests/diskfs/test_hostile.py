"""Images with flipped bits: every question is answered, soon, and without asking for all memory."""

import json
import os
import random
import resource
import signal
from collections.abc import Callable
from typing import Any

import pytest
import trio

from agent.image_nodes import ImageAccessor
from diskfs import worker
from diskfs.blocks import Disk
from diskfs.client import look_into
from diskfs.image import RAW
from pxar.accessor import Directory
from tests.diskfs.reading import Files, memory_for_this_process, walk
from tests.support.disk_images import MadeImage

#: Entries of each damaged image that are looked at.
_LOOKED_AT = 60


class Damaged:
    """What a worker talks to: an image with other bits at some places."""

    def __init__(self, files: Files, changes: dict[int, int]) -> None:
        self._files, self._changes = files, changes
        self._wanted: dict[str, int] = {}

    def send(self, document: dict[str, Any], data: bytes = b"") -> None:
        self._wanted = document

    def receive(self) -> tuple[dict[str, Any], bytes]:
        offset, length = self._wanted["offset"], self._wanted["length"]
        data = bytearray(self._files.fetch(0, offset, length))
        for place, mask in self._changes.items():
            if offset <= place < offset + length:
                data[place - offset] ^= mask
        return {}, bytes(data)


def ask_all(files: Files, changes: dict[int, int]) -> dict[str, int]:
    """Ask everything of a damaged image; how often there was an answer, an error, and an error for taking too long."""
    server = worker.Server(Damaged(files, changes), files.sizes, 0)  # type: ignore[arg-type]
    counts = {"answers": 0, "errors": 0, "exhausted": 0}

    def ask(op: str, **more: Any) -> dict[str, Any]:
        document, _ = server.answer({"op": op, "volume": "raw", **more})
        json.dumps(document)
        kind = "answers" if "error" not in document else "errors"
        counts[kind] += 1
        counts["exhausted"] += "more than" in document.get("why", "") and "; it may be" in document["why"]
        return document

    ask("volumes")
    waiting = [ask("entry").get("entry")]
    seen = 0
    while waiting and seen < _LOOKED_AT:
        entry = waiting.pop()
        if entry is None:
            continue
        for row in ask("list", id=entry[0], start=0).get("rows", ()):
            if isinstance(row[1], str):
                counts["errors"] += 1
                continue
            seen += 1
            found = row[1]
            if found[1] >> 12 == 4:
                waiting.insert(0, found)
            elif found[1] >> 12 == 8 and seen < _LOOKED_AT:
                if ask("runs", id=found[0], start=0).get("runs") is None:
                    ask("read", id=found[0], offset=0, length=1 << 20)
                ask("xattrs", id=found[0])
    return counts


def in_a_process(work: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What `work` returns in a child with the bounds of the real one, and the KiB that its peak of memory grew by."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        answer = '{"crashed": 1}'
        try:
            limit = memory_for_this_process()
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.signal(signal.SIGPROF, worker.overrun)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found = work()
            answer = json.dumps({**found, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before})
        finally:
            os.write(write, answer.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return dict(json.loads(answer))


@pytest.mark.parametrize("kind", ["ext4", "ntfs", "xfs", "xfs-dirty", "btrfs", "fat16"])
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.long)])
def test_flipped_bits_are_answered_in_time_and_within_bounds(
    kind: str,
    count: int,
    made: Callable[[str], MadeImage],
    files: Callable[..., Files],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if count < 100 and kind not in ("ext4", "ntfs"):
        count = 5
    monkeypatch.setattr(worker, "CPU_S", 1.0)
    source = files(made(kind).path)
    # The bytes that a walk through the sound image asks for: nothing else can do harm.
    touched: set[int] = set()
    honest = Disk._read

    def read(disk: Disk, offset: int, length: int) -> bytes:
        data = honest(disk, offset, length)
        touched.update(offset + at for at, byte in enumerate(data) if byte)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "_read", read)
        for _ in zip(walk(source.image().file_system(RAW)), range(_LOOKED_AT), strict=False):
            pass
    places = sorted(touched)
    draw = random.Random(2026)
    rounds = [
        {draw.choice(places): 1 << draw.randrange(8) for _ in range(draw.choice((1, 1, 4, 30)))} for _ in range(count)
    ]

    def work() -> dict[str, int]:
        total = {"wrecked": ask_all(source, dict.fromkeys(places, 0xFF))["errors"]}
        for changes in rounds:
            for key, value in ask_all(source, changes).items():
                total[key] = total.get(key, 0) + value
        return total

    found = in_a_process(work)
    assert "crashed" not in found
    assert found["answers"] > count
    # A few flipped bits may well hit nothing that is checked.
    assert found["errors"] > 0 or count < 200
    assert found["wrecked"] > 0
    assert found["exhausted"] <= max(4, count // 20)
    assert found["memory"] < 256 << 10


async def test_a_directory_that_is_its_own_ancestor_ends_where_it_begins_again(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    source = files(made("ext4").path)
    system = source.image().file_system(RAW)
    found = dict(walk(system))
    # In /deep/a/b/c the entry d becomes the root.
    inner, outer = found[b"/deep/a/b/c/d"], system.root
    runs = system.runs(found[b"/deep/a/b/c"].id)
    assert runs is not None
    (position,) = [
        run.position + at
        for run in runs
        for at in range(0, run.length - 12, 4)
        if source.fetch(0, run.position + at, 4) == inner.id[0].to_bytes(4, "little")
        and source.fetch(0, run.position + at + 8, 1) == b"d"
    ]
    honest = source.fetch

    def fetch(disk: int, offset: int, length: int) -> bytes:
        data = bytearray(honest(disk, offset, length))
        if offset <= position < offset + length:
            data[position - offset : position - offset + 4] = outer[0].to_bytes(4, "little")
        return bytes(data)

    source.fetch = fetch  # type: ignore[method-assign]
    async with look_into(source, 0, "disk.img") as image:
        accessor = ImageAccessor(image, where="disk.img")

        def count() -> int:
            total, stack = 0, [accessor.root.lookup(b"raw")]
            while stack:
                node = stack.pop()
                if isinstance(node, Directory):
                    for below in node.stream():
                        total += 1
                        stack.append(below)
            return total

        assert await trio.to_thread.run_sync(count) <= len(found)
        assert any("the directory lies in two places" in text for text in accessor.complaints)
