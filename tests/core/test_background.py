"""Work in a process of its own: the caller learns that it is ready, or why it is not.

Each in a Python of its own, since one with threads must not fork.
"""

import subprocess
import sys
from pathlib import Path

from tests.support.cache import ROOT

_BEGIN = """
import os, signal, sys
from core import background
from core.background import Background
from core.errors import FleeceError, UsageError

class OurError(FleeceError):
    pass

def start(work, log=None):
    try:
        return background.start(work, Background("hold", "the thing", "fleece test", OurError, log))
    except FleeceError as error:
        print(f"{type(error).__name__}: {error}")
"""


def run(code: str, *arguments: str) -> list[str]:
    """Lines that `code` prints."""
    line = [sys.executable, "-c", _BEGIN + code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_what_it_says_when_it_is_ready_comes_back_and_it_goes_on() -> None:
    code = """
def work(ready):
    ready({"answer": [1, "\\u00e4" * 100_000]})  # more than a pipe holds
    while True:
        signal.pause()
child, value = start(work)
print(value == {"answer": [1, "\\u00e4" * 100_000]})
print(os.getsid(child) == child != os.getsid(0))
print(os.readlink(f"/proc/{child}/fd/0"))
background.end(child)
print(os.path.exists(f"/proc/{child}"))
"""
    assert run(code) == ["True", "True", "/dev/null", "False"]


def test_it_finds_what_the_caller_names_until_it_is_ready_and_then_holds_no_folder(tmp_path: Path) -> None:
    code = """
os.chdir(sys.argv[1])
def work(ready):
    ready(os.getcwd())
    signal.pause()
child, value = start(work)
print(value == sys.argv[1])
print(os.readlink(f"/proc/{child}/cwd"))
background.end(child)
"""
    assert run(code, str(tmp_path)) == ["True", "/"]


def test_errors_come_back_as_they_are_with_their_notes() -> None:
    code = """
def raising(error):
    def work(ready):
        raise error
    return work
error = FleeceError("open", "it", "it is shut", "knock")
error.add_note("nobody is at home")
start(raising(error))
start(raising(UsageError("use", "it", "nonsense")))
start(raising(ValueError(7)))
"""
    assert run(code) == [
        "OurError: cannot open it: it is shut; knock; nobody is at home",
        "UsageError: cannot use it: nonsense",
        "OurError: cannot hold the thing: ValueError: 7",
    ]


def test_an_end_before_it_is_ready_is_an_error() -> None:
    code = """
start(lambda ready: None)
start(lambda ready: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert run(code) == [
        "OurError: cannot hold the thing: it ended before it was usable",
        "OurError: cannot hold the thing: the serving process was killed",
    ]


def test_what_goes_wrong_later_is_in_the_log(tmp_path: Path) -> None:
    code = """
from pathlib import Path
def work(ready):
    ready(None)
    raise FleeceError("go", "on", "the end")
child, _ = start(work, Path(sys.argv[1]))
os.waitpid(child, 0)
start(work, Path("/no/such/log"))
"""
    said = run(code, str(tmp_path / "log"))
    assert said == ["OurError: cannot write the log /no/such/log: No such file or directory"]
    log = (tmp_path / "log").read_text()
    assert "fleece test" in log
    assert "cannot go on: the end" in log
