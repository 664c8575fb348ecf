"""Photographs with captions, fetched from a server on this machine that stands in."""

import hashlib
import io
import json
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flamingo_lite import cache_features, load_captions, merge_captions
from tools.weights import get_captions

quiet = partial(print, file=io.StringIO())


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "JPEG")
    return file.getvalue()


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def coco():
    names = [f"{i:012d}.jpg" for i in range(12)]
    notes = [
        {"image_id": i, "id": 10 * i + k, "caption": f"picture {i}, said {k} \n"}
        for i in range(12)
        for k in range(5)
    ]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    listing = json.dumps({"images": images, "annotations": notes})
    pictures = {f"val2017/{n}": jpeg((20 * i, 0, 0)) for i, n in enumerate(names)}
    return {
        "val2017.zip": zipped({"val2017/": "", **pictures}),
        "annotations_trainval2017.zip": zipped(
            {"annotations/captions_val2017.json": listing}
        ),
    }


def flickr8k():
    names = {"train": ["a.jpg", "b.jpg"], "dev": ["c.jpg"], "test": ["d.jpg"]}
    every = [name for some in names.values() for name in some] + ["unlisted.jpg"]
    token = "".join(f"{n}#{k}\tA dog {k} .\n" for n in every for k in range(5))
    lists = {f"Flickr_8k.{k}Images.txt": "\n".join(v) + "\n" for k, v in names.items()}
    pictures = {f"Flicker8k_Dataset/{name}": jpeg("blue") for name in every}
    junk = {"__MACOSX/Flicker8k_Dataset/._a.jpg": b"x"}
    return {
        "Flickr8k_Dataset.zip": zipped({**pictures, **junk}),
        "Flickr8k_text.zip": zipped({"Flickr8k.token.txt": token, **lists}),
    }


@pytest.fixture
def server(monkeypatch):
    """Serves both sets; `server.cut` bytes are sent of an answer, then it hangs up."""
    files = {
        f"/{name}": data for make in (coco, flickr8k) for name, data in make().items()
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data, start = files.get(self.path), 0
            self.server.asked.append((self.path, self.headers.get("Range")))
            if data is None:
                return self.send_error(404)
            if (wanted := self.headers.get("Range")) and self.server.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = len(data) if self.server.cut is None else start + self.server.cut
            self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.asked, http.cut, http.ranges, http.files = [], None, True, files
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}"
        for name, archives in get_captions.SETS.items():
            stand_in = {}
            for kind, archive in archives.items():
                file = archive.url.rsplit("/", 1)[1]
                data = files[f"/{file}"]
                digest = hashlib.md5(data).hexdigest()
                size = None if archive.size is None else len(data)
                stand_in[kind] = archive._replace(
                    url=f"{address}/{file}", md5=digest, size=size
                )
            monkeypatch.setitem(get_captions.SETS, name, stand_in)
        yield http
        http.shutdown()


def listing(folder):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


def test_coco_becomes_two_caption_folders(server, tmp_path):
    counts = get_captions.get_captions("coco-val2017", tmp_path, quiet)
    out = tmp_path / "coco-val2017"
    train, test = listing(out / "train"), listing(out / "test")
    assert counts == {"train": len(train), "test": len(test)}
    assert len(train) + len(test) == 12 and train and test
    assert not train.keys() & test.keys()
    one = "000000000003.jpg"
    assert (train | test)[one] == [f"picture 3, said {k}" for k in range(5)]
    folder = out / ("train" if one in train else "test")
    assert (folder / one).read_bytes() == jpeg((60, 0, 0))


def test_flickr8k_has_its_published_splits(server, tmp_path):
    counts = get_captions.get_captions("flickr8k", tmp_path, quiet)
    assert counts == {"train": 2, "validation": 1, "test": 1}
    out = tmp_path / "flickr8k"
    assert listing(out / "validation") == {"c.jpg": [f"A dog {k} ." for k in range(5)]}
    assert not list(out.rglob("unlisted.jpg")) and not list(out.rglob("._a.jpg"))


@pytest.mark.parametrize("name", ["coco-val2017", "flickr8k"])
def test_the_book_reads_the_folders(server, tmp_path, name, make_model):
    """Each split through `load_captions`, and its pictures to features on disk."""
    counts = get_captions.get_captions(name, tmp_path, quiet)
    model, image_processor, _ = make_model()
    for split, count in counts.items():
        rows = load_captions(tmp_path / name, split=split, check_pictures=True)
        assert len(rows) == count == len(merge_captions(rows))
        assert all(len(row["text"]) == 5 for row in rows)
        settings = {"progress": False}
        features = cache_features(
            tmp_path / "f", model.vision_encoder, image_processor, rows, **settings
        )
        assert len(features) == count
    with pytest.raises(FileNotFoundError, match="choose one with split="):
        load_captions(tmp_path / name)


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    get_captions.get_captions("flickr8k", tmp_path, quiet)
    server.asked.clear()
    get_captions.get_captions("flickr8k", tmp_path, quiet)
    assert server.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_goes_on(server, tmp_path, ranges):
    server.cut, server.ranges = 700, ranges
    with pytest.raises(OSError, match="cut at 700 of .* Give the same command again"):
        get_captions.get_captions("flickr8k", tmp_path, quiet)
    assert not list(tmp_path.rglob("metadata.jsonl"))
    server.cut = None
    get_captions.get_captions("flickr8k", tmp_path, quiet)
    assert ("/Flickr8k_Dataset.zip", "bytes=700-") in server.asked
    path = tmp_path / "flickr8k" / "Flickr8k_Dataset.zip"
    assert path.read_bytes() == server.files["/Flickr8k_Dataset.zip"]


def test_a_whole_part_is_taken_as_it_is(server, tmp_path):
    folder = tmp_path / "flickr8k"
    folder.mkdir()
    data = server.files["/Flickr8k_Dataset.zip"]
    (folder / "Flickr8k_Dataset.zip.part").write_bytes(data)
    assert get_captions.get_captions("flickr8k", tmp_path, quiet)["train"] == 2


def test_other_bytes_are_refused_and_thrown_away(server, tmp_path):
    data = bytearray(server.files["/Flickr8k_Dataset.zip"])
    data[100] ^= 1
    server.files["/Flickr8k_Dataset.zip"] = bytes(data)
    with pytest.raises(ValueError, match="Flickr8k_Dataset.zip.part: its MD5 is"):
        get_captions.get_captions("flickr8k", tmp_path, quiet)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.zip"))


def test_no_room_is_said_before_anything_is_written(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(get_captions.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="has 0.0 GB free"):
        get_captions.get_captions("flickr8k", tmp_path, quiet)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://127.0.0.1:9/x.zip", "cannot reach http://127.0.0.1:9/x.zip"),
        (None, "404"),
    ],
)
def test_a_user_without_network_gets_one_line(
    server, tmp_path, monkeypatch, capsys, url, line
):
    archives = get_captions.SETS["flickr8k"]
    away = archives["pictures"].url.replace("Flickr8k_Dataset", "gone")
    stand_in = {**archives, "pictures": archives["pictures"]._replace(url=url or away)}
    monkeypatch.setitem(get_captions.SETS, "flickr8k", stand_in)
    monkeypatch.setattr(sys, "argv", ["get_captions", "flickr8k", str(tmp_path)])
    with pytest.raises(SystemExit, match=line) as stopped:
        get_captions.main()
    assert "\n" not in str(stopped.value)
