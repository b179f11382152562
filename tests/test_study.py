import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from vitface.__main__ import main
from vitface.config import resolve
from vitface.documents import put_between_markers
from vitface.errors import ConfigError
from vitface.evaluation import benchmarks
from vitface.evaluation.compare import ONE_SEED
from vitface.evaluation.protocol import verify
from vitface.study import grid
from vitface.study.grid import adapter_parameters, chosen_variants, variants
from vitface.training import setup


@pytest.fixture
def few_faces(monkeypatch):
    """16 synthetic people with 4 photos each and 40 benchmark pairs."""
    monkeypatch.setattr(setup, "SYNTHETIC_PEOPLE", 16)
    monkeypatch.setattr(setup, "SYNTHETIC_IMAGES", 4)
    monkeypatch.setattr(grid, "synthetic_routing", partial(grid.synthetic_routing, num_people=4, images_per_person=3))
    benchmarks._synthetic_benchmark.cache_clear()
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", benchmarks.Benchmark("synthetic", 40))
    yield
    benchmarks._synthetic_benchmark.cache_clear()


def test_lora_at_equal_parameters_has_the_same_scaling():
    base = resolve({"num_domains": 3, "lora_alpha": 16.0})
    wide = variants(base)["lora_wide"]
    assert wide["lora_rank"] == 48
    assert wide["lora_alpha"] / 48 == base.lora_alpha / base.lora_rank == 1
    assert "dalora_unlabelled" not in variants(base)


def test_a_study_trains_compares_resumes_and_writes_its_table(tmp_path, few_faces, monkeypatch, capsys):
    folder = tmp_path / "grid"
    command = ["tiny", "--seeds", "0", "--save-dir", str(folder), "--max-samples", "8", "--batch-size", "8"]
    assert main(["study", *command]) == 0
    printed = capsys.readouterr().out
    trained = ["lora", "lora_wide", "dalora", "uniform", "random", "shuffled", "dalora_unlabelled"]
    for variant in trained:
        assert (folder / f"{variant}-s0" / "checkpoints" / "best").is_dir()
    table = json.loads((folder / "study.json").read_text())
    rows = {row["variant"]: row for row in table["variants"]}
    assert list(rows) == ["frozen", *trained, "dalora_shuffled_at_test"]
    assert rows["lora_wide"]["adapter_parameters"] == rows["uniform"]["adapter_parameters"] == 147_456
    assert rows["dalora"]["adapter_parameters"] == 147_456 + 128 * 256 + 256 + 256 * 3 + 3
    assert set(table["comparisons"]) == set(rows) - {"dalora"}
    assert 0 <= rows["dalora"]["agreement"] <= 1
    assert (folder / "study.md").read_text() in printed
    for variant in ("lora", "dalora"):
        assert f"| {variant} |" in printed

    def never(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr("vitface.training.run.Trainer", never)
    monkeypatch.setattr("vitface.study.grid.evaluate_all", never)
    assert main(["study", *command]) == 0  # all cells are there: the table alone is made anew
    again = json.loads((folder / "study.json").read_text())
    assert again["variants"] == table["variants"] and again["comparisons"] == table["comparisons"]
    assert main(["evaluate", "--compare", str(folder / "lora-s0"), str(folder / "dalora-s0")]) == 0
    assert "verdict: " in capsys.readouterr().out
    assert adapter_parameters(folder / "frozen", with_router=True) is None


def test_scores_of_a_model_are_kept_for_the_benchmarks_they_are_of(tmp_path, monkeypatch):
    seen = []
    result = verify(np.array([0.1, 0.9] * 20), np.array([True, False] * 20))

    def evaluate(embed, names, folder):
        seen.append((tuple(names), folder))
        return SimpleNamespace(results=dict.fromkeys(names, result), failures=[])

    monkeypatch.setattr(grid, "evaluate_all", evaluate)
    model = SimpleNamespace(embed=None)
    for folder, names in (("a", ["lfw"]), ("a", ["lfw"]), ("b", ["lfw"]), ("b", ["lfw", "cfp_fp"]), ("b", ["lfw"])):
        grid.judge(tmp_path / "frozen", lambda: model, "backbone", resolve({"exp": "demo", "val_data": folder}), names)
    assert seen == [(("lfw",), "a"), (("lfw",), "b"), (("lfw", "cfp_fp"), "b"), (("lfw",), "b")]


def test_the_table_says_what_each_interval_shows():
    def row(variant, low, high):
        return {"variant": variant, "adapter_parameters": 8, "accuracy": {"lfw": 0.9}, "deviation": {}, "p": 0.25} | {
            "dalora_minus_this": (low + high) / 2,
            "interval": (low, high),
        }

    rows = [row("behind", 0.01, 0.03), row("level", -0.01, 0.02), row("ahead", -0.03, -0.01)]
    about = {"command": "vitface study tiny", "date": "2026-11-26", "device": "cpu", "torch": "2.13.0", "seeds": [0]}
    text = grid.study_markdown(about, rows)
    assert "| behind | 8 | 90.00 | +2.00 | +1.00 to +3.00 | 0.25 | DA-LoRA is better |\n" in text
    assert "| level | 8 | 90.00 | +0.50 | -1.00 to +2.00 | 0.25 | no difference |\n" in text
    assert "| ahead | 8 | 90.00 | -2.00 | -3.00 to -1.00 | 0.25 | DA-LoRA is worse |\n" in text
    assert "3 comparisons, not corrected" in text and text.count(ONE_SEED) == 1
    assert ONE_SEED not in grid.study_markdown(about | {"seeds": [0, 1]}, rows)


def test_a_study_of_some_variants_always_has_dalora():
    base = resolve({"exp": "demo"})
    assert list(chosen_variants(base, None)) == list(variants(base))
    assert list(chosen_variants(base, ["uniform", "lora"])) == ["lora", "dalora", "uniform"]
    with pytest.raises(ConfigError, match="unknown variant 'lora48'; known: lora, lora_wide, dalora"):
        chosen_variants(base, ["lora48"])


def test_a_study_refuses_what_it_sets_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flag, answer in (
        ("--seed", "did you mean --seeds?"),
        ("--no-use-dalora", "unknown flag"),
        ("--dry-run", "unknown"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["study", "tiny", flag])
        assert answer in capsys.readouterr().err
    assert main(["study", "controls"]) == 2
    assert "a study needs a benchmark" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_generated_part_of_a_document_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("# Results\n\nby hand\n")
    put_between_markers(path, "a", "first\n")
    put_between_markers(path, "b", "other\n")
    with open(path, "a") as file:
        file.write("by hand too\n")
    once = path.read_text()
    assert once.startswith("# Results\n\nby hand\n\n<!-- a: generated") and once.endswith("by hand too\n")
    put_between_markers(path, "a", "second\n")
    assert path.read_text() == once.replace("first", "second")
    path.write_text(once.replace("<!-- end of a -->", ""))
    with pytest.raises(ConfigError, match="put it back or remove both"):
        put_between_markers(path, "a", "third\n")
