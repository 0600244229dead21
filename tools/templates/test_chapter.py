"""TITLE against PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbook.PART.NAME import exercises
from llmbook.PART.NAME.mechanism import running_mean
from tests.checkers import checker_tests


@given(st.lists(st.floats(-100, 100), min_size=0, max_size=20))
def test_equals_the_mean_of_every_prefix(values):
    x = torch.tensor(values, dtype=torch.float64)
    wanted = torch.tensor([x[: i + 1].mean() for i in range(len(values))], dtype=torch.float64)
    torch.testing.assert_close(running_mean(x), wanted)


def test_a_matrix_is_refused():
    with pytest.raises(ValueError, match="must be a vector"):
        running_mean(torch.ones(2, 2))


SOLUTIONS = {"update_a_mean": lambda mean, n, value: (mean * n + value) / (n + 1)}
WRONG = {
    "update_a_mean": [
        (lambda mean, n, value: (mean + value) / 2, "but you gave"),
        (lambda mean, n, value: mean * n + value, "but you gave"),
        (lambda mean, n, value: (mean * n + value) / max(n, 1), "but you gave"),
    ],
}
test_the_solution_is_accepted, test_a_wrong_answer_is_told_why = checker_tests(exercises, SOLUTIONS, WRONG)
