# Written by tools/sync.py from book/07_data.ipynb.
# Edit the notebook, not this file.
"""Pictures with text: caption folders, scenes, interleaving, batches, cached features.

A batch: vision_features (B, T_img, F, v, d_img); lang_x, attention_mask and labels,
(B, T_txt) each.
"""

import json
import warnings
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

from flamingo_lite.loss import IGNORE, make_labels

SIZE = 64  # pixels, the side of a scene
RELATIONS = ("to the left of", "above")
SPECIAL_TOKENS = ("<image>", "<|endofchunk|>")


def check_text(text, where, special_tokens=SPECIAL_TOKENS):
    """Raise ValueError, naming `where`, for a text that cannot be a caption."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the caption is empty or not a text")
    if text.encode(errors="ignore").decode() != text:
        raise ValueError(f"{where}: the caption is not valid Unicode")
    for token in special_tokens:
        if token in text:
            raise ValueError(f"{where}: take {token} out of the caption")


def read_picture(path):
    """Open a picture file as RGB, upright, transparency on white.

    Args:
        path: a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file; its first frame is taken.

    Raises:
        ValueError: the file, which is named, is not a picture that can be read.
    """
    formats = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    try:
        if not Path(path).is_file():
            raise ValueError("there is no such file, or it is no ordinary one")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as picture:
                upright = ImageOps.exif_transpose(picture)
        if upright.mode == "F" or (upright.mode, picture.format) == ("I", "TIFF"):
            raise ValueError("brightness in 32 bits; save it with 8 or 16")
        clear, deep = upright.info.get("transparency"), upright.mode.startswith("I")
        if (clear is not None and deep) or (type(clear) is tuple and max(clear) > 255):
            raise ValueError("a transparent colour in 16 bits; save it with 8")
        if deep:  # 16 bits: Pillow would clip, so scale
            grey = (np.asarray(upright) / 257).clip(0, 255)
            upright = Image.fromarray(grey.astype(np.uint8))
        if max(upright.size) > 3000 * min(upright.size):
            raise ValueError(f"a strip of {upright.width} x {upright.height} pixels")
        upright = upright.convert("RGBA")
    except Exception as error:  # a broken file makes decoders raise almost anything
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright).convert("RGB")


def check_row(folder, line, where):
    """A line of `metadata.jsonl` as a dict with "path"; ValueError names `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError(f'{where}: no "file_name"')
    check_text(row.get("text"), where)
    path = Path(folder, row["file_name"])
    try:
        if not path.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{row['file_name']} is outside the folder")
        read_picture(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return {**row, "path": path}


def load_captions(folder, skip_broken=False):
    """List a caption folder: pictures, and `metadata.jsonl` with file_name and text.

    Args:
        folder: a folder in the imagefolder convention of Hugging Face datasets.
        skip_broken: leave out, with a warning, rows that cannot be used.

    Returns:
        list of dict: each line of `metadata.jsonl`, and "path", its picture.

    Raises:
        FileNotFoundError: there is no `metadata.jsonl`.
        ValueError: a row cannot be used, and its line and file are named; or none can.
    """
    listing = Path(folder) / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(
            f'no {listing}: write a line {{"file_name": …, "text": …}} for each picture'
        )
    rows, broken = [], []
    for number, line in enumerate(listing.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                rows.append(check_row(folder, line, f"{listing}, line {number}"))
        except ValueError as error:
            if not skip_broken:
                raise
            broken.append(str(error))
    if broken:
        broken.insert(0, f"left out {len(broken)} rows:")
        warnings.warn("\n".join(broken), stacklevel=2)
    if not rows:
        raise ValueError(f"{listing}: there is no row that can be used")
    return rows


def load_sprites(rows):
    """Open the drawings of caption-folder rows: {thing: {studio: RGBA picture}}."""
    sprites = {}
    for row in rows:
        with Image.open(row["path"]) as picture:
            studios = sprites.setdefault(row["thing"], {})
            studios[row["studio"]] = picture.convert("RGBA")
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


def is_held_out(one, other):
    """Say whether a pair of things is kept for testing: about one pair in eight.

    A hash decides, so the split is the same for everyone, in either order.
    """
    return zlib.crc32(" and ".join(sorted((one, other))).encode()) % 8 == 0


def make_scenes(rows, n_scenes, seed, pairs=0.5, held_out=False):
    """Draw captioned scenes of one or two things, always the same for the same seed.

    Args:
        rows: caption-folder rows with "thing", "studio" and "text": what to draw.
        n_scenes: how many.
        seed: an int.
        pairs: share of scenes with two things.
        held_out: True, only pairs kept for testing; False, only the others.

    Returns:
        list of {"picture": RGB picture, "text": caption, "things": [names],
        "studios": [theirs], "relation": None or one of RELATIONS}.

    Raises:
        ValueError: there is no pair to draw.
    """
    rng = np.random.default_rng(seed)
    sprites, names = load_sprites(rows), {row["thing"]: row["text"] for row in rows}
    things, scenes = list(names), []
    if pairs and all(is_held_out(*p) != held_out for p in combinations(things, 2)):
        raise ValueError(f"{len(things)} things, and no pair with held_out={held_out}")
    while len(scenes) < n_scenes:
        relation = str(rng.choice(RELATIONS)) if rng.random() < pairs else None
        chosen = rng.choice(things, 2 if relation else 1, replace=False).tolist()
        while relation and is_held_out(*chosen) != held_out:
            chosen = rng.choice(things, 2, replace=False).tolist()
        studios = [str(rng.choice(list(sprites[t]))) for t in chosen]
        drawings = [sprites[t][s] for t, s in zip(chosen, studios, strict=True)]
        picture = draw_scene(rng, drawings, relation)
        text = f" {relation} ".join(names[t] for t in chosen)
        scene = {"picture": picture, "text": text, "relation": relation}
        scenes.append({**scene, "things": chosen, "studios": studios})
    return scenes


def whole_text(text, where=None):
    """A text as one string; `text` may be a pair of strings, (given, asked)."""
    if not isinstance(text, tuple):
        return text
    if len(text) != 2 or not all(isinstance(part, str) for part in text):
        place = f"{where}: " if where else ""
        raise ValueError(f"{place}want a text or (given, asked), got {text!r}")
    return " ".join(part for part in text if part)


def interleave(texts):
    """Chunks of one picture and its text: "<image>a lemon<|endofchunk|><image>…".

    A text may be a pair, (given, asked): see `collate`.
    """
    if isinstance(texts, str):  # else each letter would get a picture
        raise ValueError(f"want a list of texts, got the text {texts!r}")
    where = [f"text {number}" for number in range(1, len(texts) + 1)]
    texts = [whole_text(*one) for one in zip(texts, where, strict=True)]
    for one in zip(texts, where, strict=True):
        check_text(*one)
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
        (pictures, F=1, v, d_img) float16 in main memory; for one picture, what
        `collate` wants.
    """
    device, features = next(visual.parameters()).device, []
    for start in range(0, len(pictures), batch_size):
        some = pictures[start : start + batch_size]
        pixels = torch.stack([image_processor(p) for p in some])  # (some, 3, H, W)
        tokens = visual(pixels.to(device))[1]  # (some, v, d_img)
        features.append(rearrange(tokens.half().cpu(), "some v d -> some 1 v d"))
    return torch.cat(features)


def _special_tokens(tokenizer):
    """All special tokens of a tokenizer; ValueError if ours are not among them."""
    added = tokenizer.added_tokens_decoder.values()
    special_tokens = {str(token) for token in added if token.special}
    if lacking := set(SPECIAL_TOKENS) - special_tokens:
        raise ValueError(f"the tokenizer has no special token {min(lacking)}")
    return special_tokens


def _first_words(text):
    """The beginning of a text or of anything else, for an error message."""
    if not isinstance(text, str):
        return repr(text)[:60]
    return repr(text if len(text) <= 40 else text[:40].rsplit(" ", 1)[0] + " …")


def _given(texts):
    """Where in `interleave(texts)` the given parts stand: (start, end), in characters.

    The blank after a given part belongs to what is asked.
    """
    place = 0
    for text in texts:
        place += len("<image>")
        if isinstance(text, tuple):
            yield place, place + len(text[0])
        place += len(whole_text(text)) + len("<|endofchunk|>")


def collate(examples, tokenizer):
    """Put sequences of different lengths into one batch, padded on the right.

    Args:
        examples: list of (features, texts), (T_img, F, v, d_img) and T_img texts. A
            text is a string or a pair of strings, (given, asked): `given` has no label.
        tokenizer: with `<image>` and `<|endofchunk|>` among its tokens.

    Returns:
        dict for `Flamingo.forward`: vision_features (B, T_img, F, v, d_img), lang_x,
        attention_mask and labels (B, T_txt). Missing pictures at the end are zeros.

    Raises:
        ValueError: a row has not as many texts as pictures, pictures of another shape,
            a special token in a text, or too many tokens; there is no row; the
            tokenizer lacks `<image>` or `<|endofchunk|>`.
    """
    special_tokens = _special_tokens(tokenizer)
    if not examples:
        raise ValueError("there is no row")
    shape = tuple(examples[0][0].shape[1:])  # (F, v, d_img)
    for row, (features, texts) in enumerate(examples):
        if len(features) != len(texts):
            counts = f"{len(features)} pictures, but {len(texts)} texts"
            raise ValueError(f"row {row}: {counts}")
        if (own := tuple(features.shape[1:])) != shape:
            raise ValueError(f"row {row}: pictures are {own}, those of row 0 {shape}")
        for number, text in enumerate(texts, 1):
            where = f"row {row}, text {number}"
            check_text(whole_text(text, where), where, special_tokens)
    pictures = [features.float() for features, _ in examples]
    lines = [interleave(texts) for _, texts in examples]
    settings = {"padding_side": "right", "return_offsets_mapping": True}
    batch = tokenizer(lines, padding=True, return_tensors="pt", **settings)
    starts, ends = batch.offset_mapping.unbind(dim=2)  # (B, T_txt), in characters
    T_txt, most = batch.input_ids.shape[1], tokenizer.model_max_length
    if T_txt > most:
        row = int(batch.attention_mask.sum(dim=1).argmax())
        words = _first_words(whole_text(examples[row][1][0]))
        raise ValueError(
            f"row {row}: {T_txt} tokens, but the model reads {most}: {words}"
        )
    media, eoc = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    labels = make_labels(batch.input_ids, media, eoc, batch.attention_mask)
    for row, (_, texts) in enumerate(examples):
        for start, end in _given(texts):
            told = (starts[row] < end) & (ends[row] > start)  # (T_txt,)
            labels[row, told] = IGNORE
    return {
        "vision_features": torch.nn.utils.rnn.pad_sequence(pictures, batch_first=True),
        "lang_x": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": labels,
    }


def _alternatives(texts, sequences):
    """Of each item its texts, and of each text [(where, text), …], one to be drawn."""
    if isinstance(texts, str):
        raise ValueError(f"want a list of texts, got the text {_first_words(texts)}")
    for number, item in enumerate(texts):
        named = {f"texts[{number}]": item}
        if sequences:
            if not isinstance(item, (list, tuple)):
                want = f"texts[{number}]: want a list of texts, one for each picture"
                raise ValueError(f"{want}, got {_first_words(item)}")
            named = {f"texts[{number}][{n}]": text for n, text in enumerate(item)}
        if empty := [name for name, text in named.items() if text == []]:
            raise ValueError(f"{empty[0]}: there is no text in the list")
        yield [
            [(f"{name}[{n}]", one) for n, one in enumerate(text)]
            if isinstance(text, list)
            else [(name, text)]
            for name, text in named.items()
        ]


def check_texts(texts, tokenizer, sequences=False):
    """Check all texts of a training before its first step.

    Args:
        texts: list of texts, one for each picture. A text is a string, a pair of
            strings, (given, asked), or a list of such texts, of which one is drawn.
        tokenizer: with `<image>` and `<|endofchunk|>` among its tokens.
        sequences: True, each item is a list of texts, one for each of its pictures.

    Raises:
        ValueError: a text is empty or none, or has a special token in it; or an item
            has too many tokens. It is named: `texts[3] ('a lemon'): …`.
    """
    special_tokens, items, lines = _special_tokens(tokenizer), [], []
    for item in _alternatives(texts, sequences):
        items.append([])
        for several in item:
            items[-1].append(range(len(lines), len(lines) + len(several)))
            for where, text in several:
                where = f"{where} ({_first_words(text)})"
                check_text(whole_text(text, where), where, special_tokens)
                lines.append(interleave([text]))
    settings = {"add_special_tokens": False, "verbose": False}
    ids = tokenizer(lines, **settings).input_ids if lines else []
    n_start, most = len(tokenizer("").input_ids), tokenizer.model_max_length
    for number, item in enumerate(items):
        longest = [max(several, key=lambda i: len(ids[i])) for several in item]
        n_tokens = n_start + sum(len(ids[i]) for i in longest)
        if n_tokens > most:
            words = lines[max(longest, key=lambda i: len(ids[i]))]
            where = f"texts[{number}] ({_first_words(words[len('<image>') :])})"
            raise ValueError(f"{where}: {n_tokens} tokens, but the model reads {most}")
