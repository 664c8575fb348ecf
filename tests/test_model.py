"""The model: closed gates, frozen parts, clean state, exact generation, saving."""

import copy
import json
import os
import pickle
import shutil
from collections import Counter

import pytest
import torch
from conftest import (
    D_TXT,
    SMALL,
    Bomb,
    open_gates,
    opt_config,
    random_features,
    random_pixels,
    save_clip,
    save_language_model,
    tokenize,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LogitsProcessor,
    MistralConfig,
)

from flamingo_lite import (
    build_flamingo,
    create_model_and_transforms,
    load_flamingo,
    make_labels,
    parameter_groups,
    save_flamingo,
    train,
    trained_tensors,
)

TEXTS = ["look<image>a lemon<|endofchunk|><image>a tent above", "<image>a bear"]


def language_model_alone(path, model):
    """The plain language model from `path`, with the rows of the two new tokens."""
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    for mine, theirs in (
        (plain.get_input_embeddings, model.lang_encoder.get_input_embeddings),
        (plain.get_output_embeddings, model.lang_encoder.get_output_embeddings),
    ):
        mine().weight = theirs().weight
    return plain


def labelled_batch(model, tokenizer, texts=TEXTS, side="right"):
    """lang_x, attention_mask and labels of some texts."""
    ids, mask = tokenize(tokenizer, texts, side)
    labels = make_labels(ids, model.media_token_id, model.eoc_token_id, mask)
    return {"lang_x": ids, "attention_mask": mask, "labels": labels}


def assert_clean(model):
    """Nothing of an earlier call is left in the layers."""
    for layer in model.lang_encoder._get_decoder_layers():
        assert layer.vis_x is None and layer.media_locations is None
        assert not layer.use_cached_media and layer.keys_values is None
    assert not model.lang_encoder._use_cached_vision_x


# --------------------------------------------------------- gates closed, frozen parts


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_closed_gates_leave_the_language_model(make_model, backbones, training, side):
    """Bit for bit, also after `train()`: the frozen OPT's dropout stays off."""
    model, _, tokenizer = make_model()
    model.train(training)
    ids, mask = tokenize(tokenizer, TEXTS, side)
    plain = language_model_alone(backbones["opt"], model)
    with torch.no_grad():
        logits = model(random_pixels([2, 1], 2), ids, mask).logits
        assert torch.equal(logits, plain(ids, attention_mask=mask).logits)


def test_open_gates_do_not(small, backbones):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    plain = language_model_alone(backbones["opt"], model)
    with torch.no_grad():
        logits = model(random_pixels([2, 1], 2), ids, mask).logits
        assert not torch.allclose(logits, plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("freeze", [True, False])
def test_only_gates_get_gradient_at_the_start(make_model, freeze):
    """And, where they are trained, the embeddings' two new rows."""
    model, _, tokenizer = make_model(freeze_lm_embeddings=freeze)
    model.train()
    batch = labelled_batch(model, tokenizer)
    model(None, vision_features=random_features([2, 1], 2), **batch).loss.backward()
    moved = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    gates = {name for name, _ in model.named_parameters() if name.endswith("_gate")}
    assert len(gates) == 6
    embedding = model.lang_encoder.get_input_embeddings().weight
    if freeze:
        assert moved == gates and embedding.grad is None
    else:
        assert moved - gates == {"lang_encoder.model.decoder.embed_tokens.weight"}
        rows = embedding.grad.any(dim=1).nonzero().flatten().tolist()
        assert rows == sorted([model.eoc_token_id, model.media_token_id])


def test_frozen_means_frozen(make_model):
    """After some steps of AdamW every frozen tensor is what it was, bit for bit; of the
    embeddings exactly two rows moved; and all that should learn, learned."""
    model, _, tokenizer = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2), lr=1e-2)
    batch, pixels = labelled_batch(model, tokenizer), random_pixels([2, 1], 2)
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        model(pixels, **batch).loss.backward()
        optimizer.step()
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    embedding = model.lang_encoder.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():  # under all names that a tensor has
        if tensor.data_ptr() == embedding.data_ptr():
            rows = (tensor != before[name]).any(dim=1).nonzero().flatten().tolist()
            assert rows == sorted([model.eoc_token_id, model.media_token_id]), name
        else:
            moved = not torch.equal(tensor, before[name])
            assert moved == (tensor.data_ptr() in trained), name


def test_parameter_groups_hold_each_trained_tensor_once(make_model):
    model, _, _ = make_model()
    groups = parameter_groups(model, lr=1e-3, gate_factor=30)
    sorted_ids = sorted(id(p) for group in groups for p in group["params"])
    assert sorted_ids == sorted(id(p) for p in model.parameters() if p.requires_grad)
    gates, matrices, others = (group["params"] for group in groups)
    assert all(p.numel() == 1 for p in gates) and groups[0]["peak"] == 30e-3
    embedding = model.lang_encoder.get_input_embeddings().weight
    assert any(p is embedding for p in others) and groups[2]["weight_decay"] == 0
    assert all(p.ndim >= 2 and p is not embedding for p in matrices)


def test_frozen_parts_stay_in_eval_mode(make_model):
    model, _, _ = make_model()
    for mode in (True, False):
        model.train(mode)
        for name, module in model.named_modules():
            learns = name.startswith("perceiver") or "gated_cross_attn_layer" in name
            if learns and name != "lang_encoder.gated_cross_attn_layers":
                assert module.training == mode, name
            elif name and "lang_encoder" in name or name.startswith("vision_encoder"):
                is_list = name == "lang_encoder.gated_cross_attn_layers"
                assert not module.training or is_list, name


def test_gradient_checkpointing_saves_and_changes_nothing(make_model):
    """The same loss and gradients; layers of both kinds really run twice."""
    results = []
    for checkpointing in (False, True):
        model, _, tokenizer = make_model(
            gates=0.5, gradient_checkpointing=checkpointing
        )
        calls = []
        for layer in model.lang_encoder.old_decoder_blocks:
            layer.fc1.register_forward_hook(lambda *_, calls=calls: calls.append("lm"))
        for attention, _ in model.perceiver.layers:
            attention.register_forward_hook(lambda *_, calls=calls: calls.append("eye"))
        model.train()
        batch = labelled_batch(model, tokenizer)
        loss = model(None, vision_features=random_features([2, 1], 2), **batch).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((Counter(calls), loss, gradients))
    (plain_calls, plain_loss, plain), (calls, loss, gradients) = results
    assert torch.equal(loss, plain_loss)
    for name, gradient in plain.items():
        assert_close(gradients[name], gradient, msg=name)
    assert plain_calls == {"lm": 3, "eye": 2} and calls == {"lm": 6, "eye": 4}


# --------------------------------------------------------------------- what goes in


@pytest.mark.parametrize("F", [1, 3])
def test_vision_features_equal_vision_x(small, F):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels([2, 1], 2, F)
    with torch.no_grad():
        features = model.vision_encoder(pixels.flatten(0, 2))[1].unflatten(0, (2, 2, F))
        features[1, 1] = 0.0  # where there is no picture
        from_pixels = model(pixels, ids, mask).logits
        assert torch.equal(
            model(None, ids, mask, vision_features=features).logits, from_pixels
        )
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(None, ids, vision_features=features, **settings),
        model.generate(pixels, ids, **settings),
    )


def test_no_image_at_all_in_the_text(small, backbones):
    """Then the pictures are zeros, or for later, and ignored, whatever they show."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["no picture here"])
    with torch.no_grad():
        one = model(random_pixels([0], 1), ids, mask).logits
        other = model(random_pixels(1, 1, seed=2), ids, mask, spare_pictures=True)
        assert torch.equal(one, other.logits)
        assert one.isfinite().all()


@pytest.mark.parametrize("call", ["forward", "generate", "cache_media"])
def test_wrong_pictures_are_named(small, call):
    """None at all, fewer than `<image>` tokens (with the row), and a missing axis."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a bear", "<image>a<image>b<image>c"])

    def run(pixels):
        if call == "cache_media":
            model.cache_media(ids, pixels)
        else:
            (model if call == "forward" else model.generate)(pixels, ids, mask)

    for pixels, message in (
        (None, "vision_x or vision_features"),
        (random_pixels([1, 2], 2), r"row 1 .*3 <image>.*2 pictures"),
        (random_pixels(2, 3)[0], r"B, T_img, F, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pixels)
        assert_clean(model)


def test_pictures_for_another_number_of_rows_are_refused(small):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    with pytest.raises(ValueError, match="pictures for 3 rows, but 2 of text"):
        model(random_pixels(3, 2), ids, mask)
    assert_clean(model)


def test_layers_that_were_not_conditioned_say_so(small):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    with pytest.raises(ValueError, match="condition"):
        model.lang_encoder(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="condition"):
        model.lang_encoder._get_decoder_layers()[0](torch.zeros(1, 3, D_TXT))


def test_cached_media_and_new_pictures_together_are_refused(small):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    model.cache_media(ids, random_pixels([2, 1], 2))
    with pytest.raises(ValueError, match="uncache_media"):
        model(random_pixels([2, 1], 2), ids, mask)
    model.uncache_media()
    assert_clean(model)


# ----------------------------------------------------------------------- clean state


class Stop(LogitsProcessor):
    """Interrupt generation after some tokens, as a reader who presses "stop" does."""

    def __init__(self, after):
        self.left = after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return scores


def test_state_is_clean_after_every_exit(small):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels([2, 1], 2)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(pixels, ids, **settings)
    with torch.no_grad():
        logits = model(pixels, ids, mask).logits
    assert_clean(model)
    for after in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            model.generate(pixels, ids, logits_processor=[Stop(after)], **settings)
        assert_clean(model)
    broken = model.lang_encoder.old_decoder_blocks[1].register_forward_hook(
        lambda *_: 1 / 0
    )
    for run in (model, model.generate):
        with pytest.raises(ZeroDivisionError):
            run(pixels, ids, mask)
        assert_clean(model)
    broken.remove()
    assert torch.equal(model.generate(pixels, ids, **settings), wanted)
    with torch.no_grad():
        assert torch.equal(model(pixels, ids, mask).logits, logits)


def test_nothing_passed_in_is_changed(small):
    model, _, tokenizer = small
    batch = labelled_batch(model, tokenizer, side="left")
    passed = {**batch, "pixels": random_pixels([2, 1], 2)}
    passed["features"] = random_features([2, 1], 2)
    copies = {name: tensor.clone() for name, tensor in passed.items()}
    settings = {"attention_mask": batch["attention_mask"], "max_new_tokens": 3}
    config = GenerationConfig(do_sample=False)
    written = config.to_dict()
    model(passed["pixels"], **batch).loss.backward()
    model(None, vision_features=passed["features"], **batch)
    model.generate(passed["pixels"], batch["lang_x"], **settings)
    model.generate(
        None,
        batch["lang_x"],
        vision_features=passed["features"],
        generation_config=config,
        **settings,
    )
    for name, tensor in passed.items():
        assert torch.equal(tensor, copies[name]) and tensor.grad is None, name
    assert config.to_dict() == written
    assert set(settings) == {"attention_mask", "max_new_tokens"}


# ------------------------------------------------------------------ exact generation

PROMPTS = {
    "ends at an image": ["<image>a lemon<|endofchunk|><image>", "<image>"],
    "ends in text": [
        "look at this<image>a lemon<|endofchunk|><image>this is",
        "<image>a",
    ],
    "a row without a picture": ["<image>a bear and<image>a", "words only"],
}


class Force(LogitsProcessor):
    """Make one row say a token at a step; the other rows are left alone."""

    def __init__(self, row, length, token):
        self.row, self.length, self.token = row, length, token

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores = scores.clone()
            scores[self.row] = -torch.inf
            scores[self.row, self.token] = 0.0
        return scores


@torch.no_grad()
def full_recompute(model, features, ids, mask, n_tokens, suppress=True, force=None):
    """Greedy decoding by running the whole text through `forward` for every token."""
    done = torch.zeros(len(ids), dtype=torch.bool)
    pad = model.lang_encoder.config.pad_token_id
    for _ in range(n_tokens):
        pictures = {"vision_features": features, "spare_pictures": True}
        scores = model(None, ids, mask, **pictures).logits[:, -1]
        if suppress:
            scores[:, model.media_token_id] = -torch.inf
        if force is not None:
            scores = force(ids, scores)
        token = scores.argmax(dim=-1).masked_fill(done, pad)
        ids = torch.cat((ids, token[:, None]), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        done |= token == model.eoc_token_id
        if done.all():
            break
    return ids


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_a_full_recompute(make_model, prompt, immediate):
    """Left-padded rows with different numbers of images, with all caches on."""
    model, _, tokenizer = make_model(gates=1.0, only_attend_immediate_media=immediate)
    blocks = model.lang_encoder.gated_cross_attn_layers
    assert {b.attn.only_attend_immediate_media for b in blocks} == {immediate}
    ids, mask = tokenize(tokenizer, PROMPTS[prompt])
    answers = []
    for seed in range(2):
        counts = (ids == model.media_token_id).sum(dim=1).tolist()
        features = random_features(counts, 2, seed=seed)
        settings = {
            "vision_features": features,
            "max_new_tokens": 8,
            "do_sample": False,
        }
        wanted = full_recompute(model, features, ids, mask, 8)
        assert torch.equal(model.generate(None, ids, mask, **settings), wanted)
        without = model.generate(None, ids, mask, use_cache=False, **settings)
        assert torch.equal(without, wanted)
        answers.append(wanted[0].tolist())
    assert answers[0] != answers[1], "the pictures do nothing"


def test_a_row_in_a_batch_writes_what_it_writes_alone(small):
    model, _, tokenizer = small
    prompts, features = PROMPTS["ends in text"], random_features([2, 1], 2)
    ids, mask = tokenize(tokenizer, prompts)
    settings = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(None, ids, mask, vision_features=features, **settings)
    for row, prompt in enumerate(prompts):
        one, one_mask = tokenize(tokenizer, [prompt])
        alone = model.generate(
            None, one, one_mask, vision_features=features[row : row + 1], **settings
        )
        new = alone.shape[1] - one.shape[1]
        written = together[row, ids.shape[1] :][:new].tolist()
        assert written == alone[0, one.shape[1] :].tolist()


def test_a_row_that_emits_an_image_token(small):
    """Row 0 says `<image>` and from then on looks at its second picture; row 1 goes on
    with its own first one, as in a full recompute."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon and", "<image>a"])
    features = random_features([2, 1], 2)
    force = Force(row=0, length=ids.shape[1] + 2, token=model.media_token_id)
    wanted = full_recompute(model, features, ids, mask, 10, suppress=False, force=force)
    assert (wanted[0] == model.media_token_id).sum() == 2
    assert (wanted[1] == model.media_token_id).sum() == 1
    result = model.generate(
        None,
        ids,
        mask,
        vision_features=features,
        max_new_tokens=10,
        do_sample=False,
        suppress_tokens=None,
        logits_processor=[force],
    )
    assert torch.equal(result, wanted)
    quiet = full_recompute(model, features, ids, mask, 10)
    assert quiet[1].tolist() == wanted[1].tolist(), "row 1 was disturbed"


@pytest.mark.parametrize("immediate", [True, False])
def test_an_image_token_without_a_picture_reads_no_padding(make_model, immediate):
    """A row that writes one `<image>` more than it has pictures goes on beside a row
    with more of them as it does alone: the zeros that fill it up are not a picture."""
    model, _, tokenizer = make_model(
        gates=1.0, cross_attn_kwargs={"only_attend_immediate_media": immediate}
    )
    prompts = ["<image>a lemon<|endofchunk|><image>", "<image>a"]
    ids, mask = tokenize(tokenizer, prompts)
    features = random_features([2, 1], 2)
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    settings |= {"eos_token_id": len(tokenizer) + 5}  # never

    def logits_of(rows, row):
        n = ids[rows].shape[1]
        force = Force(row=row, length=n + 1, token=model.media_token_id)
        out = model.generate(
            None,
            ids[rows],
            mask[rows],
            vision_features=features[rows][:, : 2 if len(ids[rows]) > 1 else 1],
            logits_processor=[force],
            **settings,
        )
        return torch.stack(out.logits)[:, row]

    together, alone = logits_of(slice(0, 2), 1), logits_of(slice(1, 2), 0)
    assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert_clean(model)


def test_more_image_tokens_than_a_row_has_pictures(small):
    """In a batch, too, where the row is filled up with zeros."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a<image>tent", "<image>a<image>lemon"])
    features = random_features([2, 1], 2)
    for spare in (False, True):
        with pytest.raises(ValueError, match="row 1 has 2 <image> tokens, but 1 pict"):
            model(None, ids, mask, vision_features=features, spare_pictures=spare)
    with pytest.raises(ValueError, match="row 1 has 2 <image> tokens, but 1 pict"):
        model.generate(None, ids, mask, vision_features=features)
    # a blind model's zeros are no mistake
    model(None, ids, mask, vision_features=torch.zeros_like(features))
    with pytest.raises(ValueError, match="T_img is 0"):
        model(None, ids, mask, vision_features=features[:, :0])
    assert_clean(model)


def test_two_texts_in_turn_keep_their_own_images(small):
    """Each cache says where `<image>` stood in its text, whichever was read last."""
    model, _, tokenizer = small
    one, _ = tokenize(tokenizer, ["<image>a lemon and"])
    two, _ = tokenize(tokenizer, ["<image>a<image>a"])
    rest, _ = tokenize(tokenizer, ["a tent"])
    features = random_features(2, 2)[:1]
    go_on = {"use_cache": True, "clear_conditioned_layers": False}
    answers = []
    with torch.no_grad():
        model.cache_media(one, None, features, spare_pictures=True)
        for between in (False, True):
            first, second = DynamicCache(), DynamicCache()
            model(None, one, past_key_values=first, **go_on)
            if between:
                model(None, two, past_key_values=second, **go_on)
            out = model(None, rest, past_key_values=first, **go_on)
            answers.append(out.logits)
        model.uncache_media()
    assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-5)


def test_a_text_follows_the_cached_one_and_not_the_last(small):
    """After `cache_media` texts may be read in turn, each as if it were the first."""
    model, _, tokenizer = small
    prompt, _ = tokenize(tokenizer, ["<image>a lemon"])
    longer, _ = tokenize(tokenizer, ["<image>a tent<image>a lemon and"])
    rest, _ = tokenize(tokenizer, ["a tent", "a lemon"])  # two rows, one of pictures
    features = random_features(2, 2)[:1]
    with torch.no_grad():
        model.cache_media(prompt, None, features, spare_pictures=True)
        keep = {"clear_conditioned_layers": False}
        wanted = model(None, rest, **keep).logits
        model(None, longer, **keep)
        assert_close(model(None, rest, **keep).logits, wanted)
        model.uncache_media()


@pytest.mark.parametrize("every", [0, -1, 4, 99])
def test_layers_of_which_none_would_read_a_picture(make_model, every):
    with pytest.raises(ValueError, match=f"every_n_layers is {every}, of 3 layers"):
        make_model(cross_attn_every_n_layers=every)


def test_a_tower_that_learns_gets_a_gradient(small):
    model, processor, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon"])
    pixels = torch.rand(1, 1, 1, 3, 32, 32)
    tower = list(model.vision_encoder.parameters())
    assert not any(p.requires_grad for p in tower), "it is frozen at first"
    model.vision_encoder.requires_grad_(True)
    model(pixels, ids, mask, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower)
    with torch.no_grad():
        assert not model(pixels, ids, mask).logits.requires_grad


def assert_logits_are_recomputed(model, features, prompt_mask, out, copies):
    """Every logit that decoding used equals `forward` on the finished text."""
    features = features.repeat_interleave(copies, dim=0)
    new = out.sequences.shape[1] - prompt_mask.shape[1]
    mask = torch.cat(
        (
            prompt_mask.repeat_interleave(copies, dim=0),
            prompt_mask.new_ones(1, new).expand(len(features), -1),
        ),
        dim=1,
    )
    with torch.no_grad():
        logits = model(None, out.sequences, mask, vision_features=features).logits
    after_end = (out.sequences == model.eoc_token_id).cumsum(dim=1)  # (B, T_txt)
    n_prompt = prompt_mask.shape[1]
    for step, used in enumerate(out.logits):
        ended = after_end[:, n_prompt + step - 1] > after_end[:, n_prompt - 1]
        here = logits[:, n_prompt + step - 1]
        assert_close(used[~ended], here[~ended], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_sampling_uses_the_recomputed_logits(small, num_return_sequences):
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, PROMPTS["ends in text"])
    features, outs = random_features([2, 1], 2), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(
            model.generate(
                None,
                ids,
                mask,
                vision_features=features,
                do_sample=True,
                top_k=5,
                max_new_tokens=8,
                num_return_sequences=num_return_sequences,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    assert len(outs[0].sequences) == 2 * num_return_sequences
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert_logits_are_recomputed(model, features, mask, outs[0], num_return_sequences)


@pytest.mark.parametrize("num_return_sequences", [1, 2, 3])
def test_beams_are_a_full_recompute(small, num_return_sequences):
    """Equal with and without cache, and each score is what `forward` gives the text."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, PROMPTS["ends in text"])
    features = random_features([2, 1], 2)
    settings = {
        "vision_features": features,
        "num_beams": 3,
        "num_return_sequences": num_return_sequences,
        "do_sample": False,
        "max_new_tokens": 6,
        "length_penalty": 0.0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    out = model.generate(None, ids, mask, **settings)
    without = model.generate(None, ids, mask, use_cache=False, **settings)
    assert torch.equal(out.sequences, without.sequences)
    n_prompt = ids.shape[1]
    for i, sequence in enumerate(out.sequences):
        row = i // num_return_sequences
        text, score = sequence[None], 0.0
        extra = mask.new_ones(1, text.shape[1] - n_prompt)
        text_mask = torch.cat((mask[row : row + 1], extra), dim=1)
        with torch.no_grad():
            logits = model(
                None, text, text_mask, vision_features=features[row : row + 1]
            )
        log_p = logits.logits[0].log_softmax(dim=-1)
        for t in range(n_prompt, text.shape[1]):
            score += log_p[t - 1, sequence[t]].item()
            if sequence[t] == model.eoc_token_id:
                break
        assert out.sequences_scores[i].item() == pytest.approx(score, abs=1e-3)


def test_beams_named_in_a_generation_config(small):
    """The other way in which transformers lets a caller ask for beams."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, PROMPTS["ends in text"])
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}
    features = random_features([2, 1], 2)
    wanted = model.generate(None, ids, mask, vision_features=features, **settings)
    config = GenerationConfig(
        eos_token_id=model.eoc_token_id,
        suppress_tokens=[model.media_token_id],
        **settings,
    )
    result = model.generate(
        None, ids, mask, vision_features=features, generation_config=config
    )
    assert torch.equal(result, wanted)


def test_a_prompt_in_chunks_is_a_prompt_at_once(small):
    """Prefill in two calls with the language model's cache; media in each chunk."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["look<image>a lemon<|endofchunk|><image>a tent"])
    features = random_features(1, 2)
    out = model.generate(
        None,
        ids,
        mask,
        vision_features=features,
        max_new_tokens=6,
        do_sample=False,
        prefill_chunk_size=4,
    )
    assert torch.equal(out, full_recompute(model, features, ids, mask, 6))


@pytest.mark.parametrize("emits", [False, True])
def test_steps_by_hand_count_images_row_by_row(small, emits):
    """`forward` with the language model's cache, a few tokens a call, any of which may
    be an image in one row and not in the other; pictures cached, or given each time."""
    model, _, tokenizer = small
    ids, _ = tokenize(tokenizer, ["<image>a lemon and a", "look<image>a tent"])
    more = ids.flip(1).clone()
    more[more == model.media_token_id] = 5
    if emits:
        more[0, 2] = model.media_token_id
    text, features = torch.cat((ids, more), dim=1), random_features([1 + emits, 1], 2)
    more_to_come = {"spare_pictures": True}
    with torch.no_grad():
        wanted = model(None, text, vision_features=features).logits
        for cached in (True, False):
            pictures = {} if cached else {"vision_features": features, **more_to_come}
            if cached:
                model.cache_media(text[:, :3], None, features, **more_to_come)
            past, logits = DynamicCache(), []
            for piece in (text[:, :3], *text[:, 3:].split(2, dim=1)):
                out = model(
                    None,
                    piece,
                    past_key_values=past,
                    use_cache=True,
                    clear_conditioned_layers=False,
                    **pictures,
                )
                logits.append(out.logits)
            model.uncache_media()
            assert_close(torch.cat(logits, dim=1), wanted, rtol=1e-4, atol=1e-4)
    assert_clean(model)


def test_a_cache_whose_text_was_forgotten_is_an_error(small):
    """Not a silent answer about the wrong picture."""
    model, _, tokenizer = small
    ids, _ = tokenize(tokenizer, ["<image>a lemon"])
    features, past = random_features(1, 1), DynamicCache()
    settings = {"vision_features": features, "past_key_values": past, "use_cache": True}
    model(None, ids, **settings)
    with pytest.raises(ValueError, match="clear_conditioned_layers=False"):
        model(None, ids[:, -1:], **settings)
    assert_clean(model)


def test_keys_and_values_of_the_pictures_are_made_once(small):
    """Once per layer and generation, whatever is written, and equal to making them at
    each token."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, PROMPTS["ends in text"])
    blocks = [b for b in model.lang_encoder.gated_cross_attn_layers if b is not None]
    calls, asked = [], {"max_new_tokens": 6, "do_sample": False}
    asked |= {"attention_mask": mask, "vision_features": random_features([2, 1], 2)}
    asked |= {"min_new_tokens": 6}
    hooks = [
        b.attn.to_kv.register_forward_hook(lambda *_: calls.append(1)) for b in blocks
    ]
    kept = model.generate(None, ids, **asked)
    assert len(calls) == len(blocks)
    calls.clear()
    made_anew = model.generate(None, ids, keep_keys_values=False, **asked)
    assert len(calls) == 6 * len(blocks)
    for hook in hooks:
        hook.remove()
    assert torch.equal(kept, made_anew)


def test_a_cache_that_was_passed_in_is_left_as_it_was(small):
    """`generate` goes on from it, twice, to the same answer."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["look<image>a lemon<|endofchunk|><image>a tent"])
    asked = {"vision_features": random_features(1, 2), "do_sample": False}
    asked |= {"max_new_tokens": 6, "attention_mask": mask}
    wanted = model.generate(None, ids, **asked)
    past = DynamicCache()
    with torch.no_grad():
        pictures = {"vision_features": asked["vision_features"], "spare_pictures": True}
        model(None, ids[:, :5], past_key_values=past, **pictures)
    before = [layer.keys.clone() for layer in past.layers]
    for _ in range(2):
        assert torch.equal(
            model.generate(None, ids, past_key_values=past, **asked), wanted
        )
    assert past.get_seq_length() == 5
    after = [layer.keys for layer in past.layers]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_generate_refuses_while_pictures_are_cached(small):
    """And what was cached is still there afterwards."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS)
    model.cache_media(ids, random_pixels([2, 1], 2))
    with pytest.raises(ValueError, match="uncache_media"):
        model.generate(random_pixels([2, 1], 2), ids, mask)
    assert model.lang_encoder.is_conditioned()
    model.uncache_media()
    assert_clean(model)


def test_generate_stops_and_stays_quiet_by_default(small):
    """It ends at `<|endofchunk|>`, pads after it, and never says `<image>`."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a", "<image>this is"])
    end = Force(row=0, length=ids.shape[1] + 1, token=model.eoc_token_id)
    out = model.generate(
        random_pixels(2, 1),
        ids,
        mask,
        max_new_tokens=5,
        do_sample=False,
        logits_processor=[end],
    )
    new = out[0, ids.shape[1] :].tolist()
    assert new[1] == model.eoc_token_id
    assert set(new[2:]) <= {model.lang_encoder.config.pad_token_id}
    with torch.no_grad():  # the strongest wish for <image> is not granted
        model.lang_encoder.get_output_embeddings().weight[model.media_token_id] *= 50
    quiet = model.generate(random_pixels(2, 1), ids, mask, max_new_tokens=5)
    assert not (quiet[:, ids.shape[1] :] == model.media_token_id).any()


# ---------------------------------------------------------------------- save and load


@pytest.fixture
def saved(backbones, tmp_path):
    """A Flamingo made by `build_flamingo`, and the folder that it was saved to."""
    model, _, tokenizer = build_flamingo(
        "tiny",
        clip_vision_encoder_path=backbones["clip"],
        lang_encoder_path=backbones["opt"],
        tokenizer_path=backbones["opt"],
        **SMALL,
    )
    open_gates(model)
    save_flamingo(model, tmp_path / "saved")
    return model, tokenizer, tmp_path / "saved"


def test_round_trip(saved):
    model, tokenizer, folder = saved
    loaded, _, _ = load_flamingo(folder)
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels([2, 1], 2)
    with torch.no_grad():
        assert torch.equal(
            loaded(pixels, ids, mask).logits, model(pixels, ids, mask).logits
        )
    assert not loaded.training
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "flamingo.safetensors",
    ]
    names = load_file(folder / "flamingo.safetensors")
    assert not any("old_decoder" in n or "vision_encoder" in n for n in names)
    assert names["new_embeddings"].shape == (2, D_TXT)


def test_round_trip_in_half_precision(saved):
    model, tokenizer, folder = saved
    whole = (folder / "flamingo.safetensors").stat().st_size
    save_flamingo(model, folder, dtype=torch.float16)
    assert (folder / "flamingo.safetensors").stat().st_size < 0.6 * whole
    loaded, _, _ = load_flamingo(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels([2, 1], 2)
    with torch.no_grad():
        logits = loaded(pixels, ids, mask).logits
        assert_close(logits, model(pixels, ids, mask).logits, rtol=0.05, atol=0.05)


def test_what_was_unfrozen_is_saved_too(saved):
    """And is still unfrozen when it is back, so that it is not lost the next time."""
    model, tokenizer, folder = saved
    layer = model.lang_encoder._get_decoder_layers()[0].decoder_layer
    for module in (layer.self_attn.q_proj, model.vision_encoder):
        module.requires_grad_(True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels([2, 1], 2)
    for again in ("once", "twice"):
        save_flamingo(model, folder / again)
        loaded, _, _ = load_flamingo(folder / again)
        with torch.no_grad():
            wanted = model(pixels, ids, mask).logits
            assert torch.equal(loaded(pixels, ids, mask).logits, wanted)
        model = loaded


@pytest.mark.parametrize("way", ["train", "a loop of one's own"])
def test_what_was_unfrozen_trained_and_frozen_again_is_saved(saved, way):
    """And is frozen, and still known, when it is back."""
    model, tokenizer, folder = saved
    before = copy.deepcopy(model)
    layer = model.lang_encoder._get_decoder_layers()[0].decoder_layer
    parts = (layer.self_attn.q_proj, model.vision_encoder)
    for part in parts:
        part.requires_grad_(True)
    pixels = random_pixels([2, 1], 2)
    if way == "train":
        texts = ["a lemon", "a tent"]
        how = {"n_steps": 2, "lr": 1e-2, "report": lambda line: None}
        train(model, tokenizer, pixels[0], texts, **how)
    else:
        model(pixels, **labelled_batch(model, tokenizer)).loss.backward()
        torch.optim.SGD([q for p in parts for q in p.parameters()], lr=1.0).step()
    for part in parts:
        part.requires_grad_(False)
    ids, mask = tokenize(tokenizer, TEXTS)
    with torch.no_grad():
        wanted = model(pixels, ids, mask).logits
        assert not torch.equal(before(pixels, ids, mask).logits, wanted)
    names = set(trained_tensors(before))
    for again in ("once", "twice"):
        model = copy.deepcopy(model)
        save_flamingo(model, folder / again)
        model, _, _ = load_flamingo(folder / again)
        assert not any(p.requires_grad for p in model.vision_encoder.parameters())
        with torch.no_grad():
            assert torch.equal(model(pixels, ids, mask).logits, wanted)
    assert names < set(trained_tensors(model))


@pytest.mark.parametrize("spoil", ["nan", "inf", "half"])
def test_what_is_not_finite_replaces_nothing(saved, spoil):
    """The tensor is named; in half precision a number may be too large."""
    model, _, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    number = 1e5 if spoil == "half" else float(spoil)
    model.perceiver.latents.data[0, 0] = number
    dtype = torch.float16 if spoil == "half" else None
    with pytest.raises(ValueError, match="not saved to .*perceiver.latents holds"):
        save_flamingo(model, folder, dtype)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if spoil == "half":
        save_flamingo(model, folder)


@pytest.mark.parametrize("n_done", [0, 1])
def test_a_save_that_is_killed_is_never_half_of_each(saved, monkeypatch, n_done):
    """New weights with the old config would load, and be built in another way."""
    model, _, folder = saved
    replace, done = os.replace, []

    def killed(*paths):
        if len(done) == n_done:
            raise KeyboardInterrupt
        done.append(replace(*paths))

    model.config.built_with["only_attend_immediate_media"] = False
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_flamingo(model, folder)
    with pytest.raises(OSError, match="no flamingo.safetensors and config.json"):
        load_flamingo(folder)
    monkeypatch.undo()
    save_flamingo(model, folder)
    assert len(list(folder.iterdir())) == 2
    loaded, _, _ = load_flamingo(folder)
    assert not loaded.config.built_with["only_attend_immediate_media"]


def rewrite(folder, change):
    """Change the saved tensors, {name: tensor}, in place."""
    tensors = load_file(folder / "flamingo.safetensors")
    change(tensors)
    save_file(tensors, folder / "flamingo.safetensors")


def test_weights_of_another_size_are_named(saved):
    _, _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["perceiver_kwargs"]["num_latents"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"perceiver.latents is \(4, 32\), want \(5, 32\)"
    ):
        load_flamingo(folder)


def test_an_unexpected_and_a_missing_tensor_are_named(saved):
    _, _, folder = saved
    rewrite(folder, lambda tensors: tensors.update(stranger=torch.zeros(1)))
    with pytest.raises(ValueError, match="unexpected: stranger"):
        load_flamingo(folder)
    rewrite(folder, lambda tensors: tensors.pop("stranger"))
    rewrite(folder, lambda tensors: tensors.pop("perceiver.norm.bias"))
    with pytest.raises(ValueError, match="missing: perceiver.norm.bias"):
        load_flamingo(folder)


@pytest.mark.parametrize("damage", ["cut short", "empty", "noise", "pickle"])
def test_a_damaged_file_is_an_error_and_runs_no_code(saved, damage, monkeypatch):
    _, _, folder = saved
    path = folder / "flamingo.safetensors"
    whole = path.read_bytes()
    contents = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "noise": bytes(range(256)) * 20,
        "pickle": pickle.dumps(Bomb()),
    }
    path.write_bytes(contents[damage])
    monkeypatch.delenv("FLAMINGO_BOMB", raising=False)
    with pytest.raises(OSError, match="flamingo.safetensors"):
        load_flamingo(folder)
    assert "FLAMINGO_BOMB" not in os.environ


@pytest.mark.parametrize("gone", ["config.json", "flamingo.safetensors", "."])
def test_a_missing_file_or_folder_is_named(saved, gone):
    _, _, folder = saved
    shutil.rmtree(folder) if gone == "." else (folder / gone).unlink()
    message = "no flamingo.safetensors and config.json in .*saved"
    with pytest.raises(OSError, match=message):
        load_flamingo(folder)


def test_a_broken_config_is_named(saved):
    _, _, folder = saved
    (folder / "config.json").write_text('{"size": "tiny", ')
    with pytest.raises((ValueError, OSError), match="config.json"):
        load_flamingo(folder)


@pytest.mark.parametrize("change", [{"hidden_size": 48, "word_embed_proj_dim": 48}, {}])
def test_another_language_model_is_refused(saved, tmp_path, change):
    """One of another width, and one of the same size with other weights."""
    _, _, folder = saved
    other = save_language_model(tmp_path / "other", opt_config(**change), seed=1)
    with pytest.raises(ValueError, match="with the lang_encoder 'opt' .* is 'other'"):
        load_flamingo(folder, lang_encoder_path=other)
    load_flamingo(folder)


def test_another_vision_encoder_is_refused(saved, tmp_path):
    _, _, folder = saved
    other = save_clip(tmp_path / "eyes", seed=1)
    with pytest.raises(ValueError, match="with the vision_encoder 'clip' .* is 'eyes'"):
        load_flamingo(folder, clip_vision_encoder_path=other)


def test_a_model_without_a_size_is_saved_too(make_model, backbones, tmp_path):
    """From `create_model_and_transforms`: the config names backbones and sizes."""
    model, _, tokenizer = make_model(gates=1.0)
    save_flamingo(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lang_encoder_path"] == backbones["opt"]
    assert config["perceiver_kwargs"] == SMALL["perceiver_kwargs"]
    assert config["backbones"]["vision_encoder"]["name"] == "clip"
    loaded, _, _ = load_flamingo(tmp_path)
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels([2, 1], 2)
    with torch.no_grad():
        assert torch.equal(
            loaded(pixels, ids, mask).logits, model(pixels, ids, mask).logits
        )


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", r"saved.config\.json does not describe a model"),
        ('{"size": "tiny", "colour": "pink"}', "cannot build what .*saved .*'colour'"),
    ],
    ids=["a list", "an entry"],
)
def test_a_config_of_something_else_is_named(saved, text, message):
    _, _, folder = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_flamingo(folder)


def test_unknown_size_lists_the_known_ones(saved, monkeypatch):
    with pytest.raises(ValueError, match="'huge'.*'tiny', 'smol', 'paper'"):
        build_flamingo("huge")
    monkeypatch.setenv("FLAMINGO_LITE_SIZE", "enormous")
    with pytest.raises(ValueError, match="'enormous'"):
        build_flamingo()
    _, _, folder = saved
    (folder / "config.json").write_text('{"size": "huge"}')
    with pytest.raises(ValueError, match="'huge'"):
        load_flamingo(folder)


# -------------------------------------------------------------- other language models

COMMON = {"vocab_size": 1200, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
SIZES = {
    "hidden_size": D_TXT,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
KINDS = {
    "llama": LlamaConfig(**SIZES, **COMMON),
    "llama, tied": LlamaConfig(**SIZES, **COMMON, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        n_embd=D_TXT, n_layer=2, n_head=4, initializer_range=0.15, **COMMON
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES, **COMMON),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_language_models(make_model, tmp_path, kind):
    """Closed gates bit-equal, open ones look, and generation is a full recompute."""
    path = save_language_model(tmp_path / "lm", KINDS[kind])
    model, _, tokenizer = make_model(language_model=path)
    plain = language_model_alone(path, model)
    ids, mask = tokenize(tokenizer, TEXTS)
    features = random_features([2, 1], 2)
    with torch.no_grad():
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)  # as `generate` counts them
        wanted = plain(ids, attention_mask=mask, position_ids=places).logits
        logits = model(None, ids, mask, vision_features=features).logits
        assert torch.equal(logits, wanted)
        open_gates(model, 1.0)
        opened = model(None, ids, mask, vision_features=features).logits
        assert not torch.allclose(opened, wanted)
    settings = {"vision_features": features, "max_new_tokens": 8, "do_sample": False}
    result = model.generate(None, ids, mask, use_cache=False, **settings)
    assert torch.equal(model.generate(None, ids, mask, **settings), result)
    assert torch.equal(result, full_recompute(model, features, ids, mask, 8))


def test_an_unknown_kind_asks_for_the_attribute(make_model, tmp_path):
    config = MistralConfig(num_key_value_heads=2, **SIZES, **COMMON)
    path = save_language_model(tmp_path / "lm", config)
    with pytest.raises(ValueError, match="mistral.*decoder_layers_attr_name"):
        make_model(language_model=path)
    model, _, tokenizer = make_model(
        language_model=path, decoder_layers_attr_name="model.layers"
    )
    ids, mask = tokenize(tokenizer, TEXTS)
    with torch.no_grad():
        assert model(random_pixels([2, 1], 2), ids, mask).logits.isfinite().all()


def test_a_wrong_attribute_is_named(backbones):
    with pytest.raises((AttributeError, ValueError), match="no_such_layers"):
        create_model_and_transforms(
            backbones["clip"],
            None,
            backbones["opt"],
            backbones["opt"],
            decoder_layers_attr_name="model.no_such_layers",
        )
