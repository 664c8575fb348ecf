#!/usr/bin/env python3
"""Make the still pictures of the figures that answer: book/images/figure_NAME.png.

    python tools/book/make_stills.py                all figures
    python tools/book/make_stills.py prompt look    these

GitHub, Colab and a browser without scripts show them in place of the figures. Those of
book/_static/figures.js are taken by tests/figure_pages.py. Those that ask the trained
model, of figures_model.js, are opened here, in headless Chromium too (CHROMIUM, or
found on the PATH): the model is loaded and the first answer photographed, two pixels
for each of the page, in the light theme, at most 150 kB.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from figure_pages import NAMES, THEME, take
from PIL import Image
from playwright.sync_api import sync_playwright

from tools.book.export_play import write_curves, write_weights

STATIC = ROOT / "book" / "_static"
WIDTH, MOST_BYTES = 760, 150_000
MODEL_NAMES = ["training", "prompt", "look"]  # of figures_model.js
PAGE = """<!doctype html><html lang=en data-theme=light data-mode=light>
<meta charset=utf-8><title>{name}</title><link rel=stylesheet href="{theme}">
<link rel=stylesheet href=book.css><link rel=stylesheet href=figures.css>
<body><div class=bd-content style="display: block">
<div class=live data-figure={name}></div></div>
<script src=figures.js></script><script src=figures_model.js></script></html>"""


def prepare(folder, wanted):
    """Fill a folder with the scripts, the weights, and a page for each figure."""
    for file in STATIC.iterdir():
        if file.suffix in (".js", ".css"):
            shutil.copy(file, folder)
    write_weights(folder / "flamingo_weights.js")
    write_curves(folder / "flamingo_curves.js")
    for name in wanted:
        page = PAGE.format(name=name, theme=THEME.as_uri())
        (folder / f"{name}.html").write_text(page)


def photograph(browser, folder, name):
    """A figure, with the model loaded, as a PIL picture."""
    page = browser.new_page(
        viewport={"width": WIDTH, "height": 900},
        device_scale_factor=2,
        color_scheme="light",
    )
    page.goto((folder / f"{name}.html").as_uri())
    page.click("text=Load the model")
    page.wait_for_selector(".live-figure[data-state=done]", timeout=120_000)
    page.evaluate("document.activeElement.blur()")
    shot = page.locator(".live-figure").screenshot()
    page.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def save(picture, path):
    """Write a PNG with as many colours as stay under 150 kB."""
    for colours in (256, 128, 64, 32):
        small = picture.quantize(colours, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            return
    raise ValueError(f"{path} has {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="figures; none, all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "images")
    args = parser.parse_args()
    known = [*NAMES, *MODEL_NAMES]
    wanted = args.names or known
    if strange := [name for name in wanted if name not in known]:
        parser.error(f"no figure {strange[0]!r}; there are {', '.join(known)}")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    chromium = chromium or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        folder = Path(folder)
        if asking := [name for name in wanted if name in MODEL_NAMES]:
            prepare(folder, asking)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        for name in wanted:
            path = args.out / f"figure_{name}.png"
            if name in MODEL_NAMES:
                save(photograph(browser, folder, name), path)
            else:
                take(browser, name, path)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
