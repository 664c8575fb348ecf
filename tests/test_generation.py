"""Captions, words as they come, scores: equal to slow loops, clean after any exit."""

import time

import pytest
import torch
from conftest import make_picture, random_features, random_pixels, tokenize
from torch.testing import assert_close

from flamingo_lite import (
    caption,
    make_prompt,
    score_candidates,
    stream_caption,
)

ANSWERS = ["a lemon", "a tent above a bear", "a", "yes", "a lemon above a tent"]


def assert_clean(model):
    """Nothing of an earlier call is left in the layers."""
    assert not model.lang_encoder._use_cached_vision_x
    for layer in model.lang_encoder._get_decoder_layers():
        assert layer.vis_x is layer.media_locations is layer.keys_values is None


@pytest.fixture
def pictures():
    """Three small pictures of different colours."""
    return [make_picture(colour) for colour in ("red", "green", "blue")]


# ------------------------------------------------------------------------- prompts


def test_make_prompt():
    assert make_prompt() == "<image>"
    assert make_prompt(["a lemon"], "this is") == (
        "<image>a lemon<|endofchunk|><image>this is"
    )


@pytest.mark.parametrize("texts, ask", [(["an <image>"], ""), ([], "a<|endofchunk|>")])
def test_make_prompt_refuses_special_tokens(texts, ask):
    with pytest.raises(ValueError, match="take .* out"):
        make_prompt(texts, ask)


# ------------------------------------------------------------------------ captions


def test_captions_together_are_captions_alone(small, pictures):
    """Rows with different numbers of images and of tokens; whatever the batch size."""
    model, image_processor, tokenizer = small
    rows = [pictures[:2], [pictures[2]], [pictures[1]]]
    prompts = ["<image>a lemon<|endofchunk|><image>", "look at<image>", "<image>a"]
    ask = (model, image_processor, tokenizer)
    alone = [
        caption(*ask, [row], [prompt], max_new_tokens=6)[0]
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    for batch_size in (2, 100):
        together = caption(*ask, rows, prompts, batch_size, max_new_tokens=6)
        assert together == alone
    assert len(set(alone)) > 1
    assert_clean(model)


def test_a_caption_is_what_generate_writes(small, pictures):
    model, image_processor, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a"])
    for picture in pictures:
        pixels = image_processor(picture)[None, None, None]
        out = model.generate(pixels, ids, mask, max_new_tokens=5, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        ask = (model, image_processor, tokenizer, [picture], "<image>a")
        assert caption(*ask, max_new_tokens=5) == [text.strip()]


def test_features_do_as_well_as_pictures(small, pictures):
    model, image_processor, tokenizer = small
    pixels = torch.stack([image_processor(p) for p in pictures])
    with torch.no_grad():
        features = model.vision_encoder(pixels)[1][:, None]  # (pictures, F, v, d_img)
    wanted = caption(model, image_processor, tokenizer, pictures)
    assert caption(model, None, tokenizer, features) == wanted
    assert caption(model, None, tokenizer, features[:, None]) == wanted


def test_the_tokenizer_is_left_as_it_was(small, pictures):
    model, image_processor, tokenizer = small
    tokenizer.padding_side = "right"
    caption(model, image_processor, tokenizer, pictures[:2], ["<image>", "<image>a b"])
    assert tokenizer.padding_side == "right"


def test_no_pictures_no_captions(small):
    assert caption(*small, []) == []


@pytest.mark.parametrize(
    "n_pictures, prompt, message",
    [
        ([1, 2], "<image>a", "row 1: 2 pictures, but 1 <image>"),
        ([1], "<image>a<image>", "row 0: 1 pictures, but 2 <image>"),
        ([1], "no picture here", "row 0: 1 pictures, but 0 <image>"),
        ([1, 1], ["<image>"], "1 prompts for 2 rows"),
        ([1], "<image>" + " a" * 90, "the model reads 96"),
    ],
)
def test_what_does_not_fit_is_named(small, pictures, n_pictures, prompt, message):
    rows = [pictures[:n] for n in n_pictures]
    with pytest.raises(ValueError, match=message):
        caption(*small, rows, prompt)
    assert_clean(small[0])


def test_sampling_and_beams_are_passed_on(small, pictures):
    settings = {"num_return_sequences": 2, "max_new_tokens": 4}
    torch.manual_seed(0)
    sampled = caption(*small, pictures, do_sample=True, **settings)
    beams = caption(*small, pictures, num_beams=2, **settings)
    assert len(sampled) == len(beams) == 6


# --------------------------------------------------------------- words as they come


def test_pieces_join_to_the_caption(small, pictures):
    settings = {"prompt": "<image>a", "max_new_tokens": 8}
    for picture in pictures:
        pieces = list(stream_caption(*small, picture, **settings))
        assert "".join(pieces).strip() == caption(*small, [picture], **settings)[0]
    assert_clean(small[0])


def test_leaving_the_loop_stops_the_writing(small, pictures):
    model, _, _ = small
    wanted, calls = caption(*small, pictures[:1]), []

    def note(*_):
        calls.append(1)
        time.sleep(0.02)  # or it might be through before we have left

    hook = model.lang_encoder.register_forward_hook(note)
    asked = {"max_new_tokens": 80, "min_new_tokens": 80}
    for _ in stream_caption(*small, pictures[0], **asked):
        break
    hook.remove()
    assert len(calls) < 80
    assert_clean(model)
    assert caption(*small, pictures[:1]) == wanted


def test_an_error_while_writing_arrives(small, pictures):
    model, _, _ = small
    broken = model.lang_encoder.old_decoder_blocks[1].register_forward_hook(
        lambda *_: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        list(stream_caption(*small, pictures[0]))
    broken.remove()
    assert_clean(model)


# --------------------------------------------------------------------------- scores


@torch.no_grad()
def score_slowly(model, tokenizer, features, prompt, answers, end="<|endofchunk|>"):
    """Sum of log-probabilities of each answer, from one `forward` of the whole text."""
    scores = []
    n_prompt = len(tokenizer(prompt).input_ids)
    for answer in answers:
        ids, _ = tokenize(tokenizer, [f"{prompt}{answer}{end}"])
        logits = model(None, ids, vision_features=features[None]).logits[0]
        log_p = logits.log_softmax(dim=-1)
        told = [log_p[t - 1, ids[0, t]] for t in range(n_prompt, ids.shape[1])]
        scores.append(torch.stack(told).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("end", ["<|endofchunk|>", ""])
@pytest.mark.parametrize("prompt", ["<image>", "<image>a lemon<|endofchunk|><image>"])
def test_scores_equal_a_full_recompute(small, prompt, end):
    model, _, tokenizer = small
    features = random_features(1, prompt.count("<image>"))[0]
    ask = (model, None, tokenizer, features, prompt)
    result = score_candidates(*ask, ANSWERS, end=end)
    wanted = score_slowly(model, tokenizer, features, prompt, ANSWERS, end)
    assert_close(result, wanted, rtol=1e-4, atol=1e-4)
    others = random_features(1, len(features), seed=1)[0]
    other = score_candidates(model, None, tokenizer, others, prompt, ANSWERS, end=end)
    assert not torch.allclose(result, other, atol=1e-3), "the pictures do nothing"
    assert_clean(model)


def test_scores_do_not_depend_on_the_others(small):
    """Not on the order of the candidates, nor on which others there are."""
    model, _, tokenizer = small
    ask = (model, None, tokenizer, random_features(1, 1)[0], "<image>")
    scores = score_candidates(*ask, ANSWERS)
    order = [3, 0, 4, 1, 2]
    mixed = score_candidates(*ask, [ANSWERS[i] for i in order])
    assert_close(mixed, scores[order], rtol=1e-4, atol=1e-4)
    for i, answer in enumerate(ANSWERS):
        alone = score_candidates(*ask, [answer])
        assert_close(alone, scores[i : i + 1], rtol=1e-4, atol=1e-4)


def test_the_prompt_is_read_once(small):
    """Two calls of the language model, and the second has only the answers."""
    model, _, tokenizer = small
    prompt, lengths = "<image>" + " a lemon above a tent" * 4, []
    hook = model.lang_encoder._get_decoder_layers()[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(tuple(inputs[0].shape[:2]))
    )
    ask = (model, None, tokenizer, random_features(1, 1)[0], prompt)
    score_candidates(*ask, [f" {answer}" for answer in ANSWERS])
    hook.remove()
    n_prompt = len(tokenizer(prompt).input_ids)
    assert len(lengths) == 2 and lengths[0] == (1, n_prompt)
    assert lengths[1][0] == len(ANSWERS) and lengths[1][1] < n_prompt


def test_tokens_that_melt_into_the_prompt(small):
    """ "…a" + "n owl": the prompt alone is cut otherwise than with its answer."""
    model, _, tokenizer = small
    features, prompt, answers = random_features(1, 1)[0], "<image>a", ["n owl", "nts"]
    scores = score_candidates(model, None, tokenizer, features, prompt, answers)
    whole = [f"<image>a{answer}" for answer in answers]
    wanted = score_slowly(model, tokenizer, features, "<image>", [w[7:] for w in whole])
    difference = (scores - wanted)[0] - (scores - wanted)[1]
    assert abs(difference.item()) < 1e-3


@pytest.mark.parametrize(
    "answers, message",
    [
        ([], "no candidates"),
        (["a", ""], "candidate 2"),
        (["a <image>"], "candidate 1"),
        (["a<|endofchunk|>"], "candidate 1"),
        (["a" + " b" * 99], "the model reads 96"),
    ],
)
def test_bad_candidates_are_named(small, answers, message):
    model, _, tokenizer = small
    ask = (model, None, tokenizer, random_features(1, 1)[0], "<image>")
    with pytest.raises(ValueError, match=message):
        score_candidates(*ask, answers)
    assert_clean(model)


def test_scoring_is_clean_after_an_error(small):
    model, _, tokenizer = small
    ask = (model, None, tokenizer, random_features(1, 1)[0], "<image>", ANSWERS)
    wanted = score_candidates(*ask)
    broken = model.lang_encoder.old_decoder_blocks[1].register_forward_hook(
        lambda *_: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        score_candidates(*ask)
    broken.remove()
    assert_clean(model)
    assert torch.equal(score_candidates(*ask), wanted)


# ------------------------------------------------------------------------------ video


@pytest.mark.parametrize("max_num_frames", [None, 4])
def test_frame_order_matters_only_with_frame_embeddings(make_model, max_num_frames):
    """Through pixels, features, logits, scores and generation."""
    sizes = {"depth": 2, "num_latents": 4, "heads": 2, "dim_head": 16}
    sizes["max_num_frames"] = max_num_frames
    model, _, tokenizer = make_model(gates=1.0, perceiver_kwargs=sizes)
    film = random_pixels(1, 1, F=4)  # (B, T_img, F, 3, H, W)
    ids, mask = tokenize(tokenizer, ["<image>a lemon"])
    with torch.no_grad():
        forwards = model(film, ids, mask).logits
        backwards = model(film.flip(2), ids, mask).logits
        features = model.vision_encoder(film[0, 0])[1][None]  # (T_img, F, v, d_img)
        again = model(None, ids, mask, vision_features=features[None]).logits
    assert_close(again, forwards, rtol=1e-5, atol=1e-5)
    ask = (model, None, tokenizer)
    scores = score_candidates(*ask, features, "<image>", ANSWERS)
    reversed_scores = score_candidates(*ask, features.flip(1), "<image>", ANSWERS)
    if max_num_frames is None:
        assert_close(backwards, forwards, rtol=1e-4, atol=1e-4)
        assert_close(reversed_scores, scores, rtol=1e-4, atol=1e-4)
    else:
        assert (backwards - forwards).abs().max() > 0.01
        assert (reversed_scores - scores).abs().max() > 0.01
    written = model.generate(film, ids, mask, max_new_tokens=4, do_sample=False)
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    captions = caption(*ask, features[None], "<image>a lemon", max_new_tokens=4)
    assert captions == [text.strip()]


def test_a_stream_inside_alone_is_an_error_and_does_not_hang(small):
    """Its writer is another thread, and would wait for this one."""
    model, _, tokenizer = small
    features = random_features(1, 1)[0]
    with model.alone():
        with pytest.raises(RuntimeError, match="would wait for itself"):
            next(stream_caption(model, None, tokenizer, features))
    assert isinstance("".join(stream_caption(model, None, tokenizer, features)), str)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_a_batch_of_no_prompts_is_an_error(small, batch_size):
    model, _, tokenizer = small
    with pytest.raises(ValueError, match="batch_size: want a whole number from 1"):
        caption(model, None, tokenizer, random_features(1, 1), batch_size=batch_size)
