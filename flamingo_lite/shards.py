# Written by tools/book/sync.py from book/07d_shards.ipynb.
# Edit the notebook, not this file.
"""Shards: tar archives of pictures with their texts, read from end to end.

    000000.tar    0000.jpg 0000.txt 0001.jpg 0001.json …   members of a key side by side

A shard is read by one process. What is broken is named by its shard and its key.
"""

__all__ = [
    "find_shards",
    "read_shards",
]

import json
import random
import sys
import tarfile
import warnings
from collections import Counter
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path

import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from flamingo_lite.data import check_text, read_picture, trim

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_PICTURES += ("avif", "heic", "heif")  # if Pillow can read them


def find_shards(shards):
    """The paths of shards, in order; all of them are there: list of strings.

    Args:
        shards: a folder with .tar files; a pattern, "web-{000..003}.tar"; or a list of
            paths.

    Raises:
        FileNotFoundError: one is missing, or there is none.
        ValueError: one stands there twice, or is no .tar file.
    """
    if not isinstance(shards, (str, Path)):
        paths = [str(path) for path in shards]
    elif Path(shards).is_dir():
        paths = sorted(str(path) for path in Path(shards).glob("*.tar"))
    else:
        paths = expand_urls(str(shards))
    if not paths:
        raise FileNotFoundError(f"there is no .tar file in {shards}")
    if lacking := [path for path in paths if not Path(path).is_file()]:
        there = f"{len(lacking)} of {len(paths)} shards are not there"
        raise FileNotFoundError(f"no file {lacking[0]}: {there}")
    if strange := [path for path in paths if not path.endswith(".tar")]:
        raise ValueError(f"{strange[0]}: want a .tar file, not packed any further")
    if twice := [path for path, number in Counter(paths).items() if number > 1]:
        raise ValueError(f"{twice[0]} stands in the list twice")
    return paths


def _members(path):
    """(key, kind, bytes) of the files of a shard; where it is damaged, an error.

    That has the key and the kind of the file that is cut. Between two files, it has the
    key of the one before, and no kind.
    """
    key = kind = None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                start, ending = base_plus_ext(member.name)
                if member.isreg() and start is not None:  # no folder, no README
                    key, kind = start, ending.lower()
                    yield key, kind, archive.extractfile(member).read()
                    kind = None
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(512)
            if len(block) < 512 or any(block):
                raise tarfile.ReadError("there is no end of the archive")
    except (tarfile.TarError, OSError, EOFError) as error:
        yield key, kind, error


def _is_whole(sample, kinds):
    """Has the last sample before a cut what those before it have?"""
    text = "txt" if "txt" in kinds else "json"
    return text in sample and any(kind in sample for kind in _PICTURES)


def _samples(path):
    """What a shard has for each key, {"__key__", "jpg", "txt", …}; or a ValueError."""
    seen, kinds, last = set(), set(), "its start"
    for key, members in groupby(_members(path), itemgetter(0)):
        sample, twice, cut = {"__key__": key}, None, None
        for _, kind, content in members:
            if isinstance(content, Exception):
                cut = kind, content
            elif (key, kind) in seen:
                twice = f"{path}, {key}.{kind} stands there twice"
            seen.add((key, kind))
            sample[kind] = content
        kinds |= sample.keys()
        if twice:
            yield ValueError(twice)
        elif cut is None or (cut[0] is None and _is_whole(sample, kinds)):
            sample.pop(None, None)
            last = key
            yield sample
        if cut:
            problem = f"is cut off or damaged after {last}: {cut[1]}; copy it again"
            yield ValueError(f"{path} {problem}")
    if not seen:
        yield ValueError(f"{path}: there is nothing in it with an ending, as .jpg")


def _counted(path):
    """(path, None, sample), and at the last in the place of None how many there are."""
    samples = _samples(path)
    held, number = next(samples), 1
    for sample in samples:
        yield path, None, held
        held, number = sample, number + 1
    yield path, number, held


def _text(sample, where):
    """The caption of a sample, or the list of them; ValueError names `where`."""
    try:
        if "txt" in sample:
            text = sample["txt"].decode()
        else:
            text = json.loads(sample.get("json", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the caption cannot be read: {error}") from error
    if isinstance(text, dict):
        text = text.get("text", text.get("caption"))
    if text is None or text == []:
        raise ValueError(
            f"{where}: no caption: beside the picture, want a .txt, or a .json with "
            f'"text"; there are {_kinds(sample)}'
        )
    for one in text if isinstance(text, list) else [text]:
        check_text(one, where)
    return trim(text)


def _kinds(sample):
    """The kinds of files that a sample has, in words."""
    return ", ".join(f".{kind}" for kind in sample if not kind.startswith("__"))


def _row(sample, shard, image_processor, least):
    """A sample as a row: {"key", "text", "picture" or "pixels"}."""
    where = f"{shard}, {sample['__key__']}"
    kind = next((kind for kind in _PICTURES if kind in sample), None)
    if kind is None:
        raise ValueError(
            f"{where}: no picture: want one of {', '.join(_PICTURES)}; there are "
            f"{_kinds(sample)} (a key ends at the first dot of a name, and a file "
            "without an ending is passed over)"
        )
    row = {"key": sample["__key__"], "text": _text(sample, where)}
    picture = read_picture(f"{where}.{kind}", least, sample[kind])
    if image_processor is None:
        return {**row, "picture": picture}
    # An array goes to the main process by a pipe; /dev/shm may be too small.
    return {**row, "pixels": image_processor(picture).numpy()}


def _mixed(items, buffer, rng):
    """The same items; so many at a time are taken, mixed, and handed out."""
    while some := list(islice(items, buffer)):
        rng.shuffle(some)
        yield from some


class _Reading(IterableDataset):
    """(shard, None or its number of rows, row or ValueError): one worker's, by lot."""

    def __init__(self, shards, lot, buffer, image_processor, least):
        self.shards, self.lot, self.buffer = shards, lot, buffer
        self.image_processor, self.least = image_processor, least

    def __iter__(self):
        mine = webdataset.split_by_worker(self.shards)
        samples = chain.from_iterable(map(_counted, mine))
        if self.lot is not None:
            samples = _mixed(samples, self.buffer, random.Random(self.lot))
        for shard, number, sample in samples:
            if not isinstance(sample, ValueError):
                try:
                    sample = _row(sample, shard, self.image_processor, self.least)
                except ValueError as error:
                    sample = error
            yield shard, number, sample


def read_shards(
    shards,
    image_processor=None,
    seed=None,
    epoch=0,
    buffer=1000,
    workers=0,
    skip_broken=False,
    done=(),
    least=None,
    process=0,
    n_processes=1,
):
    """Read pictures and texts from shards, each once: an iterator over rows.

    Args:
        shards: see `find_shards`.
        image_processor: PIL picture to (3, H, W); None, rows have the pictures.
        seed, epoch: of the order; the same for the same two and the same `workers`.
            Without a seed it is that of the archives, by turns of the workers.
        buffer: so many samples of each worker are mixed at a time.
        workers: processes that read; 0, this one.
        skip_broken: leave out, with a warning, what cannot be used.
        done: shards that are not read, see below.
        least: of JPEGs, see `read_picture`.
        process, n_processes: of several that train together, the number of this one.

    Returns:
        dicts: "text", a string or a list of them; "picture", or "pixels", (3, H, W);
        "key", "shard"; and "done", the names of all shards of which no row will come
        any more. To go on, hand the last row's to `done`: what had begun is read again.

    Raises:
        FileNotFoundError, ValueError: see `find_shards`; there are fewer shards than
            processes; or a picture or a text cannot be used, and its shard and key are
            named.
    """
    paths = find_shards(shards)
    if strange := set(done) - set(paths):
        raise ValueError(f"done: {min(strange)} is none of these shards")
    if buffer < 1 or not 0 <= process < n_processes:
        numbers = f"buffer {buffer}, process {process} of {n_processes}"
        raise ValueError(f"want buffer >= 1, and process < n_processes: {numbers}")
    if len(paths) < n_processes:
        raise ValueError(
            f"{len(paths)} shards for {n_processes} processes, and a shard is read by "
            "one: write more of them, which are smaller"
        )
    lot = None if seed is None else f"{seed} {epoch}"
    if lot is not None:
        random.Random(lot).shuffle(paths)
    paths = [path for path in paths[process::n_processes] if path not in done]
    reading = _Reading(paths, lot, buffer, image_processor, least)
    return _hand_out(_loader(reading, workers), skip_broken, tuple(done))


def _loader(reading, workers):
    """A DataLoader of lists of some items each, by turns of the workers."""
    settings = {"batch_size": 8, "collate_fn": list, "num_workers": workers}
    if workers and sys.platform == "linux":
        settings["multiprocessing_context"] = "fork"
    # With a generator of its own it takes no random number from the reader's.
    return DataLoader(reading, generator=torch.Generator(), **settings)


def _hand_out(loader, skip_broken, done):
    """The rows of `read_shards`."""
    come, numbers = Counter(), {}
    for shard, number, row in chain.from_iterable(loader):
        come[shard] += 1
        numbers[shard] = number or numbers.get(shard)
        if come[shard] == numbers[shard]:
            done = (*done, shard)
        if not isinstance(row, ValueError):
            if "pixels" in row:
                row["pixels"] = torch.from_numpy(row["pixels"])
            yield {**row, "shard": shard, "done": done}
        elif skip_broken:
            warnings.warn(f"left out: {row}", stacklevel=2)
        else:
            raise row
