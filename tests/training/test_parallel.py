"""What is computed over all ranks, against one process and the whole batch."""

import numpy as np
import pytest
import torch
from ranks import in_ranks

from vitface.errors import ConfigError, DataError
from vitface.model.margin import MarginLoss, make_margin
from vitface.model.router import load_balance_loss
from vitface.training.ranks.parallel import gather_rows, in_turns, mean_over_ranks, synchronise_batch_norms
from vitface.training.ranks.process_group import (
    agree,
    all_gather,
    barrier,
    broadcast,
    check_same,
    process_group,
    rank,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def all_well(world, act):
    def inside(number):
        with process_group("cpu", 60):
            act(number)

    assert in_ranks(world, inside) == [0] * world


def part_of(batch, number, world):
    size = len(batch) // world
    return batch[number * size : (number + 1) * size]


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_over_ranks_is_that_of_the_whole_batch(world):
    """In float64: outputs, running statistics and, after the average that DDP takes, every gradient."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(12, 5, generator=generator, dtype=torch.float64) + 1
    weights = torch.randn(12, 5, generator=generator, dtype=torch.float64)  # of the loss

    def run(norm, x, weights):
        x = x.clone().requires_grad_()
        for _ in range(2):
            out = norm(x)
        (out * weights).sum(1).mean().backward()
        return out.detach(), x.grad, norm

    alone = run(torch.nn.BatchNorm1d(5).double(), x, weights)

    def act(number):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(5).double())
        before = model[0].weight
        synchronise_batch_norms(model)
        assert model[0].weight is before and list(model.state_dict()) == [f"0.{name}" for name in alone[2].state_dict()]
        out, d_x, norm = run(model[0], part_of(x, number, world), part_of(weights, number, world))
        torch.testing.assert_close(out, part_of(alone[0], number, world))
        torch.testing.assert_close(d_x / world, part_of(alone[1], number, world))
        for (name, got), want in zip(norm.named_parameters(), alone[2].parameters(), strict=True):
            torch.testing.assert_close(mean_over_ranks(got.grad), want.grad, msg=name)
        for got, want in zip(norm.buffers(), alone[2].buffers(), strict=True):
            torch.testing.assert_close(got, want)
        norm.eval()
        assert torch.equal(norm(x), torch.nn.BatchNorm1d.forward(norm, x))

    all_well(world, act)


def test_load_balance_and_adaface_see_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(12, 3, generator=generator, dtype=torch.float64).softmax(1)
    whole = weights.clone().requires_grad_()
    expected = load_balance_loss(whole)
    expected.backward()
    embedding, labels = 9 * torch.randn(12, 4, generator=generator), torch.arange(12) % 5
    margin = MarginLoss(make_margin("adaface", 0.35), 5, 4, 64.0)
    margin(embedding, labels)

    def act(number):
        mine = part_of(weights, number, 3).clone().requires_grad_()
        loss = load_balance_loss(mine, mean_over_ranks)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(mine.grad / 3, part_of(whole.grad, number, 3))
        own = MarginLoss(make_margin("adaface", 0.35, gather_rows), 5, 4, 64.0)
        own(part_of(embedding, number, 3), part_of(labels, number, 3))
        for got, want in zip(own.buffers(), margin.buffers(), strict=True):
            assert torch.equal(got, want)

    all_well(3, act)


@pytest.mark.parametrize("turns", [1, 2, 7])
def test_rows_do_not_depend_on_how_many_ranks_take_turns(turns):
    def work(turns):
        for turn in turns:
            assert turn % 3 == rank()
            yield np.full((turn + 1, 2), turn, np.float32)

    expected = np.concatenate([np.full((turn + 1, 2), turn, np.float32) for turn in range(turns)])

    def act(number):
        assert np.array_equal(in_turns(work, turns), expected)

    all_well(3, act)
    assert np.array_equal(
        in_turns(lambda numbers: (np.full((turn + 1, 2), turn, np.float32) for turn in numbers), turns), expected
    )


def test_work_that_fails_in_one_turn_fails_on_all_ranks():
    def work(turns):
        for turn in turns:
            if turn == 1:
                raise DataError("image 7 is damaged")
            yield np.zeros((1, 2), np.float32)

    def act(number):
        with pytest.raises(DataError, match="image 7 is damaged"):
            in_turns(work, 4)
        assert in_turns(lambda turns: (np.ones((1, 1), np.float32) for _ in turns), 2).tolist() == [
            [1],
            [1],
        ]  # nobody is left waiting

    all_well(2, act)


def test_messages():
    def act(number):
        assert all_gather({"rank": number, "text": "é" * number}) == [{"rank": k, "text": "é" * k} for k in range(3)]
        assert broadcast(f"from {number}") == "from 0" and broadcast([number, None], source=2) == [2, None]
        assert agree(number == 1, [number, 0.5]) == (True, [1.0, 0.5])
        assert agree(False, []) == (False, [])
        barrier("here")
        check_same({"lr": 0.1, "data": "x"})
        with pytest.raises(ConfigError, match="rank 2 has other data than rank 0: z+ instead of x; every rank"):
            check_same({"lr": 0.1, "data": "z" * 99 if number == 2 else "x"})

    all_well(3, act)
    assert all_gather(1) == [1] and broadcast("alone") == "alone" and agree(True, [0.1]) == (True, [0.1])


def test_one_group_after_another():
    def act(number):
        for size in (3, 2):
            with process_group("cpu", 60):
                assert all_gather(number * size) == [0, size]

    assert in_ranks(2, act) == [0, 0]
