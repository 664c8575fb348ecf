#!/usr/bin/env python3
"""Fail when a rendered page would ask the network for anything by itself.

    python tests/offline.py _build/html

A link that the reader clicks is fine. What a browser fetches on its own is not:
scripts, style sheets, pictures, fonts, frames, modules, preloads, redirects.
"""

import argparse
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# Elements and the attributes that a browser follows without being asked.
FETCHED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "frame": ("src",),
    "embed": ("src",),
    "object": ("data", "codebase"),
    "audio": ("src",),
    "video": ("src", "poster"),
    "track": ("src",),
    "input": ("src",),
    "body": ("background",),
    "base": ("href",),  # would turn every relative address into a request
    "image": ("href", "xlink:href"),  # in SVG
    "use": ("href", "xlink:href"),
    "feimage": ("href", "xlink:href"),
}
# `rel` of links that are only statements about the page, or for the reader to follow.
QUIET_RELS = {"alternate", "author", "canonical", "help", "index", "license", "next"}
QUIET_RELS |= {"prev", "search", "top", "up"}

OUTSIDE = re.compile(r"\s*(https?:|wss?:|ftp:)?//\S", re.I)
ADDRESS = r"""\s*["'`]?\s*(?:(?:https?|wss?):)?//[^\s"'`)]+"""
CSS = re.compile(rf"url\({ADDRESS}|@import{ADDRESS}", re.I)
SCRIPT = re.compile(
    rf"""\b(?:import|fetch|importScripts|Worker|WebSocket|EventSource|sendBeacon)
         \s*\({ADDRESS}
       | \bimport\s+(?:[^"'`;()]{{0,200}}\bfrom\b)?\s*["'](?:https?:)?//[^"']+
       | \.open\(\s*["']\w+["']\s*,{ADDRESS}
       | \.(?:src|srcset)\s*=(?!=){ADDRESS}""",
    re.I | re.X,
)


def is_outside(address):
    """True for an absolute address of another machine, "//host" included."""
    return bool(address and OUTSIDE.match(address))


class Page(HTMLParser):
    """Collects what a page would fetch from elsewhere."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = [], None

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        for name in FETCHED.get(tag, ()):
            value = attributes.get(name, "")
            addresses = value.split(",") if name == "srcset" else [value]
            self.found += [f"<{tag} {name}={a}>" for a in addresses if is_outside(a)]
        if tag == "link" and is_outside(attributes.get("href")):
            if not set(attributes.get("rel", "").lower().split()) <= QUIET_RELS:
                self.found.append(f"<link href={attributes['href']}>")
        if tag == "meta" and attributes.get("http-equiv", "").lower() == "refresh":
            _, _, target = attributes.get("content", "").partition("=")
            if is_outside(target.strip("'\" ")):
                self.found.append(f"<meta refresh {target}>")
        self.found += CSS.findall(attributes.get("style", ""))
        if "srcdoc" in attributes:  # a whole page inside an attribute
            self.found += requests_of_page(attributes["srcdoc"])
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.found += requests_of_text(
                data, CSS if self.inside == "style" else SCRIPT
            )


def requests_of_text(text, pattern):
    """Addresses in a style sheet (CSS) or a script (SCRIPT) that would be fetched."""
    return [match[0].strip() for match in pattern.finditer(text)]


def requests_of_page(text):
    """What one HTML page would fetch."""
    page = Page()
    page.feed(text)
    page.close()
    return page.found


def requests_of_folder(folder):
    """[(file, request)] of all pages, style sheets and scripts below a folder."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix not in (".html", ".svg", ".css", ".js", ".mjs"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix in (".html", ".svg"):
            requests = requests_of_page(text)
        else:
            requests = requests_of_text(text, CSS if path.suffix == ".css" else SCRIPT)
        found += [(path.relative_to(folder), request[:120]) for request in requests]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the rendered book")
    folder = parser.parse_args().folder
    if not (folder / "index.html").is_file():
        sys.exit(f"no index.html in {folder}: build the book first")
    found = requests_of_folder(folder)
    for path, request in found:
        print(f"{path}: {request}")
    pages = len(list(folder.rglob("*.html")))
    print(f"{len(found)} requests to the network in {pages} pages")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
