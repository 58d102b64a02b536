"""What the fuzzers have found worth keeping is tried again, and a little beyond it."""

from random import Random

import pytest

from tests.fuzz.fuzz_archives import CORPUS, changed, seeds
from tests.fuzz.targets import TARGETS, outcome


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_inputs_of_the_corpus_end_in_many_ways(target: str) -> None:
    outcomes = {outcome(target, path.read_bytes()) for path in (CORPUS / target).iterdir()}
    assert len(outcomes) >= {"metadata": 7, "patterns": 3}.get(target, 20)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_is_near_the_corpus_is_accepted_or_refused(target: str) -> None:
    random = Random(target)
    inputs = seeds(target) + [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert {outcome(target, data) for data in seeds(target)} == {"accepted"}
    for _ in range(300 if target == "patterns" else 1000):
        outcome(target, changed(random.choice(inputs), inputs, random))
