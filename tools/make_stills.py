#!/usr/bin/env python3
"""Make the still pictures of the figures that answer: book/images/figure_NAME.png.

    python tools/make_stills.py                 all figures
    python tools/make_stills.py prompt look     these

GitHub, Colab and a browser without scripts show them in place of the figures of
book/_static/figures.js and figures_model.js. Each figure is opened in headless Chromium
(CHROMIUM, or found on the PATH), driven to the state in STEPS, and photographed: two
pixels for each of the page, in the light theme, at most 150 kB.
"""

import argparse
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "book" / "_static"
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from export_play import write_curves, write_weights  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

SCRIPTS = ("figures.js", "figures_model.js")
WIDTH, MOST_BYTES = 680, 150_000
LOAD = "text=Load the model"
# What is clicked before the picture is taken; a figure that is not here stays as it is.
STEPS = {"training": [LOAD], "prompt": [LOAD], "look": [LOAD]}
PAGE = """<!doctype html><html lang=en data-theme=light><meta charset=utf-8>
<title>{name}</title><link rel=stylesheet href=figures.css>
<style>body {{ margin: 0; font-family: sans-serif; line-height: 1.5 }}</style>
<div class=live data-figure={name}></div>{scripts}</html>"""


def names():
    """Of all figures, in the scripts' order: {name: its script}."""
    found = {}
    for script in SCRIPTS:
        text = (STATIC / script).read_text() if (STATIC / script).is_file() else ""
        found |= dict.fromkeys(re.findall(r'register\("(\w+)"', text), script)
    found.pop("NAME", None)  # of the comment that explains it
    return found


def prepare(folder, wanted):
    """Fill a folder with the scripts, the weights if they are needed, and the pages."""
    for file in STATIC.iterdir():
        if file.suffix in (".js", ".css"):
            shutil.copy(file, folder)
    scripts = names()
    if any(scripts[name] == "figures_model.js" for name in wanted):
        write_weights(folder / "flamingo_weights.js")
        write_curves(folder / "flamingo_curves.js")
    for name in wanted:
        tags = dict.fromkeys(("figures.js", scripts[name]))
        tags = "".join(f"<script src={tag}></script>" for tag in tags)
        page = PAGE.format(name=name, scripts=tags)
        (folder / f"{name}.html").write_text(page)


def photograph(browser, folder, name):
    """A figure as a PIL picture."""
    page = browser.new_page(
        viewport={"width": WIDTH, "height": 900},
        device_scale_factor=2,
        color_scheme="light",
    )
    page.goto((folder / f"{name}.html").as_uri())
    for step in STEPS.get(name, ()):
        page.click(step)
    if LOAD in STEPS.get(name, ()):
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
            return path.stat().st_size
    raise ValueError(f"{path} has {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="figures; none, all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "images")
    args = parser.parse_args()
    wanted = args.names or list(names())
    if strange := [name for name in wanted if name not in names()]:
        parser.error(f"no figure {strange[0]!r}; there are {', '.join(names())}")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    chromium = chromium or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        folder = Path(folder)
        prepare(folder, wanted)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        for name in wanted:
            path = args.out / f"figure_{name}.png"
            print(f"{path}: {save(photograph(browser, folder, name), path)} bytes")
        browser.close()


if __name__ == "__main__":
    main()
