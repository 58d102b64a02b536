"""The C parser of ACLs and the Python one make the same of anything, and nothing is read that is not there."""

import errno
import subprocess
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.fuzz_acls import build, compare


def test_both_parsers_of_acls_agree_under_sanitizers(tmp_path: Path) -> None:
    try:
        program = build(tmp_path)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no compiler with sanitizers: {error}")
    assert compare(program, Random(4), 2000) == {0, errno.EINVAL}
