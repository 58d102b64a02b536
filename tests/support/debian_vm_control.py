"""Runs inside the Debian VM (`debian_vm.py`): obeys requests that come over a virtio port, many at a time.

One JSON object a line, both ways. A request has an `id`, and its answer has the same:

    {"run": SHELL LINE, "input": BASE64}         {"code": n, "out": BASE64, "err": BASE64}
    {"write": PATH, "mode": n, "data": BASE64, "append": bool}       {}
    {"read": PATH, "offset": n}                  {"data": BASE64}, at most `PIECE` bytes, none at the end

What cannot be done gives `{"error": TEXT}`. The first line, after each boot, is `{"ready": BOOT ID}`. Needs nothing but
the standard library, since the VM has Debian's Python alone.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

PORT = "/dev/virtio-ports/fleece.control"
#: Bytes of a file in one answer.
PIECE = 1 << 20


def obey(request: dict[str, Any]) -> dict[str, Any]:
    """What one request gives."""
    if "run" in request:
        # Files, not pipes: what the line leaves running in the background would keep a pipe open.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
            given.write(base64.b64decode(request.get("input", "")))
            given.seek(0)
            line = ["/bin/bash", "-c", request["run"]]
            done = subprocess.run(line, stdin=given, stdout=out, stderr=err, cwd="/root", start_new_session=True)
            out.seek(0)
            err.seek(0)
            return {"code": done.returncode, "out": encoded(out.read()), "err": encoded(err.read())}
    if "write" in request:
        path = Path(request["write"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab" if request["append"] else "wb") as file:
            file.write(base64.b64decode(request["data"]))
        path.chmod(request["mode"])
        return {}
    with Path(request["read"]).open("rb") as file:
        file.seek(request["offset"])
        return {"data": encoded(file.read(PIECE))}


def encoded(data: bytes) -> str:
    """Base64 as text."""
    return base64.b64encode(data).decode()


def main() -> None:
    """Obey until the VM ends."""
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        with lock:
            while data:
                data = data[os.write(port, data) :]

    def answer(request: dict[str, Any]) -> None:
        try:
            given = obey(request)
        except Exception as error:
            given = {"error": f"{type(error).__name__}: {error}"}
        say({"id": request["id"], **given})

    say({"ready": Path("/proc/sys/kernel/random/boot_id").read_text().strip()})
    parts: list[bytes] = []
    while True:
        data = os.read(port, 1 << 20)
        if not data:
            sys.exit("the other side hung up")
        parts.append(data)
        if b"\n" in data:  # a page comes at a time: lines are put together once
            *lines, rest = b"".join(parts).split(b"\n")
            parts = [rest]
            for line in lines:
                threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    main()
