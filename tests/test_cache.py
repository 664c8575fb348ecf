"""Features on disk: equal to those in memory, whatever happens to the writer or files.

A tower that counts what it is given stands in for CLIP where CLIP is not the point.
Whoever must die does so by SIGKILL, in a process of its own.
"""

import ctypes
import errno
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_IMG, V
from PIL import Image, ImageOps
from torch import nn

import flamingo_lite.cache as cache
from flamingo_lite import (
    FeatureCache,
    PixelSource,
    answer,
    cache_features,
    cache_settings,
    caption,
    check_examples,
    check_pictures,
    check_texts,
    collate,
    encode_pictures,
    load_captions,
    make_batch,
    make_stories,
    make_tasks,
    nearest,
    read_picture,
    score_candidates,
    train,
)
from flamingo_lite.batches import Examples

posix = pytest.mark.skipif(os.name != "posix", reason="no SIGKILL here")
ROOT = Path(__file__).resolve().parents[1]


class Tower(nn.Module):
    """Tokens that depend on all pixels and on every weight; `calls` are batch sizes."""

    def __init__(self, v=V, d_img=D_IMG, factor=1.0):
        super().__init__()
        weight = torch.randn(12, v * d_img, generator=torch.Generator().manual_seed(0))
        self.weight, self.shape = nn.Parameter(factor * weight), (v, d_img)
        self.image_size, self.calls = (8, 8), []

    def forward(self, pixels):
        self.calls.append(len(pixels))
        small = nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)  # (some, 12)
        tokens = small.double() @ self.weight.double()  # the same in any batch
        return None, tokens.to(pixels.dtype).unflatten(1, self.shape)


def processor(picture):
    """PIL picture to (3, 8, 8)."""
    small = picture.resize((8, 8), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(small)).permute(2, 0, 1).float() / 255


def picture(seed, size=(24, 16)):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def paths(tmp_path):
    """Twenty picture files, an hour old, as far as their clock says."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    made = [folder / f"{i:02d}.png" for i in range(20)]
    for i, path in enumerate(made):
        picture(i).save(path)
    return made


@pytest.fixture
def settled(monkeypatch):
    """Every file is old enough to be known again by its mark."""
    monkeypatch.setattr(cache, "_is_settled", lambda mark: True)


def keep(folder, pictures, tower=None, **kwargs):
    settings = {"batch_size": 6, "workers": 0, "progress": False, **kwargs}
    return cache_features(folder, tower or Tower(), processor, pictures, **settings)


def wanted(pictures, tower=None):
    return encode_pictures(tower or Tower(), processor, pictures, batch_size=6)


# ----------------------------------------------------------- the same as in memory


class Columns:
    """What is asked by number, like an image dataset of Hugging Face's."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        return {"image": Image.open(self.paths[number]), "label": 3}

    def __iter__(self):
        return (self[number] for number in range(len(self)))


FORMS = {
    "paths": list,
    "strings": lambda paths: tuple(map(str, paths)),
    "rows": lambda paths: [{"path": path, "text": "a dog"} for path in paths],
    "pictures": lambda paths: [Image.open(path) for path in paths],
    "scenes": lambda paths: [{"picture": Image.open(path)} for path in paths],
    "iterator": iter,
    "generator": lambda paths: (Image.open(path) for path in paths),
    "columns": Columns,
    "array": lambda paths: np.array([str(path) for path in paths]),
}


@pytest.mark.parametrize("form", FORMS)
def test_bit_for_bit_what_encode_pictures_gives(paths, tmp_path, form):
    features = keep(tmp_path / "f", FORMS[form](paths))
    assert isinstance(features, FeatureCache)
    assert features.shape == (20, 1, V, D_IMG) and len(features) == 20
    assert features[:].dtype == features.dtype == torch.float16
    assert torch.equal(features[:], wanted(paths))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_but_the_time(paths, tmp_path, workers):
    torch.manual_seed(4)
    features = keep(tmp_path / "f", [*paths, picture(99)], workers=workers)
    assert torch.equal(features[:], wanted([*paths, picture(99)]))
    drawn = torch.rand(1)
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.rand(1))  # no random number was taken


class Handle:
    """Pictures, opened when they are asked for, of a file that is open already."""

    def __init__(self, file):
        self.file = file

    def __len__(self):
        return 20

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        return Image.open(self.file)

    def __iter__(self):
        return (self[number] for number in range(len(self)))


OPEN = {
    "one picture": lambda file: [Image.open(file)] * 20,
    "one file": lambda file: [Image.open(file) for _ in range(20)],
    "rows": lambda file: [{"image": Image.open(file)} for _ in range(20)],
    "iterator": lambda file: (Image.open(file) for _ in range(20)),
    "by number": Handle,
    "mixed": lambda file: [Image.open(file if i % 2 else file.name) for i in range(20)],
}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.parametrize("form", OPEN)
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG"])
def test_open_pictures_are_not_read_by_several_processes(tmp_path, form, kind):
    """They have one place in the file together: each would read where another left."""
    one, more = picture(0, (500, 400)), {}
    if kind == "MPO":  # two pictures in a file, of which Pillow reads on in silence
        more = {"save_all": True, "append_images": [picture(1, (500, 400))]}
    one.save(tmp_path / "one", kind, **more)
    alone = wanted([Image.open(tmp_path / "one")])
    with open(tmp_path / "one", "rb") as file:
        features = keep(tmp_path / "f", OPEN[form](file), workers=2)
    assert torch.equal(features[:], alone.expand(20, -1, -1, -1))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_workers_read_what_they_open_themselves(paths, tmp_path, monkeypatch):
    """Of a data set that opens files when it is asked, nothing comes back."""
    read, real = [], cache._Reading.read

    def note(self, item, where):
        read.append(where)  # a worker's list is its own
        return real(self, item, where)

    monkeypatch.setattr(cache._Reading, "read", note)
    features = keep(tmp_path / "f", Columns(paths), workers=2)
    assert read == [] and torch.equal(features[:], wanted(paths))
    some = [paths[0], Image.open(paths[1]), *paths[2:]]
    keep(tmp_path / "g", some, workers=2)
    assert read == ["pictures[1]"]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_workers_ask_for_a_picture_once(paths, tmp_path):
    """A data set may decode it each time."""
    asked = tmp_path / "asked"

    class Decoding(Columns):
        def __getitem__(self, number):
            with asked.open("a") as file:
                file.write(f"{number}\n")
            return super().__getitem__(number)["image"].convert("RGB")

    features = keep(tmp_path / "f", Decoding(paths), workers=2)
    assert torch.equal(features[:], wanted(paths))
    numbers = sorted(map(int, asked.read_text().split()))
    assert numbers == [0, *range(len(paths))]  # the first one is looked at before


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_many_pictures_get_workers(paths, tmp_path, monkeypatch):
    asked = []
    real = cache.DataLoader

    def loader(dataset, **kwargs):
        asked.append(kwargs["num_workers"])
        return real(dataset, **kwargs)

    monkeypatch.setattr(cache, "DataLoader", loader)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    keep(tmp_path / "f", paths, workers=None)
    many = [picture(i) for i in range(70)]
    features = keep(tmp_path / "f", many, workers=None)
    assert asked == [0, 2]
    assert torch.equal(features[:], wanted(many))


def test_it_is_asked_like_a_tensor(paths, tmp_path):
    features, tensor = keep(tmp_path / "f", paths), wanted(paths)
    for numbers in (
        [3, 5, 3],
        [],
        [-1, 0],
        4,
        -2,
        slice(2, 9, 3),
        slice(None),
        torch.tensor([[1, 2], [3, -1]]),
        torch.tensor(7),
        np.array([4, 1]),
        torch.arange(20) % 2 == 0,
        range(3),
    ):
        index = list(numbers) if isinstance(numbers, range) else numbers
        assert torch.equal(features[numbers], tensor[index]), numbers
    assert features.ndim == tensor.ndim and features.nbytes == tensor.nbytes
    assert torch.equal(torch.stack(list(features)), tensor)  # it ends
    for bad in ([20], -21, [0.5]):
        with pytest.raises(IndexError):
            features[bad]
    features[[0]].zero_()  # a copy, and not the file
    assert torch.equal(features[[0]], tensor[[0]])


def test_a_part_of_it_reads_nothing(paths, tmp_path):
    features = keep(tmp_path / "f", paths)
    some = features.select([7, 2, -1])
    assert some.shape == (3, 1, V, D_IMG) and not some.checked
    assert torch.equal(some[:], features[[7, 2, 19]])
    assert torch.equal(features.select(slice(5))[:], features[:5])


def test_another_process_gets_the_place_and_not_the_numbers(paths, tmp_path):
    features = keep(tmp_path / "f", paths)
    sent = pickle.dumps(features)
    assert len(sent) < 2500 < features.nbytes
    assert torch.equal(pickle.loads(sent)[:], features[:])


def test_float32_where_it_is_asked_for(paths, tmp_path):
    features = keep(tmp_path / "f", paths, dtype=torch.float32)
    exact = encode_pictures(Tower(), processor, paths, 6, torch.float32)
    assert features.dtype == torch.float32 and torch.equal(features[:], exact)
    with pytest.raises(ValueError, match="want float16 or float32, got bfloat16"):
        keep(tmp_path / "f", paths, dtype=torch.bfloat16)


def test_one_picture_and_none(paths, tmp_path):
    assert keep(tmp_path / "f", paths[0]).shape[0] == 1
    assert keep(tmp_path / "f", {"path": paths[0]}).shape[0] == 1
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="there are no pictures"):
            keep(tmp_path / "f", nothing)
    with pytest.raises(TypeError, match="want a list of pictures, got int"):
        keep(tmp_path / "f", 3)


# -------------------------------------------------------------- each picture once


def n_encoded(tower):
    """Pictures that went through, without the noise that tells the features' shape."""
    return sum(tower.calls) - tower.calls.count(1)


def test_nothing_is_encoded_or_read_twice(paths, tmp_path, settled, monkeypatch):
    first, again = Tower(), Tower()
    one = keep(tmp_path / "f", paths, first)
    assert n_encoded(first) == 20
    monkeypatch.setattr(cache, "_Reading", None)  # nothing is opened
    two = keep(tmp_path / "f", paths, again)
    assert n_encoded(again) == 0 and torch.equal(one[:], two[:])


def test_several_captions_share_a_picture(tmp_path, paths):
    rows = [{"path": path, "text": f"said {k}"} for path in paths[:4] for k in "abc"]
    tower = Tower()
    features = keep(tmp_path / "f", rows, tower)
    assert features.shape[0] == 12 and n_encoded(tower) == 4
    assert (features.folder / "features.bin").stat().st_size == 4 * V * D_IMG * 2
    assert torch.equal(features[:], wanted(paths[:4]).repeat_interleave(3, dim=0))


def test_a_picture_twice_that_is_read_ahead(tmp_path, paths):
    """Workers read the second one before the first one's features are there."""
    tower = Tower()
    features = keep(tmp_path / "f", [*paths[:6], paths[0], paths[5]], tower)
    assert n_encoded(tower) == 6 and len(set(features.hashes)) == 6
    assert (features.folder / "features.bin").stat().st_size == 6 * V * D_IMG * 2


def test_files_that_moved_are_known(tmp_path, paths):
    """And so are copies, the same files in another order, and a cache that moved."""
    tower = Tower()
    before = keep(tmp_path / "f", paths, tower)
    old = before[:]
    shutil.copytree(paths[0].parent, tmp_path / "copy")
    shutil.move(tmp_path / "f", tmp_path / "g")
    moved = [tmp_path / "copy" / path.name for path in reversed(paths)]
    features = keep(tmp_path / "g", moved, tower)
    assert n_encoded(tower) == 20 and torch.equal(features[:], old.flip(0))


def test_new_pictures_are_added_to_the_old(tmp_path, paths, settled):
    tower = Tower()
    keep(tmp_path / "f", paths[:12], tower)
    features = keep(tmp_path / "f", paths, tower)
    assert n_encoded(tower) == 20 and torch.equal(features[:], wanted(paths))


# --------------------------------------------------------- never a wrong picture


def test_a_picture_that_changed_is_encoded_again(tmp_path, paths, settled):
    """Though its size and its time of change are those of before."""
    for path in paths[:3]:
        picture(1).save(path.with_suffix(".bmp"))
    files = [path.with_suffix(".bmp") for path in paths[:3]]
    keep(tmp_path / "f", files)
    before = os.stat(files[1])
    picture(50).save(files[1])
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(files[1]).st_size == before.st_size
    assert os.stat(files[1]).st_mtime_ns == before.st_mtime_ns
    features = keep(tmp_path / "f", files)
    assert torch.equal(features[:], wanted(files))
    assert not torch.equal(features[1], features[0])
    picture(1).save(files[1])  # and back
    assert torch.equal(keep(tmp_path / "f", files)[:], wanted(files))


def test_a_file_that_has_just_been_written_is_read_again(tmp_path, paths, monkeypatch):
    """Within one tick of the clock a file may change without a mark of it."""
    mark = [1000, time.time_ns(), time.time_ns(), 7]
    monkeypatch.setattr(cache, "_mark", lambda path: mark)
    keep(tmp_path / "f", paths[:2])
    picture(50).save(paths[1])
    assert torch.equal(keep(tmp_path / "f", paths[:2])[:], wanted(paths[:2]))
    assert cache._is_settled([1000, time.time_ns() - 4 * 10**9, 0, 7])


def test_a_file_that_changes_while_it_is_read_is_not_marked(
    tmp_path, paths, settled, monkeypatch
):
    real = Path.read_bytes

    def read(path):
        content = real(path)
        if path == paths[1]:
            picture(50).save(paths[1])
        return content

    monkeypatch.setattr(Path, "read_bytes", read)
    old = wanted([picture(0), picture(1)])
    assert torch.equal(keep(tmp_path / "f", paths[:2])[:], old)  # what was read
    monkeypatch.setattr(Path, "read_bytes", real)
    assert torch.equal(keep(tmp_path / "f", paths[:2])[:], wanted(paths[:2]))


def change_last_weight(tower):
    tower.weight.data[-1, -1] += 0.5


def change_dtype(tower):
    tower.double()


@pytest.mark.parametrize("change", [change_last_weight, change_dtype])
def test_another_tower_gets_other_features(tmp_path, paths, change):
    tower = Tower()
    old = keep(tmp_path / "f", paths, tower)
    change(tower)
    new = keep(tmp_path / "f", paths, tower)
    assert new.folder != old.folder
    assert torch.equal(new[:], wanted(paths, tower))
    assert torch.equal(old[:], wanted(paths))


def test_another_activation_or_decoding_gets_other_features(make_model):
    """The weights are the same: the fingerprint of chapter 5b has the rest."""
    model, image_processor, _ = make_model()
    visual = model.vision_encoder
    before = cache_settings(visual, image_processor)
    assert before == cache_settings(make_model()[0].vision_encoder, image_processor)
    visual.transformer.resblocks[0].mlp.gelu = nn.ReLU()
    assert cache_settings(visual, image_processor) != before
    visual.transformer.resblocks[0].mlp.gelu = nn.GELU()
    assert cache_settings(visual, image_processor) == before
    visual.image_size = (64, 64)
    assert cache_settings(visual, image_processor) != before
    tower = Tower()
    before = cache_settings(tower, processor)
    tower.image_size = (16, 16)  # so JPEGs are decoded at another size
    assert cache_settings(tower, processor) != before


def test_another_image_processor_gets_other_features(tmp_path, paths):
    def darker(picture):
        return processor(picture) * 0.9

    one = keep(tmp_path / "f", paths)
    two = cache_features(tmp_path / "f", Tower(), darker, paths, 6, progress=False)
    assert one.folder != two.folder and not torch.equal(one[:], two[:])


def scaled(how, **kwargs):
    """An image processor that makes 224 x 224 pixels."""

    def process(picture):
        small = picture.resize((224, 224), how, **kwargs)
        return torch.tensor(np.asarray(small)).permute(2, 0, 1).float() / 255

    return process


def padded(picture):
    """As `processor`, but what is narrow is not scaled up."""
    return processor(ImageOps.pad(picture, (8, 8)) if picture.width < 8 else picture)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled(Image.Resampling.BOX), scaled(Image.Resampling.NEAREST)),
        (scaled(BICUBIC := Image.Resampling.BICUBIC), scaled(BICUBIC, reducing_gap=3)),
        (processor, padded),
    ],
    ids=["down", "far down", "up"],
)
def test_each_way_of_scaling_shows(one, other):
    """Some differ where a picture is made smaller, and some where it is made larger."""
    settings = [cache_settings(Tower(), way)["pixels"] for way in (one, one, other)]
    assert settings[0] == settings[1] != settings[2]


own = np.random.default_rng(0)
CHANCE = {
    "torch": lambda: torch.rand(1).item(),
    "numpy": np.random.rand,
    "python": random.random,
    "a generator of its own": own.random,
}


@pytest.mark.parametrize("kind", CHANCE)
def test_chance_is_refused(tmp_path, paths, kind):
    """Of what changes one picture in five thousand, too, if others can see it draw."""
    share = 0.3 if kind == "a generator of its own" else 0.0002

    def noisy(picture):
        return processor(picture) + float(CHANCE[kind]() < share)

    with pytest.raises(ValueError, match="by chance.* take PixelSource"):
        cache_features(tmp_path / "f", Tower(), noisy, paths)
    assert not (tmp_path / "f").exists()


def test_asking_for_the_settings_draws_nothing():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    drawn = [draw() for draw in list(CHANCE.values())[:3]]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    cache_settings(Tower(), processor)
    assert drawn == [draw() for draw in list(CHANCE.values())[:3]]


# ----------------------------------------------------------------- killed, and on


def in_child(function, *args):
    """Run it in a forked process of its own: its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment, number, folder, paths):
    """Encode, and be killed at the `number`th write: before, in, or after it."""
    real, calls = cache._append, []

    def append(path, start, content):
        calls.append(path)
        if len(calls) == number:
            if moment == "in":
                with open(path, "ab") as file:
                    file.write(content[: len(content) // 2])
            if moment == "after":
                real(path, start, content)
            die()
        real(path, start, content)

    cache._append = append
    keep(folder, paths)


@posix
@pytest.mark.parametrize("moment", ["before", "in", "after"])
@pytest.mark.parametrize("number", range(1, 9))
def test_killed_at_any_write_it_goes_on(tmp_path, paths, settled, moment, number):
    """Twenty pictures are four batches, of three writes each."""
    folder = tmp_path / "f"
    assert in_child(die_at, moment, number, folder, paths) == -signal.SIGKILL
    tower = Tower()
    features = keep(folder, paths, tower)
    assert torch.equal(features[:], wanted(paths))
    done = number if moment == "after" else number - 1  # whole writes
    left = 20 - 6 * ((done + 1) // 3)  # a batch counts once its lines are there
    assert n_encoded(tower) == left or (moment == "in" and n_encoded(tower) < left)
    assert (features.folder / "features.bin").stat().st_size == 20 * V * D_IMG * 2
    assert torch.equal(keep(folder, paths, tower)[:], features[:])


def work_slowly(folder, paths):
    class Slow(Tower):
        def forward(self, pixels):
            time.sleep(0.2)
            return super().forward(pixels)

    keep(folder, paths, Slow(), batch_size=2)


def rows_in(folder):
    """The lists of what is done, one for each key."""
    return list(folder.glob("*/rows.jsonl"))


@posix
def test_two_writers(tmp_path, paths, settled):
    """The second is refused, or waits; a reader is not kept waiting; death unlocks."""
    folder = tmp_path / "f"
    context = multiprocessing.get_context("fork")
    other = context.Process(target=work_slowly, args=(folder, paths))
    other.start()
    while not any(len(f.read_bytes().splitlines()) > 1 for f in rows_in(folder)):
        time.sleep(0.02)  # the first two pictures are not there yet
    place = next(folder.glob("*"))
    with pytest.raises(TimeoutError, match=r"another process is writing.*wait=3600"):
        keep(folder, paths, Tower())
    there = keep(folder, paths[:2])  # read, while the other one writes
    assert torch.equal(there[:], wanted(paths[:2]))
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert len((place / "rows.jsonl").read_bytes().splitlines()) < 20
    assert torch.equal(keep(folder, paths)[:], wanted(paths))


@posix
def test_who_waits_finds_all_done(tmp_path, paths, settled):
    folder, tower = tmp_path / "f", Tower()
    context = multiprocessing.get_context("fork")
    other = context.Process(target=work_slowly, args=(folder, paths))
    other.start()
    while not list(folder.glob("*/rows.jsonl")):
        time.sleep(0.02)
    features = keep(folder, paths, tower, wait=60)
    other.join()
    assert n_encoded(tower) == 0 and torch.equal(features[:], wanted(paths))


def test_an_error_keeps_what_was_done(tmp_path, paths, settled):
    paths[15].write_bytes(paths[15].read_bytes()[:100])
    tower = Tower()
    with pytest.raises(ValueError, match=r"pictures\[15\]: .*15\.png"):
        keep(tmp_path / "f", paths, tower)
    assert n_encoded(tower) == 15
    picture(15).save(paths[15])
    features = keep(tmp_path / "f", paths, tower)
    assert n_encoded(tower) == 20 and torch.equal(features[:], wanted(paths))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_bad_picture_is_named_by_a_worker_too(tmp_path, paths):
    paths[3].unlink()
    with pytest.raises(ValueError, match=r"pictures\[3\]: .*03\.png: there is no") as e:
        keep(tmp_path / "f", paths, workers=2)
    assert "Traceback" not in str(e.value)
    with pytest.raises(TypeError, match=r"pictures\[1\]: want a PIL picture, got None"):
        keep(tmp_path / "f", [paths[0], None], workers=2)


def test_features_that_are_too_large_are_named(tmp_path, paths):
    with pytest.raises(ValueError, match=r"float16 only .*: take dtype=torch.float32"):
        keep(tmp_path / "f", paths, Tower(factor=1e6))
    white = [*paths[:2], Image.new("RGB", (9, 9), "white")]
    black = [Image.new("RGB", (9, 9))] * 2

    class Loud(Tower):
        def forward(self, pixels):
            _, tokens = super().forward(pixels)
            loud = pixels.amin(dim=(1, 2, 3)) > 0.99  # (some,)
            return None, torch.where(loud[:, None, None], 1e6, tokens)

    with pytest.raises(ValueError, match=r"pictures\[2\]: .*1e\+06.*take dtype"):
        keep(tmp_path / "f", white, Loud())
    assert keep(tmp_path / "f", black, Loud()).shape[0] == 2
    white[2].save(tmp_path / "loud.png")
    for loud in (tmp_path / "loud.png", Image.open(tmp_path / "loud.png")):
        for encode in (keep, lambda _, *data: wanted(*data)):
            with pytest.raises(ValueError, match=r"pictures\[2\] \(.*loud\.png\): "):
                encode(tmp_path / "f", [*white[:2], loud], Loud())


# ------------------------------------------------------------------ disk and damage


def free(n_bytes):
    return lambda folder: types.SimpleNamespace(free=n_bytes)


def test_the_disk_is_asked_before_anything_is_written(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", free(20 * V * D_IMG * 2 - 1))
    with pytest.raises(OSError, match=r"want 0\.0 MB, and 0\.0 MB are free; take an"):
        keep(tmp_path / "f", paths)
    assert not list(tmp_path.glob("f/*/features.bin"))
    monkeypatch.setattr(shutil, "disk_usage", free(20 * V * D_IMG * 2))
    assert keep(tmp_path / "f", paths).shape[0] == 20


def test_a_full_disk_is_no_matter_where_all_is_known(tmp_path, paths, monkeypatch):
    """The files moved, so they must be read, but nothing will be written."""
    keep(tmp_path / "f", paths)
    shutil.move(paths[0].parent, tmp_path / "moved")
    moved = [tmp_path / "moved" / path.name for path in paths]
    monkeypatch.setattr(shutil, "disk_usage", free(0))
    tower = Tower()
    assert torch.equal(keep(tmp_path / "f", moved, tower)[:], wanted(moved))
    assert n_encoded(tower) == 0
    with pytest.raises(OSError, match="0.0 MB are free"):
        keep(tmp_path / "f", [*moved, picture(77)])


def test_a_disk_that_fills_up_is_named_and_the_rest_kept(
    tmp_path, paths, settled, monkeypatch
):
    real, calls = os.fsync, []

    def fsync(number):
        calls.append(number)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    message = r"features\.bin: No space left.*the same call goes on"
    with pytest.raises(OSError, match=message) as caught:
        keep(tmp_path / "f", paths)
    assert caught.value.errno == errno.ENOSPC
    tower = Tower()
    assert torch.equal(keep(tmp_path / "f", paths, tower)[:], wanted(paths))
    assert n_encoded(tower) == 14


def test_damage_is_found_and_named(tmp_path, paths, settled):
    features = keep(tmp_path / "f", paths)
    data = features.folder / "features.bin"
    whole = data.read_bytes()
    spoilt = bytearray(whole)
    spoilt[5 * V * D_IMG * 2 + 9] ^= 1
    data.write_bytes(spoilt)
    damaged = FeatureCache(features.folder, features.hashes)
    assert torch.equal(damaged[[4, 6]], wanted(paths)[[4, 6]])
    with pytest.raises(ValueError, match=r"features\.bin: .*pictures\[5\] "):
        damaged[[4, 5]]
    said = r"pictures\[5\] \(.*05\.png\) are damaged; delete its folder"
    with pytest.raises(ValueError, match=said):
        damaged[[5]]  # and again
    data.write_bytes(whole[:-1])
    for act in (lambda: keep(tmp_path / "f", paths), lambda: features.select([0])):
        with pytest.raises(ValueError, match=r"features\.bin is cut: 20,479 of 20,480"):
            act()
    data.write_bytes(whole)
    assert torch.equal(keep(tmp_path / "f", paths)[:], wanted(paths))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b"\x00\x00\n"),
        ("files.jsonl", b'["a", "b"\n'),
        ("settings.json", b"{}"),
        ("settings.json", b'{"shape": [1, 2, 3], "dtype": "int8"}'),
        ("settings.json", b""),
    ],
)
def test_damaged_lists_are_named(tmp_path, paths, name, content):
    features = keep(tmp_path / "f", paths)
    (features.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged: .*delete its folder"):
        keep(tmp_path / "f", paths)


def test_a_folder_without_features_says_so(tmp_path, paths):
    with pytest.raises(FileNotFoundError, match="holds no features"):
        FeatureCache(tmp_path, ["00"])
    features = keep(tmp_path / "f", paths)
    with pytest.raises(ValueError, match=r"no features of pictures\[1\]"):
        FeatureCache(features.folder, [features.hashes[0], "00"])


# -------------------------------------------------------------------------- memory


def peak(function):
    """By how many bytes a process of its own grows at most while it runs this."""

    def run(pipe):
        gc.collect()  # what earlier tests left must not be given back meanwhile
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        pipe.send(function())

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(False)
    process = context.Process(target=run, args=(there,))
    process.start()
    grown = here.recv()
    process.join()
    return grown


def memory(name):
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) * 1024


class Made:
    """So many pictures, each made when it is asked for."""

    def __init__(self, n, then=lambda: None):
        self.n, self.then = n, then

    def __len__(self):
        return self.n

    def __getitem__(self, number):
        self.then()
        return picture(number)

    def __iter__(self):
        return map(self.__getitem__, range(self.n))


LARGE = (64, 192)  # v and d_img: 24.6 kB a picture


def grown_by_encoding(how, n, folder):
    """What `how` takes for n pictures of LARGE features, in a process of its own."""

    def run():
        torch.set_num_threads(1)
        tower = Tower(*LARGE)
        encode_pictures(tower, processor, [picture(0)])  # libraries warm up
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak up to here
        before, own = memory("VmRSS"), [memory("RssAnon")]
        pictures = Made(n, lambda: own.append(memory("RssAnon")))
        if how == "cache":
            cache_features(
                folder, tower, processor, pictures, 32, workers=0, progress=False
            )
        else:
            encode_pictures(tower, processor, pictures, 32)
        # The system may take pages of libraries away meanwhile, which hides growth from
        # the first of the two; the second is counted picture by picture, between peaks.
        return max(memory("VmHWM") - before, max(own) - own[0])

    return peak(run)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_pictures(tmp_path):
    one = 2 * LARGE[0] * LARGE[1]  # bytes
    few = grown_by_encoding("cache", 200, tmp_path / "few")
    many = grown_by_encoding("cache", 2000, tmp_path / "many")
    assert many - few < 0.15 * 1800 * one, (few, many)
    held = grown_by_encoding("tensor", 2000, None)
    assert held > 0.9 * 2000 * one, held  # the measure does see what is held


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_holds_no_more_than_what_is_asked_for(tmp_path):
    features = cache_features(
        tmp_path / "f",
        Tower(*LARGE),
        processor,
        [picture(i) for i in range(1500)],
        workers=0,
        progress=False,
    )

    def run():
        before, most = memory("RssAnon"), 0
        for start in range(0, 1500, 50):
            features[list(range(start, start + 50))]
            most = max(most, memory("RssAnon") - before)
        return most

    assert peak(run) < 0.2 * features.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_encode_pictures_holds_its_result_once():
    result = 2000 * 2 * LARGE[0] * LARGE[1]  # bytes
    assert grown_by_encoding("tensor", 2000, None) < 1.4 * result


def test_the_bar_says_the_size(tmp_path, paths, capsys):
    keep(tmp_path / "f", paths, progress=True)
    error = capsys.readouterr().err
    assert "features, 0.0 MB: 100%" in error and "20/20" in error
    keep(tmp_path / "f", paths)
    assert capsys.readouterr() == ("", "")
    assert cache._words(1_572_864_000) == "1.6 GB" and cache._words(24_576) == "0.0 MB"


# ------------------------------------------------------- where a tensor goes, it goes


@pytest.fixture
def flamingo(make_model, paths, tmp_path):
    """A small Flamingo, the pictures' features on disk, the same as a tensor."""
    model, image_processor, tokenizer = make_model(gates=1.0)
    settings = {"batch_size": 6, "progress": False}
    there = cache_features(
        tmp_path / "f", model.vision_encoder, image_processor, paths, **settings
    )
    tensor = encode_pictures(model.vision_encoder, image_processor, paths, 6)
    return model, image_processor, tokenizer, there, tensor


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_batches_from_it(flamingo):
    _, _, tokenizer, there, tensor = flamingo
    texts = [f"picture {i}" for i in range(20)]
    same(*(make_batch([4, 0, 19], f, texts, tokenizer, "cpu") for f in (there, tensor)))
    sequences = [[0, 1, 2], [5, 5], [19, 3, 8]]
    told = [[texts[i] for i in s] for s in sequences]
    same(
        *(
            make_batch([2, 0], f, told, tokenizer, "cpu", sequences)
            for f in (there, tensor)
        )
    )


def test_training_from_it(flamingo, make_model, paths, tmp_path):
    """The same weights as from a tensor, and nearly so from pixels; of others not."""
    _, image_processor, tokenizer, there, tensor = flamingo
    texts = [f"picture {i}" for i in range(20)]
    texts[3] = ["three", "drei"]
    ends, losses = [], []
    pixels, others = (
        PixelSource(some, image_processor) for some in (paths, paths[::-1])
    )
    for features in (there, tensor, pixels, others):
        model = make_model(seed=1, gates=1.0)[0]
        settings = {"n_steps": 6, "batch_size": 4, "report_every": 3}
        settings |= {"report": str, "checkpoint": tmp_path / f"{len(ends)}.pt"}
        history = train(model, tokenizer, features, texts, **settings)
        ends.append(model.state_dict())
        losses.append([note["loss"] for note in history])
    for name, weights in ends[0].items():
        assert torch.equal(weights, ends[1][name]), name
        torch.testing.assert_close(weights, ends[2][name], atol=2e-2, rtol=2e-2)
    assert losses[0] == losses[1]
    near, far = (np.abs(np.subtract(own, losses[0])).max() for own in losses[2:])
    assert near < 1e-3 < far, (near, far)


def test_captions_and_few_shot_from_it(flamingo):
    model, _, tokenizer, there, tensor = flamingo
    some = [there[[i]] for i in (3, 4)]
    exact = [tensor[[i]] for i in (3, 4)]
    words = [
        caption(model, None, tokenizer, f, max_new_tokens=4) for f in (some, exact)
    ]
    assert words[0] == words[1]
    for images in (there, there.select([3, 4])):  # as a whole
        alike = caption(model, None, tokenizer, images[:], max_new_tokens=4)
        assert caption(model, None, tokenizer, images, max_new_tokens=4) == alike
    two = "<image>a<|endofchunk|><image>", ["a tent", "a lemon"]
    scores = [
        score_candidates(model, None, tokenizer, f, *two)
        for f in (there.select([3, 4]), tensor[[3, 4]])
    ]
    assert torch.equal(*scores)
    episodes = [
        {"numbers": [1, -1, 7], "texts": ["a dax", "a wug", "a dax"]},
        {"numbers": [3, 2, 2], "texts": ["a wug", "a dax", "a wug"]},
    ]
    said = [answer(model, tokenizer, f, episodes) for f in (there, tensor)]
    assert said[0] == said[1]
    chosen = [
        nearest(f[[0, 1]].float().mean(dim=(1, 2)), f[:].float().mean(dim=(1, 2)), 3)
        for f in (there, tensor)
    ]
    assert torch.equal(*chosen) and chosen[0][:, -1].tolist() == [0, 1]


def test_tasks_and_stories_from_it(make_model, tmp_path):
    model, image_processor, tokenizer = make_model()
    rows = [r for r in load_captions(ROOT / "data" / "emoji") if r["named"]][:60]
    tasks = make_tasks(rows, 6, seed=1, task="what is this")
    stories = make_stories(rows, 3, seed=1)
    flat = [picture for story in stories for picture in story["pictures"]]
    for pictures in (tasks, flat):
        features = cache_features(
            tmp_path / "f",
            model.vision_encoder,
            image_processor,
            pictures,
            progress=False,
        )
        exact = encode_pictures(model.vision_encoder, image_processor, pictures)
        torch.testing.assert_close(features[:], exact)
    ends = np.cumsum([len(story["texts"]) for story in stories]).tolist()
    sequences = [
        list(range(end - len(story["texts"]), end))
        for story, end in zip(stories, ends, strict=True)
    ]
    told = [story["texts"] for story in stories]
    batch = make_batch([1], features, told, tokenizer, "cpu", sequences)
    assert batch["vision_features"].shape[1] == len(told[1])


# ---------------------------------------------------------------------------- pixels


def test_pixels_are_a_source_too(make_model, paths):
    """The model makes of them what it makes of the features."""
    model, image_processor, tokenizer = make_model(gates=1.0)
    source = PixelSource(paths, image_processor)
    assert source.shape == (20, 1, 3, 32, 32) and len(source) == 20
    assert source.ndim == 5 and source[3].shape == (1, 3, 32, 32)
    exact = torch.stack([image_processor(read_picture(path)) for path in paths])
    assert torch.equal(source[[4, -1]], exact[[4, -1], None])
    tensor = encode_pictures(
        model.vision_encoder, image_processor, paths, dtype=torch.float32
    )
    texts = [f"picture {i}" for i in range(20)]
    losses = []
    for features in (source, tensor):
        batch = make_batch([2, 9], features, texts, tokenizer, "cpu")
        losses.append(model(batch.pop("vision_x", None), **batch).loss)
    torch.testing.assert_close(*losses)


def test_a_tower_that_is_unfrozen_learns_from_pixels(make_model, paths):
    model, image_processor, tokenizer = make_model(gates=1.0)
    model.vision_encoder.requires_grad_(True)
    tower = model.vision_encoder.state_dict()
    before = {name: tensor.clone() for name, tensor in tower.items()}
    texts = [f"picture {i}" for i in range(20)]
    train(model, tokenizer, PixelSource(paths, image_processor), texts, 2, report=str)
    moved = [n for n, t in tower.items() if not torch.equal(t, before[n])]
    last = "transformer.resblocks.1.mlp.c_fc.weight"
    assert "conv1.weight" in moved and last in moved


def test_pixels_change_with_the_image_processor(paths):
    def noisy(picture):
        return processor(picture) + torch.rand(1)

    source = PixelSource(iter(paths), noisy)
    assert not torch.equal(source[[1]], source[[1]])
    torch.manual_seed(0)
    one = source[[1, 2]]
    torch.manual_seed(0)
    assert torch.equal(one, source[[1, 2]])


def test_pixels_name_what_cannot_be_read(paths, tmp_path):
    source = PixelSource([*paths, tmp_path / "gone.png"], processor)
    with pytest.raises(ValueError, match=r"pictures\[20\]: .*gone\.png"):
        source[[20]]
    with pytest.raises(IndexError):
        source[[21]]
    with pytest.raises(ValueError, match="there are no pictures"):
        PixelSource([], processor)


def test_pixels_and_features_know_their_files(paths, tmp_path, settled, monkeypatch):
    """By their whole paths; what came from no file has none."""
    monkeypatch.chdir(paths[0].parent)
    given = [paths[0], "01.png", {"path": paths[2]}, Image.open("03.png"), picture(9)]
    whole = [str(path) for path in paths[:4]] + [None]
    assert PixelSource(given, processor).files == whole
    assert PixelSource(Columns(paths), processor).files == [None] * 20
    features = keep(tmp_path / "f", given[:3])
    assert features.files == whole[:3] and features.select([2]).files == whole[2:3]
    assert keep(tmp_path / "f", given).files == [*whole[:3], None, None]


@pytest.mark.parametrize("of", ["files", "memory"])
def test_a_bad_step_names_the_files_of_its_pictures(flamingo, paths, of):
    pixels = PixelSource(paths[:4], processor)
    pixels = pixels if of == "files" else pixels[:]
    texts = [f"a {n}" for n in range(4)]
    said = Examples(flamingo[2], pixels, texts, None, 4, 1, 0).suspects(0)
    assert "with the texts" in said
    assert sum(str(path) in said for path in paths) == (3 if of == "files" else 0)


class Column:
    """As a pandas.Series after `sample` or a filter: asked by label, not by place."""

    def __init__(self, values, labels):
        self.by_label, self.iloc = dict(zip(labels, values, strict=True)), None

    def __len__(self):
        return len(self.by_label)

    def __iter__(self):
        return iter(self.by_label.values())

    def __getitem__(self, label):
        return self.by_label[label]


class Table(Column):
    """As a pandas.DataFrame: it iterates over the names of its columns."""

    columns = ("path", "text")

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient):
        assert orient == "records"
        return list(self.by_label.values())


@pytest.mark.parametrize("kind", ["column", "table"])
@pytest.mark.parametrize("labels", [range(19, -1, -1), range(100, 120)])
def test_pandas_is_read_by_place(paths, tmp_path, kind, labels):
    """After a shuffle, or with labels that are no places."""
    rows = [{"path": path, "text": path.stem} for path in paths]
    given = Column(paths, labels) if kind == "column" else Table(rows, labels)
    features = wanted(paths)
    assert torch.equal(wanted(given), features)
    assert torch.equal(keep(tmp_path / "f", given)[:], features)
    assert torch.equal(
        PixelSource(given, processor)[:], PixelSource(paths, processor)[:]
    )


def test_texts_of_pandas_stay_beside_their_pictures(flamingo, paths):
    tokenizer = flamingo[2]
    texts = [f"a {n}" for n in range(20)]
    column = Column(texts, range(19, -1, -1))
    features = wanted(paths)
    rows, device = [3, 7], torch.device("cpu")
    batch = make_batch(rows, features, column, tokenizer, device)
    by_hand = make_batch(rows, features, texts, tokenizer, device)
    assert torch.equal(batch["lang_x"], by_hand["lang_x"])
    assert check_examples(features, column)[0] == texts
    check_texts(column, tokenizer)
    table = Table([{"text": text} for text in texts], range(20))
    with pytest.raises(ValueError, match=r"texts\[0\] .*'a 0'.* not a text"):
        check_texts(check_examples(features, table)[0], tokenizer)
    some = Column(["a lemon", "very " * 500], [5, 6])
    with pytest.raises(ValueError, match="row 0: .* tokens, but the model reads"):
        collate([(features[:2], some)], tokenizer)


def test_pixels_of_a_large_jpeg_are_decoded_as_wide_as_is_asked(tmp_path):
    picture(0, (800, 600)).save(tmp_path / "a.jpg")
    seen = []

    def note(picture):
        seen.append(picture.size)
        return processor(picture)

    PixelSource([tmp_path / "a.jpg"], note)[[0]]
    PixelSource(tmp_path / "a.jpg", note, least=200)[[0]]
    assert seen == [(800, 600)] * 2 + [(400, 300)] * 2


def test_pixels_in_a_batch(make_model):
    tokenizer = make_model()[2]
    pixels = torch.rand(3, 1, 3, 32, 32)
    batch = collate([(pixels, ["a", "b", "c"]), (pixels[:1], ["d"])], tokenizer)
    assert batch["vision_x"].shape == (2, 3, 1, 3, 32, 32)
    assert "vision_features" not in batch
    assert torch.equal(batch["vision_x"][0], pixels)
    assert not batch["vision_x"][1, 1:].any()
    media = tokenizer.convert_tokens_to_ids("<image>")
    check_pictures(batch["vision_x"], batch["lang_x"] == media, "B T i F h w")
    mixed = [(pixels, ["a", "b", "c"]), (torch.rand(1, 1, V, D_IMG), ["d"])]
    with pytest.raises(ValueError, match="row 1: pictures are .*those of row 0"):
        collate(mixed, tokenizer)
    with pytest.raises(ValueError, match=r"row 0: want .*or \(T_img, F, 3, H, W\)"):
        collate([(pixels[None], ["a"])], tokenizer)


def test_collate_refuses_what_the_model_would(make_model):
    """A tokenizer that cuts, say, loses an `<image>`, and the picture stays."""
    tokenizer = make_model()[2]

    def cut(texts, **kwargs):
        return tokenizer(texts, **kwargs, truncation=True, max_length=5)

    class Cutting(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs, truncation=True, max_length=5)

    cutting = pickle.loads(pickle.dumps(tokenizer))
    cutting.__class__ = Cutting
    features = torch.rand(2, 1, V, D_IMG)
    texts = ["a lemon to the left of a tent", "a tent"]
    with pytest.raises(ValueError, match="row 0: 1 <image> tokens, but 2 pictures"):
        collate([(features, texts)], cutting)
    ids = cut(["<image>" + "<|endofchunk|><image>".join(texts)], return_tensors="pt")
    media = tokenizer.convert_tokens_to_ids("<image>")
    with pytest.raises(ValueError, match="row 0 has 1 <image> tokens, and 1 pictures"):
        check_pictures(features[None], ids.input_ids == media)
