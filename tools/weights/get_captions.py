#!/usr/bin/env python3
"""Fetch photographs with several captions each, and write them as caption folders.

    python tools/weights/get_captions.py coco-val2017 photographs
        1.1 GB, 5,000 pictures
    python tools/weights/get_captions.py flickr8k photographs
        1.1 GB, 8,000 pictures

Then `load_captions("photographs/coco-val2017", split="train")`. A download that was cut
goes on where it stopped when the same command is given again; what is there is not
fetched twice. Each split is a folder with its pictures and a `metadata.jsonl`, written
when all of them are there; "text" is a list.

flickr8k has its published splits (6,000, 1,000 and 1,000). COCO's val2017 has none,
being one itself: a hash of the file name puts about one picture in five into `test`.
Both sets are for research and private study: the photographs belong to those who took
them.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path, PurePosixPath

Archive = namedtuple("Archive", "url size md5")
COCO = "http://images.cocodataset.org"
FLICKR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
# Sizes in bytes, None where nobody published it; checksums as others have noted them.
SETS = {
    "coco-val2017": {
        "pictures": Archive(
            f"{COCO}/zips/val2017.zip", 815585330, "442b8da7639aecaf257c1dceb8ba8c80"
        ),
        "captions": Archive(
            f"{COCO}/annotations/annotations_trainval2017.zip",
            252907541,
            "f4bbac642086de4f52a3fdda2de5fa2c",
        ),
    },
    "flickr8k": {
        "pictures": Archive(
            f"{FLICKR}/Flickr8k_Dataset.zip", None, "f18a1e2920de5bd84dae7cf08ec78978"
        ),
        "captions": Archive(
            f"{FLICKR}/Flickr8k_text.zip", None, "bf6c1abcb8e4a833b7f922104de18627"
        ),
    },
}


def whole(path, archive):
    """Raise ValueError if a file is not what was published."""
    size = path.stat().st_size
    if archive.size is not None and size != archive.size:
        raise ValueError(f"{path}: {size:,} bytes, want {archive.size:,}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != archive.md5:
        raise ValueError(f"{path}: its MD5 is {found}, want {archive.md5}")


def check_room(folder, needed):
    """Raise OSError, before anything is written, where the disk has no room."""
    free = shutil.disk_usage(folder).free
    if needed and free < needed:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, want {needed / 1e9:.1f}")


def fetch(archive, folder, report=print, piece=1 << 20):
    """Download an archive into a folder, going on where an earlier try stopped.

    Returns:
        the file's path.

    Raises:
        OSError: no network, the server says no, the download was cut, or no room.
        ValueError: what came is not what was published; it is thrown away.
    """
    path = Path(folder) / PurePosixPath(archive.url).name
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(archive.url)
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing behind what we have
            raise OSError(f"{archive.url}: the server says {error}") from error
        answer = None
    except OSError as error:
        raise OSError(f"cannot reach {archive.url}: {error}") from error
    if answer is not None:
        with answer:
            if done and answer.status != 206:  # a server that cannot go on
                done = 0
            length = answer.headers.get("Content-Length")
            total = done + int(length) if length else archive.size
            check_room(folder, total and 2 * total - done)  # and once more, unpacked
            with open(part, "ab" if done else "wb") as file:
                while data := answer.read(piece):
                    file.write(data)
                    done += len(data)
                    share = f" of {total / 1e6:,.0f}" if total else ""
                    report(f"\r{path.name}: {done / 1e6:,.0f}{share} MB", end="")
        report()
        if total and done < total:
            raise OSError(
                f"{path.name}: cut at {done:,} of {total:,} bytes. "
                "Give the same command again: it goes on from there."
            )
    try:
        whole(part, archive)
    except ValueError:
        part.unlink()
        raise
    os.replace(part, path)
    return path


def coco_captions(archive):
    """{file name: [captions]} and a function from file name to split."""
    with archive.open("annotations/captions_val2017.json") as file:
        listing = json.load(file)
    names = {picture["id"]: picture["file_name"] for picture in listing["images"]}
    captions = {name: [] for name in names.values()}
    for note in listing["annotations"]:
        captions[names[note["image_id"]]].append(note["caption"].strip())

    def split_of(name):
        return "test" if zlib.crc32(name.encode()) % 5 == 0 else "train"

    return captions, split_of


def flickr_captions(archive):
    """The same for Flickr8k: "name.jpg#0<tab>caption" lines, and a list per split."""
    captions, splits = {}, {}
    for line in archive.read("Flickr8k.token.txt").decode().splitlines():
        name, _, caption = line.partition("\t")
        captions.setdefault(name.partition("#")[0], []).append(caption.strip())
    for split, word in (("train", "train"), ("validation", "dev"), ("test", "test")):
        listed = archive.read(f"Flickr_8k.{word}Images.txt").decode().split()
        splits |= dict.fromkeys(listed, split)
    return captions, splits.get


READERS = {"coco-val2017": coco_captions, "flickr8k": flickr_captions}


def unpack(archive, member, path):
    """One picture out of an archive: whole, or not there."""
    if path.is_file() and path.stat().st_size == member.file_size:
        return
    temporary = path.with_name(path.name + ".part")
    with archive.open(member) as source, open(temporary, "wb") as file:
        shutil.copyfileobj(source, file)
    os.replace(temporary, path)


def get_captions(name, folder, report=print):
    """Fetch a set and write its caption folders: {split: number of pictures}."""
    out = Path(folder) / name
    out.mkdir(parents=True, exist_ok=True)
    paths = {k: fetch(archive, out, report) for k, archive in SETS[name].items()}
    with zipfile.ZipFile(paths["captions"]) as archive:
        captions, split_of = READERS[name](archive)
    rows = {}
    with zipfile.ZipFile(paths["pictures"]) as archive:
        for member in archive.infolist():
            picture = PurePosixPath(member.filename).name
            split = split_of(picture) if captions.get(picture) else None
            if member.is_dir() or "__MACOSX" in member.filename or split is None:
                continue
            (out / split).mkdir(exist_ok=True)
            unpack(archive, member, out / split / picture)
            row = {"file_name": picture, "text": captions[picture]}
            rows.setdefault(split, []).append(row)
    if not rows:
        raise ValueError(f"{paths['pictures']}: no picture that has a caption")
    for split, listed in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed)
        temporary = out / split / "metadata.part"
        temporary.write_text(lines, encoding="utf-8")
        os.replace(temporary, out / split / "metadata.jsonl")
    return {split: len(listed) for split, listed in rows.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        counts = get_captions(args.name, args.folder)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"get_captions: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    print(f"{args.folder / args.name}:", counts)


if __name__ == "__main__":
    main()
