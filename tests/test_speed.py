"""Fast equals slow: blocks and mask, pieces and whole; and needs less."""

import importlib.util
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import D_IMG, ROOT, random_features, tokenize
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flamingo_lite import (
    FeedForward,
    MaskedCrossAttention,
    PerceiverAttention,
    PerceiverResampler,
    cross_attention,
    cut_into_blocks,
    loss_at_labels,
    make_labels,
    perceiver,
    standardize,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_layout(seed):
    """Random sizes, and `<image>` anywhere; some rows have none, some too many."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    B, T_img, T_all = draw(1, 4), draw(1, 14), draw(1, 40)
    often = torch.rand(B, 1, generator=generator)
    locations = torch.rand(B, T_all, generator=generator) < often  # (B, T_all)
    return locations, draw(1, T_all + 1), T_img


@pytest.mark.parametrize("seed", range(60))
def test_blocks_read_what_the_mask_lets_through(seed):
    locations, T_txt, T_img = random_layout(seed)
    torch.manual_seed(seed)
    attn = MaskedCrossAttention(dim=16, dim_visual=12, dim_head=4, heads=2).double()
    B, n = len(locations), 3
    x = torch.randn(B, T_txt, 16, dtype=torch.double, requires_grad=True)
    media = torch.randn(B, T_img, n, 12, dtype=torch.double, requires_grad=True)
    q = attn._split_heads(attn.to_q(attn.norm(x)))  # (B, h, T_txt, d_head)
    given = q, *attn.keys_values(media), locations, T_img
    fast, slow = attn.read_blocks(*given), attn.read_masked(*given)
    assert_close(fast, slow)
    seen = cross_attention.text_to_media_mask(locations, T_img)[:, -T_txt:].any(dim=-1)
    assert (fast.transpose(1, 2)[~seen] == 0).all()
    weight = torch.randn_like(fast)
    for leaf in (x, media):
        grads = [
            torch.autograd.grad((read * weight).sum(), leaf, retain_graph=True)
            for read in (fast, slow)
        ]
        assert_close(*grads)


@pytest.mark.parametrize("seed", range(60))
def test_each_block_has_one_image_and_room_is_at_most_double(seed):
    locations, T_txt, T_img = random_layout(seed)
    image = (locations.cumsum(dim=1) - 1).clamp(0, T_img - 1)[:, -T_txt:]
    place, block_image, c = cut_into_blocks(image, T_img)
    n_places = block_image.shape[1] * c
    assert T_txt <= n_places < 2 * T_txt + T_img
    for row, places, images in zip(image, place, block_image, strict=True):
        assert len(set(places.tolist())) == T_txt and places.max() < n_places
        assert torch.equal(images[places // c], row)


def many_pictures(tokenizer, counts, seed=0):
    """Left-padded prompts with so many pictures, the ids, mask and features."""
    texts = ["look" + "<image>a lemon<|endofchunk|>" * (n - 1) for n in counts]
    texts = [
        text + ("<image> a" if n else "") for text, n in zip(texts, counts, strict=True)
    ]
    ids, mask = tokenize(tokenizer, texts, "left")
    features = random_features(len(counts), max(counts), seed=seed)
    for row, count in enumerate(counts):
        features[row, count:] = 0.0
    return ids, mask, features


def with_masks(monkeypatch):
    """From here on, attention uses the mask however many images there are."""
    monkeypatch.setattr(cross_attention, "FEW", 10**9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
        {"suppress_tokens": []},  # rows may write <image> themselves
    ],
    ids=str,
)
def test_generation_with_many_images(small, options, monkeypatch):
    """Left padding, rows with ten pictures, one and three: the same words as masked."""
    model, _, tokenizer = small
    ids, mask, features = many_pictures(tokenizer, [10, 1, 3])
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    given = {"attention_mask": mask, "vision_features": features}
    fast = model.generate(None, ids, **given, **options)
    with_masks(monkeypatch)
    assert torch.equal(fast, model.generate(None, ids, **given, **options))


def test_logits_and_cached_pieces_with_many_images(small, monkeypatch):
    model, _, tokenizer = small
    ids, mask, features = many_pictures(tokenizer, [10, 4])
    kept = {"clear_conditioned_layers": False, "use_cache": True}

    def in_pieces():
        model.cache_media(ids, None, features)
        past, logits = None, []
        for first in range(0, ids.shape[1], 7):
            seen = mask[:, : first + 7]
            part = ids[:, first : first + 7]
            out = model(None, part, seen, past_key_values=past, **kept)
            past = out.past_key_values
            logits.append(out.logits)
        model.uncache_media()
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        whole = model(None, ids, mask, vision_features=features).logits
        pieces = in_pieces()
        with_masks(monkeypatch)
        slow = model(None, ids, mask, vision_features=features).logits
    real = mask.bool()
    assert_close(whole[real], slow[real], **CLOSE)
    assert_close(pieces[real], slow[real], **CLOSE)


# -------------------------------------------------------------------------- the loss


def labelled(model, tokenizer, n_words=6, rows=3):
    """A batch for `loss_at_labels`."""
    words = " a lemon" * n_words
    ids, mask = tokenize(tokenizer, [f"<image>{words}<|endofchunk|>"] * rows)
    labels = make_labels(ids, model.media_token_id, model.eoc_token_id, mask)
    features = random_features(rows, 1)
    batch = {"lang_x": ids, "attention_mask": mask, "labels": labels}
    return {**batch, "vision_features": features}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_loss_at_labels(small, piece):
    """The loss and every gradient, that of the tied table of tokens too."""
    model, _, tokenizer = small
    batch = labelled(model, tokenizer)
    whole = model(None, **batch).loss
    wanted = gradients(model, whole)
    loss = loss_at_labels(model, piece=piece, **batch)
    found = gradients(model, loss)
    assert_close(loss, whole, **CLOSE)
    assert set(found) == set(wanted) and len(found) > 20
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, msg=name, **CLOSE)
    head = model.lang_encoder.get_output_embeddings()
    assert not head._forward_pre_hooks
    assert model(None, **batch).logits.shape[:2] == batch["lang_x"].shape


class MostLogits(TorchDispatchMode):
    """The most rows that a tensor as wide as the vocabulary has meanwhile."""

    def __init__(self, vocab, d_txt):
        super().__init__()
        self.vocab, self.d_txt, self.rows = vocab, d_txt, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (self.vocab,):
            if out.shape != (self.d_txt, self.vocab):  # the head's matrix, turned
                self.rows = max(self.rows, out.numel() // self.vocab)
        return out


@pytest.mark.parametrize("n_words", [6, 24])
def test_rows_of_logits_do_not_grow(small, n_words):
    model, _, tokenizer = small
    d_txt = model.lang_dim
    batch = labelled(model, tokenizer, n_words)
    with MostLogits(len(tokenizer), d_txt) as most:
        loss_at_labels(model, piece=8, **batch).backward()
    assert 0 < most.rows <= 8
    with MostLogits(len(tokenizer), d_txt) as most:
        model(None, **batch).loss.backward()
    assert most.rows >= batch["lang_x"].numel()


def test_only_labelled_tokens_reach_the_head(small):
    model, _, tokenizer = small
    batch = labelled(model, tokenizer)
    batch["labels"][:, :-2] = -100
    with MostLogits(len(tokenizer), model.lang_dim) as most:
        loss_at_labels(model, **batch)
    assert most.rows == int((batch["labels"][:, 1:] != -100).sum())


def test_loss_without_labels_and_after_an_error(small):
    model, _, tokenizer = small
    batch = labelled(model, tokenizer)
    head = model.lang_encoder.get_output_embeddings()
    with pytest.raises(ValueError, match="no token has a label"):
        loss_at_labels(model, **{**batch, "labels": batch["labels"] * 0 - 100})
    with pytest.raises(ValueError, match="no pictures"):
        loss_at_labels(model, **{**batch, "vision_features": None})
    assert not head._forward_pre_hooks and not model.lang_encoder.is_conditioned()


def test_a_language_model_that_changes_logits_itself(small, monkeypatch):
    """Scaled logits are not what the head gives: the usual way is taken."""
    model, _, tokenizer = small
    lm, batch = model.lang_encoder, labelled(model, tokenizer)
    monkeypatch.setattr(lm.config, "logits_scaling", 4.0, raising=False)
    with MostLogits(len(tokenizer), model.lang_dim) as most:
        loss = loss_at_labels(model, piece=1, **batch)
    assert most.rows >= batch["lang_x"].numel()
    assert_close(loss, model(None, **batch).loss)


# ------------------------------------------------------------------ Perceiver, tool


def test_norm_in_the_matrix():
    """As OpenFlamingo's order, in numbers and gradients; features ask for none."""
    torch.manual_seed(0)
    attention = PerceiverAttention(dim=D_IMG, dim_head=8, heads=2)
    norm = attention.norm_media
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 3, 5, D_IMG, requires_grad=True)
    leaves = [x, norm.weight, norm.bias, attention.to_kv.weight]
    results = []
    for to_kv in (
        lambda x: attention._tokens_to_kv(standardize(x)),
        lambda x: attention.to_kv(norm(x)),
    ):
        kv = to_kv(x)
        results.append((kv, *torch.autograd.grad(kv.square().sum(), leaves)))
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def kept_by(function, *given):
    """What a function returns, and the numbers in each tensor it keeps for backward."""
    kept, alive = {}, []

    def note(tensor):
        if not isinstance(tensor, nn.Parameter):
            alive.append(tensor)  # or another could get its place
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(*given)
    return result, list(kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("large", [15 * 32, 15 * 32 + 1])
def test_gelu_is_not_kept(precision, again, large, monkeypatch):
    """As four plain layers: numbers, gradients and products; it keeps less."""
    monkeypatch.setattr(perceiver, "LARGE", large)
    torch.manual_seed(0)
    ours = FeedForward(8)
    plain = nn.Sequential(*ours)
    results = []
    for module in (ours, plain):
        call = partial(checkpoint, module, use_reentrant=False) if again else module
        x = torch.ones(3, 5, 8).cumsum(dim=1).cumsum(dim=2).cos().requires_grad_()
        ours.zero_grad()
        with FlopCounterMode(display=False) as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
                read, kept = kept_by(call, x)
            read.float().square().sum().backward()
        gradients = [p.grad for p in module.parameters()]
        results.append((counter.get_total_flops(), kept, (read, x.grad, *gradients)))
    (ours_flops, kept, fast), (flops, kept_plain, slow) = results
    for one, other in zip(fast, slow, strict=True):
        assert torch.equal(one, other)
    if again:
        assert kept == kept_plain == [x.numel()]
    else:
        assert ours_flops == flops
        assert kept_plain.count(15 * 32) == 2
        assert kept.count(15 * 32) == (1 if large == 15 * 32 else 2)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tokens_are_kept_once(precision):
    """The Resampler keeps its tokens once, though each of its layers reads them."""
    torch.manual_seed(0)
    resampler = PerceiverResampler(dim=D_IMG, depth=3, dim_head=8, heads=2)
    x = torch.randn(2, 1, 1, 77, D_IMG)  # (B, T_img, F, v, d)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        _, kept = kept_by(resampler, x)
    assert kept.count(x.numel()) == 1


def test_benchmark_runs():
    """The tool in its smallest form: a Markdown table with a row for each case."""
    if importlib.util.find_spec("open_flamingo") is None:
        pytest.skip("needs open-flamingo: tests/requirements-parity.txt")
    command = [sys.executable, str(ROOT / "tools" / "measure" / "benchmark.py")]
    groups = ["step", "growth", "tower", "generation", "memory", "checkpointing"]
    command += ["--smallest", "--busy", *groups]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 11 and all(row.count("|") == 7 for row in rows)
