"""Equal to OpenFlamingo 2.0.1 with the same weights: each piece, then the model."""

import os
import sys
from types import ModuleType

import pytest
import torch
from conftest import D_IMG, Bomb, open_gates, random_pixels, tokenize
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor

import flamingo_lite as ours
from flamingo_lite import load_flamingo, load_vision_encoder, make_labels

WHY = (
    "open-flamingo is not here: pip install --no-deps -r tests/requirements-parity.txt"
)
theirs = pytest.importorskip("open_flamingo.src.helpers", reason=WHY)
their_model = pytest.importorskip("open_flamingo.src.flamingo", reason=WHY)
their_layers = pytest.importorskip("open_flamingo.src.flamingo_lm", reason=WHY)
sys.modules.setdefault("wandb", ModuleType("wandb"))  # the next line imports it
their_training = pytest.importorskip("open_flamingo.train.train_utils", reason=WHY)
their_utils = pytest.importorskip("open_flamingo.src.utils", reason=WHY)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Two rows of different length, with two pictures and with one, text before and after.
TEXTS = [
    "look<image>a lemon<|endofchunk|><image>a tent<|endofchunk|>",
    "and here<image>a flamingo<|endofchunk|>",
]


def twins(name, seed=0, **sizes):
    """Our module and theirs, with the same weights."""
    torch.manual_seed(seed)
    mine, reference = getattr(ours, name)(**sizes), getattr(theirs, name)(**sizes)
    open_gates(mine)
    assert set(mine.state_dict()) == set(reference.state_dict())
    reference.load_state_dict(mine.state_dict(), strict=True)
    return mine, reference


def assert_same_gradients(mine, reference):
    """The gradient of every parameter, by name."""
    wanted = dict(reference.named_parameters())
    for name, parameter in mine.named_parameters():
        assert_close(parameter.grad, wanted[name].grad, msg=name, **TOLERANCE)


@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 32, "depth": 1, "dim_head": 8, "heads": 2, "num_latents": 3},
        {
            "dim": 48,
            "depth": 3,
            "dim_head": 16,
            "heads": 4,
            "num_latents": 7,
            "ff_mult": 2,
        },
        {"dim": 32, "depth": 2, "max_num_frames": 5},
        {"dim": 32, "depth": 2, "max_num_media": 4},
        {"dim": 32, "depth": 2, "max_num_frames": 3, "max_num_media": 2},
    ],
    ids=lambda sizes: " ".join(f"{name}={size}" for name, size in sizes.items()),
)
def test_perceiver(sizes):
    mine, reference = twins("PerceiverResampler", **sizes)
    x = torch.randn(2, 2, 3, 5, sizes["dim"])  # (B, T_img, F, v, d)
    result, wanted = mine(x), reference(x)
    assert_close(result, wanted, **TOLERANCE)
    weight = torch.randn_like(result)
    (result * weight).mean().backward()
    (wanted * weight).mean().backward()
    assert_same_gradients(mine, reference)


def block_inputs():
    """Text, media, and `<image>` at 1 and 4 of one row and at 3 of the other."""
    media_locations = torch.zeros(2, 8, dtype=torch.bool)
    media_locations[0, [1, 4]] = media_locations[1, 3] = True
    return torch.randn(2, 8, 24), torch.randn(2, 2, 5, 40), media_locations


SIZES = {"dim": 24, "dim_visual": 40, "dim_head": 16, "heads": 2}


def test_gated_block():
    mine, reference = twins("GatedCrossAttentionBlock", **SIZES)
    text, media, locations = block_inputs()
    result, wanted = mine(text, media, locations), reference(text, media, locations)
    assert_close(result, wanted, **TOLERANCE)
    weight = torch.randn_like(result)
    (result * weight).mean().backward()
    (wanted * weight).mean().backward()
    assert_same_gradients(mine, reference)


def test_gated_block_without_locations():
    mine, reference = twins("GatedCrossAttentionBlock", **SIZES)
    text, media, _ = block_inputs()
    wanted = reference(text, media, use_cached_media=True)  # without it, it stumbles
    assert_close(mine(text, media), wanted, **TOLERANCE)


def test_gated_block_that_sees_all_earlier_images():
    """Not rows before the first image: there the reference sees later images."""
    mine, reference = twins(
        "GatedCrossAttentionBlock", only_attend_immediate_media=False, **SIZES
    )
    text, media, locations = block_inputs()
    result, wanted = mine(text, media, locations), reference(text, media, locations)
    after = locations.cumsum(dim=-1) > 0  # (B, T_txt)
    assert_close(result[after], wanted[after], **TOLERANCE)
    assert not torch.allclose(result[~after], wanted[~after], **TOLERANCE)


@pytest.mark.parametrize("immediate", [True, False])
def test_gated_block_with_cached_media(immediate):
    mine, reference = twins(
        "GatedCrossAttentionBlock", only_attend_immediate_media=immediate, **SIZES
    )
    text, media, locations = block_inputs()
    result = mine(text[:, :3], media, locations, use_cached_media=True)
    wanted = reference(text[:, :3], media, locations, use_cached_media=True)
    assert_close(result, wanted, **TOLERANCE)


class TheirMixin(their_layers.FlamingoLMMixin):
    """transformers 5 drops a mask of ones in `generate`; the reference wants one."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return super().forward(input_ids, attention_mask, **kwargs)


def their_flamingo(backbones, tokenizer, every):
    """The reference's model around the same backbones, as its factory makes it."""
    eoc, media = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    lang_encoder = AutoModelForCausalLM.from_pretrained(backbones["opt"])
    their_utils.extend_instance(lang_encoder, TheirMixin)
    lang_encoder.set_decoder_layers_attr_name("model.decoder.layers")
    lang_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision_encoder, _ = load_vision_encoder(backbones["clip"])
    reference = their_model.Flamingo(
        vision_encoder, lang_encoder, eoc, media, D_IMG, cross_attn_every_n_layers=every
    )
    reference.requires_grad_(False)
    reference.perceiver.requires_grad_(True)
    reference.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    reference.lang_encoder.get_input_embeddings().requires_grad_(True)
    return reference.eval()


@pytest.fixture(scope="module", params=[1, 2], ids="cross_attn_every={}".format)
def models(request, make_model, backbones):
    """Our model, theirs with our weights, the tokenizer. The reference has one size."""
    mine, _, tokenizer = make_model(
        gates=0.5,
        cross_attn_every_n_layers=request.param,
        perceiver_kwargs=None,
        cross_attn_kwargs=None,
    )
    reference = their_flamingo(backbones, tokenizer, every=request.param)
    assert set(mine.state_dict()) == set(reference.state_dict())
    reference.load_state_dict(mine.state_dict(), strict=True)
    return mine, reference, tokenizer


def model_batch(model, tokenizer, side="right"):
    ids, attention_mask = tokenize(tokenizer, TEXTS, side)
    labels = make_labels(ids, model.media_token_id, model.eoc_token_id, attention_mask)
    return {"lang_x": ids, "attention_mask": attention_mask, "labels": labels}


@pytest.mark.parametrize("side", ["left", "right"])
def test_model_logits_and_loss(models, side):
    mine, reference, tokenizer = models
    pixels, batch = random_pixels([2, 1], 2), model_batch(mine, tokenizer, side)
    with torch.no_grad():
        result, wanted = mine(pixels, **batch), reference(pixels, **batch)
    real = batch["attention_mask"].bool()  # padding is read by no one
    assert_close(result.logits[real], wanted.logits[real], **TOLERANCE)
    assert_close(result.loss, wanted.loss, **TOLERANCE)


def test_model_gradients(models):
    mine, reference, tokenizer = models
    pixels, batch = random_pixels([2, 1], 2), model_batch(mine, tokenizer)
    for model in (mine, reference):
        model.zero_grad()
        model(pixels, **batch).loss.backward()
    wanted = dict(reference.named_parameters())
    embedding = mine.lang_encoder.get_input_embeddings().weight
    trained = {n: p for n, p in mine.named_parameters() if p.requires_grad}
    assert len(trained) > 20
    for name, parameter in trained.items():
        if parameter is embedding:  # of ours, only the rows of the two new tokens move
            rows = [mine.eoc_token_id, mine.media_token_id]
            assert_close(parameter.grad[rows], wanted[name].grad[rows], **TOLERANCE)
        else:
            assert_close(parameter.grad, wanted[name].grad, msg=name, **TOLERANCE)


def test_model_weights_go_both_ways(models, make_model):
    mine, reference, tokenizer = models
    other, _, _ = make_model(
        seed=1,
        cross_attn_every_n_layers=1
        if mine.lang_encoder.gated_cross_attn_layers[0]
        else 2,
        perceiver_kwargs=None,
        cross_attn_kwargs=None,
    )
    other.load_state_dict(reference.state_dict(), strict=True)
    pixels, batch = random_pixels([2, 1], 2), model_batch(mine, tokenizer)
    with torch.no_grad():
        assert torch.equal(other(pixels, **batch).logits, mine(pixels, **batch).logits)


def test_model_with_cached_media(models):
    """`cache_media`, then a text that comes after: how the reference scores."""
    mine, reference, tokenizer = models
    pixels = random_pixels([2, 1], 2)
    prompt, _ = tokenize(tokenizer, ["<image> a <image>", "<image> a b"])
    answer, _ = tokenize(tokenizer, ["is it a lemon?", "is it a tent?"])
    logits = []
    for model in (mine, reference):
        with torch.no_grad():
            model.cache_media(prompt, pixels)
            logits.append(model(None, answer, clear_conditioned_layers=False).logits)
        model.uncache_media()
    assert_close(*logits, **TOLERANCE)


def test_greedy_generation(models):
    """One prompt, no padding: the case in which the reference is right."""
    mine, reference, tokenizer = models
    pixels = random_pixels(1, 1)
    ids, attention_mask = tokenize(tokenizer, ["<image> a"])
    settings = {
        "attention_mask": attention_mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": mine.eoc_token_id,
        "suppress_tokens": [mine.media_token_id],
    }
    result = mine.generate(pixels, ids, **settings)
    assert torch.equal(result, reference.generate(pixels, ids, **settings))


def test_beam_search(models):
    """Beams of one row, no padding; the reference cannot return several of them."""
    mine, reference, tokenizer = models
    pixels = random_pixels(1, 1)
    ids, attention_mask = tokenize(tokenizer, ["<image> a"])
    settings = {
        "attention_mask": attention_mask,
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": mine.eoc_token_id,
        "suppress_tokens": [mine.media_token_id],
    }
    result = mine.generate(pixels, ids, **settings)
    assert torch.equal(result, reference.generate(pixels, ids, **settings))


def test_cached_media_and_one_token_at_a_time(models):
    """`cache_media`, the prompt with the language model's cache, then single tokens."""
    mine, reference, tokenizer = models
    pixels = random_pixels([2, 1], 2)
    ids, mask = tokenize(tokenizer, ["<image> a <image>", "<image> a b"])
    answer, _ = tokenize(tokenizer, ["a lemon", "a tent"])
    logits = []
    for model in (mine, reference):
        with torch.no_grad():
            model.cache_media(ids, pixels)
            past, so_far, steps = DynamicCache(), mask, []
            for piece in (ids, *answer.split(1, dim=1)):
                if piece is not ids:
                    so_far = torch.cat((so_far, so_far.new_ones(2, 1)), dim=1)
                out = model(
                    None,
                    piece,
                    so_far,
                    clear_conditioned_layers=False,
                    past_key_values=past,
                    use_cache=True,
                )
                steps.append(out.logits)
        model.uncache_media()
        logits.append(torch.cat(steps, dim=1))
    real = torch.cat((mask, torch.ones_like(answer)), dim=1).bool()
    assert_close(logits[0][real], logits[1][real], **TOLERANCE)


# Where the reference is wrong: the table of where_you_are_now.md, by running it. Its
# first row is test_gated_block_that_sees_all_earlier_images.


@pytest.mark.parametrize("texts", [["<image> a", "<image> a"], ["<image><image>"] * 2])
def test_the_reference_does_not_count_pictures(models, texts):
    """Two pictures beside one `<image>`, or one beside two."""
    mine, reference, tokenizer = models
    ids, mask = tokenize(tokenizer, texts)
    n_images = 3 - texts[0].count("<image>")
    pixels = random_pixels([n_images] * 2, n_images)
    with torch.no_grad():
        assert reference(pixels, ids, mask).logits.isfinite().all()
        with pytest.raises(ValueError, match="image"):
            mine(pixels, ids, mask)


class Forced(LogitsProcessor):
    """Every row writes the tokens that it is told to; row 0's scores are kept.

    tokens: for each step one of each row, or an error that stops the writing.
    """

    def __init__(self, tokens):
        self.tokens, self.scores = iter(tokens), []

    def __call__(self, input_ids, scores):
        self.scores.append(scores[0].clone())
        step = next(self.tokens)
        if isinstance(step, BaseException):
            raise step
        forced = torch.full_like(scores, -1e9)
        return forced.scatter(1, torch.tensor(step)[:, None], 0.0)


def scores_of_row_0(model, tokenizer, pixels, row_1):
    """(steps, vocab) of row 0, while row 1 writes these words."""
    ids, attention_mask = tokenize(tokenizer, ["<image> a", "<image> a"])
    word = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(" a"))[0]
    other = {"<image>": tokenizer.convert_tokens_to_ids("<image>"), "a": word}
    forced = Forced([(word, other[said]) for said in row_1])
    settings = {"attention_mask": attention_mask, "max_new_tokens": len(row_1)}
    model.generate(pixels, ids, logits_processor=[forced], do_sample=False, **settings)
    return torch.stack(forced.scores)


def test_the_reference_forgets_all_pictures_once_one_row_writes_image(models):
    mine, reference, tokenizer = models
    pixels = random_pixels([1, 1], 1)
    for model, forgets in ((mine, False), (reference, True)):
        usual = scores_of_row_0(model, tokenizer, pixels, ["a", "a", "a", "a"])
        beside = scores_of_row_0(model, tokenizer, pixels, ["a", "<image>", "a", "a"])
        assert_close(beside[:2], usual[:2], **TOLERANCE)
        for before, after in zip(usual[2:], beside[2:], strict=True):
            assert torch.allclose(before, after, **TOLERANCE) != forgets


def test_the_reference_is_stuck_after_an_interruption(models):
    mine, reference, tokenizer = models
    pixels = random_pixels([1, 1], 1)
    ids, mask = tokenize(tokenizer, ["<image> a", "<image> a"])
    for model in (mine, reference):
        with torch.no_grad():
            before = model(pixels, ids, mask).logits
        stopped = [Forced([KeyboardInterrupt()])]
        with pytest.raises(KeyboardInterrupt):
            settings = {"logits_processor": stopped, "max_new_tokens": 2}
            model.generate(pixels, ids, attention_mask=mask, **settings)
        if model is mine:
            with torch.no_grad():
                assert torch.equal(model(pixels, ids, mask).logits, before)
        else:
            with pytest.raises(AssertionError):
                model(pixels, ids, mask)
            model.uncache_media()  # for the next test


@pytest.fixture
def released(models, tmp_path, capsys):
    """A checkpoint as OpenFlamingo's own training script writes it."""
    _, reference, _ = models
    trained = their_training.filter_state_dict_to_trainable(
        reference, reference.state_dict()
    )
    torch.save(trained, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def load_released(path, backbones, model):
    blocks = model.lang_encoder.gated_cross_attn_layers
    return load_flamingo(
        path,
        clip_vision_encoder_path=backbones["clip"],
        clip_vision_encoder_pretrained=None,
        lang_encoder_path=backbones["opt"],
        tokenizer_path=backbones["opt"],
        cross_attn_every_n_layers=1 if blocks[0] else 2,
    )


def test_a_released_checkpoint(models, released, backbones):
    mine, reference, tokenizer = models
    loaded, _, _ = load_released(released, backbones, mine)
    pixels, batch = random_pixels([2, 1], 2), model_batch(mine, tokenizer)
    with torch.no_grad():
        result, wanted = loaded(pixels, **batch), reference(pixels, **batch)
    assert_close(result.logits, wanted.logits, **TOLERANCE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("perceiver.latents"), "missing: perceiver.latents"),
        (lambda s: s.update(stranger=torch.zeros(1)), "stranger does not fit"),
        (
            lambda s: s["lang_encoder.model.decoder.embed_tokens.weight"].add_(1.0),
            "another backbone",
        ),
    ],
)
def test_another_checkpoint_is_refused(models, released, backbones, change, message):
    mine, _, _ = models
    state = torch.load(released, weights_only=True)
    change(state)
    torch.save(state, released)
    with pytest.raises(ValueError, match=message):
        load_released(released, backbones, mine)


@pytest.mark.parametrize("damage", ["pickled code", "cut short", "empty", "no dict"])
def test_a_damaged_checkpoint_runs_no_code(models, released, backbones, damage):
    mine, _, _ = models
    os.environ.pop("FLAMINGO_BOMB", None)
    if damage == "pickled code":
        torch.save({"perceiver.latents": Bomb()}, released)
    elif damage == "no dict":
        torch.save([torch.zeros(2)], released)
    else:
        whole = released.read_bytes()
        released.write_bytes(whole[: len(whole) // 2] if "cut" in damage else b"")
    with pytest.raises(OSError, match="checkpoint.pt"):
        load_released(released, backbones, mine)
    assert "FLAMINGO_BOMB" not in os.environ
