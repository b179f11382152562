"""From three drawn photos to two verdicts, as SVGs in English and French whose numbers are those of a run."""

import base64
import itertools
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageFilter

from vitface.data.faces.alignment import align_face
from vitface.data.faces.detect import FaceDetector
from vitface.data.images import encode_image
from vitface.data.synthetic.render import render_scenes
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE
from vitface.recogniser import Recogniser
from vitface.store.thresholds import Verdict

PHOTOS = (  # person, yaw in degrees, age, light and the seed of everything else; how much the head is tilted
    (9, -8, 0.1, 0.1, 11, 12),
    (9, 38, 0.1, 0.1, 412, -10),
    (10, 5, 0.85, 0.1, 440, 7),
)
WIDTH, HEIGHT, TIMES = 144, 108, 2  # of a photo in the picture, and how many of its pixels are one there
SCALE = 168  # the length of the cosines from -1 to 1
LEVELS = (192, 245, 11), (60, 245, 99), (20, 245, 206)  # of red, green and blue for -1, 0 and 1 in an embedding
WORDS = {  # English, French
    "title": (
        "Faces are found in photos and aligned, cut into patches, and embedded by frozen blocks whose adapters a "
        "router mixes for each photo; the cosine of two embeddings gives the verdict",
        "Les visages sont trouvés dans les photos et alignés, découpés en patchs, puis représentés par des blocs gelés "
        "dont un routeur mélange les adaptateurs pour chaque photo ; le cosinus de deux embeddings donne la réponse",
    ),
    "photo": ("photo", "photo"),
    "crop": ("face found\nand aligned", "visage trouvé\net aligné"),
    "tokens": ("patches\nare tokens", "patchs,\nles tokens"),
    "router": ("router:\nits weights", "routeur :\nses poids"),
    "blocks": ("frozen blocks\nand adapters", "blocs gelés et\nadaptateurs"),
    "embedding": ("embedding", "embedding"),
    "cosine": ("cosine of two", "cosinus de deux"),
    "formula": (
        "each layer, for each photo: W' = W + Σ wₖ Bₖ Aₖ",
        "chaque couche, pour chaque photo : W' = W + Σ wₖ Bₖ Aₖ",
    ),
    "numbers": ("{} numbers", "{} nombres"),
    "same": ("same person", "même personne"),
    "different": ("different people", "pas la même"),
    "verdict": ("{:.2f}, threshold {:.2f}", "{:.2f}, seuil {:.2f}"),
    "pose": ("pose", "pose"),
    "age": ("age", "âge"),
    "light": ("light", "lumière"),
}


def photos() -> list[np.ndarray]:
    """Tilted heads with room around them, uint8 (TIMES HEIGHT, TIMES WIDTH, 3) each."""
    person, yaw, age, light, seed, tilts = np.array(PHOTOS).T
    crops = render_scenes(TEST_PEOPLE.start + person.astype(int), yaw, age, light, seed.astype(int))[0]
    found = []
    for crop, tilt in zip(crops, tilts.tolist(), strict=True):
        around = Image.fromarray(np.pad(crop, ((80, 80), (120, 120), (0, 0)), mode="edge"))
        around = around.filter(ImageFilter.GaussianBlur(6))
        around.paste(Image.fromarray(crop), (120, 80))
        turned = around.resize((around.width * 3 // 2, around.height * 3 // 2), Image.Resampling.BICUBIC)
        turned = turned.rotate(tilt, Image.Resampling.BICUBIC)
        left, top = (turned.width - TIMES * WIDTH) // 2, (turned.height - TIMES * HEIGHT) // 2
        found.append(np.asarray(turned.crop((left, top, left + TIMES * WIDTH, top + TIMES * HEIGHT))))
    return found


def fingerprint(embedding: np.ndarray) -> np.ndarray:
    """An embedding (E,) as a picture with a pixel for each number, 16 in a row: red below zero, blue above."""
    shares = (embedding / np.abs(embedding).max()).reshape(-1, 16)
    return np.stack([np.interp(shares, (-1, 0, 1), levels) for levels in LEVELS], -1).astype(np.uint8)


def flow_pictures(model: Recogniser) -> list[str]:
    """The SVG in English, and in French; `model` has three domains, thresholds, and learned from "synthetic"."""
    images, detector = photos(), FaceDetector()
    faces = [detector.detect(image)[0] for image in images]
    crops = np.stack([align_face(image, face.landmarks) for image, face in zip(images, faces, strict=True)])
    embeddings, weights = model.embed(crops), model.domain_weights(crops)
    rows = [
        {
            "photo": _uri(image, "JPEG"),
            "box": (face.box / TIMES).round(1).tolist(),
            "points": (face.landmarks / TIMES).round(1).tolist(),
            "crop": _uri(crop, "JPEG"),
            "weights": gate.round(3).tolist(),
            "embedding": _uri(fingerprint(embedding), "PNG"),
        }
        for image, face, crop, gate, embedding in zip(images, faces, crops, weights, embeddings, strict=True)
    ]
    verdicts = [model.verify(*pair) for pair in itertools.pairwise(crops)]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.get_template("flow.svg.j2")
    return [template.render(rows=rows, **_told(model, verdicts, language)) for language in (0, 1)]


def _uri(pixels: np.ndarray, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encode_image(pixels, kind)).decode()}"


def _told(model: Recogniser, verdicts: list[Verdict], language: int) -> dict[str, Any]:
    """What the template shows beside the rows: words, the model's sizes, and what became of each pair of neighbours."""
    say, config = {name: texts[language] for name, texts in WORDS.items()}, model.config
    pairs = []
    for verdict in verdicts:
        assert verdict.threshold is not None
        text, kind = say["verdict"].format(verdict.score, verdict.threshold), "same" if verdict.same else "different"
        places = {"cosine_x": verdict.score, "threshold_x": verdict.threshold}
        at = {name: round(SCALE * (1 + cosine) / 2, 1) for name, cosine in places.items()}
        pairs.append({"kind": kind, "text": text.replace(".", ",") if language else text, **at})
    say["numbers"] = say["numbers"].format(config.embedding_dim)
    grid = model.model.vit.image_size // config.vit.patch_size
    names = [say[name] for name in SYNTHETIC["synthetic"]]
    return {"say": say, "pairs": pairs, "names": names, "grid": grid, "blocks": config.vit.depth, "scale": SCALE}
