"""Large figures of a notebook are stored in few colours; small ones as they are."""

import base64
import io

import nbformat
import numpy as np
from PIL import Image

from tools.book.run_notebooks import LARGE, lighten


def stored(pixels):
    """A notebook with one cell that shows a picture, and the picture's bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    size = {"image/png": {"width": 100, "height": 100}}
    output = nbformat.v4.new_output("display_data", data, metadata=size)
    cell = nbformat.v4.new_code_cell("show()", outputs=[output])
    return nbformat.v4.new_notebook(cells=[cell]), file.getvalue()


def picture_in(notebook):
    return base64.b64decode(notebook.cells[0].outputs[0].data["image/png"])


def test_a_large_figure_has_fewer_bytes_and_looks_the_same():
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, 300)[:, None, None]
    pixels = (slope + rng.integers(0, 12, (300, 300, 3))).astype(np.uint8)
    notebook, before = stored(pixels)
    assert len(before) > LARGE
    lighten(notebook)
    after = picture_in(notebook)
    shown = np.asarray(Image.open(io.BytesIO(after)).convert("RGB"), dtype=float)
    assert len(after) < len(before) / 2
    assert np.abs(shown - pixels).mean() < 4  # of 255
    assert notebook.cells[0].outputs[0].metadata["image/png"]["width"] == 100
    lighten(notebook)
    assert picture_in(notebook) == after


def test_a_small_figure_stays_to_the_byte():
    notebook, before = stored(np.full((50, 50, 3), 7, dtype=np.uint8))
    lighten(notebook)
    assert picture_in(notebook) == before
