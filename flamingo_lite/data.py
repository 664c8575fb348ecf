import json
import zlib
from pathlib import Path

from PIL import Image, ImageOps

SIZE = 64


def is_held_out(one, other):
    """Say whether a pair of things is kept for testing: about one pair in eight.

    A hash decides, so the split is the same for everyone, in either order.
    """
    return zlib.crc32(" and ".join(sorted((one, other))).encode()) % 8 == 0


def load_sprites(rows):
    """Open the drawings of caption-folder rows: {thing: {studio: RGBA picture}}."""
    sprites = {}
    for row in rows:
        picture = Image.open(row["path"]).convert("RGBA")
        sprites.setdefault(row["thing"], {})[row["studio"]] = picture
    return sprites


def draw_scene(rng, drawings, relation=None, background=None):
    """Put one drawing, or two in a relation, on one canvas.

    Args:
        rng: numpy Generator; decides sizes, places and the background.
        drawings: one or two RGBA pictures.
        relation: None for one, "to the left of" or "above" for two.
        background: an RGB triple; a random pale colour when None.

    Returns:
        RGB picture, SIZE x SIZE.
    """
    if background is None:
        background = tuple(int(c) for c in rng.integers(200, 256, 3))
    canvas = Image.new("RGB", (SIZE, SIZE), background)
    for i, drawing in enumerate(drawings):
        if relation is None:
            size = int(rng.integers(36, 61))
            x, y = (int(c) for c in rng.integers(0, SIZE - size + 1, 2))
        else:
            size = int(rng.integers(25, 32))
            along = int(rng.integers(0, SIZE // 2 - size + 1)) + i * SIZE // 2
            across = int(rng.integers(0, SIZE - size + 1))
            x, y = (along, across) if relation == "to the left of" else (across, along)
        small = drawing.resize((size, size), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            small = ImageOps.mirror(small)
        canvas.paste(small, (x, y), small)
    return canvas
