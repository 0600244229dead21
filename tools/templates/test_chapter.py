"""TITLE against PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbook.PART.NAME import exercises
from llmbook.PART.NAME.mechanism import running_mean


@given(st.lists(st.floats(-100, 100), min_size=0, max_size=20))
def test_equals_the_mean_of_every_prefix(values):
    x = torch.tensor(values, dtype=torch.float64)
    wanted = torch.tensor([x[: i + 1].mean() for i in range(len(values))], dtype=torch.float64)
    torch.testing.assert_close(running_mean(x), wanted)


def test_a_matrix_is_refused():
    with pytest.raises(ValueError, match="must be a vector"):
        running_mean(torch.ones(2, 2))


def test_the_solution_is_accepted():
    assert exercises.update_a_mean.verdict(lambda mean, n, value: (mean * n + value) / (n + 1))[0]


@pytest.mark.parametrize(
    "answer",
    [
        lambda mean, n, value: (mean + value) / 2,
        lambda mean, n, value: mean * n + value,
        lambda mean, n, value: (mean * n + value) / max(n, 1),
    ],
)
def test_wrong_answers_are_rejected(answer):
    assert not exercises.update_a_mean.verdict(answer)[0]
