"""What several test files share: small random backbones, and a Flamingo around them.

Nothing here is trained or fetched: a language model of transformers and a CLIP of
open_clip, both with random weights, are saved in the formats of their libraries, and
`create_model_and_transforms` loads them as it would load the real ones.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

from flamingo_lite import create_model_and_transforms

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # faster than two for tensors as small as these


def pytest_configure(config):
    """One folder for all that this run writes, chapters included; gone at its end.

    The notebooks make scratch folders that end with the machine in Colab, but on one's
    own would stay: chapter 12's checkpoints alone are four gigabytes. What a *failed*
    test wrote can be kept with --basetemp.
    """
    if not hasattr(config, "workerinput"):  # workers find it in the environment
        folder = tempfile.mkdtemp(prefix="flamingo_lite_tests_")
        os.environ["TMPDIR"], tempfile.tempdir = folder, None
        # After multiprocessing has put away its own (-100), which lies in there.
        Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)


D_IMG, D_TXT, V = 32, 32, 16  # widths, and visual tokens of one picture
SMALL = {
    "perceiver_kwargs": {"depth": 2, "num_latents": 4, "heads": 2, "dim_head": 16},
    "cross_attn_kwargs": {"heads": 2, "dim_head": 16},
}
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": D_IMG,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": D_IMG,
            "layers": 2,
            "head_width": 16,
            "output_tokens": True,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": 64,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
}


def save_clip(folder, config=CLIP_CONFIG, seed=0):
    """A CLIP with random weights, as a folder that open_clip calls "local-dir"."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**config["model_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def save_language_model(folder, config, seed=0):
    """A random language model and the tiny OPT's tokenizer, in hub format."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in (ROOT / "data" / "tiny_opt").glob("tokenizer*.json"):
        shutil.copy(path, folder)
    return str(folder)


def opt_config(**changes):
    """An OPT small enough for tests. Large random weights make its choices clear."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_opt")
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": D_TXT,
        "word_embed_proj_dim": D_TXT,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 96,
        "dropout": 0.1,
        "init_std": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return OPTConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """{"clip": path, "opt": path} of the saved random backbones."""
    folder = tmp_path_factory.mktemp("backbones")
    clip = save_clip(folder / "clip")
    return {"clip": clip, "opt": save_language_model(folder / "opt", opt_config())}


@pytest.fixture(scope="session")
def make_model(backbones):
    """A function that builds a small Flamingo: model, image processor, tokenizer."""

    def make(seed=0, gates=None, language_model=None, **kwargs):
        torch.manual_seed(seed)
        path = language_model or backbones["opt"]
        loaded = create_model_and_transforms(
            backbones["clip"], None, path, path, **{**SMALL, **kwargs}
        )
        if gates is not None:
            open_gates(loaded[0], gates)
        return loaded

    return make


@pytest.fixture
def small(make_model):
    """A new small Flamingo with open gates: model, image processor, tokenizer."""
    return make_model(gates=1.0)


def open_gates(module, value=0.5):
    """Set every gate below `module`, so that what is behind it has an effect."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(value)


def tokenize(tokenizer, texts, side="left"):
    """Ids and attention mask, both (B, T_txt), of texts padded on one side."""
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def random_features(B, T_img, F=1, seed=0):
    """(B, T_img, F, V, D_IMG) visual tokens, of rows or of `B` as below."""
    return _some(B, T_img, (F, V, D_IMG), seed)


def random_pixels(B, T_img, F=1, seed=0):
    """(B, T_img, F, 3, 32, 32) pixels.

    B: how many rows, or a list of how many pictures each has; the others are zeros.
    """
    return _some(B, T_img, (F, 3, 32, 32), seed)


def _some(B, T_img, shape, seed):
    counts = [T_img] * B if isinstance(B, int) else B
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(len(counts), T_img, *shape, generator=generator)
    for row, count in enumerate(counts):
        pictures[row, count:] = 0.0
    return pictures


def make_picture(colour, size=(40, 30)):
    """A PIL picture: a square of one colour on white."""
    picture = Image.new("RGB", size, "white")
    picture.paste(colour, (5, 5, 25, 25))
    return picture


class Bomb:
    """A pickle of this runs code when it is loaded."""

    def __reduce__(self):
        return (exec, ("import os; os.environ['FLAMINGO_BOMB'] = 'went off'",))
