"""The C parser of ACLs and the Python one make the same of anything, and nothing is read that is not there."""

import errno
import subprocess
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.fuzz_acls import build, compare


def have_sanitizers(folder: Path) -> bool:
    """Whether an empty program can be built with them: only then does a parser that cannot be built mean anything."""
    line = ["gcc", "-fsanitize=address,undefined", "-x", "c", "-", "-o", str(folder / "nothing")]
    try:
        done = subprocess.run(line, input=b"int main(void){return 0;}", capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def test_both_parsers_of_acls_agree_under_sanitizers(tmp_path: Path) -> None:
    if not have_sanitizers(tmp_path):
        pytest.skip("this host has no compiler with address and UB sanitizers, which are what the test looks with")
    program = build(tmp_path)
    assert compare(program, Random(4), 2000) == {0, errno.EINVAL}
