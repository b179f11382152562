import itertools
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import tiny_recogniser
from PIL import Image

from vitface.data.degrade import parse_sensors
from vitface.evaluation.benchmarks import Degraded, Evaluation
from vitface.evaluation.page import category_bars, degraded_curves, report_page
from vitface.evaluation.protocol import verify, verify_fixed
from vitface.evaluation.report import results_json
from vitface.evaluation.routing import pose_routing

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects what a reader of the page would see."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.headings, self.text, self.outside = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.outside += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:")]
        assert tag != "img" or attributes["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page_of(tmp_path, **changes):
    rng = np.random.default_rng(0)
    issame = np.arange(200) % 2 == 0
    results = {
        name: verify(np.clip(1 + 0.3 * (rng.normal(size=200) - 2 * (issame - 0.5)), 0, 4), issame)
        for name in ("lfw", "cfp_fp", "synthetic")
    }
    (tmp_path / "log.csv").write_text("step,epoch,loss,holdout_auc,img_per_s\n2,1,9.5,0.7,80\n4,2,4.25,0.8,80\n")
    evaluation = Evaluation(results, ["lfw: AUC <0.52> is chance level"], [])
    poses = {"lfw": pose_routing(np.array([[0.75, 0.125, 0.125], [0.125, 0.875, 0]]), np.array([3.0, 40.0]))}
    page = report_page(
        "runs/a & b", tiny_recogniser(**changes), evaluation, tmp_path, tmp_path, faces=False, routing=poses
    )
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return page, outline, results


def test_the_page_is_whole_and_says_the_same_as_the_json(tmp_path):
    _, outline, results = page_of(tmp_path, num_domains=3)
    assert outline.headings == [
        "Summary",
        "Beside what others report",
        "Learning curve",
        "ROC",
        "Scores",
        "By category",
        "Where CLS looks",
        "Routing",
        "Settings",
    ]
    text = " ".join(outline.text)
    for name, entry in results_json(results).items():
        low, high = entry["interval"]
        assert name in text
        assert f"{100 * entry['accuracy']:.2f} ± {100 * entry['std']:.2f}" in text
        assert f"{100 * low:.2f} to {100 * high:.2f}" in text
        assert entry["tar_at_far"] == {"0.01": None, "0.001": None, "0.0001": None}
    assert text.count("too few pairs") == 3
    assert "Mean domain weights on lfw" in text and "AUC: domain 0 0.00, domain 1 1.00, domain 2 0.00." in text
    assert "runs/a & b" in text and "<0.52>" in text  # escaped in the source
    assert "recorded; threshold chosen on the test pairs" in text
    # curves, ROC, histograms, categories, routing with a legend of three
    assert outline.tags.count("svg") == 2 + 1 + 3 + 1 + 2 * (1 + 3)
    assert outline.tags.count("polygon") == 3  # the intervals of the ROC
    assert outline.tags.count("img") == 2 * 6 + 1  # faces and attention, and the scale


def test_a_single_benchmark_needs_no_bars_by_category(tmp_path):
    _, _, results = page_of(tmp_path)
    assert category_bars({"lfw": results["lfw"]}) is None
    assert category_bars(dict(itertools.islice(results.items(), 2)))["x_ticks"]


@pytest.mark.parametrize(("threshold", "curves"), [(1.0, ["my_pairs.csv"]), (np.nan, [])])
def test_pairs_without_an_accuracy_have_no_curve_of_it(threshold, curves):
    issame = np.arange(40) % 2 == 0
    degraded = {f"my_pairs.csv lowres:{side}": Degraded(parse_sensors(f"lowres:{side}")) for side in (8, 16)}
    results = {label: verify_fixed(np.where(issame, 0.5, 1.5), issame, threshold) for label in degraded}
    charts = degraded_curves(Evaluation(results, [], [], degraded=degraded))
    assert [name for chart in charts for name in chart["lines"]] == curves


@pytest.mark.parametrize(
    ("name", "threshold", "note"),
    [
        ("lfw", None, "Ten folds in file order; the interval is a pair bootstrap"),
        ("my_pairs.csv", None, "The interval is a pair bootstrap"),
        ("my_pairs.csv", 1.0, "The interval is Wilson's"),
        ("my_pairs.csv", np.nan, None),
    ],
)
def test_the_note_is_about_the_pairs_there_are(tmp_path, name, threshold, note):
    issame = np.arange(40) % 2 == 0
    distance = np.where(issame, 0.5, 1.5)
    result = verify(distance, issame) if threshold is None else verify_fixed(distance, issame, threshold)
    evaluation = Evaluation({name: result}, [], [])
    page = report_page("runs/a", tiny_recogniser(), evaluation, None, tmp_path, faces=False, routing={})
    assert (f'<p class="note">{note}, a lower bound' in unescape(page)) if note else "lower bound" not in page
    assert "On faces drawn by vitface, no person's" in unescape(page)


def test_the_page_needs_no_network_and_fits_phones_and_the_dark(tmp_path):
    page, outline, _ = page_of(tmp_path)
    assert outline.outside == []
    assert "script" not in outline.tags and "link" not in outline.tags
    assert "http" not in page and "url(" not in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme:dark" in page
    assert "Routing" not in outline.headings  # plain LoRA has no router


def test_curves_have_a_point_for_each_value(tmp_path):
    page, _, _ = page_of(tmp_path)
    loss = page.split('aria-label="training loss"')[1].split("</svg>")[0]
    first, second = (tuple(map(float, point.split(","))) for point in loss.split('points="')[1].split('"')[0].split())
    assert first[0] < second[0] and first[1] < second[1]  # the loss falls, so y grows downwards


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_it_without_sideways_scrolling(tmp_path, width):
    page, _, _ = page_of(tmp_path, num_domains=3)
    measure = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join()</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{measure}</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command += [f"--window-size={width},900", "--hide-scrollbars", f"--screenshot={tmp_path / 'page.png'}"]
    subprocess.run([*command, (tmp_path / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
    drawn = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"), int)
    background = drawn[2, 2]
    assert drawn.shape[1] == width
    assert 0.02 < (np.abs(drawn - background).sum(2) > 60).mean() < 0.6  # text and curves, neither blank nor a blot
    dumped = subprocess.run(
        [*command[:-1], "--dump-dom", (tmp_path / "page.html").as_uri()], check=True, capture_output=True, timeout=120
    )
    inner, needed = map(int, dumped.stdout.decode().split("<title>")[1].split("</title>")[0].split(","))
    assert needed <= inner
