"""Pictures with text: caption folders, scenes, interleaving, batches, cached features."""

import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

from flamingo_lite.loss import make_labels

SIZE = 64  # pixels, the side of a scene
RELATIONS = ("to the left of", "above")
SPECIAL_TOKENS = ("<image>", "<|endofchunk|>")


def check_text(text, where):
    """Raise ValueError, naming `where`, if a caption is no text or holds a special token."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the caption is empty or not a text")
    for token in SPECIAL_TOKENS:
        if token in text:
            raise ValueError(f"{where}: the caption itself contains {token}; take it out")


def read_picture(path):
    """Open a picture file as RGB, upright, transparency on white.

    Raises:
        ValueError: the file, which is named, is not a picture that can be read.
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright).convert("RGB")


def load_captions(folder, skip_broken=False):
    """List a caption folder: pictures, and `metadata.jsonl` with file_name and text.

    Args:
        folder: a folder in the imagefolder convention of Hugging Face datasets.
        skip_broken: leave out, with a warning, rows that cannot be used.

    Returns:
        list of dict: each line of `metadata.jsonl`, and "path", its picture.

    Raises:
        FileNotFoundError: there is no `metadata.jsonl`.
        ValueError: a row cannot be used; the message names its line and file.
    """
    folder = Path(folder)
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(
            f'no {listing}: write one line {{"file_name": …, "text": …}} for each picture'
        )
    rows, broken = [], []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(check_row(folder, line, f"{listing}, line {number}"))
        except ValueError as error:
            if not skip_broken:
                raise
            broken.append(str(error))
    if broken:
        warnings.warn(f"left out {len(broken)} rows:\n" + "\n".join(broken), stacklevel=2)
    return rows


def check_row(folder, line, where):
    """One line of `metadata.jsonl` as a dict with "path", or ValueError naming `where`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError(f'{where}: no "file_name"')
    check_text(row.get("text"), where)
    path = folder / row["file_name"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {row['file_name']} is outside the folder")
    try:
        read_picture(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {**row, "path": path}


def is_held_out(one, other):
    """Say whether a pair of things is kept for testing: about one pair in eight.

    A hash decides, so the split is the same for everyone, in either order.
    """
    return zlib.crc32(" and ".join(sorted((one, other))).encode()) % 8 == 0


def load_sprites(rows):
    """Open the drawings of caption-folder rows: {thing: {studio: RGBA picture}}."""
    sprites = {}
    for row in rows:
        with Image.open(row["path"]) as picture:
            sprites.setdefault(row["thing"], {})[row["studio"]] = picture.convert("RGBA")
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


def make_scenes(rows, n_scenes, seed, pairs=0.5, held_out=False):
    """Draw captioned scenes of one or two things, always the same for the same seed.

    Args:
        rows: caption-folder rows with "thing", "studio" and "text"; the drawings to use.
        n_scenes: how many.
        seed: an int.
        pairs: share of scenes with two things.
        held_out: True, only pairs kept for testing; False, only the others.

    Returns:
        list of {"picture": RGB picture, "text": caption, "things": [names]}.
    """
    rng = np.random.default_rng(seed)
    sprites, names = load_sprites(rows), {row["thing"]: row["text"] for row in rows}
    things, scenes = list(names), []
    while len(scenes) < n_scenes:
        relation = str(rng.choice(RELATIONS)) if rng.random() < pairs else None
        chosen = list(rng.choice(things, 2 if relation else 1, replace=False))
        if relation and is_held_out(*chosen) != held_out:
            continue
        drawings = [sprites[t][rng.choice(list(sprites[t]))] for t in chosen]
        scenes.append(
            {
                "picture": draw_scene(rng, drawings, relation),
                "text": f" {relation} ".join(names[t] for t in chosen),
                "things": chosen,
            }
        )
    return scenes


def interleave(texts):
    """Chunks of one picture and its text: "<image>a lemon<|endofchunk|><image>…"."""
    for number, text in enumerate(texts, 1):
        check_text(text, f"text {number}")
    return "".join(f"<image>{text}<|endofchunk|>" for text in texts)


@torch.no_grad()
def encode_pictures(visual, image_processor, pictures, batch_size=96):
    """Run the frozen vision encoder once over all pictures, to train from the result.

    Args:
        visual: `Flamingo.vision_encoder`.
        image_processor: PIL picture to (3, H, W).
        pictures: list of RGB pictures.
        batch_size: pictures at a time.

    Returns:
        (pictures, F=1, v, d_img) float16, as `vision_features` wants it for one image.
    """
    device, features = next(visual.parameters()).device, []
    for start in range(0, len(pictures), batch_size):
        pixels = torch.stack([image_processor(p) for p in pictures[start : start + batch_size]])
        tokens = visual(pixels.to(device))[1]  # (pictures, v, d_img)
        features.append(rearrange(tokens.half(), "B v d -> B 1 v d"))
    return torch.cat(features)


def collate(examples, tokenizer):
    """Put sequences of different lengths into one batch, padded on the right.

    Args:
        examples: list of (features, texts): features (T_img, F, v, d_img) and as many texts.
        tokenizer: with `<image>` and `<|endofchunk|>` among its tokens.

    Returns:
        dict for `Flamingo.forward`: vision_features (B, T_img, F, v, d_img), lang_x,
        attention_mask and labels (B, T_txt). Missing pictures at the end are zeros.

    Raises:
        ValueError: a row has not as many texts as pictures; a text holds a special token.
    """
    for row, (features, texts) in enumerate(examples):
        if len(features) != len(texts):
            raise ValueError(f"row {row}: {len(features)} pictures, but {len(texts)} texts")
    vision_features = torch.nn.utils.rnn.pad_sequence(
        [features.float() for features, _ in examples], batch_first=True
    )
    tokenizer.padding_side = "right"
    batch = tokenizer(
        [interleave(texts) for _, texts in examples], padding=True, return_tensors="pt"
    )
    media, eoc = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    labels = make_labels(batch.input_ids, media, eoc, batch.attention_mask)
    return {
        "vision_features": vision_features,
        "lang_x": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": labels,
    }
