#!/usr/bin/env python3
"""Give the loaders damaged pictures, captions and checkpoints, and count what happens.

    python tools/measure/fuzz.py                         two minutes, seed 0
    python tools/measure/fuzz.py --seconds 600 --seed 7
    python tools/measure/fuzz.py --seed 7 --only 1234    input 1234 of seed 7 again

Input i of a seed is always the same. A loader may return what is right or raise a
ValueError or OSError that says what is wrong, and of which picture, listing or
checkpoint. Anything else is listed, and the exit status is then 1: another exception,
more than 10 seconds, code that ran, a program or a connection that was opened, a
result that is wrong.
"""

import argparse
import io
import itertools
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from flamingo_lite import (
    build_flamingo,
    check_text,
    collate,
    load_captions,
    load_checkpoint,
    load_flamingo,
    make_optimizers,
    read_picture,
    run_settings,
    save_checkpoint,
    save_flamingo,
    trained_rows,
    trained_tensors,
    training_step,
    trim,
)

LIMIT = 10  # seconds that one input may take
MEMORY = 12 * 2**30  # bytes of address space: too large an array is then an error
SMALL = {
    "cross_attn_every_n_layers": 4,
    "perceiver_kwargs": {"depth": 1, "num_latents": 2, "heads": 1, "dim_head": 8},
    "cross_attn_kwargs": {"heads": 1, "dim_head": 8, "ff_mult": 1},
}
OPENED = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
OPENED |= {"socket.connect", "socket.getaddrinfo"}


class Hang(BaseException):
    """Over the limit; no `except Exception` in a library can swallow it."""


class Wrong(Exception):
    """A loader returned something that is not right."""


class Bomb:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "went off")


def want(right, message):
    if not right:
        raise Wrong(message)


# ---------------------------------------------------------------------------- damage


def pick(rng, things):
    """One of a list, as it is: numpy would make an array of it."""
    return things[int(rng.integers(len(things)))]


def damage(rng, data):
    """Bytes like `data`, but cut, flipped, filled in, left out, doubled or empty."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        n = len(data)
        # Most faults are in headers, so half of the places are near the beginning.
        near = min(n, 256) if rng.random() < 0.5 else n
        start = int(rng.integers(near + 1))
        stop = min(n, start + int(rng.integers(1, 17)))
        kind = pick(rng, ["flip", "flip", "number", "cut", "fill", "leave", "double"])
        if kind == "flip":
            for place in rng.integers(0, max(near, 1), rng.integers(1, 6)):
                if n:
                    data[place] ^= 1 << int(rng.integers(8))
        elif kind == "number":
            number = pick(rng, [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1])
            data[start : start + 4] = struct.pack(pick(rng, ["<I", ">I"]), number)
        elif kind == "cut":
            del data[start:]
        elif kind == "fill":
            data[start:stop] = rng.bytes(stop - start)
        elif kind == "leave":
            del data[start:stop]
        else:
            data[start:start] = data[start:stop] * int(rng.integers(1, 9))
    return bytes(data)


def mend_png(data):
    """Make the checksums of a PNG right again, so that its decoder reads on."""
    mended, place = bytearray(data), 8
    while place + 12 <= len(mended):
        (length,) = struct.unpack(">I", mended[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(mended):
            break
        checksum = zlib.crc32(mended[place + 4 : end])
        mended[end : end + 4] = struct.pack(">I", checksum)
        place = end + 4
    return bytes(mended)


VALUES = [None, True, 0, -1, 1, 3, 2.5, 10**6, 10**13, 10**20, 1e300, float("nan")]
VALUES += ["", "tiny", "paper", "a\0b", "../..", "\ud800", "x" * 5000, [], [1], {}]


def change_one(rng, tree, change):
    """Change, take out or add one entry somewhere in nested dicts and lists."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys or rng.random() < 0.05:
            if isinstance(tree, dict):
                tree[pick(rng, ["more", "size", ""])] = change(None)
            else:
                tree.append(change(None))
            return
        key = pick(rng, keys)
        inner = tree[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            tree = inner
            continue
        if rng.random() < 0.15:
            del tree[key]
        else:
            tree[key] = change(inner)
        return


def change_tensor(rng, tensor):
    """A tensor of another type, size or content."""
    kinds = [torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64]
    kind = int(rng.integers(6))
    if kind == 0:
        return tensor.to(pick(rng, kinds))
    if kind == 1:
        return tensor * pick(rng, [float("nan"), float("inf")])
    if kind == 2 and tensor.ndim:
        return tensor[1:].clone()
    if kind == 3:
        return tensor[None].clone()
    if kind == 4 and tensor.ndim > 1:
        return tensor.transpose(0, 1).contiguous()
    return torch.full(tensor.shape, pick(rng, [1e30, -1.0, 0.0]))


# --------------------------------------------------------------------------- loaders


class Pictures:
    """`read_picture`: files of seven formats and many kinds."""

    share, name, named = 45, "read_picture", "picture"

    def __init__(self, folder):
        self.path, self.files = folder / "picture", []
        noise = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
        rgba, rgb = Image.fromarray(noise), Image.fromarray(noise[..., :3].copy())
        deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112] = 6
        film = {"save_all": True, "append_images": [rgb.transpose(1), rgb]}
        for kind, picture, options in [
            ("png", rgb, {"exif": exif}),
            ("png", rgba, {}),
            ("png", deep, {}),
            ("png", rgb.convert("P"), {"transparency": 3}),
            ("png", rgb.convert("1"), {}),
            ("png", rgba.convert("LA"), {}),
            ("png", rgb, film),
            ("jpeg", rgb, {"exif": exif}),
            ("jpeg", rgb, {"progressive": True}),
            ("jpeg", rgb.convert("CMYK"), {}),
            ("jpeg", rgb.convert("L"), {}),
            ("gif", rgb, film),
            ("gif", rgb.convert("P"), {"transparency": 0, "interlace": 1}),
            ("webp", rgba, {"exif": exif}),
            ("webp", rgba, {"lossless": True}),
            ("webp", rgb, film),
            ("bmp", rgb, {}),
            ("bmp", rgb.convert("P"), {}),
            ("tiff", rgba, {}),
            ("tiff", deep, {}),
            ("tiff", rgb.convert("CMYK"), {"compression": "tiff_lzw"}),
            ("tiff", rgb, {"compression": "jpeg"}),
            ("tiff", rgb.convert("1"), {"compression": "group4"}),
            ("tiff", rgb, film),
            ("ppm", rgb, {}),
            ("ppm", deep, {}),
        ]:
            content = io.BytesIO()
            picture.save(content, kind, **options)
            self.path.write_bytes(content.getvalue())
            read = read_picture(self.path)
            self.files.append((content.getvalue(), read.size, read.tobytes()))

    def prepare(self, rng):
        data, size, pixels = pick(rng, self.files)
        kind = rng.random()
        self.wanted = (size, pixels) if kind < 0.2 else None
        if 0.05 <= kind < 0.2:
            data = data[: int(rng.integers(len(data)))]
        elif kind >= 0.2:
            data = damage(rng, data)
            if data[:4] == b"\x89PNG" and rng.random() < 0.7:
                data = mend_png(data)
        self.path.write_bytes(data)

    def load(self):
        return read_picture(self.path)

    def check(self, picture):
        want(picture.mode == "RGB" and min(picture.size) > 0, f"{picture}")
        if self.wanted:  # not damaged, or only cut
            found = picture.size, picture.tobytes()
            want(found == self.wanted, "a cut picture is another picture")


WORDS = [
    "a lemon",
    "Löwe",
    "一只火烈鸟",
    "פלמינגו",
    "🦩\u200d",
    "\u202e",
    "\0",
    "<image>",
]
WORDS += ["<|endofchunk|>", "</s>", "<pad>", "<image", "|endofchunk|>", "<", "\ud83e"]
WORDS += [" ", "\n", "\u2028", "\ufeff", "\\u003cimage>", '"', "\x1b[2J", "e\u0301"]


def make_text(rng):
    """A caption of words, special tokens, whole ones or in parts, and any signs."""
    parts = []
    for _ in range(int(rng.integers(0, 7))):
        kind = rng.random()
        if kind < 0.7:
            parts.append(pick(rng, WORDS if kind < 0.1 else WORDS[:6]))
        else:
            signs = rng.integers(0, pick(rng, [128, 0x3000, 0x110000]), 5)
            parts.append("".join(map(chr, signs)))
    text = pick(rng, ["", " "]).join(parts)
    return text * int(rng.integers(50, 5000)) if rng.random() < 0.02 else text


class Captions:
    """`load_captions`: listings, and names that lead nowhere or out of the folder."""

    share, name, named = 25, "load_captions", "metadata.jsonl"
    good = ["a.png", "b.jpg", "inner/c.gif", "inner/../a.png", "inside.png"]
    bad = ["link.png", "away/secret.png", "../secret.png", "/etc/hostname", "loop.png"]
    bad += ["pipe.png", "inner", "", ".", "gone.png", "a\0.png", "n" * 5000, "\udc80"]
    bad += ["..\\secret.png", "inner\\..\\..\\secret.png"]

    def __init__(self, folder):
        self.folder = folder / "captions"
        (self.folder / "inner").mkdir(parents=True)
        picture = Image.new("RGB", (8, 8), "red")
        picture.save(folder / "secret.png")
        for name in self.good[:3]:
            picture.save(self.folder / name)
        for name, target in [
            ("inside.png", "a.png"),
            ("link.png", folder / "secret.png"),
            ("away", folder),
            ("loop.png", "loop.png"),
        ]:
            (self.folder / name).symlink_to(target)
        os.mkfifo(self.folder / "pipe.png")

    def prepare(self, rng):
        lines = []
        for _ in range(int(rng.integers(1, 5))):
            name = pick(rng, self.good if rng.random() < 0.85 else self.bad)
            text = "a tent" if rng.random() < 0.5 else make_text(rng)
            line = {"file_name": name, "text": text}
            if rng.random() < 0.15:
                change_one(rng, line, lambda old: pick(rng, VALUES))
            ascii_only = bool(rng.random() < 0.5)
            line = json.dumps(line, ensure_ascii=ascii_only)
            lines.append(line.encode("utf-8", "surrogatepass"))
        data = b"\n".join(lines)
        self.damaged = rng.random() < 0.4
        if self.damaged:
            data = damage(rng, data)
        self.lines = lines
        self.skip = bool(rng.random() < 0.5)
        (self.folder / "metadata.jsonl").write_bytes(data)

    def load(self):
        return load_captions(self.folder, skip_broken=self.skip)

    def check(self, rows):
        want(rows, "no rows and no error")
        if not self.damaged and not self.skip:
            found = [(row["file_name"], row["text"]) for row in rows]
            asked = [json.loads(line) for line in self.lines]
            asked = [(row["file_name"], row["text"]) for row in asked]
            want(found == asked, "other rows than in the list")
        for row in rows:
            check_text(row["text"], "a row that was let through")
            place = row["path"].resolve()
            inside = place.is_relative_to(self.folder.resolve())
            want(inside and place.is_file(), f"{place} was let through")


class Batches:
    """`collate`: captions in any script, with special tokens and odd signs."""

    share, name, named = 22, "collate", ""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def prepare(self, rng):
        self.examples = []
        for _ in range(int(rng.integers(0 if rng.random() < 0.1 else 1, 4))):
            texts = [make_text(rng) for _ in range(int(rng.integers(1, 4)))]
            # Features of another number or width than they should have are rare.
            n = len(texts) + int(rng.random() < 0.05)
            self.examples.append(
                (torch.ones(n, 1, 2, 3 + (rng.random() < 0.03)), texts)
            )

    def load(self):
        return collate(self.examples, self.tokenizer)

    def check(self, batch):
        media = self.tokenizer.convert_tokens_to_ids("<image>")
        for i, (features, texts) in enumerate(self.examples):
            count = int((batch["lang_x"][i] == media).sum())
            want(count == len(texts) == len(features), f"{count} <image> in row {i}")
            labels = batch["labels"][i]
            spelled = self.tokenizer.decode(labels[labels != -100])
            asked = "".join(f"{trim(text)}<|endofchunk|>" for text in texts)
            want(spelled == asked, f"row {i} spells {spelled!r}, not {asked!r}")
            held = batch["vision_features"][i]
            want(torch.equal(held[: len(features)], features), f"row {i}: features")


class Folders:
    """`load_flamingo`: config.json, the weights' bytes, header and tensors."""

    share, name, named = 4, "load_flamingo", ""

    def __init__(self, folder, model, crater):
        self.folder, self.crater = folder / "flamingo", crater
        save_flamingo(model, self.folder)
        self.config = (self.folder / "config.json").read_bytes()
        self.path = self.folder / "flamingo.safetensors"
        self.weights, self.tensors = self.path.read_bytes(), load_file(self.path)

    def change_header(self, rng):
        length = int.from_bytes(self.weights[:8], "little")
        header = json.loads(self.weights[8 : 8 + length])
        entry = header[pick(rng, list(header))]
        if rng.random() < 0.5 and "dtype" in entry:
            entry["dtype"] = pick(rng, ["F64", "F16", "BF16", "I32", "F4", "F8_E8M0"])
        else:
            change_one(rng, entry, lambda old: pick(rng, VALUES))
        header = json.dumps(header).encode()
        return len(header).to_bytes(8, "little") + header + self.weights[8 + length :]

    def change_tensors(self, rng):
        tensors = dict(self.tensors)
        name = pick(rng, list(tensors))
        tensor, kind = tensors.pop(name), rng.random()
        if kind < 0.7:
            tensors[name] = change_tensor(rng, tensor)
        elif kind < 0.85:
            tensors[name + "x"] = tensor
        save_file(tensors, self.path)
        return self.path.read_bytes()

    def prepare(self, rng):
        config, weights = self.config, self.weights
        kind = pick(rng, ["none", "json", "json", "text", "bytes", "header", "tensors"])
        if kind == "json":
            tree = json.loads(config)
            change_one(rng, tree, lambda old: pick(rng, VALUES))
            config = json.dumps(tree).encode()
        elif kind == "text":
            config = damage(rng, config)
        elif kind == "bytes":
            weights = damage(rng, weights)
            if rng.random() < 0.1:
                weights = pickle.dumps(Bomb(self.crater))
        elif kind == "header":
            weights = self.change_header(rng)
        elif kind == "tensors":
            weights = self.change_tensors(rng)
        (self.folder / "config.json").write_bytes(config)
        self.path.write_bytes(weights)

    def load(self):
        return load_flamingo(self.folder)[0]

    def check(self, model):
        saved = load_file(self.path)
        for name, tensor in trained_tensors(model).items():
            want(tensor.dtype == torch.float32, f"{name} is {tensor.dtype}")
            want(tensor.isfinite().all(), f"{name} is not finite")
            want(torch.equal(tensor, saved[name].float()), f"{name} is another")


class Checkpoints:
    """`load_checkpoint`: bytes, entries and tensors of a checkpoint of training."""

    share, name, named = 4, "load_checkpoint", "last.pt"

    def __init__(self, folder, model, tokenizer, crater):
        self.model, self.crater, self.path = model, crater, folder / "last.pt"
        width = model.vis_dim
        features, texts = torch.ones(1, 1, 4, width), ["a lemon"]
        self.settings = run_settings(features, texts, 3, 1, 1e-3, 30.0, True, 0)
        optimizers = make_optimizers(model, 1e-3)
        batch = collate([(features, texts)], tokenizer)
        history = []
        for step in (1, 2):
            loss = training_step(model, batch, optimizers, 1.0).item()
            history.append({"step": step, "loss": loss, "gates": [0.0]})
        progress = {"step": 2, "history": history, "settings": self.settings}
        save_checkpoint(self.path, model, optimizers, **progress)
        self.whole = self.path.read_bytes()

    def prepare(self, rng):
        kind = pick(rng, ["none", "bytes", "bytes", "entries", "entries", "code"])
        data = self.whole
        if kind == "bytes":
            data = damage(rng, data)
        elif kind != "none":
            state = torch.load(io.BytesIO(data), weights_only=True)
            bomb = Bomb(self.crater)

            def change(old):
                if kind == "code":
                    return bomb
                if isinstance(old, torch.Tensor) and rng.random() < 0.8:
                    return change_tensor(rng, old)
                return pick(rng, VALUES)

            change_one(rng, state, change)
            content = io.BytesIO()
            new_format = bool(rng.random() < 0.8)
            torch.save(state, content, _use_new_zipfile_serialization=new_format)
            data = content.getvalue()
        self.path.write_bytes(data)
        self.optimizers = make_optimizers(self.model, 1e-3)

    def load(self):
        return load_checkpoint(self.path, self.model, self.optimizers, self.settings)

    def check(self, found):
        step, history = found
        want(
            type(step) is int and type(history) is list,
            f"step {step!r}, history {history!r:.50}",
        )
        want(step == len(history), f"{step} steps, {len(history)} in the history")
        saved = torch.load(self.path, weights_only=True)["trained"]
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        want(saved.keys() == trained.keys(), "other tensors than are trained")
        for name, tensor in trained.items():
            want(tensor.isfinite().all(), f"{name} is not finite")
            rows = trained_rows(self.model).get(tensor, ...)
            same = torch.equal(tensor[rows], saved[name].to(tensor))
            want(same, f"{name} is another")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rates = [group[n] for n in ("lr", "peak", "weight_decay")]
                want(np.isfinite(rates).all(), f"rates {rates}")
            for tensor, known in optimizer.state.items():
                for name, value in known.items():
                    fits = value.shape in (tensor.shape, ())
                    want(fits and value.isfinite().all(), f"bad {name} in an optimizer")


# ------------------------------------------------------------------------------- run


def try_one(loader, rng, crater, opened):
    """What became of one input: "result", "error", or a description of a fault."""

    def stop(signum, frame):
        raise Hang

    loader.prepare(rng)
    opened.clear()
    started = time.perf_counter()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        result, what = loader.load(), "result"
    except (ValueError, OSError) as error:
        clear = str(error).strip() and loader.named in str(error)
        what = "error" if clear else f"an unclear {type(error).__name__}: {error}"
    except Hang:
        what = f"a hang: over {LIMIT} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        name = Path(where.filename).name
        what = f"{type(error).__name__} in {name}:{where.lineno}: {str(error)[:150]}"
    finally:
        signal.alarm(0)
    if what == "result":
        try:
            loader.check(result)
        except Exception as error:
            what = f"a wrong result: {type(error).__name__}: {str(error)[:200]}"
    if time.perf_counter() - started > LIMIT + 5:
        what = f"a hang: {time.perf_counter() - started:.0f} s"
    if crater.exists():
        crater.unlink()
        what = "code of the input ran"
    if opened:
        what = f"opened something: {sorted(opened)}"
    return what


def make_loaders(folder, crater):
    """One of each kind, with its valid inputs."""
    torch.manual_seed(0)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, _, tokenizer = build_flamingo("tiny", **SMALL)
    return [
        Pictures(folder),
        Captions(folder),
        Batches(tokenizer),
        Folders(folder, model, crater),
        Checkpoints(folder, model, tokenizer, crater),
    ]


def fuzz(seed, first, n_inputs, seconds):
    """Try inputs from `first` on, so many or so long: (counts, number of faults)."""
    counts, faults, opened = Counter(), 0, set()
    with tempfile.TemporaryDirectory() as folder:
        crater = Path(folder) / "crater"
        loaders = make_loaders(Path(folder), crater)
        shares = np.array([loader.share for loader in loaders])
        sys.addaudithook(lambda event, _: event in OPENED and opened.add(event))
        end = time.monotonic() + seconds
        for i in itertools.islice(itertools.count(first), n_inputs):
            if time.monotonic() > end:
                break
            rng = np.random.default_rng((seed, i))
            loader = loaders[rng.choice(len(loaders), p=shares / shares.sum())]
            what = try_one(loader, rng, crater, opened)
            is_fault = what not in ("result", "error")
            counts[loader.name, "fault" if is_fault else what] += 1
            if is_fault:
                faults += 1
                line = f"seed {seed}, input {i}, {loader.name}: {what}"
                print(line.encode(errors="backslashreplace").decode(), flush=True)
    return counts, faults


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, help="so many, whatever the time")
    parser.add_argument("--only", type=int, help="try this input and no other")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # The C libraries of the decoders write to file 2, past Python.
    errors = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    seconds = args.seconds if args.inputs is None else math.inf
    started = time.monotonic()
    try:
        if args.only is None:
            counts, faults = fuzz(args.seed, 0, args.inputs, seconds)
        else:
            counts, faults = fuzz(args.seed, args.only, 1, math.inf)
    finally:
        os.dup2(errors, 2)
    print(f"seed {args.seed}, {time.monotonic() - started:.0f} s with the start")
    print(f"{'loader':16} {'inputs':>8} {'results':>8} {'errors':>8} {'else':>8}")
    for name in sorted({name for name, _ in counts}):
        found = [counts[name, what] for what in ("result", "error", "fault")]
        print(f"{name:16}", *(f"{n:8,}" for n in [sum(found), *found]))
    print(f"{'together':16} {counts.total():8,}")
    if not faults:
        print("nothing else happened")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
