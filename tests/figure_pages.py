"""Small pages with one figure of book/_static/figures.js each, and its still picture.

    python tests/figure_pages.py              the stills of all these figures
    python tests/figure_pages.py mask budget  some

A still, book/images/figure_NAME.png, stands where scripts do not run: on GitHub, in
Colab, on paper. It is a screenshot of the figure in headless Chromium (CHROMIUM or on
the PATH), in light colours, at twice the pixels.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pydata_sphinx_theme
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STATIC, IMAGES = ROOT / "book" / "_static", ROOT / "book" / "images"
THEME = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme"
THEME = THEME / "static" / "styles" / "pydata-sphinx-theme.css"
SCRIPT = (STATIC / "figures.js").read_text(encoding="utf-8")
NAMES = re.findall(r"^  register\(\"(\w+)\"", SCRIPT, re.M)
MOVES = {  # what is done before the picture is taken
    "labels": "document.querySelectorAll('.live-cards button')[3].focus();",
    "decoding": """document.querySelector('input[value=forgetful]').click();
        for (let i = 0; i < 4; i++) document.querySelector('.live-go').click();""",
}


def small_page(name, folder, mode="light"):
    """Write a page with one figure and the looks of the book; return its path."""
    styles = (THEME, STATIC / "book.css", STATIC / "figures.css")
    links = "".join(f'<link rel=stylesheet href="{s.as_uri()}">' for s in styles)
    script = (STATIC / "figures.js").as_uri()
    page = f"""<!doctype html><html lang=en data-theme={mode} data-mode={mode}>
<meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{name}</title>{links}<body><div class=bd-content style="display: block">
<article class=bd-article style="max-width: 60em; margin: auto; padding: 1rem">
<div class=live data-figure={name}><img alt="the still" src="data:,"></div>
</article></div><script src="{script}"></script></html>"""
    path = Path(folder) / f"{name}_{mode}.html"
    path.write_text(page, encoding="utf-8")
    return path


def take(browser, name, path, mode="light", width=820):
    """Save the picture of a figure, at twice the pixels and in few colours."""
    with tempfile.TemporaryDirectory() as folder:
        size = {"width": width, "height": 900}
        page = browser.new_page(viewport=size, device_scale_factor=2)
        page.emulate_media(reduced_motion="reduce")
        page.goto(small_page(name, folder, mode).as_uri())
        page.evaluate(
            f"() => {{ {MOVES.get(name, '')} document.activeElement.blur(); }}"
        )
        page.locator(".live-figure").screenshot(path=path)
        page.close()
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main(names):
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("no Chromium: set CHROMIUM, or put it on the PATH")
    for name in names:
        if name not in NAMES:
            sys.exit(f"no figure {name!r}: {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        options = {"executable_path": chromium, "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**options)
        for name in names:
            path = IMAGES / f"figure_{name}.png"
            take(browser, name, path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)
