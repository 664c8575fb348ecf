"""From a hub to a trained Flamingo and back, against a server that stands in for it.

Each step is a Python of its own, as a user's would be, with an empty home.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub import CLIP, CLIP_CONFIG, NO_GRID, OPT, SIGLIP, Hub

ROOT = Path(__file__).resolve().parents[1]
# The real ViT-L-14 has 428 M numbers; here the name stands for a small one.
HEAD = f"""
import json, open_clip, sys, torch
from PIL import Image
torch.set_num_threads(1)
small = json.loads({json.dumps(CLIP_CONFIG["model_cfg"])!r})
del small["quick_gelu"]  # as in open_clip's own ViT-L-14: the tag says it
open_clip.factory._MODEL_CONFIGS["ViT-L-14"] = small
from flamingo_lite import *
tiny = {{
    "perceiver_kwargs": dict(depth=1, num_latents=4, heads=2, dim_head=8),
    "cross_attn_kwargs": dict(heads=2, dim_head=8),
}}
names = ["ViT-L-14", "openai", "facebook/opt-125m", "facebook/opt-125m"]
"""
BUILD = """
torch.manual_seed(0)
model, image_processor, tokenizer = create_model_and_transforms(*names, **tiny)
"""
TRAIN = """
colours = ["red", "green", "blue", "black"]
pictures = [Image.new("RGB", (40, 30), colour) for colour in colours]
features = encode_pictures(model.vision_encoder, image_processor, pictures)
texts = ["a " + colour for colour in colours]
settings = dict(n_steps=2, batch_size=2, report=lambda line: None)
history = train(model, tokenizer, features, texts, **settings)
save_flamingo(model, sys.argv[1])
"""
ASK = """
pixels = image_processor(Image.new("RGB", (40, 30), "red"))[None, None, None]
ids = tokenizer("<image>a red", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(pixels, ids).logits[0, -1]
print(json.dumps([round(x, 4) for x in logits[:20].tolist()]))
"""
LOAD = "model, image_processor, tokenizer = load_flamingo(sys.argv[1])\n"


@pytest.fixture
def run(tmp_path):
    def run(code, hub, *args, cache="cache", check=True, **more):
        """Run Python in a fresh process that knows the hub.

        Returns:
            The last line of what it printed; of a run that fails, its error.
        """
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / cache)}
        env |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", HEAD + code, *map(str, args)],
            env=env | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stderr[-2000:]
        if check:
            return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        return re.split(r"\n(?=\w*Error: )", done.stderr)[-1]

    return run


@pytest.fixture(scope="module")
def files():
    with Hub() as hub:
        return hub.repositories


def fetched(hub, end):
    return [path for command, path, _ in hub.asked if command == "GET" and end in path]


def test_from_a_cold_cache_to_a_trained_model_and_back(run, files, tmp_path):
    with Hub(files) as hub:
        facts = """
act = model.vision_encoder.transformer.resblocks[0].mlp.gelu
rows = model.lang_encoder.get_input_embeddings().weight.shape[0]
start = tokenizer("a lemon").input_ids[0]
print(type(act).__name__, len(tokenizer), rows, tokenizer.model_max_length, start)
"""
        said = run(BUILD + TRAIN + facts + ASK, hub.address, tmp_path / "mine")
        assert len(fetched(hub, "pytorch_model.bin")) == 1
        assert len(fetched(hub, "open_clip_model.safetensors")) == 1
        assert not [path for command, path, _ in hub.asked if command == "POST"]

        # The tag's own activation; 50,265 words and two; a start token before a text.
        hub.asked.clear()
        told = run(BUILD + facts, hub.address)
        assert told == "QuickGELU 50267 50267 2048 2"
        assert not fetched(hub, "pytorch_model.bin"), "fetched twice"

        # Another cache: everything is fetched again, and says the same.
        assert run(LOAD + ASK, hub.address, tmp_path / "mine", cache="other") == said
    # Without the hub, from the cache alone.
    away = {"HF_HUB_OFFLINE": "1"}
    assert run(LOAD + ASK, "http://127.0.0.1:9", tmp_path / "mine", **away) == said
    weights = tmp_path / "mine" / "flamingo.safetensors"
    assert weights.stat().st_size < 300_000, "the frozen parts are not saved"


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "vocab.json", "open_clip_model.safetensors"]
)
def test_a_download_that_is_cut_is_said_and_goes_through_later(run, files, file):
    with Hub(files) as hub:
        hub.cut_file, hub.cut = file, 5000
        line = run(BUILD, hub.address, check=False)
        assert line.startswith("OSError: cannot load"), line
        assert ("ViT-L-14" if "clip" in file else "facebook/opt-125m") in line
        hub.cut_file = None
        assert run(BUILD + "print(len(tokenizer))", hub.address) == "50267"


def test_without_a_network_the_line_says_what_to_do(run):
    """The hub's library tries each of three files for 23 seconds; not here."""
    at_once = "import time\ntime.sleep = lambda seconds: None\n"
    line = run(at_once + BUILD, "http://127.0.0.1:9", check=False)
    assert line.startswith("OSError: cannot load 'ViT-L-14'"), line
    assert "Without a network" in line and "tiny" in line


def test_a_name_that_the_hub_does_not_know(run, files):
    with Hub({CLIP: files[CLIP]}) as hub:
        line = run(BUILD, hub.address, check=False)
    assert line.startswith("OSError: cannot load the language model"), line
    assert OPT in line


def test_a_full_disk_is_said_and_leaves_nothing_that_is_taken_for_whole(run, files):
    full = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
"""
    with Hub(files) as hub:
        line = run(full + BUILD, hub.address, check=False)
        assert line.startswith("OSError: cannot load"), line
        assert "File too large" in line or "space" in line.lower(), line
        assert run(BUILD + "print(len(tokenizer))", hub.address) == "50267"


def test_a_siglip_from_a_cold_cache_to_a_trained_model_and_back(run, files, tmp_path):
    """Its tower is one of timm's: 10 x 10 tokens, no CLS; pictures are squashed."""
    siglip = f'names[:2] = ["hf-hub:{SIGLIP}", None]\n'
    facts = """
pixels = torch.zeros(1, 3, 160, 160)
tokens = model.vision_encoder(pixels)[1]
mean = image_processor.transforms[-1].mean
print(json.dumps([type(model.vision_encoder).__name__, list(tokens.shape), mean]))
"""
    with Hub(files) as hub:
        weights = "open_clip_model.safetensors"
        said = run(siglip + BUILD + TRAIN + ASK, hub.address, tmp_path / "mine")
        assert fetched(hub, weights) == [f"/{SIGLIP}/resolve/main/{weights}"]
        told = json.loads(run(siglip + BUILD + facts, hub.address))
        assert told == ["TimmTower", [1, 100, 96], [0.5] * 3]
        assert len(fetched(hub, weights)) == 1, "fetched twice"
        assert run(LOAD + ASK, hub.address, tmp_path / "mine", cache="other") == said
    away = {"HF_HUB_OFFLINE": "1"}
    assert run(LOAD + ASK, "http://127.0.0.1:9", tmp_path / "mine", **away) == said


def test_a_tower_without_a_grid_is_refused_before_its_weights_are_fetched(run, files):
    with Hub(files) as hub:
        code = f'names[:2] = ["hf-hub:{NO_GRID}", None]\n' + BUILD
        line = run(code, hub.address, check=False)
        assert line.startswith(f"ValueError: hf-hub:{NO_GRID} gives no patch tokens")
        assert "CrossVit" in line
        assert fetched(hub, "open_clip_config.json")
        assert not fetched(hub, "safetensors") and not fetched(hub, "pytorch_model")


COMMANDS = """
import contextlib, io
for name in ("red", "green"):
    Image.new("RGB", (40, 30), name).save(f"{name}.png")
lines = [dict(file_name=f"{name}.png", text=f"a {name}") for name in ("red", "green")]
open("metadata.jsonl", "w").write("\\n".join(map(json.dumps, lines)))
def command(*words):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = run_command(words)
    return code, said.getvalue()
train = "train", "--images", ".", "--size", "paper", "--steps", "2", "--out", "made"
"""


def test_the_command_line_trains_at_paper_size_and_captions_offline(run, files):
    caption = 'print(json.dumps(command("caption", "red.png", "--model", "made")))'
    with Hub(files) as hub:
        hub.cut_file, hub.cut = "pytorch_model.bin", 5000
        said = run(COMMANDS + "print(json.dumps(command(*train)))", hub.address)
        assert json.loads(said) == [2, ""]  # the download was cut
        hub.cut_file = None
        said = run(COMMANDS + "print(json.dumps(command(*train)))", hub.address)
        code, result = json.loads(said)
        assert code == 0 and result.startswith("made: 2 steps, loss ")
        code, text = json.loads(run(COMMANDS + caption, hub.address))
        assert code == 0 and text.startswith("red.png: ")
    away = {"HF_HUB_OFFLINE": "1"}
    assert json.loads(run(COMMANDS + caption, "http://127.0.0.1:9", **away)) == [
        0,
        text,
    ]
