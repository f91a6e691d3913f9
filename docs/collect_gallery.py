"""Collect what the examples of the gallery found for the site: `python docs/collect_gallery.py bayes-klrl-gallery`.

Reads OUT/NAME/finding.json and its picture for every example that has been run, and writes `docs/gallery/findings.json`
and a small picture `docs/gallery/NAME.png` for each. Examples that were not run keep what was collected before. The page
`docs/gallery.md` is made of these files alone.
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor
from scipy.spatial import KDTree

from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.index import examples, title_of
from bayes_klrl.whole_files import write_whole

ROOT = Path(__file__).parents[1]
LARGEST = 40_000  # bytes of a picture
WIDTHS = (640, 560, 480, 400, 320, 240)
SHADES = {256: (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.12, 0.06), 64: (1.0, 0.7, 0.4, 0.15)}  # by number of colours


def with_palette(image: Image.Image, colours: int) -> Image.Image:
    """Return a picture with so many colours, among them those of all plots in several shades.

    A palette that is made of the picture's pixels alone gives two thin lines one colour, since most pixels are in neither.
    """
    own = np.array([ImageColor.getrgb(colour) for colour in (*COLOURS, BLACK, GREY)])
    fixed = [255 + shade * (own - 255) for shade in SHADES[colours]]
    room = colours - len(SHADES[colours]) * len(own) - 1
    others = np.array(image.quantize(room).getpalette()).reshape(-1, 3)[:room]
    palette = np.concatenate([[[255, 255, 255]], *fixed, others]).round().astype(np.uint8)
    nearest = KDTree(palette).query(np.asarray(image))[1]  # Pillow's own search is not exact: its white is not white
    small = Image.fromarray(nearest.astype(np.uint8), "P")
    small.putpalette(palette.ravel().tolist())
    return small


def thumbnail(picture: Path) -> bytes:
    """Return a picture as a PNG of at most 40 kB: smaller and with fewer colours until it fits."""
    with Image.open(picture) as image:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    for width in WIDTHS:
        for colours in SHADES:
            small = flat.resize((width, round(flat.height * width / flat.width)), Image.Resampling.LANCZOS)
            content = BytesIO()
            with_palette(small, colours).save(content, format="PNG", optimize=True)
            if content.tell() <= LARGEST:
                return content.getvalue()
    raise SystemExit(f"{picture} cannot be made smaller than {LARGEST} bytes. Draw it with fewer colours.")


def collected(out: Path, name: str, file: Path) -> dict[str, Any]:
    """Return what the site says of one example."""
    found = Finding.load(out / name)
    return {
        "title": title_of(file),
        "room": file.parent.name,
        "source": file.relative_to(ROOT).as_posix(),
        **{key: found[key] for key in ("better", "worse", "numbers", "seconds")},
    }


def collect(out: Path, site: Path) -> list[str]:
    """Write findings and pictures of the examples below `out` into a folder of the site, and return their names."""
    known = examples()
    site.mkdir(parents=True, exist_ok=True)
    names = [name for name in known if (out / name / "finding.json").is_file()]
    file = site / "findings.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    findings = {name: found for name, found in before.items() if name in known}
    for name in names:
        findings[name] = collected(out, name, known[name])
        write_whole(site / f"{name}.png", thumbnail(out / name / str(Finding.load(out / name)["picture"])))
    write_whole(file, json.dumps(dict(sorted(findings.items())), indent=1, ensure_ascii=False) + "\n")
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder that `bayes-klrl gallery ... --out` wrote")
    names = collect(parser.parse_args().out, ROOT / "docs" / "gallery")
    print(f"{len(names)} collected: {', '.join(names)}")
