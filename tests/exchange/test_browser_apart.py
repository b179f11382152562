"""A page whose backbone may not go along, in a headless Chromium: it asks for the file, and takes no other."""

import pytest
import torch
from browser import CHROMIUM
from safetensors.torch import save_file
from test_browser import axe, browser, fetched, photos, put, save_run, serve, text_of  # noqa: F401, fixtures too

import vitface
from vitface.__main__ import main
from vitface.exchange.site import drawn
from vitface.store.backbone import find_backbone, read_backbone, save_backbone
from vitface.store.sources import SOURCES, Source

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
FIELD = "document.querySelector('#backbone input')"


@pytest.fixture(scope="module")
def run(fetched, tmp_path_factory):  # noqa: F811
    """Its positions are resampled: vit_nano has 7 x 7 patches, this run 6 x 6."""
    return save_run(tmp_path_factory.mktemp("runs") / "a", image_size=96)


@pytest.fixture(scope="module")
def site(run, tmp_path_factory):
    """What a dry run of `vitface publish --space` writes."""
    out = tmp_path_factory.mktemp("site") / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "vit_nano", Source("somebody's ViT", "for research only"))
        assert main(["publish", str(run), "--space", "me/same-person", "--out", str(out)]) == 0
    with serve(out) as address:
        yield address


def offer(browser, path):  # noqa: F811
    """Chooses a file for the backbone; what the page says of it."""
    browser.wait(f"!{FIELD}.disabled")
    browser.choose(FIELD, path)
    note = "document.querySelector('#backbone .note').textContent"
    return browser.wait(f"{FIELD}.files.length === 0 && !{FIELD}.disabled && {note}")


def test_it_asks_for_the_file_and_takes_no_other(site, run, browser, fetched, photos, tmp_path):  # noqa: F811
    name, config, tensors, source = read_backbone(find_backbone("vit_nano"))
    right, changed, text = (tmp_path / name for name in ("of mine.safetensors", "changed.safetensors", "text.txt"))
    save_backbone(right, name, config, tensors, {**source, "file": "downloaded elsewhere.pth"})
    save_backbone(changed, name, config, {**tensors, "norm.bias": tensors["norm.bias"] + 1}, source)
    save_file({"x": torch.ones(3)}, tmp_path / "other.safetensors")
    text.write_text("text")
    browser.open(site, width=390)
    browser.wait(f"{FIELD}.checkVisibility()")
    asked = text_of(browser, "#backbone p")
    assert asked.startswith("This model runs on somebody's ViT, whose licence (for research only) keeps it out of this")
    assert "Choose your own vit_nano.safetensors, which vitface fetch or vitface convert wrote." in asked
    browser.run(axe(fetched))
    assert browser.run("axe.run().then(r => r.violations.map(v => v.id))") == []
    for wrong in (changed, tmp_path / "other.safetensors", text):
        expected = f"{wrong.name} does not hold the weights that this model was made with; choose vit_nano.safetensors."
        assert offer(browser, wrong) == expected
    assert "There is no model" in put(browser, 0, photos[0])
    offer(browser, right)
    assert text_of(browser, "#status").startswith("The model is ready")
    assert not browser.run(f"{FIELD}.checkVisibility()")
    rows = vitface.load(run, dtype="fp32").embed(drawn())
    put(browser, 0, photos[0])
    for number, verdict in ((1, "The same person"), (2, "Different people")):
        put(browser, 1, photos[number])
        assert text_of(browser, "#verdict") == verdict
        cosine = float(browser.run("document.querySelector('#answer').dataset.cosine"))
        assert abs(cosine - rows[0] @ rows[number]) < 1e-3
    assert browser.requests and all(address.startswith((site, f"blob:{site}")) for address in browser.requests)
    assert not any(address.endswith(".safetensors") for address in browser.requests)
    assert browser.faults == []
