"""At the edges of the model: pictures too many, half precision, rows that are copied,
the config, a model put together by hand."""

import json

import pytest
import torch
from conftest import (
    D_TXT,
    ROOT,
    make_picture,
    open_gates,
    random_features,
    random_pixels,
    tokenize,
)
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from flamingo_lite import (
    Flamingo,
    FlamingoLMMixin,
    caption,
    check_pictures,
    extend_instance,
    load_flamingo,
    load_vision_encoder,
    save_flamingo,
    score_candidates,
)

TEXTS = ["<image>a lemon<|endofchunk|><image>a", "look<image>a bear"]
COUNTS = [2, 1]
MAKE = {"features": random_features, "pixels": random_pixels}


def given(kind, pictures):
    """Pictures as `forward`, `generate` and `cache_media` take them."""
    if kind == "pixels":
        return {"vision_x": pictures}
    return {"vision_x": None, "vision_features": pictures}


def call(model, door, ids, mask, **pictures):
    """What comes out of one of the three doors, as a tensor."""
    if door == "cache_media":
        model.cache_media(ids, **pictures)
        return model(None, ids, mask).logits
    if door == "generate":
        settings = {"max_new_tokens": 4, "do_sample": False}
        return model.generate(lang_x=ids, attention_mask=mask, **pictures, **settings)
    return model(lang_x=ids, attention_mask=mask, **pictures).logits


def assert_clean(model):
    for layer in model.lang_encoder._get_decoder_layers():
        assert layer.vis_x is None and layer.media_locations is None
        assert layer.keys_values is None
    assert not model.lang_encoder._use_cached_vision_x


# ------------------------------------------------------------------ pictures too many

DOORS = ["forward", "generate", "cache_media"]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_a_picture_too_many_is_an_error_that_names_the_row(small, door, kind):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    with pytest.raises(ValueError, match="row 1 has 1 <image> tokens, and 1 pictures"):
        call(model, door, ids, mask, **given(kind, MAKE[kind](2, 2)))
    assert_clean(model)
    with pytest.raises(ValueError, match="row 0 has 2 <image> tokens, and 1 pictures"):
        call(model, door, ids, mask, **given(kind, MAKE[kind]([3, 1], 3)))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_pictures_of_zeros_may_be_left_over_and_change_nothing(small, door, kind):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    exact = call(model, door, ids, mask, **given(kind, MAKE[kind](COUNTS, 2)))
    padded = torch.cat((MAKE[kind](COUNTS, 2), MAKE[kind]([0, 0], 3)), dim=1)
    more = call(model, door, ids, mask, **given(kind, padded))
    assert_close(more, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1e-6, -1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_one_number_that_is_not_zero_is_a_picture(value, place):
    pictures = random_features(COUNTS, 2)
    pictures[1, 1].view(-1)[place] = value
    where = torch.tensor([[True, False, True], [False, True, False]])
    with pytest.raises(ValueError, match="row 1"):
        check_pictures(pictures, where)
    check_pictures(pictures, where, spare=True)
    pictures[1, 1] = -0.0
    check_pictures(pictures, where)


@torch.no_grad()
def test_a_picture_of_zeros_that_is_asked_for_is_a_picture(small):
    """The blank picture of a control stands where its `<image>` is."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    blank = random_features(COUNTS, 2)
    blank[0, 0] = 0.0
    assert model(None, ids, mask, vision_features=blank).logits.isfinite().all()


@torch.no_grad()
def test_pictures_for_images_to_come_are_kept_when_asked(small):
    """`spare_pictures`, and `generate` where a row may write `<image>`."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    spare = random_features(2, 2)
    wanted = model(None, ids, mask, vision_features=random_features(COUNTS, 2)).logits
    pictures = {"vision_features": spare, "spare_pictures": True}
    assert_close(model(None, ids, mask, **pictures).logits, wanted)
    model.cache_media(ids, None, **pictures)
    assert_close(model(None, ids, mask).logits, wanted)
    settings = {"max_new_tokens": 3, "do_sample": False, "vision_features": spare}
    model.generate(None, ids, mask, suppress_tokens=None, **settings)
    model.generate(None, ids, mask, suppress_tokens=[5], **settings)
    with pytest.raises(ValueError, match="row 1"):
        model.generate(None, ids, mask, suppress_tokens=[model.media_token_id, 5],
                       **settings)  # fmt: skip


@torch.no_grad()
def test_more_images_than_cached_pictures_are_an_error(small):
    """At once, and where an `<image>` comes in a later piece of the text."""
    model, _, tokenizer = small
    ids, _ = tokenize(tokenizer, ["<image>a lemon", "<image>a bear"])
    more = ids.clone()
    more[1, -1] = model.media_token_id
    features = random_features(2, 1)
    model.cache_media(ids, None, vision_features=features)
    with pytest.raises(ValueError, match="row 1 has 2 <image> tokens, but 1 pictures"):
        model(None, more)
    assert_clean(model)
    for cached in (True, False):
        pictures = {} if cached else {"vision_features": features}
        if cached:
            model.cache_media(ids, None, vision_features=features)
        kept = {"past_key_values": DynamicCache(), "use_cache": True, **pictures}
        kept["clear_conditioned_layers"] = False
        model(None, ids, **kept)
        model(None, ids[:, -1:], **kept)
        with pytest.raises(ValueError, match="row 1 has 2 <image>"):
            model(None, more[:, -1:], **kept)
        model.uncache_media()


@torch.no_grad()
def test_one_cached_row_of_pictures_serves_many_of_text(small):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon", "<image>a bear"])
    features = random_features(1, 1)
    wanted = model(None, ids, mask, vision_features=features.expand(2, -1, -1, -1, -1))
    model.cache_media(ids[:1], None, vision_features=features)
    assert_close(model(None, ids, mask).logits, wanted.logits)


def test_a_cache_from_elsewhere_given_to_a_new_model_is_named(make_model):
    model, _, tokenizer = make_model()
    ids, _ = tokenize(tokenizer, ["<image>a lemon"])
    past, features = DynamicCache(), random_features(1, 1)
    model(None, ids, vision_features=features, past_key_values=past)
    new, _, _ = make_model()
    with pytest.raises(ValueError, match="where was <image> in the text before"):
        new(None, ids[:, -1:], vision_features=features, past_key_values=past)


class Readings(TorchFunctionMode):
    """Count what makes a GPU wait: numbers read back from tensors."""

    names = {"tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "cpu"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.names:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [[2, 2], COUNTS])
def test_the_pictures_are_read_back_once(counts):
    where = torch.zeros(2, 5, dtype=torch.bool)
    for row, count in enumerate(counts):
        where[row, :count] = True
    pictures = random_features(counts, 2)
    with Readings() as readings:
        check_pictures(pictures, where)
    assert readings.seen == ["tolist"]


# --------------------------------------------------------------------- half precision

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", MAKE)
@torch.no_grad()
def test_a_model_in_half_precision_takes_pictures_of_any_float(small, kind, dtype):
    """As if they had been cast by hand; near what the whole model says."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    pictures = MAKE[kind](COUNTS, 2)
    whole = model(lang_x=ids, attention_mask=mask, **given(kind, pictures)).logits
    model.to(dtype)
    exact = call(model, "forward", ids, mask, **given(kind, pictures.to(dtype)))
    assert exact.dtype == dtype and exact.isfinite().all()
    assert_close(exact.float(), whole, rtol=0.1, atol=0.1 * whole.abs().max().item())
    for other in (torch.float32, torch.float64):
        for door in ("forward", "cache_media"):
            out = call(model, door, ids, mask, **given(kind, pictures.to(other)))
            assert torch.equal(out, exact)
        call(model, "generate", ids, mask, **given(kind, pictures.to(other)))


@pytest.mark.parametrize("dtype", HALVES)
def test_captions_in_half_precision(small, dtype):
    """With a picture and with its features, the same words."""
    model, image_processor, tokenizer = small
    model.to(dtype)
    picture, settings = make_picture("red"), {"max_new_tokens": 5}
    said = caption(model, image_processor, tokenizer, [picture], **settings)
    pixels = image_processor(picture)[None].to(dtype)  # (1, 3, H, W)
    features = model.vision_encoder(pixels)[1][:, None]  # (1, F, v, d_img)
    for kept in (features, features.float(), features.double()):
        assert caption(model, None, tokenizer, kept, **settings) == said
    scores = score_candidates(
        model, image_processor, tokenizer, picture, "<image>a", ["bear", "tent"]
    )
    assert scores.isfinite().all()


@pytest.mark.parametrize("part", ["vision_encoder", "perceiver", "lang_encoder"])
@pytest.mark.parametrize("kind", MAKE)
@torch.no_grad()
def test_a_part_in_half_precision_takes_what_the_part_before_gives(small, part, kind):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    pictures = given(kind, MAKE[kind](COUNTS, 2))
    whole = model(lang_x=ids, attention_mask=mask, **pictures).logits
    getattr(model, part).bfloat16()
    out = model(lang_x=ids, attention_mask=mask, **pictures).logits
    assert_close(out.float(), whole, rtol=0.1, atol=0.1 * whole.abs().max().item())


@torch.no_grad()
def test_features_of_any_float_into_a_whole_model(small):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    features = random_features(COUNTS, 2).half()
    wanted = model(None, ids, mask, vision_features=features.float()).logits
    for other in (features, features.double()):
        assert torch.equal(model(None, ids, mask, vision_features=other).logits, wanted)


def test_token_ids_are_never_cast(small):
    """bfloat16 has no 1,199 and no 1,201: the embedding must see the ids themselves."""
    model, _, tokenizer = small
    model.bfloat16()
    ids = torch.tensor([[2, model.media_token_id, 1199, model.eoc_token_id, 257]])
    seen = []
    table = model.lang_encoder.get_input_embeddings()
    hook = table.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(None, ids, torch.ones_like(ids), vision_features=random_features(1, 1))
    hook.remove()
    assert seen[0].dtype == torch.int64 and torch.equal(seen[0], ids)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integers_are_no_pictures(small, door, kind, dtype):
    """Raw pixels from 0 to 255 would give an answer, and it would be wrong."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    pictures = (MAKE[kind](COUNTS, 2).abs() * 9).to(dtype)
    with pytest.raises(ValueError, match=f"{dtype}.*give floats"):
        call(model, door, ids, mask, **given(kind, pictures))
    assert_clean(model)


# -------------------------------------------------- keys and values, and copies of rows


def note_keys_values(model):
    """How many rows each call of a `to_kv` of the gated blocks gets, from now on."""
    rows, blocks = [], model.lang_encoder.gated_cross_attn_layers
    for block in blocks:
        block.attn.to_kv.register_forward_hook(
            lambda module, args, out: rows.append(len(args[0]))
        )
    return rows, len(blocks)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_keys_and_values_are_made_before_rows_are_copied(small, asked):
    """Once for a layer, from the rows there are, and the same text as made anew."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, **asked}
    settings["vision_features"] = random_features(COUNTS, 2)
    rows, n_blocks = note_keys_values(model)
    torch.manual_seed(0)
    kept = model.generate(None, ids, mask, **settings)
    assert rows == [2] * n_blocks
    torch.manual_seed(0)
    anew = model.generate(None, ids, mask, keep_keys_values=False, **settings)
    assert torch.equal(kept, anew)
    copies = max(asked.get(k, 1) for k in ("num_beams", "num_return_sequences"))
    assert rows[n_blocks:] == [2 * copies] * 6 * n_blocks


@torch.no_grad()
def test_keys_and_values_of_cached_pictures_are_made_once(small):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    features = random_features(COUNTS, 2)
    wanted = model(None, ids, mask, vision_features=features).logits
    rows, n_blocks = note_keys_values(model)
    model.cache_media(ids, None, vision_features=features)
    for _ in range(3):
        out = model(None, ids, mask, clear_conditioned_layers=False).logits
        assert torch.equal(out, wanted)
    assert rows == [2] * n_blocks
    model.uncache_media()
    assert_clean(model)


def test_scores_make_keys_and_values_once_for_all_candidates(small):
    model, _, tokenizer = small
    answers, features = ["a lemon", "a bear", "two owls"], random_features(1, 1)[0]
    rows, n_blocks = note_keys_values(model)
    scores = score_candidates(model, None, tokenizer, features, "<image>", answers)
    assert rows == [1] * n_blocks
    for score, answer in zip(scores, answers, strict=True):
        text = f"<image>{answer}<|endofchunk|>"
        ids = tokenizer(text, return_tensors="pt").input_ids  # (1, T_txt)
        with torch.no_grad():
            log_p = model(None, ids, vision_features=features[None]).logits.log_softmax(
                -1
            )
        picked = log_p[0, :-1].gather(1, ids[0, 1:, None])[:, 0]  # (T_txt - 1,)
        n_prompt = len(tokenizer("<image>").input_ids)
        assert_close(score, picked[n_prompt - 1 :].sum(), rtol=1e-4, atol=1e-4)


# ------------------------------------------------- the config, and a model made by hand


def test_the_config_takes_what_trainers_write_and_none_of_it_is_saved(
    make_model, tmp_path
):
    """Hugging Face's Trainer sets `use_cache`; its loggers ask for the rest."""
    model, _, tokenizer = make_model(gates=1.0)
    model.config.use_cache = False
    model.config.pad_token_id = 1
    assert model.config.hidden_size == D_TXT
    assert model.config.is_encoder_decoder is False
    assert getattr(model.config, "problem_type", None) is None
    assert json.loads(model.config.to_json_string())["hidden_size"] == D_TXT
    assert model.config.to_dict()["built_with"] == model.config.built_with
    save_flamingo(model, tmp_path)
    listing = json.loads((tmp_path / "config.json").read_text())
    assert listing == model.config.built_with and "use_cache" not in listing
    loaded, _, _ = load_flamingo(tmp_path)
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels(COUNTS, 2)
    with torch.no_grad():
        wanted = model(pixels, ids, mask).logits
        assert torch.equal(loaded(pixels, ids, mask).logits, wanted)


@pytest.fixture
def by_hand():
    """A Flamingo of the tiny backbones, put together as chapter 5 does."""
    path = ROOT / "data" / "tiny_opt"
    tokenizer = AutoTokenizer.from_pretrained(path)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    new = ["<|endofchunk|>", "<image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    clip, _ = load_vision_encoder(f"local-dir:{ROOT / 'data' / 'tiny_clip'}")
    sizes = {"heads": 4, "dim_head": 48}
    model = Flamingo(
        clip,
        lm,
        *tokenizer.convert_tokens_to_ids(new),
        vis_dim=192,
        perceiver_kwargs={"depth": 2, "num_latents": 16, **sizes},
        cross_attn_kwargs=sizes,
    )
    open_gates(model)
    return model.eval(), tokenizer


def test_a_model_made_by_hand_says_what_is_missing_or_is_saved(by_hand, tmp_path):
    model, tokenizer = by_hand
    with pytest.raises(ValueError, match="by hand.*config.built_with.*trained_tensors"):
        save_flamingo(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.config.built_with = {"size": "tiny"}
    save_flamingo(model, tmp_path / "saved")
    loaded, _, _ = load_flamingo(tmp_path / "saved")
    ids, mask = tokenize(tokenizer, ["<image>a lemon"])
    pixels = torch.randn(1, 1, 1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(pixels, ids, mask).logits
        assert torch.equal(loaded(pixels, ids, mask).logits, wanted)
