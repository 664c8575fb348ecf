#!/usr/bin/env python3
"""Render the book to _build/html/index.html, warnings as errors.

    python tools/build.py          from the outputs stored in the notebooks
    python tools/build.py --run    run every notebook first, in a copy under _build/run

The checked-in tree is never changed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from export_play import write_weights

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
PARTS = ["_config.yml", "_toc.yml", "book", "data", "flamingo_lite", "tools"]


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the notebooks first")
    args = parser.parse_args()
    started = time.perf_counter()
    copy = BUILD / ("run" if args.run else "stored")
    copy_book(copy)
    if args.run:
        call(sys.executable, copy / "tools" / "run_notebooks.py", cwd=copy)
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
    seconds = time.perf_counter() - started
    page = (BUILD / "html" / "index.html").relative_to(ROOT)
    print(f"the book is at {page} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
