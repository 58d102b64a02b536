"""File archives in each change detection mode: Fleece against its limits, and against restic and borg.

    python bench/detection_modes.py [--scale 1.0] [--rounds 3] [--trees source,images] [--modes MODE,...]
                                    [--folder DIR] [--no-peers] [--output FORM]

Two trees (`trees.py`): `source`, 80 000 small files of text in 5000 folders, 1 GB, and `images`, 20 000 files of 100 to
200 KiB of noise, 3 GB. Each is backed up twice in each mode: everything is new, and nothing has changed. Everything
lies in one folder, warm: /dev/shm if there is room, else the folder for temporary files. Of files on tmpfs no extended
attributes are read, so with `--folder` on ext4 a run without changes costs a few system calls more per file.

Limits, by turns with what they limit; medians of the rounds count:

    first       a bare loop on all cores: list, open, read, find cuts, SHA-256 in batches, zstd, CRC, write (`bare.py`)
    unchanged   in mode metadata: `find -printf` of all that a stat tells

Seconds are those of the whole command and, beside them, those that the command reports, without the start of Python.
CPU seconds are those of all threads, less those of a backup of an empty folder: they hold on a busy machine too. Peers:
restic (repository version 2), borg (zstd 1, no encryption); `read again` is without their lists of unchanged files. At
the end the scan for cuts (`chunker.py`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.image_backup import FLEECE, Run, measured  # noqa: E402
from bench.trees import Tree, image_tree, source_tree  # noqa: E402
from core.limits import cpu_count  # noqa: E402
from core.units import format_size  # noqa: E402

MODES: Final = ("legacy", "data", "metadata")
#: Bytes of each tree at scale 1, and of what is stored of it; twice, for the bare loop.
SPACE: Final = {"source": 2 << 30, "images": 10 << 30}
#: Of the limit's rate.
GOALS: Final = {"first": 0.7, "unchanged": 0.5}
FORMAT: Final = "%p %s %m %U %G %T@ %i %n %l\\n"


@dataclass
class Sample:
    """One run."""

    seconds: float  #: of the whole command
    inside: float  #: as the program itself says
    cpu: float  #: of all threads; of ours without a start
    rss_mib: int = 0


@dataclass
class Row:
    """One piece of work, with what limits it."""

    name: str
    tree: Tree
    goal: float | None = None
    samples: list[Sample] = field(default_factory=list)
    limit: list[Sample] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)

    def seconds(self, what: str = "seconds") -> float:
        return float(statistics.median(getattr(sample, what) for sample in self.samples))

    def ratio(self, what: str) -> float | None:
        """The limit's seconds by ours: pairs were measured one after the other."""
        limited = "cpu" if what == "cpu" else "inside"
        pairs = [
            getattr(limit, limited) / getattr(sample, what)
            for sample, limit in zip(self.samples, self.limit, strict=False)
        ]
        return round(statistics.median(pairs), 2) if pairs else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "files-per-s": round(self.tree.files / self.seconds()),
            "mb-per-s": round(self.tree.size / self.seconds() / 1e6, 1),
            "seconds": round(self.seconds(), 3),
            "seconds-inside": round(self.seconds("inside"), 3),
            "cpu-seconds": round(self.seconds("cpu"), 3),
            "limit-seconds": round(statistics.median(one.inside for one in self.limit), 3) if self.limit else None,
            "ratio": self.ratio("seconds"),
            "ratio-inside": self.ratio("inside"),
            "ratio-cpu": self.ratio("cpu"),
            "goal": self.goal,
            "rss-mib": max(sample.rss_mib for sample in self.samples),
            **self.figures,
        }


class Bench:
    """The folder with everything in it, and the results."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.store = folder / "store"
        self.rows: dict[str, Row] = {}
        self._number = 0
        self._start_cpu = 0.0
        # Not by the command, which would enter the store into this host's list.
        measured([sys.executable, str(ROOT / "bench/image_backup.py"), "--worker", "create", str(self.store), "-", "-"])

    def row(self, name: str, tree: Tree, goal: float | None = None) -> Row:
        return self.rows.setdefault(name, Row(name, tree, goal))

    def note(self, row: Row, sample: Sample, *, limit: bool = False) -> None:
        (row.limit if limit else row.samples).append(sample)
        self.say(
            f"  {row.name + (' (limit)' if limit else ''):<36}{sample.seconds:8.3f} s, inside {sample.inside:7.3f} s, "
            f"CPU {sample.cpu:7.3f} s, {sample.rss_mib} MiB"
        )

    def round(self, kind: str, tree: Tree, modes: Sequence[str], *, peers: bool) -> None:
        """Every mode once."""
        empty = Tree(self.folder / "empty", 0, 1, 0)
        empty.path.mkdir(exist_ok=True)
        self._start_cpu = 0.0
        row = self.row("empty folder", empty)
        for _ in range(2):
            self._back_up(row, empty, "data")
        # The least of all: what is taken off must not be the noise of a busy machine.
        self._start_cpu = min(sample.cpu for sample in row.samples)
        for mode in modes:
            self._empty_store()
            self._number += 1
            row = self.row(f"{kind}, {mode}, first", tree, GOALS["first"])
            self.note(row, self._bare(tree), limit=True)
            self._back_up(row, tree, mode)
            goal = GOALS["unchanged"] if mode == "metadata" else None
            row = self.row(f"{kind}, {mode}, unchanged", tree, goal)
            if goal is not None:
                self.note(row, find(tree), limit=True)
            self._back_up(row, tree, mode)
        if peers and shutil.which("restic"):
            self._restic(kind, tree)
        if peers and shutil.which("borg"):
            self._borg(kind, tree)

    def _bare(self, tree: Tree) -> Sample:
        target = self.folder / "bare"
        run = measured([sys.executable, str(ROOT / "bench/bare.py"), "tree", str(tree.path), str(target)])
        shutil.rmtree(target)
        told = json.loads(run.output)
        return Sample(run.seconds, told["seconds"], told["cpu"], told["rss-mib"])

    def _back_up(self, row: Row, tree: Tree, mode: str) -> None:
        line = ["backup", f"{tree.path.name}.pxar:{tree.path}", "--backup-id", f"bench{self._number}"]
        line += ["--change-detection-mode", mode, "--output", "json"]
        # Snapshots have whole seconds: the wait for the next one is not measured.
        time.sleep(1.05 - time.time() % 1)
        run = measured([FLEECE, "--repo", str(self.store), *line])
        told = json.loads(run.output)
        if told["warnings"] or told["file-archives"][0]["files"] != tree.files:
            raise SystemExit(f"{row.name}: {run.output}")
        archives, folder = told["archives"], told["file-archives"][0]
        row.figures = {
            "chunks": sum(one["chunks"] for one in archives),
            "chunks-new": sum(one["chunks-new"] for one in archives),
            "chunks-injected": folder["chunks-injected"],
            "bytes-new": sum(one["new"] for one in archives),
            "bytes-stored": sum(one["stored"] for one in archives),
        }
        self.note(row, Sample(run.seconds, told["duration-s"], run.cpu_s - self._start_cpu, run.rss_mib))

    def _empty_store(self) -> None:
        shutil.rmtree(self.store / "host", ignore_errors=True)
        for folder in os.scandir(self.store / ".chunks"):
            for chunk in os.scandir(folder.path):
                Path(chunk.path).unlink()

    # --- peers -------------------------------------------------------------------------------------------------------

    def _restic(self, kind: str, tree: Tree) -> None:
        repository, cache = self.folder / "restic", self.folder / "restic-cache"
        environment = {"RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": str(repository), "RESTIC_CACHE_DIR": str(cache)}
        measured(["restic", "init", "--repository-version", "2"], environment)
        back_up = ["restic", "backup", str(tree.path)]
        for phase, more in (("first", []), ("unchanged", []), ("read again", ["--force"])):
            self._peer(f"{kind}, restic, {phase}", tree, measured([*back_up, *more], environment))
        shutil.rmtree(repository)
        shutil.rmtree(cache)

    def _borg(self, kind: str, tree: Tree) -> None:
        repository, base = self.folder / "borg", self.folder / "borg-base"
        environment = {"BORG_REPO": str(repository), "BORG_BASE_DIR": str(base)}
        environment["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
        measured(["borg", "init", "-e", "none"], environment)
        for phase, more in (("first", []), ("unchanged", []), ("read again", ["--files-cache", "disabled"])):
            line = ["borg", "create", "-C", "zstd,1", *more, f"::{phase.replace(' ', '-')}", str(tree.path)]
            self._peer(f"{kind}, borg, {phase}", tree, measured(line, environment))
        shutil.rmtree(repository)
        shutil.rmtree(base)

    def _peer(self, name: str, tree: Tree, run: Run) -> None:
        self.note(self.row(name, tree), Sample(run.seconds, run.seconds, run.cpu_s, run.rss_mib))


def find(tree: Tree) -> Sample:
    """What listing a tree with all that `stat` tells takes."""
    started = time.perf_counter()
    process = subprocess.Popen(["find", tree.path, "-printf", FORMAT], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("find failed")
    return Sample(seconds, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10)


# --- output ----------------------------------------------------------------------------------------------------------


def cuts() -> list[dict[str, Any]]:
    """What finding cuts costs."""
    line = [sys.executable, str(ROOT / "bench/chunker.py"), "--rounds", "3", "--output", "json"]
    found: list[dict[str, Any]] = json.loads(measured(line).output)["results"]
    return found


def result(bench: Bench, trees: dict[str, Tree], rounds: int) -> dict[str, Any]:
    return {
        "cores": cpu_count(),
        "file-system": file_system(bench.folder),
        "rounds": rounds,
        "load": [round(load, 2) for load in os.getloadavg()],
        "trees": {
            kind: {"files": tree.files, "folders": tree.folders, "size": tree.size} for kind, tree in trees.items()
        },
        "rows": [row.to_json() for row in bench.rows.values()],
        "cuts": cuts(),
    }


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"{document['cores']} cores, {document['file-system']}, medians of {document['rounds']} rounds, load "
        f"{document['load'][0]} at the end.",
        "",
        *(
            f"{kind}: {tree['files']} files in {tree['folders']} folders, {format_size(tree['size'])}."
            for kind, tree in document["trees"].items()
        ),
        "",
        "| work | files/s | MB/s | command | inside | CPU | limit | ratio inside (command) | of CPU | goal "
        "| chunks reused, injected | memory, MiB |",
        f"|{'---|' * 12}",
    ]
    for row in document["rows"]:
        chunks = "-"
        if "chunks" in row:
            chunks = f"{row['chunks'] - row['chunks-new']} of {row['chunks']}, {row['chunks-injected']}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio-inside']} ({row['ratio']})"
        limit = "-" if row["limit-seconds"] is None else f"{row['limit-seconds']} s"
        lines.append(
            f"| {row['name']} | {row['files-per-s']} | {row['mb-per-s']} | {row['seconds']} s "
            f"| {row['seconds-inside']} s | {row['cpu-seconds']} s | {limit} | {ratio} | {row['ratio-cpu'] or '-'} "
            f"| {row['goal'] or '-'} | {chunks} | {row['rss-mib']} |"
        )
    lines += ["", "| finding cuts | MB/s | cycles per byte |", "|---|---|---|"]
    for row in document["cuts"]:
        cycles = row["cycles_per_byte"]
        lines.append(f"| {row['work']} | {row['rate'] / 1e6:.0f} | {'-' if cycles is None else f'{cycles:.2f}'} |")
    return "\n".join(lines)


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`."""
    run = subprocess.run(["stat", "-f", "-c", "%T", path], stdout=subprocess.PIPE, check=True, text=True)
    return run.stdout.strip()


def choose_folder(space: float) -> Path:
    memory = Path("/dev/shm")
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > space
    return Path(tempfile.mkdtemp(prefix="fleece-bench-", dir=memory if fits else None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the trees' numbers of files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trees", default="source,images", help="some of these, in this order")
    parser.add_argument("--modes", default=",".join(MODES), help="some of these, in this order")
    parser.add_argument("--folder", type=Path, help="an empty folder for everything, kept")
    parser.add_argument("--no-peers", action="store_true", help="without restic and borg")
    parser.add_argument("--output", choices=["text", "markdown", "json"], default="text")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stdout if arguments.output == "text" else sys.stderr, flush=True)

    kinds = arguments.trees.split(",")
    folder = arguments.folder or choose_folder(sum(SPACE[kind] for kind in kinds) * arguments.scale)
    try:
        bench = Bench(folder, say)
        trees = {}
        for kind in kinds:
            make = {"source": source_tree, "images": image_tree}[kind]
            trees[kind] = tree = make(folder / kind, arguments.scale)
            say(f"{kind}: {tree.files} files in {tree.folders} folders, {format_size(tree.size)}, in {folder}")
        for _ in range(max(1, arguments.rounds)):
            for kind, tree in trees.items():
                bench.round(kind, tree, arguments.modes.split(","), peers=not arguments.no_peers)
        document = result(bench, trees, max(1, arguments.rounds))
        print(json.dumps(document, indent=2) if arguments.output == "json" else f"\n{markdown(document)}")
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
