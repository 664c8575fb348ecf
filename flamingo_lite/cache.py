# Written by tools/book/sync.py from book/07c_feature_cache.ipynb.
# Edit the notebook, not this file.
"""Features on disk: what the vision encoder made of each picture, in a folder.

    features/KEY/settings.json   which tower, processor and shape these are features of
    features/KEY/features.bin    (rows, F, v, d_img) float16, one row after another
    features/KEY/rows.jsonl      of each row, which picture it is, and a checksum
    features/KEY/files.jsonl     of each file what it looked like when it was read

Only what has its line in `rows.jsonl` counts, so a writer may die at any moment.
"""

__all__ = [
    "FORMAT",
    "NUMBER_FORMATS",
    "cache_settings",
    "FeatureCache",
    "check_tower",
    "cache_features",
    "PixelSource",
]

import hashlib
import json
import os
import random
import shutil
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flamingo_lite.data import (
    as_picture,
    encode_pixels,
    held_picture,
    in_order,
    picture_name,
    picture_path,
    size_to_decode,
)
from flamingo_lite.loading import fingerprint

FORMAT = 1  # of these files
NUMBER_FORMATS = {"float16": np.float16, "float32": np.float32}


def _digest(*parts):
    """32 hexadecimal digits of some bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _noise(width, height):
    """An RGB picture of noise; of each size always the same."""
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _generators():
    """The states of the generators that a process shares; a number drawn moves one."""
    _, numbers, *rest = np.random.get_state()
    ours = torch.get_rng_state().numpy().tobytes(), numbers.tobytes()
    return *ours, *rest, random.getstate()


_TRIALS = 20  # of each small picture


def _trials(image_processor):
    """What an image processor makes of noise, (5, 3, H, W): scaled up, scaled down.

    Raises:
        ValueError: it works by chance.
    """
    before = _generators()
    first = image_processor(_noise(151, 97))
    height, width = first.shape[-2:]
    small = max(1, 2 * width // 3), max(1, height // 2)
    large = 7 * width, 5 * height  # so far down, some ways to scale take short cuts
    pixels, same = [first], True
    for size, n_trials in ((small, _TRIALS), (large, 2)):
        for picture in (_noise(*size), _noise(*size[::-1])):
            made = [image_processor(picture) for _ in range(n_trials)]
            same = same and all(torch.equal(made[0], other) for other in made[1:])
            pixels.append(made[0])
    if not same or _generators() != before:
        raise ValueError(
            "the image processor changes a picture by chance, and features on disk "
            "would stay as they are: take PixelSource"
        )
    return torch.stack(pixels)


@torch.no_grad()
def cache_settings(visual, image_processor, dtype=torch.float16):
    """All that features depend on beside the picture: dict of plain values.

    Args:
        visual: `Flamingo.vision_encoder`.
        image_processor: PIL picture to (3, H, W).
        dtype: of the features, float16 or float32.

    Raises:
        ValueError: the image processor works by chance; or another dtype.
    """
    visual = getattr(visual, "visual", visual)  # of a VisionEncoder
    name = str(dtype).removeprefix("torch.")
    if name not in NUMBER_FORMATS:
        raise ValueError(f"want {' or '.join(NUMBER_FORMATS)}, got {name}")
    pixels = _trials(image_processor)  # (5, 3, H, W)
    checksum = 0  # of all weights; the fingerprint looks at the first of each matrix
    for _, tensor in sorted(visual.state_dict().items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(content.numpy(), checksum)
    features = encode_pixels(visual, pixels[:1], ["a picture of noise"], dtype)
    return {
        "format": FORMAT,
        "tower": fingerprint(visual),
        "weights": f"{checksum:08x}, {next(visual.parameters()).dtype}",
        "pixels": _digest(pixels.contiguous().numpy().tobytes()),
        "jpeg_decoded_at_least": size_to_decode(visual),
        "shape": list(features.shape[1:]),  # (F, v, d_img)
        "dtype": name,
    }


class _BadPicture:
    """Why a picture cannot be used: what a worker hands back in place of pixels."""

    def __init__(self, error):
        self.error = error


def _mark(path):
    """What a file looks like from outside: whoever writes to it changes this."""
    about = os.stat(path)
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _is_settled(mark):
    """False for a file so young that the clock may not tell its next change."""
    return time.time() - max(mark[1:3]) / 1e9 > 3


class _Reading(Dataset):
    """Pictures by number: (number, hash, path, mark, pixels), read by workers.

    Bytes are read once, for the hash and for the pixels, which thus belong together.
    Pixels are None for a picture in `known`, or where only hashes are wanted. What a
    worker must not read, it gives back as its place in `numbers`, an int.
    """

    def __init__(self, pictures, numbers, known, image_processor, least):
        self.pictures, self.numbers, self.known = pictures, numbers, known
        self.image_processor, self.least = image_processor, least
        self.process = os.getpid()  # a worker has another number

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, place):
        number = self.numbers[place]
        try:
            item = self.pictures[number]  # once: it may be decoded each time
            if self.process != os.getpid() and self.is_held_open(number, item):
                return place
            return number, *self.read(item, f"pictures[{number}]")
        except Exception as error:  # a worker's own would lose its words
            return number, None, None, None, _BadPicture(error)

    def is_held_open(self, number, item):
        """Is it a PIL picture whose file is open, and stays so?

        All processes would read on from one place in it, each where another one left.
        """
        file = getattr(held_picture(item, f"pictures[{number}]"), "fp", None)
        if file is None:  # a path; or all of it is in memory
            return False
        again = held_picture(self.pictures[number], f"pictures[{number}]")
        return again.fp is file  # else it is opened whenever it is asked for

    def read(self, item, where):
        held, content, mark = held_picture(item, where), None, None
        path = picture_path(held, where)
        path = path and os.path.abspath(path)
        if isinstance(held, (str, os.PathLike)):
            if path and os.path.isfile(path):  # else as_picture says what is wrong
                mark = _mark(path)  # of before: a later change is seen by it
                content = Path(path).read_bytes()
                mark = mark if _is_settled(mark) else None
        if content is None:
            held = as_picture(item, where)
            digest = _digest(repr(held.size).encode(), held.tobytes())
        else:
            digest = _digest(content)
        if digest in self.known or self.image_processor is None:
            return digest, path, mark, None
        picture = as_picture(held, where, self.least, content)
        # An array goes to the main process by a pipe; /dev/shm may be too small.
        return digest, path, mark, self.image_processor(picture).numpy()


def _lines(path):
    """The whole lines of a file of JSON lines, and how many bytes they are."""
    if not path.is_file():
        return [], 0
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]  # a writer may have died in the last one
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {_AWAY}") from error


_AWAY = "delete its folder, and encode the pictures again"


def _words(n_bytes):
    """A number of bytes, to be read: "24.6 MB"."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


class _Index:
    """What a folder KEY holds: `rows`, {hash: row}, `checksums` and known `files`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            settings = json.loads((self.folder / "settings.json").read_bytes())
            shape, name = tuple(settings["shape"]), settings["dtype"]
            self.settings = settings
            self.shape, self.dtype = shape, np.dtype(NUMBER_FORMATS[name])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.folder} holds no features") from error
        except (ValueError, KeyError, TypeError) as error:
            where = self.folder / "settings.json"
            raise ValueError(f"{where} is damaged: {error}; {_AWAY}") from error
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.read()

    def read(self):
        """Take in what another writer may have added."""
        lines, self.rows_end = _lines(self.folder / "rows.jsonl")
        self.rows = {digest: row for row, (digest, _) in enumerate(lines)}
        self.checksums = [checksum for _, checksum in lines]
        data = self.folder / "features.bin"
        size, want = data.stat().st_size if data.is_file() else 0, self.n_bytes
        if size < want:
            raise ValueError(f"{data} is cut: {size:,} of {want:,} bytes; {_AWAY}")
        files, self.files_end = _lines(self.folder / "files.jsonl")
        self.files = {path: (mark, digest) for path, mark, digest in files}

    @property
    def n_bytes(self):
        """The size of the features."""
        return len(self.checksums) * self.row_bytes

    def seen(self, item, where):
        """The hash of a file that has not changed since; None if it must be read."""
        held = held_picture(item, where)
        if not isinstance(held, (str, os.PathLike)):
            return None
        mark, digest = self.files.get(os.path.abspath(held), (None, None))
        same = mark and os.path.isfile(held) and _mark(held) == mark
        return digest if same and digest in self.rows else None


def _append(path, start, content):
    """Put bytes at the end of what counts in a file; on the disk when this returns."""
    try:
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kept = "what is there is kept, and the same call goes on from it"
        raise OSError(error.errno, f"{path}: {error.strerror}; {kept}") from error


class _Writer(_Index):
    """Adds to a folder KEY, of which its caller has the lock."""

    def add(self, hashes, features):
        """Put features, (some, F, v, d_img), behind the others: data first, then index.

        A writer that dies between the two leaves bytes that the next one overwrites.
        """
        rows = [row.tobytes() for row in features.numpy()]
        new = [[h, zlib.crc32(row)] for h, row in zip(hashes, rows, strict=True)]
        lines = b"".join(json.dumps(one).encode() + b"\n" for one in new)
        _append(self.folder / "features.bin", self.n_bytes, b"".join(rows))
        _append(self.folder / "rows.jsonl", self.rows_end, lines)
        self.rows_end += len(lines)
        for digest, checksum in new:
            self.rows[digest] = len(self.checksums)
            self.checksums.append(checksum)

    def note(self, found):
        """Remember (path, mark, hash) of files, so that none is read again in vain."""
        new = [f for f in found if f[1] and self.files.get(f[0]) != (f[1], f[2])]
        if new:
            lines = b"".join(json.dumps(one).encode() + b"\n" for one in new)
            _append(self.folder / "files.jsonl", self.files_end, lines)
            self.files_end += len(lines)


@contextmanager
def _alone(folder, wait):
    """Keep other writers out; the lock is gone when its process is, however it ends."""
    try:
        with FileLock(folder / "lock", timeout=wait):
            yield
    except Timeout as error:
        raise TimeoutError(
            f"{folder}: another process is writing there; wait for its end, or say "
            "how many seconds to wait, wait=3600"
        ) from error


def _loader(reading, workers):
    """The items of a `_Reading`, one by one, by `workers` processes."""
    if workers is None:  # to start a process costs more than to read a few pictures
        n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        workers = min(n, 8) if len(reading) >= 64 and sys.platform == "linux" else 0
    with suppress(Exception):  # who reads the first picture says what is wrong with it
        first = reading.numbers[0]
        if workers and reading.is_held_open(first, reading.pictures[first]):
            workers = 0  # even to open one would move the place of the others
    settings = {"batch_size": 8, "collate_fn": list, "num_workers": workers}
    if workers and sys.platform == "linux":
        settings["multiprocessing_context"] = "fork"
    # With a generator of its own it takes no random number from the reader's.
    for some in DataLoader(reading, generator=torch.Generator(), **settings):
        for item in some:
            yield reading[item] if isinstance(item, int) else item


def _batches(items, known, batch_size):
    """Lists of `batch_size` new pictures, each with what else was read on the way."""
    new, found = {}, []
    for number, digest, path, mark, pixels in items:
        if isinstance(pixels, _BadPicture):
            yield new, found
            raise pixels.error
        found.append((number, digest, path, mark))
        if pixels is not None and digest not in known:
            new.setdefault(digest, (number, pixels))
        if len(new) == batch_size:
            yield new, found
            new, found = {}, []
    yield new, found


def _pick(numbers, n):
    """Numbers of pictures as a tensor: of an int, a slice, a list or a tensor."""
    if isinstance(numbers, slice):
        numbers = range(n)[numbers]
    index = torch.as_tensor(numbers)
    return torch.arange(n)[index if index.numel() else index.long()]


class FeatureCache:
    """Features in a folder, read when they are asked for: `features[[3, 5]]`.

    It goes where a tensor of `encode_pictures` goes, and holds none of it in memory.
    Who goes through all of it, as `caption` does, gets one picture's after another and
    keeps them: give `features[[3, 5]]` of many. `cache_features` makes one.

    Args:
        folder: the folder KEY.
        hashes: of each picture, in the order in which it is to have them.

    Attributes:
        shape: (pictures, F, v, d_img).
        dtype: torch.float16 or torch.float32.
        folder: where they are.
        settings: all that they depend on beside the pictures, see `cache_settings`.

    Raises:
        FileNotFoundError, ValueError: the folder holds no features, not those of a
            picture, or is damaged.
    """

    ndim = 4

    def __init__(self, folder, hashes):
        index, self.hashes = _Index(folder), list(hashes)
        if lacking := [n for n, h in enumerate(self.hashes) if h not in index.rows]:
            raise ValueError(f"{folder} has no features of pictures[{lacking[0]}]")
        if not self.hashes:
            raise ValueError("there are no pictures")
        self.folder, self.shape = Path(folder), (len(self.hashes), *index.shape)
        self.dtype = torch.from_numpy(np.empty(0, index.dtype)).dtype
        self.checksums, self.settings = index.checksums, index.settings
        self.rows = torch.tensor([index.rows[h] for h in self.hashes])  # (pictures,)
        n_rows, self.checked = len(index.checksums), set()
        self.data = np.memmap(
            self.folder / "features.bin", index.dtype, "r", shape=(n_rows, *index.shape)
        )

    def __len__(self):
        return len(self.hashes)

    def __iter__(self):
        """Each picture's features, (F, v, d_img), read one by one."""
        return (self[number] for number in range(len(self)))

    def __repr__(self):
        return f"FeatureCache({self.shape}, {_words(self.nbytes)}, {self.folder})"

    def __reduce__(self):  # another process gets the folder's name, not its numbers
        return FeatureCache, (self.folder, self.hashes)

    @property
    def files(self):
        """Of each picture a file that it was read from, or None: list."""
        files = _Index(self.folder).files.items()
        paths = {digest: path for path, (_, digest) in files}
        return [paths.get(digest) for digest in self.hashes]

    @property
    def nbytes(self):
        """What a tensor of all of them would take."""
        return self.data[0].nbytes * len(self)

    def __getitem__(self, numbers):
        """A tensor of some pictures' features, on the CPU: (k, F, v, d_img) for k.

        Raises:
            IndexError: there is no such picture.
            ValueError: the file is damaged at one of them.
        """
        rows = self.rows[_pick(numbers, len(self))]
        features = self.data[rows.flatten().numpy()]  # (k, F, v, d_img), a copy
        for row, one in zip(rows.flatten().tolist(), features, strict=True):
            if row not in self.checked and zlib.crc32(one) != self.checksums[row]:
                number = self.rows.tolist().index(row)
                name = picture_name(self.files[number], f"pictures[{number}]")
                where = f"{self.folder / 'features.bin'}: the features of {name}"
                raise ValueError(f"{where} are damaged; {_AWAY}")
            self.checked.add(row)
        return torch.from_numpy(features).reshape(*rows.shape, *self.shape[1:])

    def select(self, numbers):
        """A FeatureCache of some of the pictures, for a split: nothing is read."""
        chosen = _pick(numbers, len(self)).tolist()
        return FeatureCache(self.folder, [self.hashes[number] for number in chosen])


def check_tower(features, visual):
    """Raise ValueError for a FeatureCache of another vision encoder than `visual`.

    Other features pass; so do those of weights in another number format.
    """
    if (settings := getattr(features, "settings", None)) is None:
        return
    visual = getattr(visual, "visual", visual)  # of a VisionEncoder
    kind = settings["weights"].split(", ")[-1]
    if kind == str(next(visual.parameters()).dtype):
        if settings["tower"] != fingerprint(visual):
            raise ValueError(
                f"{features!r} is of another vision encoder than the model's, or of "
                "this one before it was trained: call cache_features again"
            )


def _encode(writer, pictures, numbers, settings, bar):
    """Encode what is new of `pictures[number]`: {number: hash} of all the numbers."""
    visual, image_processor, batch_size, workers = settings
    least, dtype = size_to_decode(visual), getattr(torch, writer.dtype.name)
    reading = _Reading(pictures, numbers, writer.rows, image_processor, least)
    hashes = {}
    items = _loader(reading, workers)
    for new, found in _batches(items, writer.rows, batch_size):
        if new:
            of = {number: path for number, _, path, _ in found}
            numbered = [(of[number], number) for number, _ in new.values()]
            names = [picture_name(path, f"pictures[{n}]") for path, n in numbered]
            pixels = [torch.from_numpy(one) for _, one in new.values()]
            features = encode_pixels(visual, torch.stack(pixels), names, dtype)
            writer.add(list(new), features)
        writer.note([(path, mark, digest) for _, digest, path, mark in found])
        hashes |= {number: digest for number, digest, _, _ in found}
        bar.update(len(found))
    return hashes


def _really_new(writer, pictures, numbers, workers):
    """How many of these pictures have no features yet, by their hashes."""
    reading = _Reading(pictures, numbers, writer.rows, None, None)
    new = set()
    for _, digest, _, _, pixels in _loader(reading, workers):
        if isinstance(pixels, _BadPicture):
            raise pixels.error
        new.add(digest)
    return len(new - writer.rows.keys())


def _ask_disk(writer, pictures, numbers, workers):
    """The bytes of what is to be written, at most; OSError if the disk has no room."""
    free = shutil.disk_usage(writer.folder).free
    size = len(numbers) * writer.row_bytes
    if size > free and writer.rows:  # files that moved may be known: read them first
        size = _really_new(writer, pictures, numbers, workers) * writer.row_bytes
    if size > free:
        want = f"the features want {_words(size)}, and {_words(free)} are free"
        raise OSError(f"{writer.folder}: {want}; take another folder or fewer pictures")
    return size


def _several(pictures):
    """Pictures as they are given, a single one as a list."""
    pictures = in_order(pictures)
    if isinstance(pictures, (Image.Image, dict, str, os.PathLike)):
        return [pictures]
    if not hasattr(pictures, "__iter__"):
        raise TypeError(f"want a list of pictures, got {type(pictures).__name__}")
    return pictures


def _has_numbers(pictures):
    return hasattr(pictures, "__getitem__") and hasattr(pictures, "__len__")


def _parts(pictures, size):
    """Pictures by their numbers: all at once, or of an iterator `size` at a time."""
    if _has_numbers(pictures):
        yield pictures, range(len(pictures))
        return
    numbered = enumerate(pictures)
    while some := dict(islice(numbered, size)):
        yield some, list(some)


def _seen(index, pictures):
    """{number: hash} of those that are files whose features are there."""
    found = {}
    for number, item in enumerate(pictures):
        if digest := index.seen(item, f"pictures[{number}]"):
            found[number] = digest
    return found


def cache_features(
    folder,
    visual,
    image_processor,
    pictures,
    batch_size=96,
    dtype=torch.float16,
    workers=None,
    progress=True,
    wait=0,
):
    """Encode the pictures that a folder has no features of yet, and give all of them.

    Stopped or killed at any moment, the same call goes on where it was. A picture is
    known by its content: one that has changed is encoded again, one that stands there
    twice only once. Other weights or settings get a folder of their own inside.

    Args:
        folder: where to keep them; it is made.
        visual, image_processor, pictures, batch_size, dtype: as for `encode_pictures`.
        workers: processes that read pictures. None, by the number of processors where
            there are many pictures (on Linux; elsewhere this process reads them).
        progress: False shows no bar. It has the size of the features and the time left.
        wait: seconds to wait for another process that writes to the same features.

    Returns:
        FeatureCache, (pictures, F=1, v, d_img).

    Raises:
        TypeError, ValueError: as `encode_pictures`; the folder is damaged; or the image
            processor works by chance.
        OSError: the disk has no room.
        TimeoutError: another process is writing there.
    """
    pictures = _several(pictures)
    about = cache_settings(visual, image_processor, dtype)
    settings = (visual, image_processor, batch_size, workers)
    place = Path(folder, _digest(json.dumps(about, sort_keys=True).encode())[:16])
    if isinstance(pictures, (list, tuple)) and (place / "settings.json").is_file():
        hashes = _seen(_Index(place), pictures)
        if len(hashes) == len(pictures):  # all of it is there: nothing to write
            return FeatureCache(place, hashes.values())
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place, wait):
        if not (place / "settings.json").is_file():
            (place / "settings.part").write_text(json.dumps(about, indent=1))
            os.replace(place / "settings.part", place / "settings.json")
        writer, hashes = _Writer(place), {}
        for some, numbers in _parts(pictures, 8 * batch_size):
            if isinstance(some, (list, tuple)):
                hashes |= _seen(writer, some)
            numbers = [number for number in numbers if number not in hashes]
            size = _ask_disk(writer, some, numbers, workers)
            bar = {"desc": f"features, {_words(size)}", "total": len(numbers)}
            with tqdm(**bar, disable=not (progress and numbers)) as shown:
                hashes |= _encode(writer, some, numbers, settings, shown)
    return FeatureCache(place, [hashes[number] for number in sorted(hashes)])


class PixelSource:
    """Pixels of pictures, read and processed each time they are asked for.

    For a tower that is trained, or pictures that differ from epoch to epoch: where
    `train` takes features it takes this, and the batch has `vision_x`.

    Args:
        pictures: list of PIL pictures, paths or rows, as for `encode_pictures`.
        image_processor: PIL picture to (3, H, W); what it does may depend on chance.
        least: a JPEG is decoded at a half, a quarter or an eighth if no side gets
            shorter than so many pixels. None, at its whole size: for crops.

    Attributes:
        shape: (pictures, F=1, 3, H, W).
        files: of each picture its path, or None.
    """

    ndim = 5

    def __init__(self, pictures, image_processor, least=None):
        pictures = _several(pictures)
        self.pictures = pictures if _has_numbers(pictures) else list(pictures)
        self.image_processor, self.least = image_processor, least
        if not len(self.pictures):
            raise ValueError("there are no pictures")
        self.shape = (len(self.pictures), *self[[0]].shape[1:])

    def __len__(self):
        return len(self.pictures)

    @property
    def files(self):
        """Of each picture its path, or None: list. Nothing is opened for it."""
        if not isinstance(self.pictures, (list, tuple)):
            return [None] * len(self)
        found = [picture_path(one) for one in self.pictures]
        return [path and os.path.abspath(path) for path in found]

    def __getitem__(self, numbers):
        """(k, F=1, 3, H, W) pixels of k pictures; an error names one, `pictures[3]`."""
        picked, pixels = _pick(numbers, len(self)), []
        for number in picked.flatten().tolist():
            where = f"pictures[{number}]"
            picture = as_picture(self.pictures[number], where, self.least)
            pixels.append(self.image_processor(picture))
        pixels = torch.stack(pixels)  # (k, 3, H, W)
        return pixels.reshape(*picked.shape, 1, *pixels.shape[1:])
