"""Chapter 12 in both of its forms, its tools in their smallest; nothing is downloaded.

The notebook's own cells run, in a process of their own: as the rehearsal with a narrow
language model and tower, and as the real thing against a hub on this machine.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import CLIP_CONFIG, D_IMG, ROOT, SMALL, save_clip
from hub import Hub

from flamingo_lite import (
    answer,
    attention_maps,
    budget,
    caption,
    caption_losses,
    collate,
    create_model_and_transforms,
    encode_pictures,
    group_scenes,
    load_captions,
    make_scenes,
    occlusion,
    show_maps,
    spoil,
    train,
)
from flamingo_lite.budget import PRECISIONS

sys.path[:0] = [str(ROOT), str(ROOT / "book")]
from figures import INK, table

from tools.measure import measure_gpu

NARROW = """
import sys
sys.path[:0] = [{tests!r}, "."]
import matplotlib
matplotlib.use("agg")
import open_clip
from hub import CLIP_CONFIG

# The real ViT-L-14 has 428 M numbers; here the name stands for a small one.
small = {{**CLIP_CONFIG["model_cfg"]}}
del small["quick_gelu"]
open_clip.factory._MODEL_CONFIGS["ViT-L-14"] = small
cells = {cells}
"""
RUN = """
for number, cell in enumerate(cells):
    try:
        exec(compile(cell, f"cell {number}", "exec"), globals())
    except Exception:
        print(f"in cell {number}:", cell, sep="\\n", file=sys.stderr)
        raise
print("END", RUN, N_STEPS, len(history), sorted(scores))
"""
SMALL_OPT = """
from tools.measure import rehearsal
whole = rehearsal.write_random_opt
sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
rehearsal.write_random_opt = lambda folder, narrow=sizes: whole(folder, **narrow)
"""


def code_cells():
    """The code of the chapter, without its setup cell's search for a clone."""
    notebook = nbformat.read(ROOT / "book" / "12_real_one.ipynb", 4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def run_chapter(tmp_path, before="", lines=None, **environment):
    """Run all cells of the chapter at a narrow size; what was printed.

    `lines`: lines of the chapter, by how they begin, as a reader changes them.
    """
    cells = code_cells()
    for start, line in (lines or {}).items():
        rows = [cell.split("\n") for cell in cells]
        changed = [[line if r.startswith(start) else r for r in cell] for cell in rows]
        assert changed != rows, start
        cells = ["\n".join(cell) for cell in changed]
    head = NARROW.format(tests=str(ROOT / "tests"), cells=cells)
    script = tmp_path / "chapter.py"
    script.write_text(head + before + RUN)
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT / "book",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SHOTS = [(way, k) for way in ("shuffled", "true") for k in (0, 4, 8)]


def test_the_rehearsal(tmp_path):
    """Two steps, one of them lost and taken again; and it says that it is one."""
    said = run_chapter(tmp_path, SMALL_OPT, FLAMINGO_LITE_SIZE="tiny")
    assert "rehearsal: FLAMINGO_LITE_SIZE is 'tiny'" in said
    assert "going on from step 1 of 2" in said
    assert said.splitlines()[-1] == f"END rehearsal 2 2 {SHOTS}"


def test_the_real_thing_against_a_stand_in_hub(tmp_path):
    """The same cells with a hub: pretrained weights, ten epochs, no step is lost."""
    from hub import CLIP, OPT, clip_files, opt_files

    with Hub({OPT: opt_files(), CLIP: clip_files()}) as hub:
        said = run_chapter(
            tmp_path,
            FLAMINGO_LITE_SIZE="paper",
            HF_ENDPOINT=hub.address,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path / "cache"),
        )
        files = {path.rpartition("/")[2] for kind, path, _ in hub.asked}
    assert "paper: FLAMINGO_LITE_SIZE is 'paper'" in said
    assert {"open_clip_model.safetensors", "pytorch_model.bin"} <= files
    assert said.splitlines()[-1] == f"END paper 10 10 {SHOTS}"


def test_all_cells_again_after_the_machine_is_gone(tmp_path):
    """A reader's own folder, on a Drive: twice from the top, trained and encoded once.

    The third time a setting is another one, under another name.
    """
    from hub import CLIP, OPT, clip_files, opt_files
    from PIL import Image

    from flamingo_lite import hold_out

    photographs, drive = tmp_path / "photographs", tmp_path / "drive"
    photographs.mkdir()
    drive.mkdir()
    rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(14)]
    for n, row in enumerate(rows):
        colour = (15 * n, 200 - 10 * n, 80)
        Image.new("RGB", (32, 32), colour).save(photographs / row["file_name"])
    (photographs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_rows, test_rows = hold_out(rows, 5)
    changed = {
        "PHOTOGRAPHS = None": f"PHOTOGRAPHS = {str(photographs)!r}",
        "DRIVE = None": f"DRIVE = {str(drive)!r}",
    }
    another = changed | {"NAME, EPOCHS, LR": 'NAME, EPOCHS, LR = "other", 3, 1e-4'}
    with Hub({OPT: opt_files(), CLIP: clip_files()}) as hub:
        offered = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
        offered |= {"HF_HOME": str(tmp_path / "cache"), "FLAMINGO_LITE_SIZE": "paper"}
        said = [
            run_chapter(tmp_path, lines=lines, **offered)
            for lines in (changed, changed, another)
        ]
    parts = f"{len(train_rows)} to train on, {len(test_rows)} held out"
    assert all(parts in text for text in said)
    assert [text.splitlines()[-1].split()[1:4] for text in said] == [
        ["paper", "10", "10"],
        ["paper", "10", "10"],
        ["paper", "3", "3"],
    ]
    assert "going on" not in said[0] and "going on from step 10 of 10" in said[1]
    assert "GB at most" in said[0] and "GB at most" not in said[1]
    for name in ("mine", "other"):
        assert (drive / name / "flamingo.safetensors").is_file()
        lines = (drive / f"{name}.captions.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert [a["references"] for a in answers] == [[r["text"]] for r in test_rows]
        assert all(isinstance(a["wrote"], str) for a in answers)
    gone = {"DRIVE = None": f"DRIVE = {str(tmp_path / 'no drive')!r}"}
    with pytest.raises(AssertionError, match="there is no such folder"):
        run_chapter(tmp_path, SMALL_OPT, gone, FLAMINGO_LITE_SIZE="tiny")


# ------------------------------------------------------------------------- the tools


def call_tool(name, *words, cwd=None):
    command = [sys.executable, ROOT / "tools" / "measure" / name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_a_big_folder_is_a_caption_folder(tmp_path):
    """Sizes of pictures as said, splits, two captions each, the same for a seed."""
    from PIL import Image

    from flamingo_lite import load_captions

    for name in ("one", "other"):
        code, said, error = call_tool("big_folder.py", 6, tmp_path / name)
        assert code == 0, error
    rows = load_captions(tmp_path / "one", split="train", check_pictures=True)
    test = load_captions(tmp_path / "one", split="test")
    assert (len(rows), len(test)) == (5, 1)
    sizes = [Image.open(row["path"]).size for row in rows]
    assert sizes.count((640, 480)) == 4 and sizes.count((4000, 3000)) == 1
    assert all(len(row["text"]) == 2 for row in rows + test)
    for path in (tmp_path / "one").rglob("*.*"):
        same = tmp_path / "other" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == same.read_bytes()


def test_a_big_folder_overwrites_nothing(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, error = call_tool("big_folder.py", 6, tmp_path)
    assert code == 1 and error.startswith("big_folder:") and "not empty" in error
    code, _, error = call_tool("big_folder.py", 0, tmp_path / "new")
    assert code == 1 and "0 pictures are none" in error


# ------------------------------------------------- chapters 9 to 11 at the other size


@pytest.fixture(scope="module")
def paper_like(tmp_path_factory):
    """A narrow model with the paper's 224 pixels, 256 tokens and table of 50,267."""
    from tools.measure.rehearsal import write_random_opt

    folder = tmp_path_factory.mktemp("paper")
    config = {**CLIP_CONFIG, "model_cfg": dict(CLIP_CONFIG["model_cfg"])}
    vision = {"image_size": 224, "patch_size": 14}
    config["model_cfg"]["vision_cfg"] = CLIP_CONFIG["model_cfg"]["vision_cfg"] | vision
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    opt = write_random_opt(folder / "opt", **sizes)
    clip = save_clip(folder / "clip", config)
    return create_model_and_transforms(clip, None, opt, opt, **SMALL)


def test_nothing_is_written_for_64_pixels_alone(paper_like):
    """What chapters 9, 10 and 11 do with scenes, with a model of another size."""
    import matplotlib

    matplotlib.use("agg")
    model, image_processor, tokenizer = paper_like
    rows = [r for r in load_captions(ROOT / "data" / "emoji")[:400] if r["named"]]
    scenes = make_scenes(rows, 12, seed=0, pairs=0.0)
    pictures, texts = [s["picture"] for s in scenes], [s["text"] for s in scenes]
    features = encode_pictures(model.vision_encoder, image_processor, pictures)
    assert features.shape == (12, 1, 256, D_IMG)
    quiet = {"report": lambda line: None}
    train(model, tokenizer, features, texts, 2, batch_size=4, **quiet)
    assert caption_losses(model, tokenizer, features, texts).shape == (12,)
    said = caption(model, image_processor, tokenizer, pictures[:2], max_new_tokens=2)
    assert len(said) == 2

    groups = group_scenes(scenes)
    episodes = [{"numbers": [0, 1, 2], "texts": texts[:3], "answer": texts[2]}]
    spoilt = spoil(np.random.default_rng(0), episodes[0], "no pictures", groups)
    blank = torch.zeros(1, *features.shape[1:], dtype=features.dtype)
    told = answer(model, tokenizer, torch.cat((features, blank)), [*episodes, spoilt])
    assert len(told) == 2

    batch = collate([(features[:1], texts[:1])], tokenizer)
    maps = attention_maps(model, batch)
    assert maps[0].shape[-1] == 256
    show_maps(pictures[0].resize((224, 224)), ["a"], maps[0][0, 0, 1])
    cost = occlusion(model, image_processor, tokenizer, pictures[0], texts[0], 3)
    assert cost.shape == (4, 4) and cost.isfinite().all()


# --------------------------------------------------------------------- measure_gpu.py


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """What `measure_gpu.py` finds with the tiny model."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    code, said, error = call_tool("measure_gpu.py", "--smallest", "--out", out)
    assert code == 0, said + error[-2000:]
    (found,) = json.loads(out.read_text()).values()
    return found


def test_the_measuring_script_in_its_smallest_form(smallest):
    """Every part gives numbers on a CPU; the scaler and the resumed run are right."""
    found = smallest
    assert (found["size"], found["weights"]) == ("tiny", "of data/")
    assert sorted(s["precision"] for s in found["steps"]) == sorted(PRECISIONS)
    assert all(s["seconds"] > 0 and s["budget"] > 0 for s in found["steps"])
    assert found["train_rate"] > 0 and len(found["generation"]) == 4
    assert set(found["optimizers"]) == {"AdamW", "Muon, float32", "Muon, bfloat16"}
    scaler = found["scaler"]
    assert 0 < scaler["left out"] == scaler["nothing moved in"] < scaler["steps"]
    assert found["resumed"] == {"same bits": True, "apart": 0.0}
    assert found["ddp"]["gradients apart"] == 0.0


class Parts:
    """Stands in for what measures: no step fits, and one part ends as `ends` says."""

    weights, ends = "random", {}

    def __init__(self, *args):
        pass

    def __getattr__(self, part):
        def measured():
            if part in self.ends:
                raise self.ends[part]
            fault = {"precision": "float32", "batch_size": 4, "fault": "out of memory"}
            return [fault] if part == "steps" else {part: 1.0}

        return measured


def measured_in_part(monkeypatch, out, ends):
    """What the file holds after `measure_gpu.py --smallest`, and how it ended."""
    monkeypatch.setattr(measure_gpu, "Bench", Parts)
    monkeypatch.setattr(Parts, "ends", ends)
    monkeypatch.setattr(sys, "argv", ["measure_gpu", "--smallest", "--out", str(out)])
    with pytest.raises(BaseException) as caught:
        measure_gpu.main()
    return json.loads(out.read_text()), caught.value


def test_where_no_step_fits_the_rest_is_written(monkeypatch, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    out.write_text('{"Tesla T4": {}}')
    found, error = measured_in_part(monkeypatch, out, {"ddp": ValueError("no port")})
    assert (type(error), error.code) == (SystemExit, 1)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith("; failed: steps, of which none fits, ddp")
    (card,) = found.keys() - {"Tesla T4"}
    assert set(measure_gpu.PARTS) < found[card].keys()
    assert "train_rate" not in found[card]
    assert found[card]["ddp"] == {"fault": "ValueError: no port"}


def test_what_was_measured_before_the_end_is_written(monkeypatch, tmp_path):
    """Ctrl-C, or a device that is lost: it is not caught, and nothing is lost by it."""
    ends = {"optimizers": KeyboardInterrupt()}
    found, error = measured_in_part(monkeypatch, tmp_path / "gpu.json", ends)
    assert isinstance(error, KeyboardInterrupt)
    ((card, there),) = found.items()
    assert [part for part in measure_gpu.PARTS if part in there] == [
        "steps",
        "encode_rate",
        "generation",
    ]
    assert not (tmp_path / "gpu.json.part").exists()


def test_the_measuring_script_says_what_it_wants(tmp_path):
    code, _, error = call_tool("measure_gpu.py", "--smallest")
    assert code == 1 and "--smallest needs --out" in error
    if not torch.cuda.is_available():
        code, _, error = call_tool("measure_gpu.py", "--out", tmp_path / "gpu.json")
        assert code == 1 and "is no GPU" in error and not list(tmp_path.iterdir())


# ---------------------------------------------------------- its numbers in the chapter


def shown(folder, monkeypatch, measured=None):
    """The cells of the chapter that read gpu.json, run with this one: their names."""
    (folder / "book").mkdir()
    if measured is not None:
        (folder / "data").mkdir()
        (folder / "data" / "gpu.json").write_text(json.dumps(measured))
    monkeypatch.chdir(folder / "book")
    plt.switch_backend("agg")
    names = {**vars(budget), "json": json, "re": re, "Path": Path, "plt": plt}
    names |= {"table": table, "INK": INK}
    for cell in code_cells():
        if "measured_on" in cell:
            exec(compile(cell, cell[:40], "exec"), names)
    plt.close("all")
    return names


def cards(smallest):
    """A gpu.json of four cards: all was measured, no step fits, faults, cut off."""
    T4 = {**smallest, "encode_rate": {"float32": 10.0, "bfloat16": 7.0}}
    T4 |= {"train_rate": 20.0, "compiled": {"plain": 0.25, "compiled": 0.125}}
    T4["steps"] = [{**s, "memory": 3_210_000_000} for s in smallest["steps"]]
    full = [{"precision": "float32", "batch_size": 4, "fault": "out of memory"}]
    bad, names = {"fault": "RuntimeError: no"}, ("device", "size", "weights", "torch")
    A100 = {**{n: smallest[n] for n in names}, "steps": full, "encode_rate": bad}
    H100 = {**{n: smallest[n] for n in names}, "steps": bad}
    L40S = {**T4, "train_rate": 1000.0}
    H100["scaler"] = L40S["ddp"] = bad
    return {
        "NVIDIA L40S": L40S,
        "NVIDIA A100-SXM4-40GB": A100,
        "NVIDIA H100": H100,
        "Tesla T4": T4,
    }


def test_the_chapter_tells_the_time_that_was_measured(smallest, tmp_path, monkeypatch):
    as_measured = shown(tmp_path, monkeypatch, cards(smallest))["as_measured"]
    minutes = (3000 / 10.0 + 10 * 3000 / 20.0) / 60
    assert as_measured("T4", 3000, 10) == f"{minutes:.0f} min, measured"
    assert as_measured("L4", 3000, 10) == "not measured yet"  # an L40S is another card
    assert as_measured("A100", 3000, 10) == "it failed there"


def test_the_chapter_lists_all_that_was_measured(
    smallest, tmp_path, monkeypatch, capsys
):
    shown(tmp_path, monkeypatch, cards(smallest))
    said = capsys.readouterr().out
    assert "not measured yet" not in said and "Tesla T4, torch 2" in said
    T4 = said.partition("Tesla T4")[2]
    lines = [re.split(r"  +", line.strip()) for line in T4.splitlines()]
    first = smallest["steps"][0]
    pace = first["batch_size"] / first["seconds"]
    words = [f"{n:.4g}" for n in (first["seconds"], pace)]
    assert ["float32", "2", *words, "3.2", f"{first['budget'] / 1e9:.1f}"] in lines
    assert ["float32", "10"] in lines and ["plain", "0.25"] in lines
    slow = smallest["generation"][3]
    assert ["no", "no", f"{slow['tokens_per_second']:.4g}"] in lines
    assert [
        "Muon, bfloat16",
        f"{smallest['optimizers']['Muon, bfloat16']:.4g}",
    ] in lines
    assert ["left out", str(smallest["scaler"]["left out"])] in lines
    assert ["same bits", "yes"] in lines and ["gradients apart", "0"] in lines
    assert said.count("RuntimeError: no") == 4
    assert re.search(r"float32 +4 +out of memory +– +– +–", said)


def test_the_chapter_says_once_that_nothing_was_measured(tmp_path, monkeypatch, capsys):
    assert shown(tmp_path, monkeypatch)["as_measured"]("T4", 1, 1) == "not measured yet"
    assert capsys.readouterr().out.count("not measured yet") == 1
