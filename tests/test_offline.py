"""The offline check finds each planted request, and nothing on a clean page."""

import subprocess
import sys
from pathlib import Path

import pytest
from offline import requests_of_folder

FAR = "https://example.org/x"
FAULTS = {
    "script": f'<script async src="{FAR}.js"></script>',
    "script without a scheme": '<script src="//example.org/x.js"></script>',
    "script in capitals": f'<SCRIPT SRC="{FAR.upper()}"></SCRIPT>',
    "style sheet": f'<link rel="stylesheet" href="{FAR}.css">',
    "attributes the other way round": f"<link href='{FAR}.css' rel=stylesheet>",
    "preconnect": f'<link rel="preconnect" href="{FAR}">',
    "icon": f'<link rel="shortcut icon" href="{FAR}.ico">',
    "picture": f'<img alt="a" src="{FAR}.png">',
    "picture, second of a set": f'<img srcset="a.png 1x, {FAR}.png 2x">',
    "frame": f'<iframe src="{FAR}"></iframe>',
    "frame in an attribute": f"<iframe srcdoc='<img src=\"{FAR}\">'></iframe>",
    "video poster": f'<video poster="{FAR}.png"></video>',
    "sound": f'<audio><source src="{FAR}.ogg"></audio>',
    "object": f'<object data="{FAR}.svg"></object>',
    "picture in SVG": f'<svg><image xlink:href="{FAR}.png"/></svg>',
    "base": f'<base href="{FAR}">',
    "redirect": f'<meta http-equiv="refresh" content="0; url={FAR}">',
    "style attribute": f'<p style="background: url({FAR}.png)">a</p>',
    "style element": f"<style>@import '{FAR}.css';</style>",
    "font": f'<style>@font-face {{ src: url("{FAR}.woff2") }}</style>',
    "module": f'<script type="module">import a from "{FAR}.js";</script>',
    "module without a name": f'<script type="module">import "{FAR}.js";</script>',
    "import on demand": f'<script>import("{FAR}.js")</script>',
    "fetch": f"<script>fetch('{FAR}.json').then(show)</script>",
    "request": f'<script>r.open("GET", "{FAR}")</script>',
    "worker": f'<script>new Worker("{FAR}.js")</script>',
    "picture made by a script": f'<script>img.src = "{FAR}.png"</script>',
    "socket": '<script>new WebSocket("wss://example.org/x")</script>',
}
CLEAN = f"""<!doctype html><html><head>
<link rel="stylesheet" href="_static/book.css"><link rel="canonical" href="{FAR}">
<link rel="license" href="{FAR}"><script src="_static/mathjax/tex-svg.js"></script>
<script>const home = "{FAR}"; if (link.src == "{FAR}") link.href = home;</script>
<style>p {{ background: url(data:image/png;base64,AAAA) }}</style></head>
<body><a href="{FAR}">read more</a><img src="a.png"><svg xmlns="http://www.w3.org/2000/svg">
<use href="#arrow"/></svg><form action="{FAR}"></form>
<code>&lt;script src="{FAR}"&gt; fetch("{FAR}") url({FAR})</code></body></html>"""


@pytest.fixture
def book(tmp_path):
    """A rendered book of one clean page."""
    (tmp_path / "index.html").write_text(CLEAN)
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "book.css").write_text("p { background: url('a.png') }")
    return tmp_path


def test_a_clean_book_is_clean(book):
    assert requests_of_folder(book) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_request_is_found(book, fault):
    (book / "deep").mkdir()
    (book / "deep" / "page.html").write_text(
        f"<html><body>{FAULTS[fault]}</body></html>"
    )
    found = requests_of_folder(book)
    assert [path for path, _ in found] == [Path("deep/page.html")], found


@pytest.mark.parametrize(
    "name, text",
    [("theme.css", f"@import url({FAR})"), ("theme.js", f'import a from "{FAR}"')],
)
def test_style_sheets_and_scripts_are_read_too(book, name, text):
    (book / "_static" / name).write_text(text)
    assert [path.name for path, _ in requests_of_folder(book)] == [name]


def offline(folder):
    script = Path(__file__).with_name("offline.py")
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command(book):
    assert offline(book)[0] == 0
    (book / "page.html").write_text(FAULTS["script"])
    code, said = offline(book)
    assert code == 1 and "page.html" in said and FAR in said
    (book / "index.html").unlink()
    code, said = offline(book)
    assert code == 1 and "index.html" in said
