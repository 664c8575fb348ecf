#!/usr/bin/env python3
"""Run notebooks from top to bottom and store their outputs, 1..N, without time stamps.

python tools/book/run_notebooks.py                   all of book/, in order
python tools/book/run_notebooks.py book/03_*.ipynb   these
"""

import argparse
import base64
import io
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

LARGE = 60_000  # bytes; plots are below that, pictures of twice the pixels are not


def lighten(notebook):
    """Keep the large figures of a notebook in 256 colours, a third of the bytes."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            png = base64.b64decode(data.get("image/png", ""))
            if len(png) < LARGE:
                continue
            picture, file = Image.open(io.BytesIO(png)), io.BytesIO()
            if picture.mode == "P":
                continue
            few = picture.convert("RGB").quantize(256, kmeans=2)
            few.save(file, "PNG", optimize=True, dpi=picture.info.get("dpi"))
            if file.tell() < len(png):
                data["image/png"] = base64.b64encode(file.getvalue()).decode()


def run(path):
    """Execute one notebook in its own folder and write it back.

    Error cells must be tagged.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    lighten(notebook)
    nbformat.write(notebook, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--times", type=Path, help="a file for the seconds of each")
    args = parser.parse_args()
    paths = args.notebooks or sorted((ROOT / "book").glob("[0-9A-Z]*.ipynb"))
    seconds = {}
    os.environ.setdefault("FLAMINGO_LITE_SIZE", "tiny")
    for path in paths:
        started = time.perf_counter()
        try:
            run(path)
        except CellExecutionError as error:
            sys.exit(f"{path.name}: {error}")
        seconds[path.name] = time.perf_counter() - started
        print(f"{path.name}: {seconds[path.name]:.0f} s", flush=True)
    if args.times:
        args.times.write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
