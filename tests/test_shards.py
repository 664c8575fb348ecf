"""Shards: each picture once, whoever reads; what is broken is named, or left out."""

import io
import json
import random
import re
import sys
import tarfile
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from flamingo_lite import (
    FeatureCache,
    cache_features,
    collate,
    encode_pictures,
    find_shards,
    loss_at_labels,
    read_picture,
    read_shards,
    train,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
BOTH = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=linux)])


def jpeg(seed, size=(24, 16), kind="JPEG"):
    """The bytes of a picture file of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, kind)
    return content.getvalue()


def write_tar(path, files):
    """An archive of (name, bytes), as `tar` writes it."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def files_of(numbers):
    """A JPEG and a text for each number."""
    for n in numbers:
        yield f"{n:04d}.jpg", jpeg(n)
        yield f"{n:04d}.txt", f"picture {n}".encode()


@pytest.fixture
def web(tmp_path):
    """Five shards of 9, 7, 9, 7, 9 pictures, numbered through."""
    folder, first = tmp_path / "web", 0
    folder.mkdir()
    for i, n in enumerate((9, 7, 9, 7, 9)):
        write_tar(folder / f"{i:06d}.tar", files_of(range(first, first + n)))
        first += n
    return folder


ALL = [f"{n:04d}" for n in range(41)]


def keys(shards, **settings):
    return [row["key"] for row in read_shards(shards, **settings)]


def problems(shards, **settings):
    """(keys of the rows, warnings) of a reading that leaves out what is broken."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = keys(shards, skip_broken=True, **settings)
    return found, [str(w.message) for w in told if "left out" in str(w.message)]


# ----------------------------------------------------------------- once, and in order


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("buffer", [1, 4, 100])
@BOTH
def test_every_picture_once(web, workers, seed, buffer):
    settings = {"workers": workers, "seed": seed, "buffer": buffer}
    assert sorted(keys(web, **settings)) == ALL


@linux
@pytest.mark.parametrize("workers", [3, 7])
def test_more_workers_than_shards_lose_nothing(web, workers):
    assert sorted(keys(web, workers=workers, seed=1, buffer=5)) == ALL


@BOTH
def test_order(web, workers):
    """The same for the same seed, another for another seed, epoch, or buffer."""
    settings = {"workers": workers, "seed": 5, "buffer": 6}
    order = keys(web, **settings)
    assert order == keys(web, **settings)
    for change in ({"seed": 6}, {"epoch": 1}, {"buffer": 20}, {"seed": None}):
        other = keys(web, **{**settings, **change})
        assert other != order and sorted(other) == ALL, change


def test_without_a_seed_as_they_lie(web):
    assert keys(web) == ALL


@BOTH
def test_no_random_number_is_taken(web, workers):

    def seed_all():
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    seed_all()
    wanted = draw()
    seed_all()
    keys(web, workers=workers, seed=1)
    assert draw() == wanted


def test_a_buffer_mixes_so_many_at_a_time(web):
    """Without the shards' lots: the first ten handed out are ten of one shard."""
    order = keys([web / "000000.tar", web / "000002.tar"], seed=2, buffer=9)
    assert len({key < "0009" for key in order[:9]}) == 1
    assert order[:9] != sorted(order[:9])


@BOTH
def test_rows(web, workers):
    """Text, picture, key and shard belong together."""
    for row in read_shards(web, workers=workers, seed=3, buffer=10):
        number = int(row["key"])
        assert row["text"] == f"picture {number}"
        with Image.open(io.BytesIO(jpeg(number))) as picture:
            assert row["picture"].tobytes() == picture.convert("RGB").tobytes()
        with tarfile.open(row["shard"]) as archive:
            assert f"{row['key']}.jpg" in archive.getnames()


@pytest.mark.parametrize("n_processes", [2, 3])
def test_several_processes_share_an_epoch(web, n_processes):
    parts = [
        keys(web, seed=4, buffer=8, process=i, n_processes=n_processes)
        for i in range(n_processes)
    ]
    assert all(parts) and sorted(sum(parts, [])) == ALL


# --------------------------------------------------------------------------- going on


@pytest.mark.parametrize("stop", [1, 9, 12, 25, 41])
@BOTH
def test_stopped_and_gone_on(web, workers, stop):
    """Every picture comes; twice, only of shards that had begun and were not done."""
    settings = {"workers": workers, "seed": 7, "buffer": 5}
    first = []
    for row in read_shards(web, **settings):
        first.append(row)
        if len(first) == stop:
            break
    done = first[-1]["done"]
    rest = list(read_shards(web, **settings, done=json.loads(json.dumps(done))))
    kept = [row["key"] for row in first if row["shard"] in done]
    assert sorted(kept + [row["key"] for row in rest]) == ALL
    if workers == 0:  # at most two shards are open, and five pictures wait
        assert len(done) >= stop // 9 - 1
    last = rest[-1]["done"] if rest else done
    assert sorted(last) == find_shards(web)


def test_a_shard_is_not_done_before_its_last_row(web):
    left = Counter()
    for path in find_shards(web):
        with tarfile.open(path) as archive:
            left[path] = len(archive.getnames()) // 2
    for row in read_shards(web, seed=1, buffer=7):
        left[row["shard"]] -= 1
        assert {path for path in left if not left[path]} == set(row["done"])
    assert set(left.values()) == {0}


def test_done_must_be_shards_of_these(web):
    with pytest.raises(ValueError, match="done: other.tar is none of these"):
        read_shards(web, done=["other.tar"])
    everything = find_shards(web)
    assert keys(web, done=everything) == []


# --------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "kind, content, text",
    [
        ("txt", b" a lemon\n", "a lemon"),
        ("txt", "ein Löwe".encode(), "ein Löwe"),
        ("json", b'["a lemon", "fruit"]', ["a lemon", "fruit"]),
        ("json", b'{"text": ["a", "b"], "url": "x"}', ["a", "b"]),
        ("json", b'{"caption": "a lemon"}', "a lemon"),
        ("TXT", "\ufeff a lemon\u200b\r\n".encode(), "a lemon"),
        (
            "json",
            b'\xef\xbb\xbf["\\ufeffa lemon ", "fruit\\u2060"]',
            ["a lemon", "fruit"],
        ),
    ],
)
def test_captions(tmp_path, kind, content, text):
    files = [("a/0.jpg", jpeg(0)), (f"a/0.{kind}", content)]
    (row,) = read_shards([write_tar(tmp_path / "0.tar", files)])
    assert row["text"] == text and row["key"] == "a/0"


def test_what_else_is_in_an_archive(tmp_path):
    """A .txt goes before a .json; capitals; other kinds; folders; names without any."""
    tar = tmp_path / "0.tar"
    with tarfile.open(tar, "w") as archive:
        folder = tarfile.TarInfo("in")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in (
            ("README", b"hello"),
            ("in/0.JPG", jpeg(0)),
            ("in/0.cls", b"3"),
            ("in/0.json", b'{"text": "other"}'),
            ("in/0.txt", b"this"),
            ("in/1.png", jpeg(1, kind="PNG")),
            ("in/1.txt", b"one"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert [row["text"] for row in read_shards([tar])] == ["this", "one"]


def test_what_webdataset_writes(tmp_path):
    """Its ShardWriter's files, in a pattern with braces."""
    pattern = str(tmp_path / "made-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as shards:
        for n in range(10):
            sample = {"__key__": f"{n:04d}", "jpg": jpeg(n), "json": ["a", "b"]}
            shards.write(sample)
    rows = list(read_shards(f"{tmp_path}/made-{{000..002}}.tar"))
    assert [row["key"] for row in rows] == ALL[:10]
    assert all(row["text"] == ["a", "b"] for row in rows)


# -------------------------------------------------------------------------- bad input


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)


def cut(content, at):
    return content[:at]


GOOD = list(files_of(range(3)))
CAPTION = "no caption: beside the picture, want a .txt"
BROKEN = {  # files, the keys that are left, and what is said
    "no caption": (
        [*GOOD[:2], ("0001.jpg", jpeg(1)), *GOOD[4:]],
        ["0000", "0002"],
        f"0.tar, 0001: {CAPTION}",
    ),
    "empty caption": (
        [*GOOD[:3], ("0001.txt", b" \n"), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: the caption is empty",
    ),
    "caption with a special token": (
        [*GOOD[:3], ("0001.txt", b"<image> a"), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: take <image> out",
    ),
    "not UTF-8": (
        [*GOOD[:3], ("0001.txt", b"\xff\xfe"), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: the caption cannot be read",
    ),
    "not JSON": (
        [*GOOD[:3], ("0001.json", b'{"text":'), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: the caption cannot be read",
    ),
    "JSON of a number": (
        [*GOOD[:3], ("0001.json", b"3"), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: the caption is empty or not a text",
    ),
    "no captions in JSON": (
        [*GOOD[:3], ("0001.json", b'{"text": []}'), *GOOD[4:]],
        ["0000", "0002"],
        f"0.tar, 0001: {CAPTION}",
    ),
    "a number among the captions": (
        [*GOOD[:3], ("0001.json", b'["a", 3]'), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: the caption is empty or not a text",
    ),
    "no picture": (
        [*GOOD[:2], GOOD[3], *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: no picture",
    ),
    "a dot in the key": (
        [*GOOD[:2], ("0001.b.jpg", jpeg(1)), ("0001.b.txt", b"b"), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: no picture: .* there are .b.jpg, .b.txt",
    ),
    "bytes that are no picture": (
        [*GOOD[:2], ("0001.jpg", b"GIF89a nothing"), GOOD[3], *GOOD[4:]],
        ["0000", "0002"],
        "cannot read the picture .*0.tar, 0001.jpg",
    ),
    "half a picture": (
        [*GOOD[:2], ("0001.jpg", jpeg(1)[:500]), GOOD[3], *GOOD[4:]],
        ["0000", "0002"],
        "cannot read the picture .*0.tar, 0001.jpg",
    ),
    "a member twice": (
        [*GOOD[:3], ("0001.jpg", jpeg(9)), *GOOD[3:]],
        ["0000", "0002"],
        "0.tar, 0001.jpg stands there twice",
    ),
    "a key twice": (
        [*GOOD, *GOOD[2:4]],
        ["0000", "0001", "0002"],
        "0.tar, 0001.* stands there twice",
    ),
    "a kind twice, in capitals": (
        [*GOOD[:3], ("0001.JPG", jpeg(9)), *GOOD[3:]],
        ["0000", "0002"],
        "0.tar, 0001.jpg stands there twice",
    ),
    "a caption of marks": (
        [*GOOD[:3], ("0001.txt", "\ufeff\u200b\n".encode()), *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001: the caption is empty",
    ),
    "a picture without an ending": (
        [*GOOD[:2], ("0001", jpeg(1)), *GOOD[3:]],
        ["0000", "0002"],
        "0.tar, 0001: no picture: .*there are .txt .*without an ending",
    ),
    "a caption without an ending": (
        [*GOOD[:3], ("0001", b"a"), *GOOD[4:]],
        ["0000", "0002"],
        f"0.tar, 0001: {CAPTION}",
    ),
    "no endings at all": (
        [(name.partition(".")[0], content) for name, content in GOOD[::2]],
        [],
        "0.tar: there is nothing in it with an ending",
    ),
    "a photograph of a phone": (
        [*GOOD[:2], ("0001.HEIC", HEIC), GOOD[3], *GOOD[4:]],
        ["0000", "0002"],
        "0.tar, 0001.heic: it is a HEIC photograph",
    ),
    "nothing": ([], [], "0.tar: there is nothing in it"),
}


@pytest.mark.parametrize("name", BROKEN)
@BOTH
def test_broken_ones_are_named(tmp_path, name, workers):
    """An error with shard and key; or a warning, and all others."""
    files, left, said = BROKEN[name]
    tar = write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=said):
        keys([tar], workers=workers)
    found, told = problems([tar], workers=workers)
    assert found == left and len(told) == 1 and re.search(said, told[0])
    with pytest.raises(ValueError, match=said):
        keys([tar], seed=1)


@pytest.mark.parametrize("at", [1, 511, 512, 900, 1024, 1536, 2048, 2560, 3072, 4000])
def test_an_archive_that_is_cut_off(web, at):
    """Anywhere, between two members too. Rows before are there, other shards too."""
    broken = web / "000002.tar"
    broken.write_bytes(cut(broken.read_bytes(), at))
    with pytest.raises(ValueError, match="000002.tar.*(cut off|nothing in it)"):
        keys(web)
    found, told = problems(web, seed=1, buffer=4)
    assert len(told) == 1 and "000002.tar" in told[0]
    others = {key for key in ALL if not "0016" <= key < "0025"}
    assert others <= set(found) and len(found) == len(set(found))
    before = {key for key in found if key not in others}
    assert before == {f"{n:04d}" for n in range(16, 16 + len(before))}


def blocks(content):
    """How many bytes a file takes in an archive."""
    return 512 + -(-len(content) // 512) * 512


CUTS = {  # the last files of a shard: those that are whole, and one that is cut or None
    "in the next picture": ("jpg txt", "1.jpg", True),
    "between two rows": ("jpg txt", None, True),
    "between two rows with json": ("jpg json", None, True),
    "in the next text": ("jpg txt", "1.txt", True),
    "before the text": ("jpg", None, False),
    "in the text": ("jpg", "0.txt", False),
    "in the text, after another": ("jpg json", "0.txt", False),
    "before the picture": ("txt", None, False),
}


@pytest.mark.parametrize("where", CUTS)
def test_the_last_row_before_a_cut_comes_if_it_is_whole(tmp_path, where):
    """Neither is a whole one lost, nor is half a one told of a second time."""
    kinds, cut_file, comes = CUTS[where]
    contents = {"jpg": jpeg(0), "txt": b"the text", "json": b'["another"]'}
    files = [(f"0.{kind}", contents[kind]) for kind in kinds.split()]
    size = sum(blocks(content) for _, content in files)
    if cut_file:
        files.append((cut_file, contents[cut_file[-3:]]))
        size += 512 + 3
    tar = write_tar(tmp_path / "0.tar", files)
    tar.write_bytes(cut(tar.read_bytes(), size))
    found, told = problems([tar])
    assert found == ["0"] * comes and len(told) == 1
    after = "0" if comes else "its start"
    assert f"is cut off or damaged after {after}:" in told[0]


def test_another_text_that_may_be_lost_is_missed(web):
    """Rows have a .json and a .txt, which goes first; the last one's is cut away."""
    files = [
        (f"{n}.{kind}", c)
        for n in (0, 1)
        for kind, c in (
            ("jpg", jpeg(n)),
            ("json", b'["another"]'),
            ("txt", b"the text"),
        )
    ]
    tar = write_tar(web / "000000.tar", files)
    size = sum(blocks(content) for _, content in files[:5])
    tar.write_bytes(cut(tar.read_bytes(), size))
    assert problems([tar])[0] == ["0"]


@pytest.mark.parametrize("at", [0, 156, 3000, 5120, 6000])
def test_a_bit_that_has_turned_over(web, at):
    """In a header, it is noticed; in a picture or a text, only sometimes: no crash."""
    broken = web / "000001.tar"
    content = bytearray(broken.read_bytes())
    content[at] ^= 255
    broken.write_bytes(content)
    found, told = problems(web)
    assert len(found) + 7 >= len(ALL)
    if at % 512 == 0 and at < 6000:
        assert told and "000001.tar" in told[0]


def test_what_is_no_archive(tmp_path):
    tar = tmp_path / "0.tar"
    tar.write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match="0.tar is cut off or damaged after its start"):
        keys([tar])


def test_a_broken_shard_is_done_too(web):
    """Else a run that goes on would read all of it again."""
    broken = web / "000000.tar"
    broken.write_bytes(cut(broken.read_bytes(), 5000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = list(read_shards(web, skip_broken=True))
    assert sorted(rows[-1]["done"]) == find_shards(web)


def test_a_missing_shard(web):
    (web / "000002.tar").unlink()
    wanted = "no file .*000002.tar: 1 of 4 shards are not there"
    with pytest.raises(FileNotFoundError, match=wanted):
        read_shards(f"{web}/{{000000..000003}}.tar")
    assert len(find_shards(web)) == 4


def test_shards_that_cannot_be_meant(web, tmp_path):
    with pytest.raises(FileNotFoundError, match="no .tar file in"):
        find_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file pipe:"):
        find_shards("pipe:touch hello")
    with pytest.raises(ValueError, match="in the list twice"):
        find_shards([*find_shards(web), web / "000003.tar"])
    (web / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="want a .tar file"):
        find_shards([web / "x.tar.gz"])
    for numbers in ({"buffer": 0}, {"process": 1}, {"process": -1, "n_processes": 2}):
        with pytest.raises(ValueError, match="want buffer"):
            read_shards(web, seed=1, **numbers)


def test_fewer_shards_than_processes_are_refused(web):
    """One of them would have nothing, and the others would wait for it."""
    with pytest.raises(ValueError, match="5 shards for 6 processes"):
        read_shards(web, process=0, n_processes=6)
    settings = {"process": 1, "n_processes": 5}
    done = list(read_shards(web, **settings))[-1]["done"]
    assert keys(web, **settings, done=done) == []  # its epoch is at an end


def test_no_command_of_a_name_is_run(tmp_path, monkeypatch):
    """webdataset opens "pipe:…" by a shell; here it is a file like any other."""
    monkeypatch.chdir(tmp_path)
    write_tar("pipe:touch hello; cat 0.tar", files_of([1]))
    assert keys(["pipe:touch hello; cat 0.tar"]) == ["0001"]
    assert not (tmp_path / "hello").exists()


# ---------------------------------------------------------------- on to the training


@BOTH
def test_features_on_disk(web, tmp_path, small, workers):
    """As encoded from the files; encoded once; `train` takes them."""
    model, image_processor, tokenizer = small
    texts = []

    def pictures():
        for row in read_shards(web, workers=workers):
            texts.append(row["text"])
            yield row["picture"]

    def keep():
        texts.clear()
        folder, visual = tmp_path / "features", model.vision_encoder
        return cache_features(
            folder, visual, image_processor, pictures(), 8, progress=False
        )

    features = keep()
    assert isinstance(features, FeatureCache) and len(features) == len(texts) == 41
    own = [read_picture("x", content=jpeg(int(t.split()[1]))) for t in texts]
    wanted = encode_pictures(model.vision_encoder, image_processor, own, batch_size=8)
    torch.testing.assert_close(features[:], wanted, atol=2e-3, rtol=2e-3)
    trips = []
    hook = model.vision_encoder.register_forward_hook(lambda *_: trips.append(1))
    assert torch.equal(keep()[:], features[:])
    hook.remove()
    assert len(trips) <= 1  # of the settings
    history = train(
        model, tokenizer, features, texts, 3, batch_size=8, report=lambda line: None
    )
    assert len(history) == 3 and np.isfinite(history[-1]["loss"])


@BOTH
def test_pixels_straight_into_a_step(web, small, workers):
    model, image_processor, tokenizer = small
    rows = list(read_shards(web, image_processor, seed=0, workers=workers))
    assert all(row["pixels"].shape == (3, 32, 32) for row in rows)
    for row in rows[:5]:
        picture = read_picture("x", content=jpeg(int(row["key"])))
        assert torch.equal(row["pixels"], image_processor(picture))
    pairs = [(row["pixels"][None, None], [row["text"]]) for row in rows[:6]]
    batch = collate(pairs, tokenizer)
    assert batch["vision_x"].shape == (6, 1, 1, 3, 32, 32)
    loss = loss_at_labels(model, **batch)
    loss.backward()
    assert torch.isfinite(loss)


def test_decoded_small(tmp_path):
    """`least` reaches the JPEG decoder."""
    big = jpeg(0, (640, 480))
    tar = write_tar(tmp_path / "0.tar", [("0.jpg", big), ("0.txt", b"a")])
    (row,) = read_shards([tar], least=60)
    assert row["picture"].size == (80, 60)
