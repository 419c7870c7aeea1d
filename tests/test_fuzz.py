"""A few of the fuzzer's cases; `python tests/fuzz.py --cases 1000` tries more."""

from collections import Counter

import pytest
import torch

from tests.fuzz import KINDS, outcome

CASES = {
    "genotype_text": 200,
    "genotype_file": 100,
    "checkpoint": 10,
    "config_value": 24,
    "image_folder": 30,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_ends_in_a_clear_error_or_a_right_answer(kind: str) -> None:
    threads = torch.get_num_threads()
    try:
        outcomes = Counter(outcome(kind, 0, number) for number in range(CASES[kind]))
    finally:
        torch.set_num_threads(threads)
    assert outcomes["clear error"] > 0
    if kind != "config_value":  # of which few are right
        assert outcomes["answer"] > 0  # or the fuzzer would spoil too much
