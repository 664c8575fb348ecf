"""Who may look at what: masks and labels against slow oracles, and by perturbation.

The oracles are written from the rule, token by token, not from the code. Perturbation
asks the network itself: change one image, and see which tokens notice.
"""

import pytest
import torch
from conftest import (
    D_IMG,
    D_TXT,
    V,
    open_gates,
    random_features,
    random_pixels,
    tokenize,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from flamingo_lite import (
    GatedCrossAttentionBlock,
    PerceiverResampler,
    make_labels,
    media_time,
    shifted_cross_entropy,
    text_time,
    text_to_media_mask,
)

WORD, IMAGE, END, PAD = 0, 1, 2, 3  # token kinds; also their ids
settings.register_profile("here", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("here")


@st.composite
def rows_of(draw, kinds, max_rows=3, max_tokens=14):
    """A batch of token kinds: list of rows of equal length."""
    n_tokens = draw(st.integers(1, max_tokens))
    row = st.lists(st.sampled_from(kinds), min_size=n_tokens, max_size=n_tokens)
    return draw(st.lists(row, min_size=1, max_size=max_rows))


# ------------------------------------------------------------------- slow oracles


def clock(row):
    """Images met up to and with each token."""
    times, now = [], 0
    for kind in row:
        now += kind == IMAGE
        times.append(now)
    return times


def visible(row, T_img, immediate):
    """For each token, the set of images (0, 1, …) that it may look at."""
    sets = []
    for t in range(len(row)):
        earlier = [i for i, kind in enumerate(row[: t + 1]) if kind == IMAGE]
        images = range(len(earlier))  # the k-th <image> brings picture k
        images = images[-1:] if immediate else images
        sets.append({k for k in images if k < T_img})
    return sets


def labels_of(row):
    """Loss from after an `<image>` to its end-of-chunk, that one too; not at images."""
    labels, inside = [], False
    for kind in row:
        if kind == IMAGE:
            inside = True
            labels.append(-100)
            continue
        labels.append(kind if inside and kind != PAD else -100)
        if kind == END:
            inside = False
    return labels


# ------------------------------------------------------------------------- masks


@given(rows_of([WORD, IMAGE]))
def test_text_time(rows):
    assert text_time(torch.tensor(rows) == IMAGE).tolist() == [
        clock(row) for row in rows
    ]


@pytest.mark.parametrize("T_img", [1, 2, 5])
def test_media_time(T_img):
    assert media_time(T_img).tolist() == list(range(1, T_img + 1))


@pytest.mark.parametrize("immediate", [True, False])
@given(rows=rows_of([WORD, IMAGE]), T_img=st.integers(1, 5))
def test_text_to_media_mask(immediate, rows, T_img):
    """Also with fewer pictures than `<image>` tokens: what is not there is not seen."""
    mask = text_to_media_mask(torch.tensor(rows) == IMAGE, T_img, immediate)
    assert mask.shape == (len(rows), len(rows[0]), T_img) and mask.dtype == torch.bool
    for row, seen in zip(rows, mask.tolist(), strict=True):
        found = [{k for k, may in enumerate(token) if may} for token in seen]
        assert found == visible(row, T_img, immediate)


# ------------------------------------------------------------------------ labels


@given(rows_of([WORD, WORD, IMAGE, END]), st.integers(0, 3), st.booleans())
def test_make_labels(rows, n_padding, left):
    padding = [PAD] * n_padding
    rows = [padding + row if left else row + padding for row in rows]
    ids = torch.tensor(rows)
    labels = make_labels(ids, IMAGE, END, (ids != PAD).long())
    assert labels.tolist() == [labels_of(row) for row in rows]


@given(rows_of([WORD, IMAGE, END]))
def test_make_labels_without_a_mask(rows):
    ids = torch.tensor(rows)
    assert make_labels(ids, IMAGE, END).tolist() == [labels_of(row) for row in rows]


@given(rows_of([WORD, IMAGE, END], max_tokens=9), st.integers(0, 1000))
def test_shifted_cross_entropy(rows, seed):
    """Token t + 1 is what position t is asked for; nothing else counts."""
    ids = torch.tensor(rows)
    labels = make_labels(ids, IMAGE, END)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*ids.shape, 4, generator=generator)
    log_p = logits.log_softmax(dim=-1)
    losses = [
        -log_p[b, t, labels[b, t + 1]].item()
        for b, t in torch.ones_like(ids[:, 1:]).nonzero().tolist()
        if labels[b, t + 1] != -100
    ]
    if not losses:
        with pytest.raises(ValueError, match="label"):
            shifted_cross_entropy(logits, labels)
        return
    mean = shifted_cross_entropy(logits, labels).item()
    assert mean == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    each = shifted_cross_entropy(logits, labels, reduction="none")
    assert each.shape == ids[:, 1:].shape
    assert each.sum().item() == pytest.approx(sum(losses), abs=1e-4)


# ------------------------------------------------- perturbation: the gated block


def changed_rows(before, after):
    """(B, T_txt) bool: where two (B, T_txt, …) tensors differ in any bit."""
    return (before != after).flatten(2).any(dim=-1)


@pytest.mark.parametrize("immediate", [True, False])
@settings(max_examples=40)
@given(rows=rows_of([WORD, WORD, IMAGE]), T_img=st.integers(1, 4), data=st.data())
def test_block_looks_exactly_where_it_may(immediate, rows, T_img, data):
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(
        dim=12,
        dim_visual=10,
        dim_head=8,
        heads=2,
        only_attend_immediate_media=immediate,
    )
    open_gates(block)
    locations = torch.tensor(rows) == IMAGE
    text = torch.randn(*locations.shape, 12)
    media = torch.randn(len(rows), T_img, 3, 10)
    row, image = (
        data.draw(st.integers(0, len(rows) - 1)),
        data.draw(st.integers(0, T_img - 1)),
    )
    other = media.clone()
    other[row, image] += 1.0
    with torch.no_grad():
        changed = changed_rows(
            block(text, media, locations), block(text, other, locations)
        )
    for b, tokens in enumerate(changed.tolist()):
        sets = visible(rows[b], T_img, immediate)
        assert tokens == [b == row and image in seen for seen in sets]


def test_block_gives_nothing_to_a_token_before_every_image():
    """Not NaN, not a mix of later images: exactly what came in goes on to the gate."""
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(dim=12, dim_visual=10, dim_head=8, heads=2)
    locations = torch.tensor([[False, False, True, False]])
    with torch.no_grad():
        read = block.attn(torch.randn(1, 4, 12), torch.randn(1, 1, 3, 10), locations)
    assert read.isfinite().all()
    assert (read[0, :2] == 0).all() and (read[0, 2:] != 0).any(dim=-1).all()


def test_block_in_bfloat16_has_no_nan():
    block = GatedCrossAttentionBlock(dim=12, dim_visual=10, dim_head=8, heads=2)
    open_gates(block)
    locations = torch.tensor([[False, True, False]])
    text, media = torch.randn(1, 3, 12), torch.randn(1, 1, 3, 10)
    result = block.bfloat16()(text.bfloat16(), media.bfloat16(), locations)
    assert result.isfinite().all()


# ----------------------------------------------- perturbation: the whole model

TEXTS = [
    "look at this<image>a lemon<|endofchunk|><image>a tent above it<|endofchunk|>",
    "look<image>a bear<|endofchunk|>",
    "no picture at all",
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_model_notices_exactly_from_the_image_on(
    make_model, side, immediate, image, row
):
    """A changed image reaches the tokens that look at it and, through the language
    model's own attention, the tokens after them; none before, and no other row. A
    picture without an `<image>` is looked at by none."""
    sizes = {"heads": 2, "dim_head": 16, "only_attend_immediate_media": immediate}
    model, _, tokenizer = make_model(gates=1.0, cross_attn_kwargs=sizes)
    ids, mask = tokenize(tokenizer, TEXTS, side)
    features = random_features([2, 1, 0], 2)
    other = features.clone()
    other[row, image] += 1.0
    with torch.no_grad():
        before, after = (
            model(None, ids, mask, vision_features=x, spare_pictures=True).logits
            for x in (features, other)
        )
    assert before.isfinite().all()
    real = mask.bool()
    expected = torch.zeros_like(real)
    places = (ids[row] == model.media_token_id).nonzero().flatten().tolist()
    if image < len(places):
        expected[row, places[image] :] = True
    assert torch.equal(changed_rows(before, after) & real, expected & real)


def test_padding_changes_nothing(small):
    """A row alone, padded left and padded right gives the same logits."""
    model, _, tokenizer = small
    features = random_features([2, 1, 0], 2)
    logits = {}
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = tokenize(tokenizer, TEXTS, side)
            out = model(None, ids, mask, vision_features=features).logits
            logits[side] = [
                rows[keep.bool()] for rows, keep in zip(out, mask, strict=True)
            ]
        for row, text in enumerate(TEXTS):
            ids, mask = tokenize(tokenizer, [text])
            alone = model(None, ids, mask, vision_features=features[row : row + 1])
            assert_close(alone.logits[0], logits["left"][row], rtol=1e-4, atol=1e-4)
            assert_close(alone.logits[0], logits["right"][row], rtol=1e-4, atol=1e-4)


def test_pictures_come_from_vision_x_in_order(small):
    """Through the pixels too: picture k of a row belongs to its k-th `<image>`."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS[:2])
    pixels = random_pixels([2, 1], 2)
    other = pixels.clone()
    other[0, 1] += 1.0
    with torch.no_grad():
        changed = changed_rows(
            model(pixels, ids, mask).logits, model(other, ids, mask).logits
        )
    places = (ids[0] == model.media_token_id).nonzero().flatten()
    assert changed[0].nonzero().flatten()[0] == places[1] and not changed[1].any()


# ------------------------------------------------------------------ the Perceiver


def perceiver(**kwargs):
    torch.manual_seed(0)
    return PerceiverResampler(dim=D_IMG, depth=2, num_latents=4, heads=2, **kwargs)


def test_perceiver_does_not_mind_the_order_of_visual_tokens():
    x, model = random_features(2, 2, F=2), perceiver(max_num_frames=2, max_num_media=2)
    with torch.no_grad():
        assert_close(
            model(x[..., torch.randperm(V), :]), model(x), rtol=1e-5, atol=1e-5
        )


def test_perceiver_minds_the_order_of_frames_only_with_frame_embeddings():
    x = random_features(1, 1, F=3)
    backwards = x.flip(2)
    with torch.no_grad():
        without = perceiver()
        assert_close(without(backwards), without(x), rtol=1e-5, atol=1e-5)
        with_them = perceiver(max_num_frames=3)
        assert (with_them(backwards) - with_them(x)).abs().max() > 0.01


def test_perceiver_keeps_images_apart():
    x, model = random_features(2, 3), perceiver()
    other = x.clone()
    other[0, 1] += 1.0
    with torch.no_grad():
        changed = changed_rows(model(x), model(other))
    assert changed.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 16, D_IMG), "B, T_img"),
        ((1, 1, 4, 2, D_IMG), "4 frames"),
        ((1, 4, 1, 2, D_IMG), "4 images"),
    ],
)
def test_perceiver_refuses(shape, message):
    with pytest.raises(ValueError, match=message):
        perceiver(max_num_frames=3, max_num_media=3)(torch.zeros(shape))


def test_frames_go_through_the_whole_model(make_model):
    """F > 1, with frame embeddings: a film played backwards is another film."""
    sizes = {"depth": 2, "num_latents": 4, "heads": 2, "dim_head": 16}
    film = random_pixels(1, 1, F=3)
    for max_num_frames, matters in ((None, False), (3, True)):
        model, _, tokenizer = make_model(
            gates=1.0, perceiver_kwargs={**sizes, "max_num_frames": max_num_frames}
        )
        ids, mask = tokenize(tokenizer, ["<image>a bear"])
        with torch.no_grad():
            forth, back = (model(x, ids, mask).logits for x in (film, film.flip(2)))
        assert forth.shape[-1] == len(tokenizer) and D_TXT == model.lang_dim
        assert torch.allclose(forth, back, atol=1e-4) != matters
