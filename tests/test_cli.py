"""The command line: results, exit codes, mistakes in one line, and Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image
from safetensors.torch import load_file, save_file
from test_edges_vision import TIMM, timm_clip

import flamingo_lite
from flamingo_lite import cli, run_command, training

COLOURS = ["red", "green", "blue", "black", "white", "orange"]
STEPS = ["--steps", 5, "--batch-size", 3]


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory):
    """Features are not kept in the home of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAMINGO_LITE_CACHE", str(folder))
        yield folder


def write_folder(folder, colours=COLOURS):
    """A caption folder: a square for each colour."""
    folder.mkdir()
    lines = [{"file_name": f"{c}.png", "text": f"a {c} square"} for c in colours]
    for colour in colours:
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli") / "images")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder of a run that was never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run_command(["train", "--images", images, "--out", out, *STEPS]) == 0
    return out


@pytest.fixture
def command(capsys):
    """A function that runs a command: (exit code, stdout, stderr)."""

    def command(*words):
        capsys.readouterr()
        code = run_command(words)
        return code, *capsys.readouterr()

    return command


def weights(folder):
    return load_file(folder / "flamingo.safetensors")


def assert_same_weights(folder, other):
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# ------------------------------------------------------------------------- the commands


def test_train_writes_a_folder_that_load_flamingo_reads(command, images, tmp_path):
    out = tmp_path / "new" / "run"
    code, result, told = command("train", "--images", images, "--out", out, *STEPS)
    assert code == 0
    assert re.fullmatch(rf"{out}: 5 steps, loss \d+\.\d+\n", result)
    assert "6 pictures, cpu" in told and "step     5 of 5" in told
    model = flamingo_lite.load_flamingo(out)[0]
    torch.manual_seed(0)
    new = flamingo_lite.trained_tensors(flamingo_lite.build_flamingo("tiny")[0])
    trained = flamingo_lite.trained_tensors(model)
    assert not all(torch.equal(new[name], trained[name]) for name in new)


def test_train_does_what_train_does(images, trained, tmp_path):
    """The same numbers as the functions of the chapters, called by hand."""
    torch.manual_seed(0)
    model, image_processor, tokenizer = flamingo_lite.build_flamingo("tiny")
    rows = flamingo_lite.load_captions(images)
    features = flamingo_lite.encode_pictures(
        model.vision_encoder, image_processor, rows
    )
    texts = [row["text"] for row in rows]
    settings = {"warmup": 0, "report": str}  # a tenth of five steps is none
    flamingo_lite.train(model, tokenizer, features, texts, 5, 3, **settings)
    flamingo_lite.save_flamingo(model, tmp_path / "by hand")
    assert_same_weights(tmp_path / "by hand", trained)


def test_a_seed_and_a_rate_reach_the_run(images, tmp_path, monkeypatch):
    asked = []

    def note(*args, **kwargs):
        asked.append(kwargs)
        return []

    monkeypatch.setattr(flamingo_lite.training, "train", note)
    words = ["train", "--images", images, "--out", tmp_path / "out", *STEPS]
    assert run_command([*words, "--seed", 7, "--lr", "1e-4", "--accumulate", 2]) == 0
    assert (asked[0]["seed"], asked[0]["lr"]) == (7, 1e-4)
    assert (asked[0]["batch_size"], asked[0]["accumulate"]) == (3, 2)


@pytest.mark.parametrize(
    "size, lr, wanted",
    [("tiny", None, 1e-3), ("paper", None, 2e-4), ("paper", 0.0, 0.0)],
)
def test_the_rate_is_as_asked_for_or_by_size(size, lr, wanted):
    options = SimpleNamespace(size=size, lr=lr)
    assert cli._rate(options) == wanted


@pytest.fixture
def asked(monkeypatch):
    """What `train` was asked for, by each run; none of them trains."""
    asked = []

    def note(model, tokenizer, features, texts, **kwargs):
        asked.append({"texts": texts, **kwargs})
        return []

    monkeypatch.setattr(flamingo_lite.training, "train", note)
    return asked


@pytest.mark.parametrize(
    "words, n_steps",
    [
        ([], 1000),
        (["--steps", 0], 0),
        (["--epochs", 1], 1),  # six pictures are not one batch of 64
        (["--epochs", 7, "--batch-size", 3], 14),
        (["--epochs", 7, "--batch-size", 3, "--accumulate", 2], 7),
        (["--epochs", 3, "--batch-size", 4], 4),  # 18 pictures: four whole steps
    ],
)
def test_epochs_are_steps(asked, images, tmp_path, words, n_steps):
    start = ["train", "--images", images, "--out", tmp_path / "out"]
    assert run_command([*start, *words]) == 0
    assert asked[0]["n_steps"] == n_steps


@pytest.mark.parametrize(
    "words, warmup",
    [(["--steps", 30], 3), (["--steps", 5], 0), ([], 50), (["--warmup", 7], 7)],
)
def test_a_short_run_reaches_its_rate(asked, images, tmp_path, words, warmup):
    start = ["train", "--images", images, "--out", tmp_path / "out"]
    assert run_command([*start, *words]) == 0
    assert asked[0]["warmup"] == warmup


def test_checkpoints_are_as_many_as_asked_for(asked, images, tmp_path):
    for number, (words, every) in enumerate({(): None, (9,): 9, (0,): 0}.items()):
        words = ["--checkpoint-every", *words] if words else []
        start = ["train", "--images", images, "--out", tmp_path / str(number)]
        assert run_command([*start, *words]) == 0
        assert asked[-1]["checkpoint_every"] == every


def test_what_is_held_out_is_scored_and_not_trained_on(
    asked, command, images, tmp_path, monkeypatch
):
    """One folder without a test: what `train` leaves is what `score` takes."""
    rows = flamingo_lite.load_captions(images)
    texts = [[row["text"] for row in part] for part in flamingo_lite.hold_out(rows, 3)]
    out = tmp_path / "out"
    assert command("train", "--images", images, "--out", out, "--hold-out", 3)[0] == 0
    assert asked[0]["texts"] == texts[0] and asked[0]["validation"][1] == texts[1]
    assert len(texts[0]) + len(texts[1]) == len(rows) and min(map(len, texts)) > 0
    scored = []
    monkeypatch.setattr(
        flamingo_lite.fewshot, "cider_d", lambda a, b: scored.append(b) or torch.ones(1)
    )
    assert command("score", "--images", images, "--hold-out", 3)[0] == 0
    assert scored == [[[text] for text in texts[1]]]


def test_a_text_is_cut_where_it_is_said(command, tmp_path, monkeypatch):
    """By default after 24 tokens; `score` gives room for the longest true caption."""
    lengths, write = [], flamingo_lite.caption

    def note(*args, **kwargs):
        lengths.append(kwargs["max_new_tokens"])
        return write(*args, **kwargs)

    monkeypatch.setattr(flamingo_lite.generation, "caption", note)
    folder = write_folder(tmp_path / "images", COLOURS[:2])
    picture, short = folder / "red.png", ["--max-new-tokens", 1]
    assert len(command("caption", picture, *short)[1].split()) == 2
    command("caption", picture)
    command("score", "--images", folder, *short)
    command("score", "--images", folder)
    texts = ["a bear " * 20, ["a lemon", "a tent above " * 30]]
    lines = [
        json.dumps({"file_name": f"{colour}.png", "text": text})
        for colour, text in zip(COLOURS[:2], texts, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert command("score", "--images", folder)[0] == 0
    tokenizer = flamingo_lite.load_flamingo("tiny")[2]
    longest = len(tokenizer(texts[1][1].strip())["input_ids"])
    assert lengths[:4] == [1, None, 1, 24] and longest < lengths[4] < longest + 3


def test_caption_prints_a_line_for_each_picture(command):
    pictures = [ROOT / f"data/emoji/noto/{name}.webp" for name in ("lemon", "bear")]
    code, result, _ = command("caption", *pictures)
    assert code == 0
    assert result == f"{pictures[0]}: a lemon\n{pictures[1]}: a bear\n"
    code, result, _ = command("caption", *pictures, "--json", "--model", "tiny")
    texts = ["a lemon", "a bear"]
    assert json.loads(result) == [
        {"picture": str(picture), "text": text}
        for picture, text in zip(pictures, texts, strict=True)
    ]


def test_caption_goes_on_from_a_prompt(command):
    picture = ROOT / "data/emoji/noto/lemon.webp"
    assert command("caption", picture, "--prompt", "<image>a")[1].endswith(": lemon\n")


def test_score_says_what_the_functions_say(command, tmp_path):
    """Of the trained model on drawings it knows, two of which are named wrongly."""
    names, folder = ["lemon", "bear", "tractor", "camera", "cow", "bus"], tmp_path / "f"
    folder.mkdir()
    texts = ["a lemon", ["a hat", "a bear"], "a tractor", "a camera", "a hat", "a tent"]
    lines = []
    for name, text in zip(names, texts, strict=True):
        shutil.copy(ROOT / f"data/emoji/noto/{name}.webp", folder)
        lines.append(json.dumps({"file_name": f"{name}.webp", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    code, result, _ = command("score", "--images", folder, "--json")
    scores = json.loads(result)
    assert code == 0 and scores["pictures"] == 6
    model, image_processor, tokenizer = built = flamingo_lite.load_flamingo("tiny")
    pictures = [folder / f"{name}.webp" for name in names]
    written = flamingo_lite.caption(*built, pictures)
    truths = [[text] if isinstance(text, str) else text for text in texts]
    assert scores["exact"] == pytest.approx(4 / 6)
    mean = float(flamingo_lite.cider_d(written, truths).mean())
    assert scores["CIDEr-D"] == pytest.approx(100 * mean)
    features = flamingo_lite.encode_pictures(
        model.vision_encoder, image_processor, pictures
    )
    losses = flamingo_lite.caption_losses(model, tokenizer, features, texts)
    assert scores["loss, true"] == pytest.approx(float(losses.mean()))
    assert scores["loss, shuffled"] > scores["loss, true"] + 0.5
    code, result, _ = command("score", "--images", folder)
    assert code == 0
    shown = dict(re.findall(r"(.+?)\s+([\d.]+)\n", result))
    assert {name: float(number) for name, number in shown.items()} == {
        name: round(number, 3) for name, number in scores.items()
    }


@pytest.mark.parametrize("n", [2, 3, 50])
def test_no_text_stays_where_it_was(n):
    texts = [f"text {i}" for i in range(n)]
    others = cli._of_others(texts)
    assert sorted(others) == sorted(texts)
    assert all(own != other for own, other in zip(texts, others, strict=True))


def test_one_picture_has_no_control(command, tmp_path):
    """Nor have pictures that all have the same caption."""
    one = write_folder(tmp_path / "one", COLOURS[:1])
    alike = write_folder(tmp_path / "alike", COLOURS[:3])
    listing = alike / "metadata.jsonl"
    listing.write_text(re.sub("a .+? square", "a square", listing.read_text()))
    for folder in (one, alike):
        code, result, told = command("score", "--images", folder, "--json")
        assert code == 0 and "no control: no picture has another caption" in told
        assert "loss, true" in json.loads(result)
        assert "loss, shuffled" not in json.loads(result)
    assert "shuffled" not in command("score", "--images", one)[1]


def test_info_of_a_timm_tower_says_what_is_known(command, backbones, tmp_path):
    """As of SigLIP's and ConvNeXt's; the memory of a step is of open_clip's towers."""
    for name in ("test_vit3", "test_convnext"):
        config, clip = timm_clip(name, **TIMM[name])
        folder = tmp_path / name
        folder.mkdir()
        saved = {"model_cfg": {**config, "custom_text": True}}
        (folder / "open_clip_config.json").write_text(json.dumps(saved))
        save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
        parts = f"local-dir:{folder}", None, backbones["opt"], backbones["opt"]
        model = flamingo_lite.create_model_and_transforms(*parts, **SMALL)[0]
        flamingo_lite.save_flamingo(model, tmp_path / "mine")
        code, result, told = command("info", "--model", tmp_path / "mine")
        facts = {line[:15].strip(): line[16:] for line in result.splitlines()}
        n = sum(p.numel() for p in model.vision_encoder.parameters())
        assert (code, facts["vision encoder"]) == (0, f"{n:,} numbers")
        kind = type(clip.visual.trunk).__name__
        assert facts["a step of 64"].startswith("not known: ")
        assert f"this is a {kind}" in facts["a step of 64"] and "Traceback" not in told


def test_info_names_versions_device_and_sizes(command, monkeypatch, tmp_path):
    monkeypatch.setenv("FLAMINGO_LITE_CACHE", str(tmp_path / "made"))
    code, result, _ = command("info", "--model", "tiny")
    facts = {line[:15].strip(): line[16:] for line in result.splitlines()}
    assert code == 0
    assert facts["torch"] == torch.__version__.partition("+")[0]
    assert facts["flamingo_lite"] == flamingo_lite.__version__
    assert facts["device"].startswith("cpu") and facts["device"].endswith("GB")
    assert facts["features in"] == str(tmp_path / "made" / "features")
    model = flamingo_lite.load_flamingo("tiny")[0]
    n_all = sum(p.numel() for p in model.parameters())
    tensors = flamingo_lite.trained_tensors(model).values()
    assert facts["all"] == f"{n_all:,} numbers"
    assert facts["trained"] == f"{sum(t.numel() for t in tensors):,} numbers"


# -------------------------------------------------------------------------- the program


# As in this process: sums are rounded in another order by another number of threads.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def program(*words, **options):
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "flamingo_lite", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"env": ONE_THREAD, **options},
    )


def test_help_answers_without_the_libraries():
    """torch and the others take seconds to import; `--help` needs none of them."""
    code = "import sys, flamingo_lite.cli as cli; cli.run_command(['train', '--help'])"
    code += "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--resume" in done.stdout


@pytest.mark.parametrize("name", ["", "train", "caption", "score", "info"])
def test_every_command_has_a_help(command, name):
    code, result, told = command(*[name][: bool(name)], "--help")
    assert code == 0 and told == ""
    assert "usage: python -m flamingo_lite" in result
    assert {"": "caption"}.get(name, "--device") in result


@pytest.mark.skipif(os.name != "posix", reason="no SIGINT for one process here")
def test_ctrl_c_says_how_to_go_on_and_that_ends_as_a_whole_run(images, tmp_path):
    """A real signal to a real process; then the very line that it printed."""
    few = ["--steps", 12, "--batch-size", 3, "--report-every", 2]
    run, whole = tmp_path / "my run", tmp_path / "whole"
    assert run_command(["train", "--images", images, "--out", whole, *few]) == 0
    process = program("train", "--images", images, "--out", run, *few)
    told = ""
    for line in process.stderr:
        told += line
        if "step     4" in line:
            process.send_signal(signal.SIGINT)
            break
    result, rest = process.communicate(timeout=120)
    assert process.returncode == 130, told + rest
    assert result == "" and "Traceback" not in rest
    assert not (run / "flamingo.safetensors").exists()
    stopped, line = rest.strip().splitlines()[-2:]
    assert stopped.startswith("stopped. Go on from the last checkpoint")
    go_on = subprocess.run(
        ["sh", "-c", line.replace("python", sys.executable, 1)],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
    )
    assert go_on.returncode == 0, go_on.stderr
    assert "going on from step" in go_on.stderr
    assert_same_weights(run, whole)


def test_ctrl_c_before_the_first_step(command, images, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "make_optimizers", stop)
    words = ["train", "--images", images, "--out", tmp_path / "run", *STEPS]
    code, result, told = command(*words)
    assert (code, result) == (130, "")
    assert "from the start, nothing was learned yet" in told
    assert told.rstrip().endswith("--batch-size 3 --resume")
    monkeypatch.undo()
    assert command(*words, "--resume")[0] == 0


def test_ctrl_c_in_another_command(command, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", stop)
    assert command("caption", "a.png") == (130, "", "stopped\n")


# ----------------------------------------------------------------------------- mistakes


def mistakes(images, folder):
    """What a person may type, and what the one line must name."""
    empty, broken = folder / "empty", write_folder(folder / "broken")
    empty.mkdir()
    (broken / "red.png").write_bytes((broken / "red.png").read_bytes()[:60])
    (folder / "a file").write_text("")
    full = write_folder(folder / "full")
    new, picture = folder / "new", images / "red.png"
    train = ["train", "--images", images, "--out", new]
    return {
        "no such folder": (["train", "--images", "nowhere", "--out", new], "nowhere"),
        "no captions": (["train", "--images", empty, "--out", new], "metadata.jsonl"),
        "out holds something": (
            ["train", "--images", images, "--out", full],
            "holds something: add --resume",
        ),
        "out is a file": (
            ["train", "--images", images, "--out", folder / "a file"],
            "is a file",
        ),
        "no such device": ([*train, "--device", "abacus"], "--device abacus"),
        "a broken picture": (["train", "--images", broken, "--out", new], "red.png"),
        "no such validation": ([*train, "--validation", "nowhere"], "nowhere"),
        "caption: no picture": (["caption", folder / "no.png"], "no.png"),
        "caption: a text": (["caption", full / "metadata.jsonl"], "metadata.jsonl"),
        "caption: no model": (["caption", picture, "--model", empty], "empty"),
        "caption: no <image>": (["caption", picture, "--prompt", "a"], "<image>"),
        "score: no folder": (["score", "--images", "nowhere"], "nowhere"),
        "no Drive to write to": (
            ["train", "--images", images, "--out", "/content/drive/MyDrive/new"],
            "--out /content/drive/MyDrive/new: no Drive is mounted",
        ),
        "no Drive for features": (
            [*train, "--features", "/content/drive/MyDrive/features"],
            "--features /content/drive/MyDrive/features: no Drive is mounted",
        ),
        "steps and epochs": ([*train, "--steps", 1, "--epochs", 1], "give one of them"),
        "two ways to test": (
            [*train, "--validation", images, "--hold-out", 3],
            "--validation and --hold-out settle the same",
        ),
        "nothing is held out": ([*train, "--hold-out", 1000], "0 to test with"),
        "info: no model": (["info", "--model", "nowhere"], "nowhere"),
    }


MISTAKES = (
    "no such folder,no captions,out holds something,out is a file,no such device,"
    "a broken picture,no such validation,caption: no picture,"
    "caption: a text,caption: no model,caption: no <image>,score: no folder,"
    "info: no model,no Drive to write to,no Drive for features,steps and epochs,"
    "two ways to test,nothing is held out"
).split(",")


def test_every_mistake_is_tried(images, tmp_path):
    assert sorted(MISTAKES) == sorted(mistakes(images, tmp_path))


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line(command, images, tmp_path, kind):
    words, named = mistakes(images, tmp_path)[kind]
    code, result, told = command(*words)
    assert (code, result) == (2, "")
    line = told.strip().splitlines()[-1]
    assert line.startswith("error: ") and named in line, told
    assert "Traceback" not in told
    assert not (tmp_path / "new" / "flamingo.safetensors").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dance"],
        ["train", "--images", "a"],
        ["train", "--images", "a", "--out", "b", "--size", "huge"],
        ["train", "--images", "a", "--out", "b", "--steps", "many"],
        ["train", "--images", "a", "--out", "b", "--steps", "-1"],
        ["train", "--images", "a", "--out", "b", "--batch-size", 0],
        ["train", "--images", "a", "--out", "b", "--accumulate", 0],
        ["train", "--images", "a", "--out", "b", "--accumulate", "0.5"],
        ["train", "--images", "a", "--out", "b", "--lr=-0.001"],
        ["train", "--images", "a", "--out", "b", "--lr", "nan"],
        ["train", "--images", "a", "--out", "b", "--seed", "-1"],
        ["train", "--images", "a", "--out", "b", "--report-every", "-1"],
        ["train", "--images", "a", "--out", "b", "--checkpoint-every", "-1"],
        ["train", "--images", "a", "--out", "b", "--epochs", 0],
        ["train", "--images", "a", "--out", "b", "--hold-out", 1],
        ["score", "--images", "a", "--max-new-tokens", 0],
        ["caption"],
        ["score", "--images", "a", "--precise"],
    ],
)
def test_a_wrong_option_is_refused_with_the_usage(command, words):
    code, result, told = command(*words)
    assert (code, result) == (2, "")
    assert told.startswith("usage: python -m flamingo_lite") and "error:" in told


def test_a_number_that_is_too_small_is_told_what_it_may_be(command):
    words = ["train", "--images", "a", "--out", "b", "--batch-size"]
    want = "argument --batch-size: want a whole number from 1, got "
    assert command(*words, 0)[2].endswith(f"{want}'0'\n")
    assert command(*words, "3.5")[2].endswith(f"{want}'3.5'\n")


def test_a_text_that_is_too_long_is_found_before_a_picture_is_encoded(
    command, tmp_path, monkeypatch
):
    folder = write_folder(tmp_path / "images")
    line = json.dumps({"file_name": "red.png", "text": "very " * 500 + "long"})
    (folder / "metadata.jsonl").write_text(line)
    monkeypatch.setattr(cli, "_features", lambda *args: pytest.fail("encoded"))
    code, _, told = command("train", "--images", folder, "--out", tmp_path / "out")
    assert code == 2 and "tokens, but the model reads" in told


def test_broken_rows_can_be_left_out(command, tmp_path):
    folder = write_folder(tmp_path / "images")
    (folder / "red.png").write_bytes(b"no picture")
    words = ["train", "--images", folder, "--out", tmp_path / "out", *STEPS]
    with pytest.warns(UserWarning, match="left out 1 rows"):
        code, _, told = command(*words, "--skip-broken")
    assert code == 0 and "5 pictures" in told


def test_another_run_is_not_gone_on_with(command, images, trained):
    """`--resume` with another rate: the checkpoint says no, and nothing is changed."""
    before = weights(trained)
    words = ["train", "--images", images, "--out", trained, *STEPS, "--resume"]
    code, _, told = command(*words, "--lr", "0.5")
    assert code == 2 and "lr is 0.001 there, 0.5 here" in told
    assert all(torch.equal(before[n], t) for n, t in weights(trained).items())
    assert command(*words)[:2] == (0, f"{trained}: 5 steps, {_loss_of(trained)}\n")


@pytest.mark.parametrize("left", ["the model", "a checkpoint before the last"])
def test_a_finished_model_is_not_written_over(command, images, tmp_path, left):
    """`--resume` without a checkpoint would start anew, at its place."""
    out = tmp_path / "out"
    out.mkdir()
    names = ["flamingo.safetensors", "config.json", "last.pt.previous"]
    names = names[:2] if left == "the model" else names[2:]
    for name in names:
        (out / name).write_text("dear")
    words = ["train", "--images", images, "--out", out, *STEPS]
    code, result, told = command(*words, "--resume")
    assert (code, result) == (2, "")
    assert "has no last.pt to go on from" in told and names[0] in told
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert all((out / name).read_text() == "dear" for name in names)


def test_validating_on_what_is_trained_on_is_warned_of(command, images, tmp_path):
    """Once, with the count; the same picture under another name, too."""
    other = write_folder(tmp_path / "other", [*COLOURS[:2], "pink"])
    words = ["train", "--images", images, "--out", tmp_path / "out", *STEPS]
    with pytest.warns(UserWarning, match="2 of its 3 pictures are trained on") as told:
        assert command(*words, "--validation", other)[0] == 0
    assert len([w for w in told if "trained on" in str(w.message)]) == 1


def _loss_of(folder):
    state = torch.load(folder / "last.pt", weights_only=True)
    losses = [note["loss"] for note in state["history"]]
    return f"loss {sum(losses) / len(losses):.3f}"


def test_debug_shows_where(command, monkeypatch):
    monkeypatch.setenv("FLAMINGO_LITE_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        command("score", "--images", "nowhere")


def test_an_error_of_ours_is_not_hidden(command, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_load", fail)
    with pytest.raises(ZeroDivisionError):
        command("caption", "a.png")


def test_too_little_memory_is_said_with_what_to_change(
    command, images, tmp_path, monkeypatch
):
    def too_little(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training, "training_step", too_little)
    words = ["train", "--images", images, "--out", tmp_path / "out", *STEPS]
    code, _, told = command(*words)
    assert code == 2 and told.rstrip().endswith("try --batch-size 1 --accumulate 3")
    words[-1] = 1
    code, _, told = command(*words, "--resume")
    assert code == 2 and "--batch-size cannot be smaller" in told


def test_too_little_memory_for_encoding_is_said_with_what_to_change(
    command, images, tmp_path, monkeypatch
):
    real, tried = cli.flamingo_lite.cache_features, []

    def too_little(*args, batch_size, **kwargs):
        tried.append(batch_size)
        if batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(*args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(cli.flamingo_lite, "cache_features", too_little, raising=False)
    for words in (
        ["train", "--images", images, "--out", tmp_path / "out", *STEPS],
        ["score", "--images", images, "--features", tmp_path / "seen"],
    ):
        code, _, told = command(*words)
        assert code == 2 and told.rstrip().endswith(
            "too little memory to encode 96 pictures at a time: try --encode-batch 48"
        )
    code, _, told = command(*words, "--encode-batch", 8)
    assert code == 0 and tried == [96, 96, 8]
