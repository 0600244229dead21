"""Dropout on real processes: replicas agree, shards differ, and together they are the model of one device."""

import pytest
import torch

from llmbook.foundations.dropout.masks import dropout
from llmbook.foundations.dropout.philox import Stream
from llmbook.foundations.dropout.tensor_parallel import Streams, megatron_streams, parallel_mlp, sum_over_ranks
from llmbook.kit import ranks

N, D, H, P = 9, 5, 12, 0.3


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    shapes = ((N, D), (D, H), (H, D), (D,))
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def one_rank(comm, streams_of, p):
    x, A, B, c = weights()
    mine = slice(comm.rank * H // comm.size, (comm.rank + 1) * H // comm.size)
    params = [t.clone().requires_grad_() for t in (A[:, mine], B[mine], c)]
    out = parallel_mlp(comm, x, *params, p, streams_of(3, comm.rank))
    return out.detach(), torch.autograd.grad(out.square().sum(), params)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("p", [0.0, P, 1.0])
def test_the_ranks_together_are_one_device(count, p):
    results = ranks.run(one_rank, count, megatron_streams, p).results
    x, *params = (t.requires_grad_() for t in weights())
    parts = torch.relu(x @ params[0]).chunk(count, 1)
    hidden = [dropout(part, p, Stream(3 + 2718 + rank)) for rank, part in enumerate(parts)]
    out = x + dropout(torch.cat(hidden, 1) @ params[1] + params[2], p, Stream(3))
    wanted = torch.autograd.grad(out.square().sum(), params)
    found = [torch.cat([r[1][0] for r in results], 1), torch.cat([r[1][1] for r in results]), results[0][1][2]]
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-12, rtol=1e-12)
    for result in results:
        torch.testing.assert_close(result[0], out.detach(), atol=1e-12, rtol=1e-12)
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1][2], results[0][1][2])


def test_different_streams_make_replicas_differ():
    def wrong(seed, rank):
        return Streams(Stream(seed + rank), Stream(seed + 2718 + rank))

    first, second = ranks.run(one_rank, 2, wrong, P).results
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1][2], second[1][2])


def test_megatrons_streams_agree_where_they_should_and_nowhere_else():
    streams = [megatron_streams(5, rank) for rank in range(8)]
    assert {s.replicated.seed for s in streams} == {5}
    assert sorted(s.sharded.seed for s in streams) == list(range(5 + 2718, 5 + 2726))


def summed(comm):
    part = torch.full((3,), 10.0**comm.rank, dtype=torch.float64, requires_grad=True)
    total = sum_over_ranks(comm, part)
    total.sum().backward()
    return total.detach(), part.grad


def test_the_sum_is_every_ranks_and_its_gradient_the_identity():
    run = ranks.run(summed, 4)
    for total, grad in run.results:
        assert total.tolist() == [1111.0] * 3
        assert grad.tolist() == [1.0] * 3
    assert run.bytes_sent() == [3 * 3 * 8] * 4


def test_dropout_sends_nothing():
    with_it, without = (ranks.run(one_rank, 3, megatron_streams, p).bytes_sent() for p in (P, 0.0))
    assert with_it == without == [2 * N * D * 8] * 3
