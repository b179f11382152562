import json
from itertools import product

import numpy as np
import pytest
from conftest import optional
from hypothesis import given
from hypothesis import strategies as st

from vitface.__main__ import main
from vitface.errors import CheckpointError, ConfigError, EvaluationError
from vitface.evaluation.compare import Side, compare, comparison_text, group_runs
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import SCORES, keep_scores, load_scores, save_scores
from vitface.evaluation.statistics import difference_draws, interval, mcnemar, seed_weights
from vitface.metrics import contiguous_folds

stats = optional("scipy.stats")


def result(separation, seed, pairs=2000, common=None):
    """A model's result; `common` (pairs,) is what makes a pair hard for every model."""
    issame = np.arange(pairs) % 2 == 0
    common = np.random.default_rng(99).normal(size=pairs) if common is None else common
    noise = 0.8 * common + 0.6 * np.random.default_rng(seed).normal(size=pairs)
    return verify(np.clip(1 + 0.2 * (noise - separation * (issame - 0.5)), 0, 4), issame)


def test_scores_on_disk_give_the_very_results_back(tmp_path):
    people = np.random.default_rng(0).integers(0, 50, (2000, 2))
    one = verify(result(2, 0).distance, result(2, 0).issame, np.arange(2000) % 10, people)
    save_scores(tmp_path / SCORES, {"lfw": one, "cfp_fp": result(1, 1)}, "abc")
    loaded, model = load_scores(tmp_path / SCORES)
    assert model == "abc" and list(loaded) == ["cfp_fp", "lfw"]
    assert loaded["lfw"].accuracy == one.accuracy and loaded["lfw"].auc == one.auc
    np.testing.assert_array_equal(loaded["lfw"].correct, one.correct)
    np.testing.assert_array_equal(loaded["lfw"].people, people)
    keep_scores(tmp_path, {"lfw": result(2, 5)}, "abc")
    assert set(load_scores(tmp_path / SCORES)[0]) == {"lfw", "cfp_fp"}
    keep_scores(tmp_path, {"lfw": one}, "another checkpoint")
    assert set(load_scores(tmp_path / SCORES)[0]) == {"lfw"}
    (tmp_path / SCORES).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_scores(tmp_path / SCORES)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    a = np.r_[np.ones(only_a), np.zeros(only_b), np.ones(7), np.zeros(3)].astype(bool)
    b = np.r_[np.zeros(only_a), np.ones(only_b), np.ones(7), np.zeros(3)].astype(bool)
    counted_a, counted_b, p = mcnemar(a[None], b[None])
    assert (counted_a, counted_b) == (only_a, only_b)
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert p == pytest.approx(expected, abs=1e-12)


def test_mcnemar_of_several_runs_takes_the_majority():
    a = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0]], bool)  # majority: right, right, wrong
    b = np.array([[0, 1, 1], [0, 0, 1]], bool)  # wrong, tied, right
    assert mcnemar(a, b) == (1, 1, 1.0)


def test_seed_weights_have_the_variance_of_a_mean():
    """Their draws spread like s / sqrt(n), with s from n - 1: drawing n of n would spread less."""
    values, rng = np.array([1.0, 4.0, 9.0]), np.random.default_rng(0)
    weights = seed_weights(3, 200_000, rng)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (weights @ values).std() == pytest.approx(values.std(ddof=1) / 3**0.5, rel=0.01)
    np.testing.assert_array_equal(seed_weights(1, 4, rng), np.ones((4, 1)))


def test_difference_draws_equal_a_bootstrap_pair_by_pair():
    """Against the restatement: draw pairs fold by fold, run the whole protocol on them, take the difference."""
    a, b = result(1.5, 1, 200), result(2.0, 2, 200)
    fast = difference_draws([[a]], [[b]], matched=False)[0]
    rng, slow = np.random.default_rng(1), []
    for _ in range(400):
        rows = np.concatenate([rng.choice(np.flatnonzero(a.folds == fold), 20) for fold in range(10)])
        again = [verify(one.distance[rows], one.issame[rows], a.folds).accuracy for one in (a, b)]
        slow.append(again[1] - again[0])
    assert fast.mean() == pytest.approx(b.accuracy - a.accuracy, abs=1e-6)
    assert fast.std() == pytest.approx(np.std(slow), rel=0.1)


def side(name, separation, seeds=(0, 1, 2), benchmarks=("lfw", "cfp_fp"), offset=0):
    results = [
        {bench: result(separation, 1000 * seed + i + offset) for i, bench in enumerate(benchmarks)} for seed in seeds
    ]
    return Side(name, list(seeds), results)


def test_a_real_difference_is_found_and_named():
    comparison = compare(side("LoRA", 1.0), side("DA-LoRA", 2.0, offset=7))
    assert [row.benchmark for row in comparison.rows] == ["lfw", "cfp_fp", "average of 2"]
    *rows, average = comparison.rows
    assert average.difference == pytest.approx(np.mean([row.difference for row in rows]), abs=1e-12)
    assert all(row.interval[0] < row.difference < row.interval[1] for row in comparison.rows)
    assert average.interval[0] > 0 and rows[0].p < 1e-6 and rows[0].only_b > rows[0].only_a
    assert comparison.verdict.startswith("[DA-LoRA] is better than [LoRA] by ")
    backwards = compare(side("DA-LoRA", 2.0, offset=7), side("LoRA", 1.0))
    assert backwards.verdict.startswith("[DA-LoRA] is better than [LoRA] by ")
    assert backwards.rows[0].difference == -comparison.rows[0].difference
    text = comparison_text(comparison)
    assert "over 3 seeds" in text and f"{100 * average.difference:+.2f}" in text


def test_no_difference_is_said_to_be_none():
    comparison = compare(side("A", 1.5, seeds=(0,)), side("B", 1.5, seeds=(0,), offset=7))
    assert comparison.verdict.startswith("no difference shown")
    assert "One seed" in comparison.verdict


SIMULATIONS, PAIRS, TRUTH = 1000, 1000, 0.3


@pytest.mark.slow
def test_coverage_of_the_paired_difference():
    """Over simulated pairs of runs the interval holds the true difference in 95 % of them, or a little more."""
    found, intervals = [], []
    for draw in range(SIMULATIONS):
        common = np.random.default_rng(draw).normal(size=PAIRS)
        a, b = (result(s, 7919 * draw + i, PAIRS, common) for i, s in enumerate((1.5, 1.5 + TRUTH)))
        drawn = difference_draws([[a]], [[b]], matched=True, draws=400, seed=draw)
        found.append(b.accuracy - a.accuracy)
        intervals.append(interval(drawn[0]))
    low, high = np.array(intervals).T
    covered = np.mean((low <= np.mean(found)) & (np.mean(found) <= high))
    print(f"coverage of the paired difference over {SIMULATIONS} sets: {100 * covered:.1f} %")
    assert 0.93 <= covered <= 0.98


def write_run(folder, separation, seed, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"seed": seed, "save_dir": str(folder), "lora_rank": 16, **settings})
    )
    save_scores(folder / SCORES, {"lfw": result(separation, seed + int(100 * separation))}, "frozen")
    return folder


def test_runs_alike_but_for_the_seed_are_one_side(tmp_path, capsys):
    runs = [
        write_run(tmp_path / f"{'dalora' if use else 'lora'}-s{seed}", 1.0 + use, seed, use_dalora=use)
        for seed, use in product((1, 0), (False, True))
    ]
    sides = group_runs(runs, [{} for _ in runs])
    assert [(s.name, s.seeds) for s in sides] == [("use_dalora False", [0, 1]), ("use_dalora True", [0, 1])]
    command = ["--compare", *map(str, runs), "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", *command]) == 0
    printed = capsys.readouterr().out
    assert "[use_dalora True] is better than [use_dalora False]" in printed
    (entry,) = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert entry["rows"][0]["benchmark"] == "lfw" and entry["seeds_a"] == [0, 1]
    assert main(["evaluate", *command, "--bench", "cfp_fp"]) == 2
    assert "no benchmark in common" in capsys.readouterr().err


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    one, two = write_run(tmp_path / "a", 1, 0), write_run(tmp_path / "b", 1, 1)
    with pytest.raises(ConfigError, match="differ only in the seed"):
        group_runs([one, two], [{}, {}])
    with pytest.raises(ConfigError, match="the same experiment and seed twice"):
        group_runs([one, write_run(tmp_path / "c", 1, 0), write_run(tmp_path / "d", 1, 0, lr=1)], [{}] * 3)
    other = Side("B", [0], [{"lfw": result(1, 0, pairs=400)}])
    with pytest.raises(EvaluationError, match="not evaluated on the same pairs"):
        compare(side("A", 1), other)
    assert main(["evaluate", "--compare", str(one), str(tmp_path / "nothing")]) == 2
    assert "has no scores" in capsys.readouterr().err
    np.testing.assert_array_equal(contiguous_folds(400), result(1, 0, pairs=400).folds)
