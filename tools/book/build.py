#!/usr/bin/env python3
"""Render the book to _build/html/index.html, warnings as errors.

    python tools/book/build.py
        from the outputs stored in the notebooks
    python tools/book/build.py --run
        run every notebook first, in a copy under _build/run

The checked-in tree is never changed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT
from tools.book.export_play import write_curves, write_weights
from tools.book.pages import title_of

BUILD = ROOT / "_build"
MADE_WITH = """torch torchvision transformers tokenizers safetensors open_clip_torch
einops numpy pillow matplotlib jupyter-book sphinx""".split()
PARTS = ["_config.yml", "_toc.yml", "README.md", "pyproject.toml", "requirements.txt"]
PARTS += ["book", "data", "flamingo_lite", "tests", "tools"]


def call(*words, **kwargs):
    """Run a command; stop with its exit code if it fails."""
    done = subprocess.run([str(word) for word in words], **kwargs)
    if done.returncode:
        sys.exit(f"failed ({done.returncode}): {' '.join(str(word) for word in words)}")


def copy_book(target):
    """A fresh copy of what the book is made of."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=skip)
        else:
            shutil.copy(source, target / part)


def processor():
    """What the machine's processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [x.split(":", 1)[1] for x in lines if x.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def colophon(book, times):
    """The page that says with what, and on what, the book was made.

    Args:
        book: the folder of the notebooks.
        times: {notebook: seconds} of the last run of all of them; {} if unknown.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("processor", f"{processor()}, {os.cpu_count()} in all"),
        ("GPU", gpu),
        ("Python", platform.python_version()),
    ]
    for name in MADE_WITH:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    page = "# Colophon\n\nWhat these pages were rendered with, and where.\n\n"
    page += "| what | which |\n|:--|:--|\n"
    page += "".join(f"| {name} | {says} |\n" for name, says in rows)
    page += "\n## How long the notebooks run\n\n"
    if not times:
        page += "These pages show outputs that are stored in the notebooks. "
        page += "`make book` runs them, and then this page says how long each took.\n"
        return page
    page += "From top to bottom, one after the other, on the machine above.\n\n"
    page += "| chapter | seconds |\n|:--|--:|\n"
    for name, seconds in times.items():
        title = title_of(nbformat.read(book / name, as_version=4))
        page += f"| [{title}]({name}) | {seconds:.0f} |\n"
    page += f"| all | {sum(times.values()):.0f} |\n"
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the notebooks first")
    args = parser.parse_args()
    started = time.perf_counter()
    copy = BUILD / ("run" if args.run else "stored")
    copy_book(copy)
    times = copy / "times.json"
    if args.run:
        run = copy / "tools" / "book" / "run_notebooks.py"
        call(sys.executable, run, "--times", times, cwd=copy)
    seconds = json.loads(times.read_text()) if times.exists() else {}
    (copy / "book" / "colophon.md").write_text(colophon(copy / "book", seconds))
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    call(
        jupyter_book,
        "build",
        copy,
        "-W",
        "-n",
        "--keep-going",
        "-q",
        env=dict(os.environ),
    )
    page = copy / "_build" / "html" / "index.html"
    if not page.is_file():
        sys.exit("the book was built, but it has no index.html")
    shutil.rmtree(BUILD / "html", ignore_errors=True)
    shutil.move(page.parent, BUILD / "html")
    size, _ = write_weights(BUILD / "html" / "_static" / "flamingo_weights.js")
    print(f"the weights for its page play.html: {size / 1e6:.1f} MB")
    curves = BUILD / "html" / "_static" / "flamingo_curves.js"
    write_curves(curves, notebook=copy / "book" / "09_training.ipynb")
    seconds = time.perf_counter() - started
    page = (BUILD / "html" / "index.html").relative_to(ROOT)
    print(f"the book is at {page} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
