# Written by tools/book/sync.py from book/07_data.ipynb.
# Edit the notebook, not this file.
"""Pictures with text: caption folders, scenes, interleaving, batches, cached features.

A batch: vision_features (B, T_img, F, v, d_img); lang_x, attention_mask and labels,
(B, T_txt) each.
"""

__all__ = [
    "SIZE",
    "RELATIONS",
    "SPECIAL_TOKENS",
    "FORMATS",
    "LISTINGS",
    "trim",
    "check_text",
    "read_picture",
    "check_row",
    "load_captions",
    "merge_captions",
    "hold_out",
    "load_sprites",
    "draw_scene",
    "is_held_out",
    "make_scenes",
    "whole_text",
    "interleave",
    "in_order",
    "held_picture",
    "picture_path",
    "picture_name",
    "as_picture",
    "size_to_decode",
    "encode_pixels",
    "encode_pictures",
    "collate",
    "check_texts",
]

import csv
import io
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Sized
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import chain, combinations, islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.features import check as is_built_in
from tqdm import tqdm

from flamingo_lite.loss import IGNORE, make_labels
from flamingo_lite.vision import rgb_on_white

SIZE = 64  # pixels, the side of a scene
RELATIONS = ("to the left of", "above")
SPECIAL_TOKENS = ("<image>", "<|endofchunk|>")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# What is no word at the end of a text: blanks of every kind, and marks of no width.
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))
_BLANKS += "\ufeff\u200b\u200c\u200d\u2060"


def trim(text):
    """A text, or a list of them, without blanks and invisible marks at the ends."""
    if isinstance(text, list):
        return [trim(one) for one in text]
    return text.strip(_BLANKS) if isinstance(text, str) else text


def check_text(text, where, special_tokens=SPECIAL_TOKENS):
    """Raise ValueError, naming `where`, for a text that cannot be a caption."""
    if not isinstance(text, str) or not trim(text):
        raise ValueError(f"{where}: the caption is empty or not a text")
    if text.encode(errors="ignore").decode() != text:
        raise ValueError(f"{where}: the caption is not valid Unicode")
    for token in special_tokens:
        if token in text:
            raise ValueError(f"{where}: take {token} out of the caption")


_BRANDS = dict.fromkeys("heic heix heim heis hevc hevx mif1 msf1".split(), "HEIF")
_BRANDS |= {"avif": "AVIF", "avis": "AVIF"}
_ADVICE = {
    "HEIF": "a HEIC photograph of a phone: pip install pillow-heif",
    "AVIF": "an AVIF picture, which this Pillow cannot read: pip install -U pillow",
}


def _format_of_phones(head):
    """The format of a HEIC or AVIF file with these first bytes, or None.

    Raises:
        ValueError: it is one, and Pillow has nothing to read it with.
    """
    kind = _BRANDS.get(head[8:12].decode(errors="replace"))
    if kind is None or head[4:8] != b"ftyp":
        return None
    if kind == "HEIF":
        with suppress(ImportError):
            import_module("pillow_heif").register_heif_opener()
    Image.init()
    if kind not in Image.OPEN or (kind == "AVIF" and not is_built_in("avif")):
        raise ValueError(f"it is {_ADVICE[kind]}, or convert it to JPEG")
    return kind


def _opened(path, content):
    """A picture of one of FORMATS, or else of HEIC or AVIF, if Pillow can read it."""
    source = path if content is None else io.BytesIO(content)
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        if content is None:
            with open(path, "rb") as file:
                content = file.read(12)
        if (kind := _format_of_phones(content[:12])) is None:
            raise
        return Image.open(source, formats=(kind,))


@contextmanager
def _open_picture(path, content=None):
    """Open a picture file, whose header is read; the pixels are when they are used.

    Whatever goes wrong with it, in the block too, is a ValueError that names the file.
    `content` is the file's bytes, where they have been read already.
    """
    try:
        if content is None and not Path(path).is_file():
            raise ValueError("there is no such file, or it is no ordinary one")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(path, content) as picture:
                yield picture
    except Exception as error:  # a broken file makes decoders raise almost anything
        raise ValueError(f"cannot read the picture {path}: {error}") from error


def read_picture(path, least=None, content=None):
    """Read a picture file as RGB, upright, transparency on white.

    Args:
        path: a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file; its first frame is taken.
            A HEIC file with pillow-heif, an AVIF file if Pillow can.
        least: pixels; a JPEG is decoded at a half, a quarter or an eighth of its size
            if no side gets shorter than that. None, at its whole size.
        content: the file's bytes, if somebody has read them already.

    Raises:
        ValueError: the file, which is named, is not a picture that can be read.
    """
    with _open_picture(path, content) as picture:
        if least is not None:
            picture.draft(None, (least, least))  # of other formats it does nothing
        return rgb_on_white(picture)


def _columns(row):
    return "the columns are " + ", ".join(repr(name)[:40] for name in list(row)[:20])


def _file_name(row, where):
    """The name in a row's "file_name", or in its only "…_file_name"."""
    names = [name for name in row if name.endswith("_file_name")]
    names = ["file_name"] if "file_name" in row else names
    if several := [name for name in row if name.endswith("file_names")]:
        raise ValueError(f'{where}: "{several[0]}": give each picture its own line')
    if len(names) != 1:
        raise ValueError(f'{where}: no "file_name"; {_columns(row)}')
    if not isinstance(row[names[0]], str):
        raise ValueError(f'{where}: "{names[0]}" is not a text')
    return row[names[0]].replace("\\", "/")  # as the convention does


def check_row(folder, row, where, check_picture=False):
    """A line of a listing, a dict, with its "path"; ValueError names `where`.

    Its text is without blanks and invisible marks at the ends.

    Args:
        check_picture: True decodes the picture, a JPEG at an eighth of its size, which
            finds what is cut off too; False reads no more than its header.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: want an object with a file_name and a text")
    path = Path(folder, _file_name(row, where))
    if "text" not in row:
        raise ValueError(f'{where}: no "text"; {_columns(row)}; rename one of them')
    row = {**row, "text": trim(row["text"])}
    if row["text"] == []:
        raise ValueError(f"{where}: there is no caption in the list")
    if isinstance(row["text"], list):
        for number, text in enumerate(row["text"], 1):
            check_text(text, f"{where}, text {number}")
    else:
        check_text(row["text"], where)
    try:
        if not path.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{path} is outside the folder")
        with _open_picture(path) as picture:
            if check_picture:
                picture.draft(None, (SIZE, SIZE))
                rgb_on_white(picture)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return {**row, "path": path}


def _find_listing(folder, split):
    """The listing of a caption folder, or of one of the folders in it."""

    def listings(place):
        return [place / name for name in LISTINGS if (place / name).is_file()]

    def splits():
        there = sorted(p.name for p in folder.iterdir() if p.is_dir() and listings(p))
        return ", ".join(there)

    if not folder.is_dir():
        kind = "is a file: give its folder" if folder.is_file() else "is no folder"
        raise FileNotFoundError(f"{folder} {kind}")
    if split is not None:
        if split != Path(split).name or not listings(folder / split):
            there = splits() or "no folder with a listing"
            raise FileNotFoundError(f"no split {split!r} in {folder}, but {there}")
        folder = folder / split
    found = listings(folder)
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{folder} has {names}: take one of them away")
    if not found and (there := splits()):
        raise FileNotFoundError(
            f"no {LISTINGS[0]} in {folder}, but in its folders {there}: choose one "
            "with split="
        )
    if not found:
        raise FileNotFoundError(
            f"no {folder / LISTINGS[0]}: write a line "
            '{"file_name": …, "text": …} for each picture'
        )
    return found[0]


def _read_lines(listing):
    """Of each line of a `metadata.jsonl` its number, and what it says or its error."""
    for number, line in enumerate(listing.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"{listing}, line {number}: not JSON: {error}")


def _read_table(listing):
    """Of each row of a `metadata.csv` its line number, and a dict or its error."""
    try:
        text = listing.read_bytes().decode("utf-8-sig")  # spreadsheets write a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing}: save it as UTF-8: {error}") from error
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(table.fieldnames or [])
        if len(set(names)) < len(names):
            raise ValueError(f"{listing}: two columns of one name; {_columns(names)}")
        for row in table:
            number = table.line_num
            if None in row or None in row.values():
                row = ValueError(
                    f"{listing}, line {number}: want {len(names)} values, as many as "
                    "columns; a text with a comma in it stands in quotation marks"
                )
            yield number, row
    except csv.Error as error:
        where = f"{listing}, line {table.line_num + 1}"
        raise ValueError(f"{where}: {error}; see to its quotation marks") from error


def load_captions(folder, skip_broken=False, split=None, check_pictures=None):
    """List a caption folder: pictures, and a listing with their file_name and text.

    Args:
        folder: a folder in the imagefolder convention of Hugging Face datasets, with a
            `metadata.jsonl` or `metadata.csv`. A text may be a list of captions.
        skip_broken: leave out, with a warning, rows that cannot be used.
        split: the one of its folders that is meant, e.g. "train", each with a listing.
        check_pictures: True decodes all pictures now, with a progress bar if it takes
            long; False reads their headers only. None: True if broken ones are to be
            left out.

    Returns:
        list of dict: each row of the listing, and "path", its picture.

    Raises:
        FileNotFoundError: there is no listing.
        ValueError: a row cannot be used, and its line and file are named; or none can.
    """
    listing = _find_listing(Path(folder), split)
    if listing.suffix == ".parquet":
        raise ValueError(
            f"{listing}: Parquet is not read here. Write it anew, "
            'pandas.read_parquet("metadata.parquet").to_json("metadata.jsonl", '
            'orient="records", lines=True), and take the old one away'
        )
    check_pictures = skip_broken if check_pictures is None else check_pictures
    lines = list((_read_table if listing.suffix == ".csv" else _read_lines)(listing))
    rows, broken = [], []
    for number, row in tqdm(lines, "pictures", delay=2, leave=False):
        try:
            if isinstance(row, ValueError):
                raise row
            where = f"{listing}, line {number}"
            rows.append(check_row(listing.parent, row, where, check_pictures))
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


def merge_captions(rows):
    """One row for each picture, with all its different captions.

    Args:
        rows: of `load_captions`. What else is in them is the picture's first row's.

    Returns:
        list of dict. The "text" of a picture with several captions is a list.
    """
    merged = {}
    for row in rows:
        texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
        held = merged.setdefault(row["path"], {**row, "text": []})
        held["text"] += [text for text in texts if text not in held["text"]]
    for row in merged.values():
        row["text"] = row["text"][0] if len(row["text"]) == 1 else row["text"]
    return list(merged.values())


def hold_out(rows, every=5):
    """Part rows in two: those to train on, and about one in `every` to test with.

    The file_name of a row decides alone, so it stays in its part when others come or
    go. Several rows of one picture stay together.

    Returns:
        (list of dict, list of dict).

    Raises:
        ValueError: one of the two would be empty.
    """
    if every != int(every) or every < 2:
        raise ValueError(f"hold out one in how many? want 2 or more, got {every}")
    parts = [], []
    for row in rows:
        parts[zlib.crc32(row["file_name"].encode()) % every == 0].append(row)
    if not all(parts):
        kept, held = map(len, parts)
        raise ValueError(
            f"of {kept + held} pictures one in {every} is to be kept for the test, and "
            f"that leaves {kept} to train on and {held} to test with: take more "
            "pictures, or make the two folders yourself"
        )
    return parts


def load_sprites(rows):
    """Open the drawings of caption-folder rows: {thing: {studio: RGBA picture}}."""
    sprites = {}
    for number, row in enumerate(rows):
        if lacking := [name for name in ("thing", "studio") if name not in row]:
            raise ValueError(f'rows[{number}]: no "{lacking[0]}"; {_columns(row)}')
        with _open_picture(row["path"]) as picture:
            sprite = ImageOps.exif_transpose(picture)
            if not sprite.has_transparency_data:
                sprite = rgb_on_white(sprite)
            sprites.setdefault(row["thing"], {})[row["studio"]] = sprite.convert("RGBA")
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
        ValueError: there is no pair to draw, or a drawing cannot be read.
    """
    rng = np.random.default_rng(seed)
    sprites, names = load_sprites(rows), {row["thing"]: row["text"] for row in rows}
    if several := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(f"want one text for each thing, got {several[0]!r}")
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
    """A text as one string; `text` may be a pair of strings, (given, answer).

    Blanks at the ends, of each part, are left out: they would be tokens of their own.
    """
    if not isinstance(text, tuple):
        return trim(text)
    if len(text) != 2 or not all(isinstance(part, str) for part in text):
        place = f"{where}: " if where else ""
        raise ValueError(f"{place}want a text or (given, answer), got {text!r}")
    return " ".join(filter(None, map(trim, text)))


def interleave(texts):
    """Chunks of one picture and its text: "<image>a lemon<|endofchunk|><image>…".

    A text may be a pair, (given, answer): see `collate`.
    """
    if isinstance(texts, str):  # else each letter would get a picture
        raise ValueError(f"want a list of texts, got the text {texts!r}")
    where = [f"text {number}" for number in range(1, len(texts) + 1)]
    texts = [whole_text(*one) for one in zip(texts, where, strict=True)]
    for one in zip(texts, where, strict=True):
        check_text(*one)
    return "".join(f"<image>{text}<|endofchunk|>" for text in texts)


def in_order(items):
    """A list by place of a column or a table of pandas's, which are asked by label."""
    if not hasattr(items, "iloc"):
        return items
    return items.to_dict("records") if hasattr(items, "columns") else list(items)


def held_picture(item, where):
    """The PIL picture or the path that an item is, or as a row has; else TypeError."""
    if not isinstance(item, dict):
        return item
    held = [item.get(name) for name in ("picture", "image")]
    held = [one for one in held if isinstance(one, Image.Image)]
    if not held and not item.get("path"):
        raise TypeError(f'{where}: no "picture" and no "path"; {_columns(item)}')
    return held[0] if held else item["path"]


def picture_path(item, where="picture"):
    """The file that a picture is of, or None. Args: as for `held_picture`."""
    held = held_picture(item, where)
    is_file = isinstance(held, (str, os.PathLike))
    return (held if is_file else getattr(held, "filename", None)) or None


def picture_name(item, where):
    """What an error calls a picture: `where`, and its file if it has one."""
    path = picture_path(item, where)
    return f"{where} ({path})" if path else where


def as_picture(item, where, least=None, content=None):
    """RGB on white, of a PIL picture, a file or a row; errors name `where` and a file.

    Args:
        item: see `encode_pictures`.
        where: what to call it.
        least, content: of a file, see `read_picture`.
    """
    item = held_picture(item, where)
    try:
        if isinstance(item, (str, os.PathLike)):
            return read_picture(item, least, content)  # whose errors name the file
        where = picture_name(item, where)
        return rgb_on_white(item)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def size_to_decode(visual):
    """Pixels: twice a tower's picture, so that there is still something to scale down.

    None, at its whole size, for a tower that does not say what it takes.
    """
    image_size = getattr(getattr(visual, "visual", visual), "image_size", None)
    return None if image_size is None else 2 * int(np.max(image_size))


def _check_finite(tokens, halves, names):
    """Raise ValueError for features, (some, v, d_img), with an inf or nan in them."""
    bad = ~halves.isfinite().flatten(1).all(dim=1)  # (some,)
    if bad.any():
        number = int(bad.nonzero()[0])
        largest, most = tokens[number].abs().max().item(), torch.finfo(halves.dtype).max
        fault = "its features are not finite"
        if math.isfinite(largest):
            fault = f"its features reach {largest:.3g}, but {halves.dtype} only "
            fault += f"{most:.3g}: take dtype=torch.float32"
        raise ValueError(f"{names[number]}: {fault}")


@torch.no_grad()
def encode_pixels(visual, pixels, names, dtype=torch.float16):
    """Run the frozen vision encoder over a few pictures: (some, F=1, v, d_img), on CPU.

    Args:
        visual: `Flamingo.vision_encoder`.
        pixels: (some, 3, H, W), as the image processor makes them.
        names: what an error calls each of them.
        dtype: of the result.

    Raises:
        ValueError: features that are not finite; or it is no such encoder.
    """
    visual = getattr(visual, "visual", visual)  # of a VisionEncoder
    weight = next(visual.parameters())
    # What is kept is not rounded, wherever the caller is.
    with torch.autocast(weight.device.type, enabled=False):
        tokens = visual(pixels.to(weight.device, weight.dtype))[1]  # (some, v, d_img)
    if tokens.ndim != 3:
        raise ValueError("want the vision encoder of a Flamingo, with its tokens")
    halves = tokens.to(dtype).cpu()
    _check_finite(tokens, halves, names)
    return rearrange(halves, "some v d -> some 1 v d")


def _encoded(visual, image_processor, pictures, batch_size, dtype):
    """The features of `batch_size` pictures after those of others."""
    numbered, least = enumerate(pictures), size_to_decode(visual)
    while some := list(islice(numbered, batch_size)):
        named = [(one, f"pictures[{number}]") for number, one in some]
        read = [as_picture(*one, least) for one in named]
        pixels = torch.stack([image_processor(p) for p in read])  # (some, 3, H, W)
        names = [picture_name(*one) for one in named]
        yield encode_pixels(visual, pixels, names, dtype)  # (some, 1, v, d_img)


def encode_pictures(
    visual,
    image_processor,
    pictures,
    batch_size=96,
    dtype=torch.float16,
    progress=False,
):
    """Run the frozen vision encoder once over all pictures, to train from the result.

    Args:
        visual: `Flamingo.vision_encoder`.
        image_processor: PIL picture to (3, H, W).
        pictures: list or iterator of PIL pictures, of paths, or of rows with one of
            them: of `load_captions`, `make_scenes`, an image dataset of Hugging
            Face's or a table of pandas's. Files are opened batch by batch, a large
            JPEG at a half, a quarter or an eighth of its size, but at least twice
            what the encoder takes.
        batch_size: pictures at a time.
        dtype: of the result.
        progress: True shows a progress bar.

    Returns:
        (pictures, F=1, v, d_img) float16 in main memory; for one picture, what
        `collate` wants.

    Raises:
        TypeError, ValueError: a picture is none, cannot be read, or has features that
            are not finite; it is named by its number, `pictures[3]`, and its file.
    """
    pictures = in_order(pictures)
    if isinstance(pictures, (Image.Image, dict, str, os.PathLike)):
        pictures = [pictures]
    if not isinstance(pictures, Iterable):
        raise TypeError(f"want a list of pictures, got {type(pictures).__name__}")
    shown = tqdm(pictures, "pictures", disable=not progress)
    batches = _encoded(visual, image_processor, shown, batch_size, dtype)
    if (first := next(batches, None)) is None:
        raise ValueError("there are no pictures")
    if not isinstance(pictures, Sized):  # only its end says how many there are
        return torch.cat([first, *batches])
    features = first.new_empty(len(pictures), *first.shape[1:])
    start = 0
    for some in chain([first], batches):
        features[start : start + len(some)] = some
        start += len(some)
    if start < len(pictures):
        raise ValueError(f"pictures ended after {start} of {len(pictures)}")
    return features


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

    The blank after a given part belongs to the answer.
    """
    place = 0
    for text in texts:
        place += len("<image>")
        if isinstance(text, tuple):
            yield place, place + len(trim(text[0]))
        place += len(whole_text(text)) + len("<|endofchunk|>")


def _check_examples(examples, special_tokens):
    """Raise ValueError, naming the row, for what `collate` cannot take."""
    if not examples:
        raise ValueError("there is no row")
    for row, (features, texts) in enumerate(examples):
        shape = tuple(getattr(features, "shape", ()))
        if len(shape) not in (4, 5):
            got = shape or type(features).__name__
            want = "(T_img, F, v, d_img) or (T_img, F, 3, H, W)"
            raise ValueError(f"row {row}: want {want}, got {got}")
        if not (kind := torch.as_tensor(features[:0]).dtype).is_floating_point:
            problem = f"pictures are {kind}: give floats, as the image processor does"
            raise ValueError(f"row {row}: {problem}")
        if isinstance(texts, str):
            raise ValueError(f"row {row}: want a list of texts, got {texts!r}")
        if shape[0] != len(texts):
            counts = f"{shape[0]} pictures, but {len(texts)} texts"
            raise ValueError(f"row {row}: {counts}")
        if shape[1:] != (first := tuple(examples[0][0].shape[1:])):
            those = f"pictures are {shape[1:]}, those of row 0 {first}"
            raise ValueError(f"row {row}: {those}")
        for number, text in enumerate(texts, 1):
            where = f"row {row}, text {number}"
            check_text(whole_text(text, where), where, special_tokens)


def _check_counts(counts, examples):
    """Raise ValueError for a row with more or fewer `<image>` tokens than pictures."""
    for row, (count, (_, texts)) in enumerate(zip(counts, examples, strict=True)):
        if count != len(texts):
            found = f"{count} <image> tokens, but {len(texts)} pictures"
            raise ValueError(f"row {row}: {found}; does the tokenizer cut texts?")


def collate(examples, tokenizer):
    """Put sequences of different lengths into one batch, padded on the right.

    Args:
        examples: list of (features, texts), (T_img, F, v, d_img) and T_img texts; or
            pixels, (T_img, F, 3, H, W), in place of all features. A text is a string or
            a pair of strings, (given, answer): `given` has no label.
        tokenizer: with `<image>` and `<|endofchunk|>` among its tokens.

    Returns:
        dict for `Flamingo.forward`: vision_features (B, T_img, F, v, d_img), or of
        pixels vision_x (B, T_img, F, 3, H, W); lang_x, attention_mask and labels
        (B, T_txt). Missing pictures at the end are zeros, and a row has as many
        `<image>` as pictures.

    Raises:
        ValueError: a row has not as many texts as pictures, pictures of another shape,
            a special token in a text, or too many tokens; there is no row; the
            tokenizer lacks `<image>` or `<|endofchunk|>`.
    """
    _check_examples(examples, _special_tokens(tokenizer))
    pictures = [torch.as_tensor(features).float() for features, _ in examples]
    lines = [interleave(texts) for _, texts in examples]
    settings = {"padding_side": "right", "return_offsets_mapping": True}
    settings |= {"padding": True, "return_tensors": "pt", "verbose": False}
    batch = tokenizer(lines, **settings)
    starts, ends = batch.offset_mapping.unbind(dim=2)  # (B, T_txt), in characters
    T_txt, most = batch.input_ids.shape[1], tokenizer.model_max_length
    if T_txt > most:
        row = int(batch.attention_mask.sum(dim=1).argmax())
        words = _first_words(whole_text(next(iter(examples[row][1]))))
        raise ValueError(
            f"row {row}: {T_txt} tokens, but the model reads {most}: {words}"
        )
    media_and_end = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    media_locations = batch.input_ids == media_and_end[0]  # (B, T_txt)
    _check_counts(media_locations.sum(dim=1).tolist(), examples)
    labels = make_labels(batch.input_ids, *media_and_end, batch.attention_mask)
    for row, (_, texts) in enumerate(examples):
        for start, end in _given(texts):
            told = (starts[row] < end) & (ends[row] > start)  # (T_txt,)
            labels[row, told] = IGNORE
    name = "vision_features" if pictures[0].ndim == 4 else "vision_x"
    return {
        name: torch.nn.utils.rnn.pad_sequence(pictures, batch_first=True),
        "lang_x": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": labels,
    }


def _alternatives(texts, sequences):
    """Of each item its texts, and of each text [(where, text), …], one to be drawn."""
    if isinstance(texts, str):
        raise ValueError(f"want a list of texts, got the text {_first_words(texts)}")
    for number, item in enumerate(in_order(texts)):
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
            strings, (given, answer), or a list of such texts, of which one is drawn.
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
