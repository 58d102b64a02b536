"""A line with a round trip and a rate on loopback, as to a distant server: `line.c`, compiled when it is needed."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "line.c"


@contextmanager
def line(port: int, *, round_trip_s: float, rate: float = 0) -> Iterator[int]:
    """The port of a line to 127.0.0.1:`port` while the block runs; `rate`: bytes a second each way, 0: any."""
    with tempfile.TemporaryDirectory(prefix="fleece-line-") as folder:
        program = f"{folder}/line"
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-o", program, SOURCE], check=True)
        command = [program, str(port), str(round(round_trip_s * 5e5)), str(int(rate))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield json.loads(process.stdout.readline())["port"]
            finally:
                process.kill()
