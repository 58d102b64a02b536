"""`fleece` of a worker: single calls are done by the warm command of the test process, all others as ever.

    relay.py SOCKET FLEECE ARGUMENTS...

Only the standard library, and without `site`, since it is started very often.
"""

import json
import os
import socket
import sys


def main() -> None:
    """Hand the call over and end as it does."""
    path, fleece, *arguments = sys.argv[1:]
    if arguments[:2] != ["provider", "call"]:
        os.execv(fleece, [fleece, *arguments])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        request = {"arguments": arguments, "stdin": sys.stdin.read(), "environment": dict(os.environ)}
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as file:
            answer = json.loads(file.read())
    sys.stdout.write(answer["stdout"])
    sys.stderr.write(answer["stderr"])
    raise SystemExit(answer["code"])


if __name__ == "__main__":
    main()
