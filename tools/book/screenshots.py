#!/usr/bin/env python3
"""Take pictures of the rendered pages, light and dark, wide and narrow.

    python tools/book/screenshots.py
        every page of _build/html
    python tools/book/screenshots.py intro play
        these
    python tools/book/screenshots.py --open 01_clip_features
        what is folded is open

Writes _build/screenshots/PAGE-light-1300-1.png and so on, from top to bottom in pieces.
Run build.py first. The browser is Chromium: CHROMIUM, or the one on the PATH.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

HTML = ROOT / "_build" / "html"
PIECE = 3000  # pixels, the height of a picture at most
OPEN = "document.querySelectorAll('article details').forEach((d) => { d.open = true; })"


def find_chromium():
    """The path of a Chromium; stops where there is none."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    found = found or shutil.which("google-chrome")
    return found or sys.exit("no Chromium: set CHROMIUM, or put one on the PATH")


def addresses(names):
    """{name: file} of these pages, or of all of them."""
    there = {path.stem: path for path in sorted((HTML / "book").glob("*.html"))}
    if not there:
        sys.exit("no rendered book: run tools/book/build.py first")
    if unknown := [name for name in names if name not in there]:
        sys.exit(f"no page {unknown[0]}; there are {', '.join(there)}")
    return {name: there[name] for name in names or there}


def take(page, name, out):
    """Take a page from top to bottom; returns how many pieces it needed."""
    size = page.evaluate(
        "[document.documentElement.clientWidth, document.documentElement.scrollHeight]"
    )
    tops = range(0, size[1], PIECE)
    for number, top in enumerate(tops, 1):
        clip = {"x": 0, "y": top, "width": size[0]}
        clip["height"] = min(PIECE, size[1] - top)
        path = out / f"{name}-{number}.png"
        page.screenshot(path=path, clip=clip, full_page=True)
    return len(tops)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "pages", nargs="*", metavar="PAGE", help="all, if none is named"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "screenshots")
    parser.add_argument("--modes", nargs="+", default=["light", "dark"])
    parser.add_argument("--widths", nargs="+", type=int, default=[1300, 390])
    parser.add_argument("--open", action="store_true", help="open what is folded")
    args = parser.parse_args()
    if sync_playwright is None:
        sys.exit("no playwright: pip install -r requirements.txt")
    pages, taken = addresses(args.pages), 0
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox"]
        )
        for mode in args.modes:
            for width in args.widths:
                page = browser.new_page(
                    viewport={"width": width, "height": 900},
                    color_scheme=mode,
                    reduced_motion="reduce",
                )
                for name, path in pages.items():
                    page.goto(path.as_uri())
                    page.wait_for_timeout(300)  # formulas are set
                    if args.open:
                        page.evaluate(OPEN)
                    taken += take(page, f"{name}-{mode}-{width}", args.out)
                page.close()
        browser.close()
    print(f"{taken} pictures of {len(pages)} pages are in {args.out}")


if __name__ == "__main__":
    main()
