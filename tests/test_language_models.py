"""Other language models than OPT: small random ones, all held to the same.

The kinds that the package knows find their layers by themselves; for the others, at the
bottom of the table, the attribute is named, as the error for an unknown kind asks.
"""

import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from conftest import (
    D_TXT,
    SMALL,
    open_gates,
    random_features,
    random_pixels,
    save_language_model,
    tokenize,
)
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from flamingo_lite import (
    build_flamingo,
    load_flamingo,
    make_labels,
    parameter_groups,
    save_flamingo,
)

TEXTS = ["look<image>a lemon<|endofchunk|><image>a tent above", "<image>a bear"]
PROMPTS = ["look<image>a lemon<|endofchunk|><image>this is", "<image>a", "words only"]
COMMON = {"vocab_size": 1200, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
GPT = {"n_embd": D_TXT, "n_layer": 3, "n_head": 2, "initializer_range": 0.15, **COMMON}
SIZES = {
    "hidden_size": D_TXT,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.15,
    **COMMON,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
WINDOW = {**GROUPED, "head_dim": 16, "sliding_window": 5}  # shorter than the texts
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
KINDS = {
    "llama": LlamaConfig(**GROUPED, **UNTIED),
    "llama, tied": LlamaConfig(**GROUPED, **TIED),
    "gpt_neox": GPTNeoXConfig(**SIZES, **UNTIED),
    "gpt_neox, tied": GPTNeoXConfig(**SIZES, **TIED),
    "gpt2": GPT2Config(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=8, **UNTIED),
    "mistral": MistralConfig(**WINDOW, **UNTIED),
    "qwen2": Qwen2Config(**GROUPED, **TIED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16, **UNTIED),
    "gemma": GemmaConfig(**GROUPED, head_dim=16, **UNTIED),
    "gemma3_text": Gemma3TextConfig(**WINDOW, **TIED),
}
UNKNOWN = ["mistral", "qwen2", "qwen3", "gemma", "gemma3_text"]
NAMED = dict.fromkeys(UNKNOWN, "model.layers")  # what the caller has to say


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{kind: folder} of the saved random language models."""
    folder = tmp_path_factory.mktemp("language_models")
    return {
        kind: save_language_model(folder / kind.replace(", ", "_"), config)
        for kind, config in KINDS.items()
    }


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def build(make_model, paths, kind):
    """A function that makes a small Flamingo around a language model of this kind."""

    def build(**kwargs):
        named = {"decoder_layers_attr_name": NAMED.get(kind)}
        return make_model(language_model=paths[kind], **named, **kwargs)

    return build


def plain_language_model(path, model):
    """The language model alone, with the rows of the new tokens."""
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    plain.set_input_embeddings(model.lang_encoder.get_input_embeddings())
    plain.set_output_embeddings(model.lang_encoder.get_output_embeddings())
    return plain


def new_rows(model):
    return sorted([model.eoc_token_id, model.media_token_id])


def moved_rows(now, before):
    return (now != before).any(dim=1).nonzero().flatten().tolist()


def places(plain, mask):
    """Padding has none, as in `generate`; OPT leaves it out by itself."""
    takes = "position_ids" in signature(plain.forward).parameters
    if not takes or plain.config.model_type == "opt":
        return {}
    return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_closed_gates_change_nothing_and_open_ones_look(build, paths, kind, side):
    """Bit for bit, also after `train()`; then a picture changes what is behind it."""
    model, _, tokenizer = build()
    plain = plain_language_model(paths[kind], model)
    ids, mask = tokenize(tokenizer, TEXTS, side)
    first, other = (random_features([2, 1], 2, seed=seed) for seed in (1, 2))
    other[:, 0] = first[:, 0]  # only the second picture, of row 0, is another
    behind = (ids == model.media_token_id).cumsum(dim=1) == 2  # (B, T_txt)
    with torch.no_grad():
        told = {"attention_mask": mask, **places(plain, mask)}
        wanted = plain(ids, use_cache=False, **told).logits
        for mode in (True, False):
            model.train(mode)
            logits = model(None, ids, mask, vision_features=first).logits
            assert torch.equal(logits, wanted)
        open_gates(model, 1.0)
        one, two = (
            model(None, ids, mask, vision_features=x).logits for x in (first, other)
        )
    changed = (one != two).any(dim=-1)  # (B, T_txt)
    assert torch.equal(changed, behind & mask.bool())
    assert not torch.allclose(one, wanted)


@torch.no_grad()
def alone(model, features, ids, n_tokens):
    """Greedy decoding of one row: no cache, no padding, the whole text every time."""
    for _ in range(n_tokens):
        scores = model(None, ids[None], vision_features=features[None]).logits[0, -1]
        scores[model.media_token_id] = -torch.inf
        ids = torch.cat((ids, scores.argmax()[None]))
        if ids[-1] == model.eoc_token_id:
            break
    return ids.tolist()


def test_generation_with_all_caches_is_each_row_alone(build):
    """Left-padded rows with two, one and no images; cached, not cached, one by one."""
    model, _, tokenizer = build(gates=1.0)
    ids, mask = tokenize(tokenizer, PROMPTS)
    written = []
    for seed in range(3):
        features = random_features([2, 1, 0], 2, seed=seed)
        settings = {"vision_features": features, "max_new_tokens": 10}
        cached = model.generate(None, ids, mask, do_sample=False, **settings)
        whole = model.generate(
            None, ids, mask, do_sample=False, use_cache=False, **settings
        )
        assert torch.equal(cached, whole)
        for row in range(3):
            n_pad = int((mask[row] == 0).sum())
            wanted = alone(model, features[row], ids[row, n_pad:], 10)
            assert cached[row, n_pad:][: len(wanted)].tolist() == wanted
        written.append(cached[:2].tolist())
    assert written.count(written[0]) < 3, "the pictures do nothing"


def test_one_step_moves_only_what_is_trained(build):
    """Every frozen tensor stays bit for bit; of each embedding table, two rows move."""
    model, _, tokenizer = build(gates=0.5)
    lm = model.lang_encoder
    tables = {
        name: module.weight
        for name, module in (
            ("input", lm.get_input_embeddings()),
            ("output", lm.get_output_embeddings()),
        )
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = {name: table.detach().clone() for name, table in tables.items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2), lr=1e-2)
    ids, mask = tokenize(tokenizer, TEXTS, "right")
    labels = make_labels(ids, model.media_token_id, model.eoc_token_id, mask)
    features = random_features([2, 1], 2)
    losses = []
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(None, ids, mask, labels, vision_features=features).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for name, table in tables.items():
        assert moved_rows(table, old[name]) == new_rows(model), name
    pointers = {table.data_ptr() for table in tables.values()}
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in pointers:
            moved = not torch.equal(tensor, before[name])
            assert moved == (tensor.data_ptr() in trained), name


def test_gradient_checkpointing_changes_no_gradient(build):
    results = []
    for checkpointing in (False, True):
        model, _, tokenizer = build(gates=0.5, gradient_checkpointing=checkpointing)
        calls = []
        for layer in model.lang_encoder.old_decoder_blocks:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        ids, mask = tokenize(tokenizer, TEXTS, "right")
        features = random_features([2, 1], 2)
        model.train()
        loss = model(None, ids, mask, ids, vision_features=features).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((len(calls), gradients))
    (once, plain), (twice, gradients) = results
    assert twice == 2 * once
    for name, gradient in plain.items():
        assert_close(gradients[name], gradient, msg=name)


def without_pad_token(path):
    """Take the padding token out of a tokenizer: Llama's and GPT-2's have none."""
    config = Path(path) / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("pad_token")
    config.write_text(json.dumps(settings))


@pytest.mark.parametrize("has_pad", [True, False], ids=["pad", "no pad"])
def test_saved_and_loaded_it_is_the_same(backbones, tmp_path, kind, has_pad):
    """Every logit, also those of the new tokens, whose rows were random when built."""
    path = save_language_model(tmp_path / "lm", KINDS[kind])
    if not has_pad:
        without_pad_token(path)
    named = {"decoder_layers_attr_name": NAMED[kind]} if kind in NAMED else {}
    model, _, tokenizer = build_flamingo(
        "tiny",
        clip_vision_encoder_path=backbones["clip"],
        lang_encoder_path=path,
        tokenizer_path=path,
        **named,
        **SMALL,
    )
    open_gates(model)
    save_flamingo(model, tmp_path / "saved")
    torch.manual_seed(1)
    loaded, _, _ = load_flamingo(tmp_path / "saved")
    ids, mask = tokenize(tokenizer, TEXTS)
    pixels = random_pixels([2, 1], 2)
    with torch.no_grad():
        logits = loaded(pixels, ids, mask).logits
        assert torch.equal(logits, model(pixels, ids, mask).logits)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_kind_asks_for_the_attribute(make_model, paths, kind):
    with pytest.raises(ValueError, match=f"{kind}.*decoder_layers_attr_name"):
        make_model(language_model=paths[kind])
