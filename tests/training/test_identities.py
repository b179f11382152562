"""The sharded margin head against the whole one: loss, gradients, sampling, memory, checkpoints."""

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import in_ranks
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from vitface.errors import CheckpointError
from vitface.model.margin import MarginLoss, make_margin
from vitface.training.ranks import identities
from vitface.training.ranks.identities import ShardedMargin, class_range, initial_rows
from vitface.training.ranks.parallel import Shard, clip_gradients
from vitface.training.ranks.process_group import process_group, rank, world_size
from vitface.training.runs.checkpoint import save_checkpoint, verify_step
from vitface.training.runs.state import start_moments

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
DIM, SCALE = 16, 64.0


def batch(num_identities, images=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embedding = 3 * torch.randn(images, DIM, generator=generator)
    return embedding, torch.randint(num_identities, (images,), generator=generator)


def whole(kind, num_identities, embedding, labels):
    """(loss, gradient of the embedding, gradient of the prototypes, buffers) of the whole head in one process."""
    loss_of, embedding = (
        MarginLoss(make_margin(kind, 0.35), num_identities, DIM, SCALE, seed=1),
        embedding.clone().requires_grad_(),
    )
    with torch.no_grad():
        loss_of.weight[0] = 0.0  # its gradient is bounded, and the same
    loss = loss_of(embedding, labels)
    loss.backward()
    return loss, embedding.grad, loss_of.weight.grad, dict(loss_of.named_buffers())


def close(got, want, whole=None):
    """To 1e-6 of the norm of what `want` is, or is a part of."""
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-6 * (want if whole is None else whole).norm()


@pytest.mark.parametrize("kind", ["cosface", "arcface", "adaface"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_loss_and_gradients_of_the_whole_head(kind, world, monkeypatch):
    """C = 7 is no multiple of any, C = 2 is fewer classes than ranks, C = 500 takes several chunks."""
    monkeypatch.setattr(identities, "CHUNK", 48)

    def act(number):
        with process_group("cpu", 60):
            assert (rank(), world_size()) == (number, world)
            for people in (7, 2, 500):
                embedding, labels = batch(people)
                loss, d_embedding, d_weight, buffers = whole(kind, people, embedding, labels)
                head = ShardedMargin(make_margin(kind, 0.35), people, DIM, SCALE, seed=1)
                if head.first == 0 and head.end:
                    head.weight.data[0] = 0.0
                mine = slice(number * 12 // world, (number + 1) * 12 // world)
                part = embedding[mine].clone().requires_grad_()
                got = head(part, labels[mine])
                got.backward()
                close(got.detach(), loss.detach())
                close(part.grad / world, d_embedding[mine], d_embedding)  # DDP divides by the number of ranks
                close(head.weight.grad, d_weight[head.first : head.end], d_weight)
                for name, buffer in head.named_buffers():
                    close(buffer, buffers[name])

    act(0) if world == 1 else _all_well(world, act)


def _all_well(world, act):
    assert in_ranks(world, act) == [0] * world


@given(st.integers(0, 50), st.integers(1, 9))
def test_ranges_cover_each_class_once(people, world):
    ranges = [class_range(people, number, world) for number in range(world)]
    assert list(itertools.chain(*(range(*each) for each in ranges))) == list(range(people))
    sizes = [end - first for first, end in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_gradients_in_float64(monkeypatch):
    monkeypatch.setattr(identities, "CHUNK", 2)
    unit = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1).requires_grad_()
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    columns = torch.tensor([4, -1, 0])

    def log_of_sum(unit, weight):
        peak, total, own = identities._Columns.apply(unit, weight, columns, 8.0)
        return peak + total.log(), own

    assert torch.autograd.gradcheck(log_of_sum, (unit, weight))


def test_a_row_without_other_classes_has_a_loss_and_gradients():
    head = ShardedMargin(make_margin("cosface", 0.35), 1, DIM, SCALE)
    embedding = torch.randn(2, DIM, requires_grad=True)
    loss = head(embedding, torch.zeros(2, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and not embedding.grad.any() and not head.weight.grad.any()


def test_it_starts_with_the_matrix_of_the_whole_head(monkeypatch):
    expected = MarginLoss(make_margin("cosface", 0.35), 1000, DIM, SCALE, seed=3).weight.data
    for block in (64, 1 << 16):
        monkeypatch.setattr(identities, "BLOCK", block)
        for first, end in ((0, 1000), (0, 0), (63, 65), (333, 666), (999, 1000)):
            assert torch.equal(initial_rows(1000, DIM, 3, first, end), expected[first:end])


def test_the_norm_of_a_gradient_in_shards_is_that_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 3, generator=generator), torch.randn(6, 3, generator=generator)]

    def act(number):
        with process_group("cpu", 60):
            replicated = torch.nn.Parameter(torch.zeros(4, 3))
            shard = Shard(torch.zeros(3, 3))
            replicated.grad, shard.grad = gradients[0].clone(), gradients[1][3 * number : 3 * number + 3].clone()
            norm = clip_gradients([replicated, shard], 1.0)
            expected = torch.cat(gradients).norm()
            close(norm, expected)
            close(replicated.grad, gradients[0] / expected)
            close(shard.grad, gradients[1][3 * number : 3 * number + 3] / expected)

    _all_well(2, act)


def sampled_step(head, optimizer, step, labels, embedding):
    head.draw(step, labels.numpy(), optimizer)
    mine = slice(rank() * len(labels) // world_size(), (rank() + 1) * len(labels) // world_size())
    loss = head(embedding[mine], labels[mine])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    drawn = head.drawn + head.first
    head.put_back(optimizer)
    return loss.item(), drawn.tolist()


def test_sampling_draws_the_same_people_for_any_number_of_ranks_and_leaves_the_others():
    people, rate = 400, 0.1
    embedding, labels = batch(people)

    def train(steps):
        head = ShardedMargin(make_margin("cosface", 0.35), people, DIM, SCALE, seed=2, sample_rate=rate)
        optimizer = torch.optim.AdamW([head.weight], lr=0.1, fused=True)
        before, losses, drawn = head.get_buffer("all_weight").clone(), [], []
        for step in range(steps):
            loss, classes = sampled_step(head, optimizer, step, labels, embedding)
            losses.append(loss)
            drawn.append(classes)
        seen = np.unique(np.concatenate(drawn)).astype(int) - head.first
        rest = np.setdiff1d(np.arange(head.end - head.first), seen)
        rows = head.rows(optimizer)
        assert torch.equal(rows["weight"][rest], before[rest]) and not rows["exp_avg"][rest].any()
        assert not torch.equal(rows["weight"][seen], before[seen])
        return head, rows, losses, drawn

    _, rows, losses, drawn = train(4)
    for classes in drawn:
        assert set(labels.tolist()) <= set(classes)
        assert 20 <= len(classes) <= 90  # 40 and the 12 people of the step
    assert drawn[0] != drawn[1]

    def act(number):
        with process_group("cpu", 60):
            mine, own_rows, own_losses, own_drawn = train(4)
            assert own_losses == pytest.approx(losses, rel=1e-6)
            for everyone, own in zip(drawn, own_drawn, strict=True):
                assert own == [label for label in everyone if mine.first <= label < mine.end]
            torch.testing.assert_close(own_rows["weight"], rows["weight"][mine.first : mine.end], rtol=0, atol=1e-4)

    _all_well(3, act)


def test_a_sampled_step_is_adamw_on_the_drawn_rows():
    """Every class drawn in every step (rate close to one): the same as no sampling."""
    embedding, labels = batch(30)
    ends = []
    for rate in (1.0, 1 - 1e-12):
        head = ShardedMargin(make_margin("arcface", 0.35), 30, DIM, SCALE, sample_rate=rate)
        optimizer = torch.optim.AdamW([head.weight], lr=0.1, weight_decay=0.05, fused=True)
        for step in range(5):
            head.draw(step, labels.numpy(), optimizer)
            head(embedding, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            head.put_back(optimizer)
        ends.append(head.rows(optimizer))
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name])


def peak_bytes(loss_of, embedding, labels):
    """The most that a forward and backward pass holds at a time, beyond what is there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss_of(embedding, labels).backward()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("people", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_the_chunked_head_needs_an_eighth_of_the_temporaries(people):
    generator = torch.Generator().manual_seed(0)
    embedding, labels = torch.randn(128, 512, generator=generator), torch.arange(128)
    peaks = {}
    for kind in (MarginLoss, ShardedMargin):
        head = kind(make_margin("cosface", 0.35), people, 512, SCALE)
        leaf = embedding.clone().requires_grad_()
        gradients = head.weight.nbytes + leaf.nbytes
        peaks[kind] = peak_bytes(head, leaf, labels) - gradients
    print(f"temporaries at {people:,} identities: {', '.join(f'{size / 1e6:.1f} MB' for size in peaks.values())}")
    if people == 100_000:  # 5,000 are two and a half chunks
        assert peaks[ShardedMargin] <= peaks[MarginLoss] / 8
    assert peaks[ShardedMargin] < 40e6


MILLION = """
import resource, numpy as np, torch
from vitface.model.margin import CosFace
from vitface.training.ranks.identities import ShardedMargin
torch.set_num_threads(1)
head = ShardedMargin(CosFace(0.35), 1_000_000, 512, 64.0, sample_rate=0.1)
optimizer = torch.optim.AdamW([head.weight], lr=5e-3, weight_decay=0.05, fused=True)
generator, losses = torch.Generator().manual_seed(0), []
embedding = torch.randn(128, 512, generator=generator)
labels = torch.randint(1_000_000, (128,), generator=generator)
for step in range(5):
    head.draw(step, labels.numpy(), optimizer)
    loss = head(embedding, labels)
    loss.backward()
    losses.append(loss.item())
    del loss
    optimizer.step()
    optimizer.zero_grad()
    head.put_back(optimizer)
assert losses[-1] < losses[0], losses
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, *losses)
"""


@pytest.mark.slow
def test_a_million_identities_train_in_bounded_memory():
    """Three matrices of a million rows are 6.1 GB; a step on a tenth of them adds its gradient, moments and chunks."""
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    gigabytes = float(done.stdout.split()[0])
    print(f"1,000,000 identities at rate 0.1: {gigabytes:.2f} GB at most, losses {done.stdout.split()[1:]}")
    assert gigabytes < 9


def trained_head(people, rate):
    head = ShardedMargin(make_margin("adaface", 0.35), people, DIM, SCALE, seed=5, sample_rate=rate)
    optimizer = torch.optim.AdamW([head.weight], lr=0.1)
    embedding, labels = batch(people)
    for step in range(3):
        mine = slice(rank() * 12 // world_size(), (rank() + 1) * 12 // world_size())
        head.draw(step, labels.numpy(), optimizer)
        head(embedding[mine], labels[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
        head.put_back(optimizer)
    return head, optimizer


def write(run_dir, step, head, optimizer):
    files = identities.identity_files(head, optimizer)
    if rank() == 0:
        save_checkpoint(run_dir, step, {}, {}, {}, {}, False, files)
    for _ in files:
        pass


def contents(run_dir, step):
    folder = run_dir / "checkpoints" / f"step-{step}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("identities-*")}


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("people", [7, 50])
def test_a_checkpoint_holds_ranges_of_classes_and_loads_at_any_number_of_ranks(tmp_path, monkeypatch, people, rate):
    """1 -> 2 -> 3 -> 4 -> 1 ranks: what each saves is, bit for bit, what it loaded. A file has 3 classes here."""
    monkeypatch.setattr(identities, "BLOCK", 3)
    write(tmp_path, 1, *trained_head(people, rate))
    expected = contents(tmp_path, 1)
    assert len(expected) == -(-people // 3)

    def load_and_save(step, sample_rate=rate):
        head = ShardedMargin(make_margin("adaface", 0.35), people, DIM, SCALE, sample_rate=sample_rate)
        optimizer = torch.optim.AdamW([head.weight], lr=0.1)
        start_moments(optimizer)
        folder = tmp_path / "checkpoints" / f"step-{step}"
        verify_step(folder)
        identities.load_identities(folder, head, optimizer)
        write(tmp_path, step + 1, head, optimizer)

    for step, world in enumerate((2, 3, 4), 1):

        def act(number, step=step):
            with process_group("cpu", 60):
                load_and_save(step)

        _all_well(world, act)
        assert contents(tmp_path, step + 1) == expected
    load_and_save(4, sample_rate=1.5 - rate)  # sampling or not, it is the same matrix
    assert contents(tmp_path, 5) == expected
    rows = torch.cat(
        [load_file(tmp_path / "checkpoints" / "step-5" / name)["weight"] for name in sorted(expected, key=_first)]
    )
    assert rows.shape == (people, DIM)


def _first(name):
    return int(name.split("-")[1])


def test_a_damaged_missing_or_foreign_file_of_identities_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(identities, "BLOCK", 3)
    head, optimizer = trained_head(7, 1.0)
    write(tmp_path, 1, head, optimizer)
    step = tmp_path / "checkpoints" / "step-1"
    file = step / "identities-3-6.safetensors"
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"identities-3-6\.safetensors is damaged"):
        verify_step(step)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no identities-3-6\.safetensors"):
        verify_step(step)
    with pytest.raises(CheckpointError, match="does not hold the 7 identities of this run, in files without gaps"):
        identities.load_identities(step, head, optimizer)
    other = ShardedMargin(make_margin("adaface", 0.35), 8, DIM, SCALE)
    file.write_bytes(whole_file)
    with pytest.raises(CheckpointError, match="does not hold the 8 identities"):
        identities.load_identities(step, other, optimizer)
    narrow = ShardedMargin(make_margin("adaface", 0.35), 7, 8, SCALE)
    optimizer = torch.optim.AdamW([narrow.weight])
    start_moments(optimizer)
    with pytest.raises(CheckpointError, match=r"weight is not finite float32 of 3 x 8"):
        identities.load_identities(step, narrow, optimizer)


def test_identities_that_are_not_finite_are_not_saved(tmp_path):
    head, optimizer = trained_head(7, 1.0)
    head.weight.data[2, 2] = float("nan")
    with pytest.raises(CheckpointError, match="weight of the identities 0 to 7 has NaN or infinite values"):
        write(tmp_path, 1, head, optimizer)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
