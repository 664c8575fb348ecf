#!/usr/bin/env python3
"""Remake the weights, and all that was measured of them, in the order that it needs.

    python tools/remake.py --list
        what is up to date, and what is not
    python tools/remake.py
        everything that is not, one after the other; goes on where it stopped
    python tools/remake.py captions cover
        these stages, where they are not up to date

Every result belongs to the weights that it was measured on. `data/measured_on.json`
notes for each the digests of these weights, so that a page never shows a number of
weights that are gone: `tests/test_remake.py` compares them. A stage whose weights
changed begins anew, and its old files and checkpoints go first; one that was only
interrupted goes on. Pictures, tokenizers and the tiny OPT stand below all this
(tools/README.md). Smol wants requirements-smol.txt.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import ROOT

WEIGHTS = {
    "tiny_clip": "data/tiny_clip/open_clip_model.safetensors",
    "tiny_opt": "data/tiny_opt/model.safetensors",
    "tiny_flamingo": "data/tiny_flamingo/flamingo.safetensors",
    "smol_flamingo": "data/smol_flamingo/flamingo.safetensors",
}
NOTES = "data/measured_on.json"
CACHE = "~/.cache/flamingo_lite"
TRAIN, MEASURE = "tools/weights/train", "tools/measure"
SHIPPED = ("tiny_clip", "tiny_opt", "tiny_flamingo")
# A stage is a name, its command, the weights that it stands on, and the files and
# folders of other weights' runs that go before it begins anew.
STAGES = [
    ("eyes", f"{TRAIN}_eyes.py", (), ()),
    (
        "tiny",
        f"{TRAIN}_tiny_flamingo.py",
        ("tiny_clip", "tiny_opt"),
        (f"{CACHE}/flamingo",),
    ),
    (
        "smol",
        f"{TRAIN}_smol_flamingo.py",
        ("tiny_clip", "tiny_flamingo"),
        (f"{CACHE}/smol",),
    ),
    ("captions", f"{MEASURE}/measure_captions.py", SHIPPED, ()),
    ("captions, README", f"{MEASURE}/measure_captions.py --readme", SHIPPED, ()),
    (
        "few-shot",
        f"{MEASURE}/measure_fewshot.py smol",
        ("tiny_clip", "smol_flamingo"),
        ("data/smol_flamingo/fewshot.json",),
    ),
    (
        "ablations",
        f"{MEASURE}/ablations.py",
        ("tiny_clip", "tiny_opt"),
        ("data/ablations.json",),
    ),
    (
        "own pictures",
        f"{MEASURE}/own_pictures.py",
        ("tiny_clip", "tiny_opt"),
        ("data/own_pictures.json",),
    ),
    (
        "optimizers",
        f"{MEASURE}/compare_optimizers.py",
        ("tiny_clip", "tiny_opt"),
        ("data/optimizers_tiny.json",),
    ),
    (
        "rates",
        f"{MEASURE}/compare_optimizers.py --rates",
        ("tiny_clip", "tiny_opt"),
        ("data/rates_tiny.json",),
    ),
    ("data compared", f"{MEASURE}/compare_data.py", (), ("data/compare_data.json",)),
    ("cover", "tools/book/make_cover.py", SHIPPED, ()),
    ("stills", "tools/book/make_stills.py", SHIPPED, ()),
    ("pages", "tools/book/sync.py", SHIPPED, ()),  # the cover's numbers, into the intro
]


def digest(path):
    """The first sixteen hex digits of a file's SHA-256; None if it is not there."""
    if not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_by(notebook):
    """The weights that a chapter reads; a Flamingo only where its code asks for it."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    asks = "load_flamingo" in code or "run_command" in code
    smol = ("smol_flamingo",) if notebook.name.startswith("10") else ()
    return (*(SHIPPED if asks else SHIPPED[:2]), *smol)


def all_stages(root=ROOT):
    """STAGES, and one for each notebook, before those that show what they drew."""
    chapters = []
    for path in sorted((root / "book").glob("[0-9A-Z]*.ipynb")):
        command = f"tools/book/run_notebooks.py book/{path.name}"
        chapters.append((path.stem, command, read_by(path), ()))
    return STAGES[:-2] + chapters + STAGES[-2:]


def read_notes(root=ROOT):
    """{stage: {"of": {weights: digest}, "whole": bool}}."""
    path = root / NOTES
    return json.loads(path.read_text()) if path.exists() else {}


def note(name, of, whole, root=ROOT):
    """Write down that a stage began, or was done, on these weights."""
    notes = read_notes(root) | {name: {"of": of, "whole": whole}}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in notes.items())
    path = root / NOTES
    path.with_suffix(".tmp").write_text(f"{{\n{lines}\n}}\n")
    os.replace(path.with_suffix(".tmp"), path)


def weights_of(stands_on, root=ROOT):
    """The digests of the weights now: {name: digest}."""
    return {name: digest(root / WEIGHTS[name]) for name in stands_on}


def state_of(stage, root=ROOT):
    """ "done", "begun" (on these very weights), "old", or "" if it never ran."""
    name, _, stands_on, _ = stage
    found = read_notes(root).get(name)
    if found is None:
        return ""
    if found["of"] != weights_of(stands_on, root):
        return "old"
    return "done" if found["whole"] else "begun"


def do(stage, root=ROOT):
    """Run one stage; its exit code."""
    name, command, stands_on, goes_first = stage
    of = weights_of(stands_on, root)
    if state_of(stage, root) != "begun":
        for old in goes_first:
            path = root / Path(old).expanduser()
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        note(name, of, whole=False, root=root)
    started = time.time()
    code = subprocess.run([sys.executable, *command.split()], cwd=root).returncode
    print(f"{name}: {time.time() - started:.0f} s, exit code {code}", flush=True)
    if code == 0:
        note(name, of, whole=True, root=root)
    return code


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = {stage[0]: stage for stage in all_stages()}
    parser.add_argument("stages", nargs="*", metavar="stage", help="all when none")
    parser.add_argument("--list", action="store_true", help="say how things stand")
    parser.add_argument("--keep-going", action="store_true", help="past a failure")
    args = parser.parse_args()
    unknown = [name for name in args.stages if name not in stages]
    if unknown:
        parser.error(
            f"no stage is called {unknown[0]!r}; there are: {', '.join(stages)}"
        )
    failed = 0
    for name in args.stages or stages:
        state = state_of(stages[name])
        if args.list:
            print(f"{name}: {state or 'never run'}")
        elif state != "done":
            failed = do(stages[name]) or failed
            if failed and not args.keep_going:
                sys.exit(failed)
    sys.exit(failed)


if __name__ == "__main__":
    main()
