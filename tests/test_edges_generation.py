"""Captions and scores at the edges: pictures, blanks, options, two threads."""

import copy
import pickle
import threading
import time
from inspect import signature

import numpy as np
import open_clip
import pytest
import torch
import transformers
from conftest import (
    D_TXT,
    ROOT,
    make_picture,
    opt_config,
    random_features,
    random_pixels,
    save_language_model,
    tokenize,
)
from PIL import Image
from test_generation import ANSWERS, assert_clean, score_slowly
from torch.testing import assert_close
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig
from transformers.generation.streamers import BaseStreamer

from flamingo_lite import (
    OPTIONS,
    caption,
    encode_pictures,
    load_captions,
    load_flamingo,
    make_prompt,
    make_tasks,
    pixels_to_patches,
    read_picture,
    score_candidates,
    stream_caption,
)

COLOURS = ("red", "green", "blue")
FLAMINGO = ROOT / "data" / "emoji" / "openmoji" / "flamingo.webp"


@pytest.fixture(scope="module")
def tiny():
    return load_flamingo("tiny")


@pytest.fixture
def pictures():
    return [make_picture(colour) for colour in COLOURS]


def two_features(seed=0):
    """Features of two pictures, (T_img, F, v, d_img)."""
    return random_features(1, 2, seed=seed)[0]


# ------------------------------------------------------------------------- pictures


def clear(mode):
    """A wholly transparent picture of a mode."""
    picture = Image.new("RGBA", (40, 30), (200, 0, 0, 0))
    if mode == "RGBA":
        return picture
    if mode == "LA":
        return picture.convert("LA")
    palette = Image.new("P", (40, 30), 0)
    palette.putpalette([200, 0, 0] * 256)
    palette.info["transparency"] = 0
    return palette


def turned():
    """An upright picture, and one that EXIF says to turn to get it."""
    upright = Image.new("RGB", (40, 30), "white")
    upright.paste("blue", (0, 0, 40, 10))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6
    return upright, stored


def pairs_of_pictures():
    """{name: (picture, what it shows as RGB)}."""
    white, rgb = Image.new("RGB", (40, 30), "white"), make_picture("red")
    found = {mode: (clear(mode), white) for mode in ("RGBA", "LA", "P")}
    upright, stored = turned()
    found["EXIF"] = stored, upright
    grey = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (30, 1))
    found["16 bit"] = (
        Image.fromarray(grey),
        Image.fromarray((grey / 257).astype(np.uint8)).convert("RGB"),
    )
    found["CMYK"] = rgb.convert("CMYK"), rgb
    return found


PAIRS = pairs_of_pictures()


@pytest.mark.parametrize("bare", [False, True], ids=["ours", "open_clip's"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_door_sees_rgb_on_white(small, name, bare):
    """Also with a processor of open_clip that knows nothing of transparency."""
    model, image_processor, tokenizer = small
    if bare:
        image_processor = open_clip.image_transform(
            32, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3
        )
    given, shown = PAIRS[name]
    ask = (model, image_processor, tokenizer)
    one = score_candidates(*ask, given, "<image>", ANSWERS)
    other = score_candidates(*ask, shown, "<image>", ANSWERS)
    assert_close(one, other)
    assert caption(*ask, [given]) == caption(*ask, [shown])
    streamed = "".join(stream_caption(*ask, given)).strip()
    assert [streamed] == caption(*ask, [shown])


def test_a_flamingo_on_nothing_is_a_flamingo(tiny):
    """Opened by PIL, with its transparency, as through `read_picture`."""
    with Image.open(FLAMINGO) as picture:
        assert picture.mode == "RGBA"
        assert caption(*tiny, [picture]) == ["a flamingo"]
        assert caption(*tiny, [[picture]]) == ["a flamingo"]
        assert "".join(stream_caption(*tiny, picture)).strip() == "a flamingo"
        answers = ["a television", "a flamingo"]
        assert score_candidates(*tiny, picture, "<image>", answers).argmax() == 1


def test_line_drawings_on_nothing_are_named(tiny):
    """OpenMoji's, however they are opened: 96 of 113 when measured; on black 74."""
    rows = [r for r in load_captions(ROOT / "data" / "emoji") if r["named"]]
    rows = [row for row in rows if row["studio"] == "openmoji"]
    said = caption(*tiny, [Image.open(row["path"]) for row in rows])
    right = sum(s == row["text"] for s, row in zip(said, rows, strict=True))
    assert len(rows) == 113 and right >= 90


# ---------------------------------------------------------------- what can be given


def test_one_picture_a_file_an_iterator(small, pictures, tmp_path):
    paths = [tmp_path / f"{colour}.png" for colour in COLOURS]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    wanted = caption(*small, pictures)
    assert len(set(wanted)) > 1
    assert caption(*small, pictures[0]) == wanted[:1]
    assert caption(*small, paths[0]) == caption(*small, str(paths[0])) == wanted[:1]
    assert caption(*small, paths) == wanted
    assert caption(*small, [[path] for path in paths]) == wanted
    assert caption(*small, (p for p in pictures)) == wanted
    assert caption(*small, ((p for p in [one]) for one in pictures)) == wanted
    assert caption(*small, pictures, (p for p in ["<image>"] * 3)) == wanted
    assert "".join(stream_caption(*small, paths[0])).strip() == wanted[0]
    scores = score_candidates(*small, paths[0], "<image>", iter(ANSWERS))
    assert_close(scores, score_candidates(*small, pictures[0], "<image>", ANSWERS))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64, "numpy"])
def test_features_of_other_kinds(small, kind):
    model, _, tokenizer = small
    features = random_features(3, 1).half().float()  # (B, T_img, F, v, d_img)
    given = features.numpy() if kind == "numpy" else features.to(kind)
    wanted = caption(model, None, tokenizer, features)
    assert len(set(wanted)) > 1
    assert caption(model, None, tokenizer, given) == wanted
    assert caption(model, None, tokenizer, given[:, 0]) == wanted
    assert caption(model, None, tokenizer, list(given)) == wanted
    assert caption(model, None, tokenizer, [list(row) for row in given]) == wanted
    assert caption(model, None, tokenizer, given[0, 0]) == wanted[:1]
    assert (
        "".join(stream_caption(model, None, tokenizer, given[0])).strip() == wanted[0]
    )
    ask = ("<image>", ANSWERS)
    scores = score_candidates(model, None, tokenizer, given[1], *ask)
    assert_close(scores, score_candidates(model, None, tokenizer, features[1], *ask))


def no_pictures(tmp_path):
    """{what: (images, the error, what it says)}."""
    (tmp_path / "text.png").write_text("no picture")
    picture = make_picture("red")
    return {
        "pixels": (torch.zeros(2, 3, 32, 32).long(), ValueError, "row 0: a tensor is"),
        "pixels of another size": (torch.zeros(1, 3, 64, 64), ValueError, "features"),
        "an array": (np.zeros((30, 40, 3), np.uint8), ValueError, "Image.fromarray"),
        "too many axes": (torch.zeros(1, 1, 1, 1, 16, 32), ValueError, "features"),
        "a number": ([picture, 3], TypeError, "row 1: want a PIL picture, got int"),
        "nothing": ([picture, None], TypeError, "row 1: want a PIL picture, got None"),
        "bytes": (b"GIF89a", TypeError, "row 0: want a PIL picture, got bytes"),
        "a dict": (
            {"image": picture},
            TypeError,
            "row 0: want a PIL picture, got dict",
        ),
        "no file": ([picture, "nowhere.png"], ValueError, "row 1: .*nowhere.png"),
        "no picture": (tmp_path / "text.png", ValueError, "row 0: .*text.png"),
        "both": ([picture, random_features(1, 1)[0]], ValueError, "one or the other"),
        "two shapes": (
            [random_features(1, 1)[0], random_features(1, 1, F=2)[0]],
            ValueError,
            "several shapes",
        ),
    }


NO_PICTURES = [
    "a dict",
    "a number",
    "an array",
    "both",
    "bytes",
    "no file",
    "no picture",
    "nothing",
    "pixels",
    "pixels of another size",
    "too many axes",
    "two shapes",
]


@pytest.mark.parametrize("what", NO_PICTURES)
def test_what_is_no_picture_is_named(small, tmp_path, what):
    images, error, message = no_pictures(tmp_path)[what]
    with pytest.raises(error, match=message):
        caption(*small, images)
    if what in ("an array", "bytes", "a dict", "no picture", "too many axes"):
        message = message.replace("row 0", "the prompt")
        with pytest.raises(error, match=message):
            score_candidates(*small, images, "<image>", ANSWERS)
        with pytest.raises(error, match=message):
            list(stream_caption(*small, images))
    assert_clean(small[0])


def test_pictures_without_a_processor(small, pictures):
    model, _, tokenizer = small
    with pytest.raises(ValueError, match="image_processor"):
        caption(model, None, tokenizer, pictures)


def test_a_row_is_counted_through_all_batches(small, pictures):
    with pytest.raises(ValueError, match="row 2: 1 pictures, but 2"):
        caption(*small, pictures, ["<image>"] * 2 + ["<image><image>"], batch_size=1)
    with pytest.raises(TypeError, match="row 2: want a PIL picture"):
        caption(*small, [*pictures[:2], 3], batch_size=2)
    with pytest.raises(TypeError, match="row 2: a prompt is a string, got None"):
        caption(*small, pictures, ["<image>", "<image>", None], batch_size=2)


# ------------------------------------------------- more pictures than there are places


def test_surplus_features_are_an_error(small):
    """In every door; zeros, which fill up a batch, are no pictures."""
    model, _, tokenizer = small
    ask, two = (model, None, tokenizer), two_features()
    message = ": 2 pictures, but 1 <image>"
    with pytest.raises(ValueError, match=f"row 0{message}"):
        caption(*ask, two[None])
    with pytest.raises(ValueError, match=f"row 1{message}"):
        prompts = ["<image>a<image>", "<image>"]
        caption(*ask, torch.stack((two, two)), prompts)
    with pytest.raises(ValueError, match=message):
        list(stream_caption(*ask, two))
    with pytest.raises(ValueError, match=message):
        score_candidates(*ask, two, "<image>", ANSWERS)
    with pytest.raises(ValueError, match="1 pictures, but 0 <image>"):
        caption(*ask, two[:1, None].transpose(0, 1), "no place")
    padded = torch.stack((two[0], torch.zeros_like(two[1])))
    assert caption(*ask, padded[None]) == caption(*ask, two[None, :1])
    scores = score_candidates(*ask, padded, "<image>", ANSWERS)
    assert_close(scores, score_candidates(*ask, two[:1], "<image>", ANSWERS))
    assert_clean(model)


# --------------------------------------------------------------- rows without pictures


@torch.no_grad()
def text_alone(model, tokenizer, prompt, n=5):
    """Greedy words, the whole text anew for each, with a picture nobody may look at."""
    ids, _ = tokenize(tokenizer, [prompt])
    start = ids.shape[1]
    for _ in range(n):
        seen = {"vision_features": random_features(1, 1), "spare_pictures": True}
        logits = model(None, ids, **seen).logits[:, -1]
        logits[:, model.media_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
        if ids[0, -1] == model.eoc_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_a_row_without_a_picture_is_text_alone(small, pictures):
    model, _, tokenizer = small
    prompt, settings = "one plus one is", {"max_new_tokens": 5}
    alone = text_alone(model, tokenizer, prompt)
    assert alone
    pictured = caption(*small, pictures[:1], **settings)
    mixed = caption(*small, [[], pictures[:1]], [prompt, "<image>"], **settings)
    assert mixed == [alone, *pictured]
    mixed = caption(*small, [pictures[:1], []], ["<image>", prompt], **settings)
    assert mixed == [*pictured, alone]
    assert caption(*small, [[]], prompt, **settings) == [alone]
    assert caption(*small, [[], []], prompt, **settings) == [alone] * 2
    assert "".join(stream_caption(*small, [], prompt, **settings)).strip() == alone
    features = random_features(1, 1)[0]
    mixed = caption(small[0], None, tokenizer, [features, []], ["<image>", prompt])
    assert mixed[1].startswith(alone)
    assert_clean(small[0])


def test_answers_without_a_picture(small):
    model, _, tokenizer = small
    answers = [f" {answer}" for answer in ANSWERS]
    features = torch.zeros_like(random_features(1, 1)[0])
    scores = score_candidates(*small, [], "this is", answers)
    wanted = score_slowly(model, tokenizer, features, "this is", answers)
    assert_close(scores, wanted, rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_is_named(small, pictures):
    model, image_processor, tokenizer = small
    no_start = copy.deepcopy(tokenizer)
    no_start.backend_tokenizer.post_processor = None
    assert no_start("").input_ids == []
    ask = (model, image_processor, no_start)
    with pytest.raises(ValueError, match="row 1: the prompt is empty"):
        caption(*ask, [pictures[:1], []], ["<image>", " "])
    with pytest.raises(ValueError, match="prompt"):
        score_candidates(*ask, [], "", ANSWERS)


# ------------------------------------------------------------------------------ blanks

BLANKS = (" ", "  ", "\n", "\t", " \n", "\u00a0")


@pytest.mark.parametrize("blank", BLANKS)
def test_blanks_at_the_end_of_a_prompt(small, pictures, blank):
    for prompt in ("<image>", "<image>a lemon<|endofchunk|><image>this is"):
        images = [pictures[: prompt.count("<image>")]]
        settings = {"max_new_tokens": 5}
        wanted = caption(*small, images, prompt, **settings)
        assert caption(*small, images, prompt + blank, **settings) == wanted
        pieces = stream_caption(*small, images[0], prompt + blank, **settings)
        assert "".join(pieces).strip() == wanted[0]


def test_a_blank_costs_nothing(tiny):
    """OpenMoji's names: as many with a blank after `<image>` as without; once 0."""
    model, image_processor, tokenizer = tiny
    rows = [r for r in load_captions(ROOT / "data" / "emoji") if r["named"]]
    rows = [row for row in rows if row["studio"] == "openmoji"]
    drawings = [read_picture(row["path"]) for row in rows]
    features = encode_pictures(model.vision_encoder, image_processor, drawings)
    right = []
    for prompt in ("<image>", "<image> ", "<image>\n"):
        said = caption(model, None, tokenizer, features, prompt)
        right.append(sum(s == r["text"] for s, r in zip(said, rows, strict=True)))
    assert right[0] >= 90 and right == 3 * right[:1]


@pytest.mark.parametrize("blank", BLANKS)
def test_blanks_beside_answers(small, blank):
    model, _, tokenizer = small
    ask = (model, None, tokenizer, random_features(1, 1)[0])
    wanted = score_candidates(*ask, "<image>", ANSWERS)
    assert_close(score_candidates(*ask, f"<image>{blank}", ANSWERS), wanted)
    late = [f"{answer}{blank}" for answer in ANSWERS]
    assert_close(score_candidates(*ask, "<image>", late), wanted)
    wanted = score_candidates(*ask, "<image>this is", [f" {a}" for a in ANSWERS])
    assert_close(score_candidates(*ask, f"<image>this is{blank}", ANSWERS), wanted)


def test_blanks_in_a_made_prompt():
    wanted = make_prompt(["a lemon", "a tent"], "this is")
    assert make_prompt([" a lemon\n", "a tent "], " this is ") == wanted
    assert (
        make_prompt([("how many?", "two ")])
        == "<image>how many? two<|endofchunk|><image>"
    )


MARKS = ("\ufeff", "\u200b", " \u2060", "\u200d\n", " ")


@pytest.mark.parametrize("mark", MARKS)
def test_what_cannot_be_seen_is_no_token(small, pictures, mark):
    """A blank or a byte order mark before a text, or a mark of no width at its ends."""
    prompt, settings = "<image>this is", {"max_new_tokens": 5}
    wanted = caption(*small, pictures, prompt, **settings)
    assert caption(*small, pictures, f"{mark}{prompt}{mark}", **settings) == wanted
    pieces = stream_caption(*small, pictures[0], f"{mark}{prompt}", **settings)
    assert "".join(pieces).strip() == wanted[0]
    assert make_prompt([f"{mark}a fox{mark}"], f"{mark}is") == make_prompt(
        ["a fox"], "is"
    )
    ask = (*small, pictures[0])
    wanted = score_candidates(*ask, "<image>", ANSWERS)
    around = [f"{mark}{answer}{mark}" for answer in ANSWERS]
    assert_close(score_candidates(*ask, f"{mark}<image>{mark}", around), wanted)
    with pytest.raises(ValueError, match="candidate 1"):
        score_candidates(*ask, "<image>", [mark])


@pytest.mark.parametrize("mark", ":?.!,;")
def test_an_answer_after_a_mark_begins_with_a_blank(small, mark):
    """Glued to the colon, "yes" is a token that the model never saw there."""
    model, _, tokenizer = small
    features, prompt = random_features(1, 1)[0], f"<image>is it a dog{mark}"
    ask, apart = (model, None, tokenizer, features), [f" {a}" for a in ANSWERS]
    wanted = score_slowly(model, tokenizer, features, prompt, apart)
    for before, answers in (
        (prompt, ANSWERS),
        (prompt, apart),
        (f"{prompt} ", ANSWERS),
        (f"{prompt} ", apart),
    ):
        scores = score_candidates(*ask, before, answers)
        assert_close(scores, wanted, rtol=1e-4, atol=1e-4)


def test_a_question_is_judged_as_it_is_answered(tiny):
    """Yes or no, glued to the colon: 7 of 14 right, as if by lot."""
    rows = [r for r in load_captions(ROOT / "data" / "emoji") if r["named"]]
    tasks = make_tasks(rows, 14, 6, "is there")
    pictures = [task["picture"] for task in tasks]
    prompts = [f"<image>{task['given']}" for task in tasks]
    written, words, chosen = caption(*tiny, pictures, prompts), ["yes", "no"], []
    for picture, prompt in zip(pictures, prompts, strict=True):
        scores = score_candidates(*tiny, picture, prompt, words)
        chosen.append(words[scores.argmax()])
    assert chosen == written


# -------------------------------------------------------------------- scores


def test_scores_in_half_precision_are_summed_in_float32(small):
    """The logits are rounded by the model; their log-softmax must not be."""
    model, _, tokenizer = small
    model.bfloat16()
    ask = (model, None, tokenizer, random_features(1, 1)[0].bfloat16(), "<image>")
    kept = []
    hook = model.lang_encoder.register_forward_hook(
        lambda *a: kept.append(a[-1].logits)
    )
    scores = score_candidates(*ask, ANSWERS)
    hook.remove()
    assert kept[0].dtype == torch.bfloat16 and scores.dtype == torch.float32
    rows = [tokenizer(f"<image>{a}<|endofchunk|>").input_ids for a in ANSWERS]
    for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
        told = kept[0][0, -1:].float().log_softmax(dim=-1)[0, row[2]]
        for t in range(3, len(row)):
            told += kept[1][i, t - 3].float().log_softmax(dim=-1)[row[t]]
        assert_close(score, told, rtol=1e-5, atol=1e-5)


def test_every_door_in_half_precision(small, pictures):
    """Pictures and features are cast by the model, and nowhere else."""
    model, image_processor, tokenizer = small
    model.bfloat16()
    pixels = torch.stack([image_processor(p) for p in pictures])[:, None, None]
    features = pixels_to_patches(model.vision_encoder, pixels)
    assert features.dtype == torch.bfloat16
    texts = caption(*small, pictures, max_new_tokens=4)
    assert caption(model, None, tokenizer, features.float(), max_new_tokens=4) == texts
    mixed = caption(*small, [[], pictures[:1]], ["a", "<image>"], max_new_tokens=4)
    assert len(mixed) == 2 and mixed[1] == texts[0]
    one = "".join(stream_caption(*small, pictures[0], max_new_tokens=4)).strip()
    assert one == texts[0]
    scores = score_candidates(*small, pictures[0], "<image>", ANSWERS)
    again = score_candidates(model, None, tokenizer, features[0], "<image>", ANSWERS)
    assert_close(scores, again)


def test_near_certainty_is_not_rounded_to_certainty(small):
    """A log-probability of -0.0018 must not become 0.0."""
    model, _, tokenizer = small
    features = random_features(1, 1)[0]

    def certain(module, args, output):
        row = tokenizer("<image>a").input_ids
        logits = torch.zeros_like(output.logits)
        logits[..., [row[-1], model.eoc_token_id]] = 14.0
        output.logits = logits.bfloat16()
        return output

    hook = model.lang_encoder.register_forward_hook(certain)
    scores = score_candidates(model, None, tokenizer, features, "<image>", ["a"])
    hook.remove()
    logits = torch.zeros(model.lang_encoder.config.vocab_size)
    logits[:2] = 14.0
    assert_close(scores[0], 2 * logits.log_softmax(dim=-1)[0], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- options


def sampled(small, picture, seed=0, **options):
    torch.manual_seed(seed)
    return caption(*small, [picture] * 4, max_new_tokens=6, **options)


def test_a_configuration_is_believed(small, pictures):
    """The argument, then the configuration, then the model's own; else greedy."""
    greedy = sampled(small, pictures[0])
    sample, plain = (GenerationConfig(do_sample=value) for value in (True, False))
    wanted = sampled(small, pictures[0], do_sample=True)
    assert wanted != greedy and len(set(greedy)) == 1
    assert sampled(small, pictures[0], generation_config=sample) == wanted
    both = {"generation_config": sample, "do_sample": False}
    assert sampled(small, pictures[0], **both) == greedy
    both = {"generation_config": plain, "do_sample": True}
    assert sampled(small, pictures[0], **both) == wanted
    assert sampled(small, pictures[0], generation_config=GenerationConfig()) == greedy
    torch.manual_seed(0)
    pieces = stream_caption(
        *small, pictures[0], max_new_tokens=6, generation_config=sample
    )
    torch.manual_seed(0)
    one = caption(*small, pictures[:1], max_new_tokens=6, do_sample=True)
    torch.manual_seed(0)
    assert "".join(pieces).strip() == one[0]
    small[0].lang_encoder.generation_config.do_sample = True
    assert sampled(small, pictures[0]) == wanted
    assert sampled(small, pictures[0], do_sample=False) == greedy
    assert sampled(small, pictures[0], generation_config=plain) == greedy


def n_new(small, picture, **options):
    """How many tokens were written, with no end on the way."""
    _, _, tokenizer = small
    counts = []
    caption(*small, [picture], eos_token_id=None, streamer=Count(counts), **options)
    return len(counts) - 1


class Count(BaseStreamer):
    def __init__(self, counts):
        self.counts = counts

    def put(self, value):
        self.counts.append(value)

    def end(self):
        pass


def test_a_configurations_length_is_believed(small, pictures):
    one = pictures[0]
    n_prompt = len(small[2]("<image>").input_ids)
    assert n_new(small, one) == 24
    assert n_new(small, one, generation_config=GenerationConfig()) == 24
    three = GenerationConfig(max_new_tokens=3)
    assert n_new(small, one, generation_config=three) == 3
    assert n_new(small, one, generation_config=three, max_new_tokens=5) == 5
    assert n_new(small, one, generation_config=three, max_length=n_prompt + 4) == 4
    long = GenerationConfig(max_length=n_prompt + 6)
    assert n_new(small, one, generation_config=long) == 6
    assert n_new(small, one, generation_config=long, max_new_tokens=2) == 2
    with pytest.raises(ValueError, match="the model reads 96"):
        n_new(small, one, max_length=97)
    with pytest.raises(ValueError, match="give one of them"):
        n_new(small, one, max_length=9, max_new_tokens=2)


def test_a_configurations_tokens_are_believed(small):
    """What to stop at and what to bar, in `Flamingo.generate`, too."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon"])
    call = {"vision_features": random_features(1, 1), "max_new_tokens": 8}

    def new(**options):
        options = {"do_sample": False, **call, **options}
        return model.generate(None, ids, mask, **options)[0, ids.shape[1] :].tolist()

    plain = new(eos_token_id=None)
    stop = plain[2]
    wanted = plain[: plain.index(stop) + 1]
    assert new(generation_config=GenerationConfig(eos_token_id=stop)) == wanted
    barred = GenerationConfig(suppress_tokens=[plain[0]])
    assert new(generation_config=barred) == new(suppress_tokens=[plain[0]])
    # A copy of the language model's own configuration does not forget <|endofchunk|>.
    own = copy.deepcopy(model.lang_encoder.generation_config)
    assert own.eos_token_id not in (None, model.eoc_token_id)
    bias = {(model.eoc_token_id,): 100.0}
    assert new(generation_config=own, sequence_bias=bias) == [model.eoc_token_id]
    # Beams named by the model's own configuration, beside one given for something else.
    model.lang_encoder.generation_config.num_beams = 3
    beams = new(generation_config=GenerationConfig(do_sample=False))
    assert beams == new(num_beams=3)


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_stop_strings(small, pictures, how):
    model, _, tokenizer = small
    whole = caption(*small, pictures[:1], max_new_tokens=12, eos_token_id=None)[0]
    stop = whole[len(whole) // 2 :][:2]
    options = {"stop_strings": [stop]}
    if how == "configuration":
        options = {"generation_config": GenerationConfig(**options)}
    options |= {"eos_token_id": None, "max_new_tokens": 12}
    text = caption(*small, pictures[:1], **options)[0]
    assert stop in text and len(text) < len(whole) and whole.startswith(text)
    assert "".join(stream_caption(*small, pictures[0], **options)).strip() == text


def tokens_of(small, *texts):
    return [small[2](text, add_special_tokens=False).input_ids for text in texts]


def working(small, other, greedy, text):
    """{name: options that hold it}, of which each but a few changes the text.

    Args:
        other: a language model that may help.
        greedy, text: what the first row is without any option: tokens, and words.
    """
    (_, lemon, *_), (tent, *_) = tokens_of(small, "a lemon", " above a tent")
    first, second, early = greedy[0], greedy[3], {"eos_token_id": greedy[1]}
    eoc = small[0].eoc_token_id
    sample, beams = {"do_sample": True}, {"num_beams": 2}
    static = {"cache_implementation": "static"}
    lookup = {"prompt_lookup_num_tokens": 2, "batch_size": 1}
    helped = {"assistant_model": other, "batch_size": 1}
    return {
        "generation_config": {"generation_config": GenerationConfig(num_beams=2)},
        "do_sample": sample,
        "num_beams": beams,
        "num_return_sequences": {**beams, "num_return_sequences": 2},
        "early_stopping": {**beams, "early_stopping": True},
        "length_penalty": {**beams, "length_penalty": -2.0},
        "max_length": {"max_length": 9},
        "min_length": {**early, "min_length": 12},
        "min_new_tokens": {**early, "min_new_tokens": 6},
        "max_time": {"max_time": 1e-9},
        "stop_strings": {"stop_strings": text[len(text) // 2 :][:2]},
        "temperature": {**sample, "temperature": 0.01},
        "top_k": {**sample, "top_k": 1},
        "top_p": {**sample, "top_p": 0.01},
        "min_p": {**sample, "min_p": 0.99},
        "top_h": {**sample, "top_h": 0.1},
        "typical_p": {**sample, "typical_p": 0.2},
        "epsilon_cutoff": {**sample, "epsilon_cutoff": 0.5},
        "eta_cutoff": {**sample, "eta_cutoff": 0.99},
        "repetition_penalty": {"repetition_penalty": 5.0},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {
            "encoder_no_repeat_ngram_size": 1,
            "sequence_bias": {(lemon,): 99.0},  # which stands in the prompt
        },
        "bad_words_ids": {"bad_words_ids": [[first]]},
        "sequence_bias": {"sequence_bias": {(tent,): 9.0}},
        "renormalize_logits": {"renormalize_logits": True},
        "forced_eos_token_id": {"forced_eos_token_id": eoc},
        "remove_invalid_values": {"remove_invalid_values": True},
        "exponential_decay_length_penalty": {
            "exponential_decay_length_penalty": (1, 2.0),
            "eos_token_id": eoc,
        },
        "suppress_tokens": {"suppress_tokens": [first, second]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "watermarking_config": {"watermarking_config": WatermarkingConfig()},
        "pad_token_id": {"pad_token_id": 1},
        "eos_token_id": {"eos_token_id": second},
        "logits_processor": {"logits_processor": [lambda ids, scores: -scores]},
        "stopping_criteria": {
            "stopping_criteria": [
                lambda ids, _: torch.full((len(ids),), ids.shape[1] > 4)
            ]
        },
        "prefix_allowed_tokens_fn": {
            "prefix_allowed_tokens_fn": lambda row, ids: [lemon, tent, eoc]
        },
        "streamer": {"streamer": Count([])},
        "synced_gpus": {"synced_gpus": False},
        "use_cache": {"use_cache": False},
        "cache_implementation": static,
        "cache_config": {"cache_implementation": "dynamic", "cache_config": {}},
        "max_cache_len": {**static, "max_cache_len": 40},
        "prefill_chunk_size": {"prefill_chunk_size": 2},
        "keep_keys_values": {"keep_keys_values": False},
        "assistant_model": helped,
        "num_assistant_tokens": {**helped, "num_assistant_tokens": 2},
        "num_assistant_tokens_schedule": {
            **helped,
            "num_assistant_tokens_schedule": "heuristic",
        },
        "assistant_confidence_threshold": {
            **helped,
            "assistant_confidence_threshold": 0.1,
        },
        "prompt_lookup_num_tokens": lookup,
        "max_matching_ngram_size": {**lookup, "max_matching_ngram_size": 1},
        "compile_config": {"compile_config": CompileConfig()},
        "disable_compile": {**static, "disable_compile": True},
    }


# What changes how the text comes about, and must not change the text.
SAME_TEXT = """
    renormalize_logits remove_invalid_values pad_token_id streamer synced_gpus use_cache
    cache_implementation cache_config max_cache_len prefill_chunk_size keep_keys_values
    assistant_model num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size
    compile_config disable_compile temperature top_k top_p
""".split()
# What is the same without it. A lot that is certain is not; beams have one length here.
ALIKE = {*SAME_TEXT, "early_stopping", "length_penalty"}
ALIKE -= {"temperature", "top_k", "top_p"}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_works(small, backbones, pictures, name):
    """The same as transformers' `generate` itself, told where the pictures are."""
    model, image_processor, tokenizer = small
    other = transformers.AutoModelForCausalLM.from_pretrained(backbones["opt"]).eval()
    other.resize_token_embeddings(model.lang_encoder.config.vocab_size)
    prompt = "<image>a lemon<|endofchunk|><image>this"
    images = [pictures[:2], pictures[1:]]
    ids, mask = tokenize(tokenizer, [prompt] * len(images))
    pixels = torch.stack([torch.stack([image_processor(p) for p in r]) for r in images])
    pixels = pixels[:, :, None]  # (B, T_img, F, 3, H, W)
    plain = {"eos_token_id": None, "max_new_tokens": 7}
    greedy = caption(*small, images, prompt, **plain)
    tokens = model.generate(pixels, ids, mask, do_sample=False, **plain)
    tokens = tokens[0, ids.shape[1] :].tolist()
    options = working(small, other, tokens, greedy[0])[name]
    if name in ("streamer", "stop_strings"):  # of one row
        images, greedy = images[:1], greedy[:1]
        pixels, ids, mask = pixels[:1], ids[:1], mask[:1]
    options = {"eos_token_id": None, **options}
    if name != "max_length":
        options["max_new_tokens"] = 7
    torch.manual_seed(0)
    said = caption(*small, images, prompt, **options)
    if name in SAME_TEXT:
        assert said == greedy
    torch.manual_seed(0)
    others = {n: value for n, value in options.items() if n != name}
    without = caption(*small, images, prompt, **{"eos_token_id": None, **others})
    assert said != without or name in ALIKE, "it does nothing here"
    torch.manual_seed(0)
    options = {**options, "tokenizer": tokenizer}
    one_by_one = options.pop("batch_size", None)
    options = {"do_sample": False, **options}
    wanted = []
    for i in range(len(images)) if one_by_one else [slice(None)]:
        row = slice(i, i + 1) if one_by_one else i
        out = model.generate(pixels[row], ids[row], mask[row], **options)
        new = out[:, ids.shape[1] :]
        wanted += tokenizer.batch_decode(new, skip_special_tokens=True)
    assert said == [text.strip() for text in wanted]
    assert_clean(model)


REFUSED = """
    inputs input_ids inputs_embeds attention_mask position_ids past_key_values lang_x
    vision_x vision_features media_locations labels logits_to_keep guidance_scale
    negative_prompt_ids negative_prompt_attention_mask token_healing custom_generate
    trust_remote_code return_dict_in_generate output_attentions output_hidden_states
    output_scores output_logits penalty_alpha dola_layers num_beam_groups
    diversity_penalty constraints force_words_ids low_memory use_mtp is_assistant
    speculation_type assistant_early_exit assistant_tokenizer assistant_lookbehind
    target_lookbehind assistant_ensemble_weight decoder_start_token_id bos_token_id
    forced_bos_token_id continuous_batching_config num_beam temprature
""".split()


def test_all_options_of_transformers_are_decided():
    """One that a new version brings has to be tried, or refused, first."""
    arguments = signature(transformers.GenerationMixin.generate).parameters
    known = {n for n in vars(GenerationConfig()) if not n.startswith("_")}
    known |= set(arguments) - {"self", "kwargs"}
    decided = {"max_new_tokens", "transformers_version", *OPTIONS, *REFUSED}
    assert known - decided == set()


@pytest.mark.parametrize("name", REFUSED)
def test_each_other_option_is_refused_by_name(small, pictures, name):
    for value in (2, torch.ones(1, 2)):
        with pytest.raises(ValueError, match=rf"^{name} is no option"):
            caption(*small, pictures[:1], **{name: value})
        with pytest.raises(ValueError, match=rf"^{name} is no option"):
            list(stream_caption(*small, pictures[0], **{name: value}))
    assert_clean(small[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.5}, "temperature does nothing without do_sample=True"),
        ({"top_p": 0.5, "do_sample": False}, "top_p does nothing"),
        ({"length_penalty": 2.0}, "length_penalty does nothing without num_beams"),
        ({"early_stopping": True, "num_beams": 1}, "early_stopping does nothing"),
        ({"cache_implementation": "paged"}, "paged"),
    ],
)
def test_idle_options_are_refused(small, pictures, options, message):
    with pytest.raises(ValueError, match=message):
        caption(*small, pictures[:1], **options)
    assert_clean(small[0])


@pytest.mark.parametrize(
    "setting",
    [
        {"guidance_scale": 1.5},
        {"token_healing": True},
        {"return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": True},
        {"assistant_early_exit": 1},
        {"dola_layers": "high"},
        {"num_beam_groups": 2, "num_beams": 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_configuration_cannot_smuggle_one_in(small, pictures, setting):
    config = GenerationConfig(**setting)
    with pytest.raises(ValueError, match="|".join(setting)):
        caption(*small, pictures[:1], generation_config=config)
    assert_clean(small[0])


def test_a_configuration_is_a_configuration(small, pictures):
    with pytest.raises(TypeError, match="want a GenerationConfig"):
        caption(*small, pictures[:1], generation_config={"do_sample": True})


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"negative_prompt_ids": torch.ones(1, 2).long()},
        {"token_healing": True},
        {"assistant_early_exit": 1},
        {"cache_implementation": "paged"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_refuses_what_pictures_forbid(small, options):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a"])
    call = {"vision_features": random_features(1, 1), "max_new_tokens": 3}
    call["do_sample"] = False
    wanted = model.generate(None, ids, mask, **call)
    with pytest.raises(ValueError, match=next(iter(options))):
        model.generate(None, ids, mask, **call, **options)
    if "negative_prompt_ids" not in options:
        config = GenerationConfig(**options)  # which transformers itself allows
        with pytest.raises(ValueError, match=next(iter(options))):
            model.generate(None, ids, mask, **call, generation_config=config)
    assert torch.equal(model.generate(None, ids, mask, **call), wanted)
    off = {"guidance_scale": 1, "token_healing": False}
    assert torch.equal(model.generate(None, ids, mask, **call, **off), wanted)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_what_may_follow_is_asked_by_row(small, pictures, options):
    """Rows are counted through all batches."""
    _, _, tokenizer = small
    words = [tokens_of(small, word)[0][0] for word in ("lemon", "tent", "bear")]

    def may_follow(row, ids):
        return [words[row // copies]]

    copies = 2 if "do_sample" in options else 1
    options = {**options, "num_return_sequences": copies, "max_new_tokens": 1}
    options["prefix_allowed_tokens_fn"] = may_follow
    together = caption(*small, pictures, **options)
    assert caption(*small, pictures, batch_size=1, **options) == together
    assert len(set(together)) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"generation_config": GenerationConfig(num_beams=2)},
        {"streamer": Count([])},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_stream_is_one_text(small, pictures, options):
    with pytest.raises(ValueError, match="stream"):
        list(stream_caption(*small, pictures[0], **options))
    nothing = {"stopping_criteria": None, "streamer": None}
    assert (
        "".join(stream_caption(*small, pictures[0], **nothing)).strip()
        == (caption(*small, pictures[:1])[0])
    )
    assert_clean(small[0])


@pytest.mark.parametrize("batch_size", [1, 100])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_row_that_has_stopped_says_no_more(small, pictures, batch_size, options):
    """Without an end token it ran on as long as any other row of its batch."""
    options = {**options, "eos_token_id": None, "max_new_tokens": 12}
    longest = caption(*small, pictures, **options)
    pieces = [longest[2][i : i + 4] for i in range(len(longest[2]))]
    options["stop_strings"] = [next(p for p in pieces if p not in longest[0])]
    alone = [caption(*small, [picture], **options)[0] for picture in pictures]
    assert len(alone[2]) < len(longest[2])
    assert caption(*small, pictures, batch_size=batch_size, **options) == alone


def test_a_row_that_a_criterion_has_stopped_says_no_more(small, pictures):
    """The same for criteria of one's own; how they look at a row is theirs."""
    (lemon, *_), (tent, *_) = tokens_of(small, " lemon", " tent")
    stop = {"stopping_criteria": [lambda ids, _: ids[:, -1] == lemon]}
    stop |= {"eos_token_id": None, "max_new_tokens": 4}
    words = {0: lemon, 1: tent}
    stop["prefix_allowed_tokens_fn"] = lambda row, ids: [words[row]]
    said = caption(*small, pictures[:2], **stop)
    assert said == ["lemon", "tent tent tent tent"]


@pytest.mark.parametrize("name", ["max_length", "min_length"])
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_a_length_that_counts_padding_is_refused(small, pictures, name, how):
    """It allowed the row with the longer prompt fewer tokens of its own."""
    options = {name: 12}
    if how == "configuration":
        options = {"generation_config": GenerationConfig(**options)}
    prompts = ["<image>", "<image>a lemon above a"]
    with pytest.raises(ValueError, match=f"{name} counts .* max_new_tokens"):
        caption(*small, pictures[:2], prompts, **options)
    alone = [
        caption(*small, [picture], prompt, **options)[0]
        for picture, prompt in zip(pictures, prompts, strict=False)
    ]
    assert caption(*small, pictures[:2], prompts, batch_size=1, **options) == alone
    assert caption(*small, pictures[:2], prompts[1], **options)[1] == alone[1]
    assert_clean(small[0])


def test_a_length_that_does_not_count_is_no_reason(small, pictures, monkeypatch):
    """New tokens go before it; also where only the model's own configuration has it."""
    prompts, new = ["<image>", "<image>a lemon above a"], {"max_new_tokens": 5}
    ask = (*small, pictures[:2], prompts)
    wanted = caption(*ask, **new, min_new_tokens=5)
    both = GenerationConfig(**new, min_new_tokens=5, max_length=12, min_length=9)
    assert caption(*ask, generation_config=both) == wanted
    for name, value in (("max_length", 12), ("min_length", 9)):
        monkeypatch.setattr(small[0].lang_encoder.generation_config, name, value)
    assert caption(*ask, **new, min_new_tokens=5) == wanted


def left_out(small, mask):
    """A cache of all but two tokens of a padded batch, and what goes on with it."""
    model, _, tokenizer = small
    ids, whole = tokenize(tokenizer, ["<image>a lemon", "<image>a lemon above a tent"])
    features = {"vision_features": random_features(2, 1)}
    kept = {"clear_conditioned_layers": False, "use_cache": True}
    past = model(None, ids[:, :-2], whole[:, :-2], **features, **kept).past_key_values
    mask = whole if mask == "whole" else whole[:, -2:]
    out = model(None, ids[:, -2:], mask, past_key_values=past, **features)
    return out.logits, model(None, ids, whole, **features).logits[:, -2:]


def test_a_mask_is_of_the_cached_text_too(small):
    """Of the new tokens alone, it gave a row with padding other logits."""
    found, wanted = left_out(small, "whole")
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(2, 2\), want \(2, \d+\), \d+ cached"):
        left_out(small, "new")
    assert_clean(small[0])
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon"])
    features = {"vision_features": random_features(1, 1)}
    for bad in (mask[:, -2:], mask[0], mask.expand(2, -1)):
        with pytest.raises(ValueError, match="attention_mask is .* want"):
            model(None, ids, bad, **features)
        with pytest.raises(ValueError, match="attention_mask is .* want"):
            model.generate(None, ids, bad, **features)
    assert_clean(model)


@pytest.mark.parametrize("grad", [False, True])
def test_one_cache_serves_twice(small, grad):
    """Also one whose keys and values know where they come from."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a", "<image>a lemon above a tent"])
    call = {"vision_features": random_features(2, 1)}
    with torch.set_grad_enabled(grad):
        out = model(None, ids[:, :-1], mask[:, :-1], use_cache=True, **call)
    past = out.past_key_values
    before = [layer.keys.clone() for layer in past.layers]
    assert before[0].requires_grad == grad
    call |= {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    for options in ({}, {"num_beams": 3}):
        wanted = model.generate(None, ids, mask, **call, **options)
        for _ in range(2):
            again = {**call, **options, "past_key_values": past}
            assert torch.equal(model.generate(None, ids, mask, **again), wanted)
    assert all(map(torch.equal, before, [layer.keys for layer in past.layers]))


@pytest.fixture(scope="module")
def gpt2(make_model, tmp_path_factory):
    """A small Flamingo whose language model numbers all places, padding included."""
    config = transformers.GPT2Config(
        vocab_size=opt_config().vocab_size,
        n_embd=D_TXT,
        n_layer=3,
        n_head=4,
        n_positions=96,
        initializer_range=0.15,
    )
    path = save_language_model(tmp_path_factory.mktemp("lm") / "gpt2", config)
    return make_model(gates=1.0, language_model=path)


@torch.no_grad()
def test_padding_has_no_place(gpt2):
    """A row of a batch is the row alone; with a cache, too."""
    model, _, tokenizer = gpt2
    prompts = ["<image>a", "<image>a lemon above a tent"]
    ids, mask = tokenize(tokenizer, prompts)
    features = random_features(2, 1)
    logits = model(None, ids, mask, vision_features=features).logits
    for row, prompt in enumerate(prompts):
        own, _ = tokenize(tokenizer, [prompt])
        alone = model(None, own, vision_features=features[row : row + 1]).logits
        assert_close(logits[row, -own.shape[1] :], alone[0], rtol=1e-4, atol=1e-4)
    found, wanted = left_out(gpt2, "whole")
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    right, mask = tokenize(tokenizer, prompts, side="right")
    found = model(None, right, mask, vision_features=features).logits
    n = int(mask[0].sum())
    assert_close(found[0, :n], logits[0, -n:], rtol=1e-4, atol=1e-4)


def test_a_stream_keeps_the_loops_precision(small, pictures):
    """Autocast is each thread's own: the words were written in float32."""
    model, kinds = small[0], []
    head = model.lang_encoder.get_output_embeddings()
    hook = head.register_forward_hook(lambda *a: kinds.append(a[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = caption(*small, pictures[:1], max_new_tokens=6)
        said = "".join(stream_caption(*small, pictures[0], max_new_tokens=6))
    assert [said.strip()] == wanted and set(kinds) == {torch.bfloat16}
    kinds.clear()
    list(stream_caption(*small, pictures[0], max_new_tokens=6))
    hook.remove()
    assert set(kinds) == {torch.float32}


# ----------------------------------------------------------------------- two at a time


def in_threads(*jobs, seconds=60):
    """Run jobs side by side; what each returned or raised."""
    found = [None] * len(jobs)

    def run(i, job):
        try:
            found[i] = job()
        except BaseException as error:
            found[i] = error

    threads = [
        threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "waits for ever"
    return found


def slow(model, seconds=0.003):
    """Let every step of the language model give way to other threads."""
    return model.lang_encoder.register_forward_hook(lambda *_: time.sleep(seconds))


def test_threads_get_their_own_pictures(small, pictures):
    model, image_processor, tokenizer = small
    settings = {"max_new_tokens": 6}
    wanted = [caption(*small, [p], **settings) for p in pictures]
    scores = [score_candidates(*small, p, "<image>", ANSWERS) for p in pictures]
    assert len({text for (text,) in wanted}) > 1
    ids, mask = tokenize(tokenizer, ["<image>a lemon"])
    pixels = [image_processor(p)[None, None, None] for p in pictures]
    with torch.no_grad():
        logits = [model(x, ids, mask).logits for x in pixels]

    def captions(i):
        return [caption(*small, pictures[i], **settings) for _ in range(8)]

    def streams(i):
        text = "".join(stream_caption(*small, pictures[i], **settings))
        return [[text.strip()]] * 8

    def scored(i):
        return [
            score_candidates(*small, pictures[i], "<image>", ANSWERS) for _ in range(4)
        ]

    def trained(i):
        return [model(pixels[i], ids, mask).logits for _ in range(8)]

    hook = slow(model)
    kinds = (captions, streams, scored, trained)
    jobs = [lambda k=k, i=i: k(i) for i in range(3) for k in kinds]
    found = in_threads(*jobs)
    hook.remove()
    assert not [f for f in found if isinstance(f, BaseException)], found
    for i in range(3):
        texts, streamed, scored_again, logits_again = found[4 * i : 4 * i + 4]
        assert texts == streamed == [wanted[i]] * 8
        for again in scored_again:
            assert_close(again, scores[i])
        for again in logits_again:
            assert_close(again, logits[i])
    assert_clean(model)


def test_a_call_inside_ones_own_stream_waits_and_is_right(small, pictures):
    wanted = [caption(*small, [p]) for p in pictures]
    hook = slow(small[0])

    def read():
        pieces, inside = [], None
        for piece in stream_caption(*small, pictures[0]):
            pieces.append(piece)
            inside = inside or caption(*small, [pictures[1]])
        return ["".join(pieces).strip()], inside

    def two_at_once():
        one, other = (stream_caption(*small, p) for p in pictures[1:])
        first = [next(one), next(other)]
        return [[(first[i] + "".join(s)).strip()] for i, s in enumerate((one, other))]

    (read_found,), (two_found,) = in_threads(read), in_threads(two_at_once)
    hook.remove()
    assert read_found == (wanted[0], wanted[1])
    assert two_found == wanted[1:]
    assert_clean(small[0])


@pytest.mark.parametrize("how", ["dropped", "closed", "error"])
def test_a_stream_that_was_left_lets_others_in(small, pictures, how):
    model, wanted = small[0], caption(*small, pictures[:1])
    hook = slow(model, 0.02)
    pieces = stream_caption(
        *small, pictures[1], max_new_tokens=80, eos_token_id=None, prompt="<image>a"
    )
    next(pieces)
    start = time.monotonic()
    if how == "dropped":
        del pieces
    elif how == "closed":
        pieces.close()
    else:
        with pytest.raises(ZeroDivisionError):
            pieces.throw(ZeroDivisionError)
    hook.remove()
    (found,) = in_threads(lambda: caption(*small, pictures[:1]), seconds=10)
    assert found == wanted and time.monotonic() - start < 1.2
    assert_clean(model)


@pytest.mark.parametrize("door", ["caption", "stream", "score"])
def test_a_call_from_inside_a_call_is_an_error(small, pictures, door):
    """From a callback or a hook it would wait for itself."""
    model = small[0]
    wanted = caption(*small, pictures[:1])

    def nested(*_):
        caption(*small, [pictures[1]])

    hook = model.lang_encoder.register_forward_pre_hook(nested)
    doors = {
        "caption": lambda: caption(*small, pictures[:1]),
        "stream": lambda: list(stream_caption(*small, pictures[0])),
        "score": lambda: score_candidates(*small, pictures[0], "<image>", ANSWERS),
    }
    (found,) = in_threads(doors[door], seconds=20)
    hook.remove()
    assert isinstance(found, RuntimeError) and "inside a call of its own" in str(found)
    assert_clean(model)
    assert in_threads(lambda: caption(*small, pictures[:1])) == [wanted]


def test_pictures_kept_by_hand_are_not_anothers(small, pictures):
    """Between `cache_media` and `uncache_media` other threads are told, at once."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon"])
    kept = {"clear_conditioned_layers": False}
    with torch.no_grad():
        wanted = model(random_pixels(1, 1), ids, mask).logits
        model.cache_media(ids, random_pixels(1, 1))
        others = {
            "caption": lambda: caption(*small, pictures[:1]),
            "stream": lambda: list(stream_caption(*small, pictures[0])),
            "score": lambda: score_candidates(*small, pictures[0], "<image>", ANSWERS),
            "forward": lambda: model(None, ids, mask, **kept),
            "pictures": lambda: model(random_pixels(1, 1, seed=1), ids, mask),
            "cache": lambda: model.cache_media(ids, random_pixels(1, 1, seed=1)),
        }
        for error in in_threads(*others.values(), seconds=10):
            assert isinstance(error, ValueError) and "uncache_media" in str(error)
        assert_close(model(None, ids, mask, **kept).logits, wanted)
        with pytest.raises(ValueError, match="uncache_media"):
            score_candidates(*small, pictures[0], "<image>", ANSWERS)
        assert_close(model(None, ids, mask, **kept).logits, wanted)
    in_threads(model.uncache_media)  # whoever it was, somebody must be able to
    assert_clean(model)
    assert caption(*small, pictures[:1])


@torch.no_grad()
def test_a_text_goes_on_in_its_own_thread(small):
    """A cache of the language model fits the positions of its own text only."""
    model, _, tokenizer = small
    mine, _ = tokenize(tokenizer, ["<image>a lemon"])
    other, _ = tokenize(tokenizer, ["look at <image> lemons and tents"])
    kept = {"clear_conditioned_layers": False, "use_cache": True}
    features = random_features(1, 1)
    past = model(None, mine, vision_features=features, **kept).past_key_values

    def go_on():
        again = {"past_key_values": copy.deepcopy(past), "vision_features": features}
        return model(None, mine[:, -1:], **again, **kept).logits

    wanted = go_on()
    in_threads(lambda: model(None, other, vision_features=features, **kept))
    with pytest.raises(ValueError, match="another thread has left"):
        go_on()
    model.uncache_media()
    past = model(None, mine, vision_features=features, **kept).past_key_values
    assert_close(go_on(), wanted)
    model.uncache_media()


def test_training_beside_captions(small, pictures):
    """Gradients are those of the pictures that were trained on."""
    model, image_processor, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon<|endofchunk|>"])
    batch = {"vision_features": random_features(1, 1), "labels": ids}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        model.zero_grad()
        model(None, ids, mask, **batch).loss.backward()
        return [p.grad.clone() for p in parameters if p.grad is not None]

    wanted, text = gradients(), caption(*small, pictures[:1])
    hook = slow(model)
    steps, texts = in_threads(
        lambda: [gradients() for _ in range(10)],
        lambda: [caption(*small, pictures[:1]) for _ in range(5)],
    )
    hook.remove()
    assert texts == [text] * 5
    for step in steps:
        for one, other in zip(step, wanted, strict=True):
            assert_close(one, other)


def test_a_copy_has_a_lock_of_its_own(small, pictures):
    model, image_processor, tokenizer = small
    wanted, found = caption(*small, pictures[:1]), []
    held, done = threading.Event(), threading.Event()

    def hold():
        with model.alone():
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    twin = copy.deepcopy(model)
    (found,) = in_threads(
        lambda: caption(twin, image_processor, tokenizer, pictures[:1]), seconds=20
    )
    done.set()
    holder.join()
    assert found == wanted
    again = pickle.loads(pickle.dumps(model._turns))
    assert again is not model._turns and again.lock.acquire(blocking=False)
    assert copy.copy(model)._turns is model._turns, "the layers are the same"
