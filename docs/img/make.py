"""Draws the pictures of the documents from drawn faces, which are nobody's.

    python train.py --exp demo --save-dir runs/demo && vitface fetch yunet
    python docs/img/make.py runs/demo docs/img

attention.png: photos of one drawn person, where CLS looks in the frozen and in the adapted model, the domain weights.
charts.svg: the weights along pose, age and light, and the ROC of both models. No training has seen these people.
flow.svg, flow.fr.svg: photos, from their pixels to verdicts. page.png: the page of `vitface demo`, in Chromium.
"""

import sys
import threading
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import numpy as np
from flow import flow_pictures
from PIL import Image, ImageDraw, ImageFont

from vitface.commands.photos.demo import DemoServer
from vitface.data.synthetic.render import render_scenes
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE
from vitface.evaluation import page, plots
from vitface.evaluation.benchmarks import evaluate_all
from vitface.exchange.site import site_files
from vitface.recogniser import Recogniser, load
from vitface.store.faces import open_checkpoint

PERSON = TEST_PEOPLE.start + 4
PHOTOS = {  # title -> yaw in degrees, age and light (see `render_scenes`), and the seed of everything else
    "frontal": (0, 0.1, 0.1, 11),
    "turned by 65°": (65, 0.1, 0.1, 412),
    "old": (10, 0.95, 0.1, 413),
    "lamp from the side": (-10, 0.1, -0.9, 415),
}
FACTORS = {  # of the curves: what changes, from 0 to what; the other two are mild
    "turned by, in degrees": (0, 90),
    "age, from young to old": (1, 1),
    "lamp, from even light to the side": (2, 1),
}
SIDE, GAP, LEFT, TOP, ROW, BAR = 184, 12, 92, 30, 26, 144  # pixels; BAR is a weight of one
TEXT, TRACK, COLOURS = "#333333", "#eeeeee", ("#0b63ce", "#c2410c", "#15803d")
PEOPLE, STEPS = 24, 9
CHARTS = """{% from "evaluation/chart.html.j2" import drawing %}
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ 2 * box.width }} {{ 2 * (box.height + 24) }}"
 font-family="system-ui,sans-serif"><style>text{fill:#667;font-size:11px}.title{font-size:13px;fill:#222}
.plot{fill:none;stroke:#d5dae0}.grid{stroke:#d5dae0;stroke-width:.5}polyline{fill:none;stroke-width:2}.band{opacity:.2}
{% for colour in colours %}.c{{ loop.index0 }}{stroke:{{ colour }}}.b{{ loop.index0 }},.t{{ loop.index0 }}
{fill:{{ colour }}}{% endfor %}</style><rect width="100%" height="100%" fill="#fff"/>
{% for chart in charts %}
<g transform="translate({{ loop.index0 % 2 * box.width }} {{ loop.index0 // 2 * (box.height + 24) + 20 }})">
<text class="title" x="{{ box.left }}" y="-4">{{ chart.title }}</text>{{ drawing(chart, box) }}</g>
{% endfor %}
</svg>
"""


def attention_picture(frozen: Recogniser, adapted: Recogniser) -> Image.Image:
    """A column for each photo; rows for the photo, both models' attention in the last block, a bar for each domain."""
    *factors, seeds = zip(*PHOTOS.values(), strict=True)
    crops = render_scenes(np.full(len(PHOTOS), PERSON), *map(np.array, factors), np.array(seeds))[0]
    maps, weights = [model.attention(crops).mean(axis=1) for model in (frozen, adapted)], adapted.domain_weights(crops)
    names, bars = SYNTHETIC["synthetic"], TOP + 3 * (SIDE + GAP)
    sheet = Image.new("RGB", (LEFT + len(PHOTOS) * (SIDE + GAP), bars + ROW * len(names)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for row, text in enumerate(("photo", "where\nCLS looks,\nfrozen", "where\nCLS looks,\nadapted")):
        pen.text((GAP, TOP + row * (SIDE + GAP) + SIDE // 2), text, TEXT, font, "lm")
    for k, name in enumerate(names):
        pen.text((GAP, bars + ROW * k + ROW // 2), name, COLOURS[k], font, "lm")
    for column, title in enumerate(PHOTOS):
        x = LEFT + column * (SIDE + GAP)
        pen.text((x + SIDE // 2, TOP // 2), title, TEXT, font, "mm")
        photo = Image.fromarray(crops[column]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        shown = [np.asarray(photo), *(plots.heat(np.asarray(photo), each[column]) for each in maps)]
        for row, pixels in enumerate(shown):
            sheet.paste(Image.fromarray(pixels), (x, TOP + row * (SIDE + GAP)))
        for k, weight in enumerate(weights[column].tolist()):
            y = bars + ROW * k + ROW // 2
            pen.rounded_rectangle((x, y - 7, x + BAR, y + 7), 3, TRACK)
            pen.rounded_rectangle((x, y - 7, x + round(BAR * weight), y + 7), 3, COLOURS[k])
            pen.text((x + SIDE, y), f"{weight:.2f}", TEXT, font, "rm")
    return _small(sheet)


def weight_chart(model: Recogniser, label: str) -> plots.Chart:
    """The mean weight of each domain over people, and the middle half of them, along one factor."""
    place, most = FACTORS[label]
    values = np.linspace(0, most, STEPS)
    factors = np.full((3, STEPS, PEOPLE), 0.1)  # yaw, age, light
    factors[place] = values[:, None]
    people = np.tile(TEST_PEOPLE.start + 100 + np.arange(PEOPLE), STEPS)
    crops = render_scenes(people, *factors.reshape(3, -1), np.arange(STEPS * PEOPLE))[0]
    weights = model.domain_weights(crops).reshape(STEPS, PEOPLE, -1)
    low, high = np.quantile(weights, (0.25, 0.75), axis=1)
    names = SYNTHETIC["synthetic"]
    curves = {name: (values, weights.mean(axis=1)[:, k]) for k, name in enumerate(names)}
    bands = {name: (values, low[:, k], high[:, k]) for k, name in enumerate(names)}
    return plots.line_chart(f"Domain weights, {PEOPLE} people", label, "weight", curves, bands=bands)


def charts_picture(frozen: Recogniser, adapted: Recogniser) -> str:
    """An SVG of four charts."""
    models = {"frozen backbone": frozen, "adapted": adapted}
    results = {name: evaluate_all(model.embed, ["synthetic"], "").results for name, model in models.items()}
    roc = page.roc_chart({name: result["synthetic"] for name, result in results.items()})
    charts = [*(weight_chart(adapted, label) for label in FACTORS), roc]
    loader = jinja2.FileSystemLoader(Path(plots.__file__).parents[1])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(CHARTS).render(charts=charts, box=plots.BOX, colours=COLOURS).strip() + "\n"


def page_picture(run: str) -> Image.Image:
    """The page of `vitface demo` at 1280 px, down to its answer about the drawn photos of one person."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from browser import chromium

    shot = BytesIO()
    profiles = TemporaryDirectory(ignore_cleanup_errors=True)  # Chromium's last process may still write
    with DemoServer(site_files(open_checkpoint(Path(run)), "fp32")) as server, profiles as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with chromium(Path(profile)) as browser:
            browser.open(server.address)
            browser.wait("document.querySelector('#status').textContent.startsWith('The model is ready')")
            browser.run("document.querySelector('[data-pair=\"0 1\"]').click()")
            browser.wait("document.querySelector('#verdict').textContent !== 'No answer yet'")
            browser.run("document.querySelector('#look').click()")
            height = browser.run("document.querySelector('#gallery').getBoundingClientRect().top")
            shot.write(browser.screenshot())
        server.shutdown()
    return _small(Image.open(shot).convert("RGB").crop((0, 0, 1280, int(height))))


def _small(picture: Image.Image) -> Image.Image:
    return picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


if __name__ == "__main__":
    run, folder = sys.argv[1], Path(sys.argv[2])
    models = load("vit_nano"), load(run)
    attention_picture(*models).save(folder / "attention.png", optimize=True)
    page_picture(run).save(folder / "page.png", optimize=True)
    texts = [charts_picture(*models), *flow_pictures(models[1])]
    for name, text in zip(("charts.svg", "flow.svg", "flow.fr.svg"), texts, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    print(f"wrote attention.png, page.png, charts.svg, flow.svg and flow.fr.svg to {folder}")
