"""Loading at the edges: names of two things, start tokens, copies, old libraries."""

import copy
import inspect
import io
import json
import pickle
import shutil
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from conftest import (
    D_TXT,
    ROOT,
    SMALL,
    open_gates,
    random_features,
    random_pixels,
    save_language_model,
    tokenize,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

import flamingo_lite
from flamingo_lite import (
    DECODER_LAYERS,
    FlamingoLayer,
    FlamingoLMMixin,
    build_flamingo,
    create_model_and_transforms,
    extend_instance,
    foreign,
    load_flamingo,
    load_language_model,
    loading,
    make_labels,
    make_optimizers,
    parameter_groups,
    put_start_token,
    save_checkpoint,
    save_flamingo,
    smollm2_folder,
    trained_tensors,
)

WHY = "needs open-flamingo: pip install --no-deps -r tests/requirements-parity.txt"
TEXTS = ["look<image>a lemon<|endofchunk|><image>a tent above", "<image>a bear"]


# ------------------------------------------------- a folder beside the shipped name


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, where we are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def latents(model):
    return model.perceiver.latents.detach()


def test_a_saved_folder_goes_before_the_shipped_one(here):
    """And the call says that there are two. A path means the folder, without a word."""
    shipped = latents(load_flamingo("tiny")[0])
    torch.manual_seed(0)
    mine, _, _ = build_flamingo("tiny")
    save_flamingo(mine, "tiny")
    with pytest.warns(UserWarning, match="there are two 'tiny': .*loading the first"):
        assert torch.equal(latents(load_flamingo("tiny")[0]), latents(mine))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in ("./tiny", Path("tiny"), here / "tiny"):
            assert torch.equal(latents(load_flamingo(path)[0]), latents(mine))
        ours = load_flamingo(loading.DATA / "tiny_flamingo")[0]
        assert torch.equal(latents(ours), shipped)


def test_a_folder_that_is_no_model_is_told_and_passed_by(here):
    shipped = latents(load_flamingo("tiny")[0])
    Path("tiny").mkdir()
    with pytest.warns(UserWarning, match="there are two 'tiny': .*no saved model"):
        assert torch.equal(latents(load_flamingo("tiny")[0]), shipped)


@pytest.mark.parametrize("left", ["flamingo.safetensors", "config.json"])
def test_half_a_saved_folder_is_an_error_that_says_there_are_two(here, left):
    save_flamingo(build_flamingo("tiny")[0], "tiny")
    (here / "tiny" / left).unlink()
    with pytest.warns(UserWarning, match="there are two"):
        with pytest.raises(OSError, match="no flamingo.safetensors and config.json"):
            load_flamingo("tiny")


def test_a_folder_named_smol_goes_first_too(here):
    mine, _, _ = build_flamingo("tiny")
    save_flamingo(mine, "smol")
    with pytest.warns(UserWarning, match="there are two 'smol'"):
        assert torch.equal(latents(load_flamingo("smol")[0]), latents(mine))


def test_a_size_without_weights_and_a_saved_folder_as_a_size(here):
    """Each error names the function that does what was meant."""
    with pytest.raises(OSError, match=r"build_flamingo\('paper'\)"):
        load_flamingo("paper")
    save_flamingo(build_flamingo("tiny")[0], "mine")
    with pytest.raises(ValueError, match="no size 'mine'.*load_flamingo"):
        build_flamingo("mine")


def test_shipped_weights_that_are_not_there(here, monkeypatch):
    """An installed package carries the tiny ones only."""
    monkeypatch.setattr(loading, "DATA", here)
    with pytest.raises(OSError, match="give their folder in a clone.*smol_flamingo"):
        load_flamingo("smol")


# --------------------------------------------------------------------- start tokens


def save_tokenizer(folder, **special):
    """A byte-level tokenizer that puts nothing before a text, as GPT-2's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=sorted({*special.values(), "<|sep|>"}),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a lemon, an owl above a tent"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return str(folder)


END = "<|endoftext|>"
SPECIAL = {
    "GPT-2": dict(bos_token=END, eos_token=END, unk_token=END),
    "Qwen": dict(eos_token=END, pad_token=END),
    "Qwen, instructed": dict(eos_token="<|im_end|>", pad_token=END),
    "SmolLM2, instructed": dict(
        bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token=END
    ),
    "BLOOM": dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>"),
    "only an end": dict(eos_token="</s>"),
}
STARTS = dict.fromkeys(SPECIAL, END) | {"BLOOM": "<s>", "only an end": "</s>"}
GPT = {"n_embd": D_TXT, "n_layer": 2, "n_head": 2, "initializer_range": 0.15}


@pytest.fixture
def language_model(tmp_path):
    """A function that saves a small GPT-2 with a tokenizer of this kind: the folder."""

    def make(kind):
        folder = save_language_model(tmp_path / "lm", GPT2Config(vocab_size=500, **GPT))
        save_tokenizer(folder, **SPECIAL[kind])
        return folder

    return make


@pytest.mark.parametrize("kind", SPECIAL)
def test_every_text_gets_a_start_token(make_model, language_model, kind):
    """One, first, before `<image>` too, and after the padding."""
    folder = language_model(kind)
    plain = AutoTokenizer.from_pretrained(folder)
    model, _, tokenizer = make_model(language_model=folder)
    start = tokenizer.convert_tokens_to_ids(STARTS[kind])
    ids = tokenizer("<image>a lemon").input_ids
    assert ids[:2] == [start, model.media_token_id] and ids.count(start) == 1
    for text in ("", "a lemon", "an owl\n\na tent"):
        alone = plain(text).input_ids
        assert alone[:1] != [start] and tokenizer(text).input_ids == [start, *alone]
        assert tokenizer(text, add_special_tokens=False).input_ids == alone
    assert tokenizer("a", "b").input_ids[0] == start
    batch = tokenizer(["a", "a lemon above a tent"], padding=True, padding_side="left")
    for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        assert row[mask.index(1)] == start and mask.index(1) == len(mask) - sum(mask)
    offsets = tokenizer("a lemon", return_offsets_mapping=True).offset_mapping
    assert offsets[1:] == plain("a lemon", return_offsets_mapping=True).offset_mapping
    assert model.config.built_with["start_token"] == STARTS[kind]


def test_a_tokenizer_with_a_start_is_left_alone(make_model, backbones):
    plain = AutoTokenizer.from_pretrained(backbones["opt"])
    model, _, tokenizer = make_model()
    assert tokenizer("a lemon").input_ids == plain("a lemon").input_ids
    assert "start_token" not in model.config.built_with
    assert put_start_token(tokenizer, "</s>") is None  # its own
    assert tokenizer("a lemon").input_ids == plain("a lemon").input_ids
    with pytest.raises(ValueError, match="it puts '</s>'"):
        put_start_token(tokenizer, "<pad>")


def test_a_start_token_can_be_named_and_refused(make_model, language_model):
    folder = language_model("GPT-2")
    _, _, tokenizer = make_model(language_model=folder, start_token="<|sep|>")
    assert tokenizer.decode(tokenizer("a").input_ids) == "<|sep|>a"
    model, _, tokenizer = make_model(language_model=folder, start_token=None)
    assert tokenizer("<image>").input_ids == [model.media_token_id]
    with pytest.raises(ValueError, match="'<nowhere>'"):
        make_model(language_model=folder, start_token="<nowhere>")


def test_no_token_to_put_is_a_warning(make_model, tmp_path):
    folder = save_language_model(tmp_path / "lm", GPT2Config(vocab_size=500, **GPT))
    save_tokenizer(folder)
    with pytest.warns(UserWarning, match="no start token.*start_token="):
        model, _, tokenizer = make_model(language_model=folder)
    assert tokenizer("<image>").input_ids == [model.media_token_id]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(language_model=folder, start_token=None)


@pytest.mark.parametrize("start_token, first", [("auto", END), ("<|sep|>", "<|sep|>")])
def test_a_saved_model_keeps_its_start(
    backbones, language_model, tmp_path, start_token, first
):
    """Loaded, a text begins as it did in training, by either way to build."""
    folder = language_model("GPT-2")
    clip = {"clip_vision_encoder_path": backbones["clip"]}
    clip["clip_vision_encoder_pretrained"] = None
    paths = {"lang_encoder_path": Path(folder), "tokenizer_path": Path(folder)}
    for build in (
        lambda **kwargs: build_flamingo("tiny", **kwargs),
        create_model_and_transforms,
    ):
        built = build(**clip, **paths, **SMALL, start_token=start_token)
        save_flamingo(built[0], tmp_path / "saved")
        for _ in range(2):  # loaded, saved and loaded
            model, _, tokenizer = load_flamingo(tmp_path / "saved")
            assert tokenizer.decode(tokenizer("a").input_ids) == f"{first}a"
            save_flamingo(model, tmp_path / "saved")


def test_a_folder_of_before_is_loaded_as_it_was_trained(
    make_model, language_model, tmp_path
):
    """It says nothing of a start token; nor does OpenFlamingo, which puts none."""
    model, _, _ = make_model(language_model=language_model("GPT-2"))
    save_flamingo(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.pop("start_token") == END
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    config.pop("backbones")
    for loaded in (
        load_flamingo(tmp_path / "saved"),
        load_flamingo(tmp_path / "theirs.pt", **config),
    ):
        ids = loaded[2]("<image>").input_ids
        assert ids == [loaded[0].media_token_id]
    _, _, tokenizer = load_flamingo(tmp_path / "saved", start_token="auto")
    assert tokenizer.decode(tokenizer("a").input_ids) == f"{END}a"


def test_the_stored_weights_need_no_start_token():
    """What they were trained with puts its own."""
    for name in ("tiny", "smol"):
        config = ROOT / "data" / f"{name}_flamingo" / "config.json"
        assert "start_token" not in json.loads(config.read_text())
    tokenizer = load_flamingo("tiny")[2]
    assert tokenizer.decode(tokenizer("a").input_ids) == "</s>a"


# ------------------------------------------------------ kinds of language models

GPT_3 = {**GPT, "n_layer": 3, "vocab_size": 1200}
SIZES = dict(hidden_size=D_TXT, num_hidden_layers=3, num_attention_heads=2)
SIZES |= dict(vocab_size=1200)
MPT = MptConfig(
    d_model=D_TXT,
    n_heads=2,
    n_layers=3,
    max_seq_len=96,
    vocab_size=1200,
    expansion_ratio=2,
    bos_token_id=2,
    eos_token_id=2,
    pad_token_id=1,
    initializer_range=0.15,
)
THEIRS = {
    "opt": OPTConfig(**SIZES, word_embed_proj_dim=D_TXT, ffn_dim=48),
    "llama": LlamaConfig(**SIZES, intermediate_size=48),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "gptj": GPTJConfig(**GPT_3, rotary_dim=8),
    "mpt": MPT,
}


@pytest.mark.parametrize("kind", THEIRS)
def test_the_layers_are_where_openflamingo_finds_them(kind):
    factory = pytest.importorskip("open_flamingo.src.factory", reason=WHY)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(THEIRS[kind])
    assert lm.config.model_type == kind
    assert DECODER_LAYERS[kind] == factory._infer_decoder_layers_attr_name(lm)


def test_all_of_openflamingos_table_is_in_ours():
    factory = pytest.importorskip("open_flamingo.src.factory", reason=WHY)
    theirs = vars(factory)["__KNOWN_DECODER_LAYERS_ATTR_NAMES"]
    assert len(theirs) >= 8
    ours = {kind.replace("_", ""): path for kind, path in DECODER_LAYERS.items()}
    other_names = {"gpt-j": "gptj", "pythia": "gptneox"}
    other_names |= {"gptneoxforcausallm": "gptneox", "mosaicgpt": "mosaicgpt"}
    for name, path in theirs.items():
        assert ours[other_names.get(name, name)] == path, name


@pytest.fixture(scope="module")
def mpt(make_model, tmp_path_factory):
    """A small Flamingo around MPT, the folder of its language model, tokenizer."""
    folder = save_language_model(tmp_path_factory.mktemp("mpt") / "lm", MPT)
    model, _, tokenizer = make_model(language_model=folder, gates=1.0)
    return model, folder, tokenizer


@torch.no_grad()
def test_mpt_with_shut_gates_is_itself_and_open_ones_look(mpt):
    model, folder, tokenizer = mpt
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.set_input_embeddings(model.lang_encoder.get_input_embeddings())
    plain.set_output_embeddings(model.lang_encoder.get_output_embeddings())
    ids, mask = tokenize(tokenizer, TEXTS)
    wanted = plain(ids, attention_mask=mask, use_cache=False).logits
    one, two = (random_features([2, 1], 2, seed=seed) for seed in (1, 2))
    open_gates(model, 0.0)
    assert torch.equal(model(None, ids, mask, vision_features=one).logits, wanted)
    open_gates(model, 1.0)
    logits = [model(None, ids, mask, vision_features=x).logits for x in (one, two)]
    seen = (ids == model.media_token_id).cumsum(dim=1) > 0  # (B, T_txt)
    changed = (logits[0] != logits[1]).any(dim=-1)  # (B, T_txt)
    assert torch.equal(changed & mask.bool(), seen)


@torch.no_grad()
def test_mpt_writes_with_its_cache_what_it_writes_without(mpt):
    model, _, tokenizer = mpt
    ids, mask = tokenize(tokenizer, [*TEXTS, "words only"])
    settings = {"vision_features": random_features([2, 1, 0], 2), "max_new_tokens": 10}
    settings["do_sample"] = False
    cached = model.generate(None, ids, mask, **settings)
    whole = model.generate(None, ids, mask, use_cache=False, **settings)
    assert torch.equal(cached, whole)
    settings["vision_features"] = settings["vision_features"][1:2]
    alone = model.generate(None, ids[1:2, mask[1] == 1], **settings)[0]
    n_pad = int((mask[1] == 0).sum())
    assert torch.equal(alone, cached[1, n_pad:][: len(alone)])


def test_mpt_trains_and_comes_back(mpt, backbones, tmp_path):
    """One step moves what is trained; saved and loaded, every logit is the same."""
    _, folder, _ = mpt
    paths = {"lang_encoder_path": folder, "tokenizer_path": folder}
    model, _, tokenizer = build_flamingo(
        "tiny", clip_vision_encoder_path=backbones["clip"], **paths, **SMALL
    )
    open_gates(model, 0.5)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids, mask = tokenize(tokenizer, TEXTS, "right")
    labels = make_labels(ids, model.media_token_id, model.eoc_token_id, mask)
    assert table_rows_moved_by_a_step(model, ids, mask, labels) == new_rows(model)
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    save_flamingo(model, tmp_path / "saved")
    loaded, _, _ = load_flamingo(tmp_path / "saved")
    pixels = random_pixels([2, 1], 2)
    with torch.no_grad():
        logits = [m.eval()(pixels, ids, mask).logits for m in (model, loaded)]
    assert torch.equal(*logits)


# ------------------------------------------------------------------ copies, pickles


def new_rows(model):
    return sorted([model.eoc_token_id, model.media_token_id])


def table_rows_moved_by_a_step(model, ids, mask, labels):
    """Which rows of the embedding table one step of AdamW moves."""
    table = model.lang_encoder.get_input_embeddings().weight
    before = table.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2), lr=1e-2)
    features = random_features([2, 1], 2)
    model.train()
    model(None, ids, mask, labels, vision_features=features).loss.backward()
    optimizer.step()
    return (table != before).any(dim=1).nonzero().flatten().tolist()


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "torch.save": by_torch}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_the_same_model_and_apart_from_it(small, how):
    """Every logit, its classes, what it generates; and it can be saved."""
    model, _, tokenizer = small
    again = COPIES[how](model)
    assert type(again.lang_encoder) is type(model.lang_encoder)
    ids, mask = tokenize(tokenizer, TEXTS)
    features = random_features([2, 1], 2)
    with torch.no_grad():
        one, two = (
            m(None, ids, mask, vision_features=features).logits for m in (model, again)
        )
    assert torch.equal(one, two)
    settings = dict(vision_features=features, max_new_tokens=5, do_sample=False)
    one, two = (m.generate(None, ids, mask, **settings) for m in (model, again))
    assert torch.equal(one, two)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in again.parameters())
    assert again.config.built_with == model.config.built_with


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("left_by", ["cache_media", "forward"])
def test_a_copy_takes_along_nothing_that_a_call_has_left(small, how, left_by):
    """Neither pictures nor what is kept of them, with or without a gradient."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, ["<image>a lemon", "a<image> tent"])
    features = random_features(2, 1)
    if left_by == "cache_media":
        model.cache_media(ids, None, features)
    else:
        kept = {"clear_conditioned_layers": False, "vision_features": features}
        model(None, ids, mask, **kept)
    twin = COPIES[how](model)
    lm = twin.lang_encoder
    for layer in lm._get_decoder_layers():
        assert layer.vis_x is layer.media_locations is layer.keys_values is None
    assert lm._cached_text is lm._n_pictures is None and not lm._use_cached_vision_x
    assert model.lang_encoder.is_conditioned()
    assert twin(None, ids, mask, vision_features=features).logits.isfinite().all()


@pytest.mark.parametrize("how", COPIES)
def test_of_a_copy_only_the_two_new_rows_learn(small, how):
    """Tensors lose their hooks on the way: the copy gets them anew."""
    model, _, tokenizer = small
    ids, mask = tokenize(tokenizer, TEXTS, "right")
    again = COPIES[how](COPIES[how](model))
    assert table_rows_moved_by_a_step(again, ids, mask, ids) == new_rows(model)


@pytest.mark.parametrize("how", COPIES)
def test_what_is_frozen_stays_frozen_in_a_copy(make_model, how):
    model, _, _ = make_model(freeze_lm_embeddings=True)
    learns = [n for n, p in model.named_parameters() if p.requires_grad]
    again = COPIES[how](model)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == learns
    model, _, _ = make_model()
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in COPIES[how](model).parameters())


class Plain:
    def __init__(self, name):
        self.name = name

    def hello(self):
        return f"hello {self.name}"


class Loud:
    def hello(self):
        return super().hello().upper()


class Twice:
    def hello(self):
        return f"{super().hello()} {super().hello()}"


@pytest.mark.parametrize("how", [*COPIES.values(), copy.copy])
def test_an_object_with_two_mixins_is_copied(how):
    """In their order; and one without is what it was."""
    ann, bob = Plain("ann"), Plain("bob")
    for mixin in (Loud, Twice):
        extend_instance(ann, mixin)
    again = how(ann)
    assert again.hello() == ann.hello() == "HELLO ANN HELLO ANN"
    assert type(again) is type(ann) and again.name == "ann"
    assert type(bob) is Plain and how(bob).hello() == "hello bob"


# ---------------------------------------------------------------- files of other kinds


def test_a_training_checkpoint_says_what_it_is(small, tmp_path):
    model, _, _ = small
    path = tmp_path / "last.pt"
    progress = {"step": 0, "history": [], "settings": {}}
    save_checkpoint(path, model, make_optimizers(model, lr=1e-3), **progress)
    shutil.copy(path, tmp_path / "last.pt.previous")
    for name in ("last.pt", "last.pt.previous"):
        with pytest.raises(ValueError, match="checkpoint of `train`.*save_flamingo"):
            load_flamingo(tmp_path / name)


def test_the_weights_without_their_folder_name_the_folder(small, tmp_path):
    save_flamingo(small[0], tmp_path / "saved")
    with pytest.raises(ValueError, match=f"give its folder, {tmp_path / 'saved'}"):
        load_flamingo(tmp_path / "saved" / "flamingo.safetensors")


def test_a_pickled_model_is_not_run_but_told_from_a_checkpoint(small, tmp_path):
    torch.save(small[0], tmp_path / "model.pt")
    with pytest.raises(OSError, match="folders from save_flamingo"):
        load_flamingo(tmp_path / "model.pt")


# --------------------------------------------------------------------- old libraries


def test_advice_for_an_older_transformers(monkeypatch):
    """The line of pip, not what was just tried; and the version of pyproject.toml."""

    class Old:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise ValueError("Tokenizer class TokenizersBackend does not exist")

    has = foreign.version
    monkeypatch.setattr(loading, "AutoTokenizer", Old)
    monkeypatch.setattr(
        foreign, "version", lambda n: "4.57.1" if n == "transformers" else has(n)
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    need = next(n for n in project["dependencies"] if n.startswith("transformers"))
    with pytest.raises(OSError, match=f"pip install -U '{need}'") as caught:
        load_flamingo("tiny")
    assert "build_flamingo" not in str(caught.value)


@pytest.mark.parametrize(
    "has, old",
    [("5.6.1", True), ("5.6.2", False), ("5.10.0.dev0", False), ("4.57", True)],
)
def test_versions_are_compared_as_numbers(monkeypatch, has, old):
    monkeypatch.setattr(foreign, "version", lambda name: has)
    monkeypatch.setattr(flamingo_lite, "_NEEDS", ["transformers>=5.6.2", "numpy"])
    assert foreign._too_old() == (["transformers>=5.6.2"] if old else [])


def test_no_advice_that_was_just_tried(tmp_path, monkeypatch):
    """A broken folder of ours: the network would not help."""
    shutil.copytree(ROOT / "data" / "tiny_opt", tmp_path / "tiny_opt")
    (tmp_path / "tiny_opt" / "model.safetensors").write_bytes(b"cut")
    settings = {**loading.SIZES["tiny"], "lang_encoder_path": tmp_path / "tiny_opt"}
    monkeypatch.setitem(loading.SIZES, "tiny", settings)
    with pytest.raises(OSError, match="tiny_opt.*does the folder hold all") as caught:
        build_flamingo("tiny")
    assert "build_flamingo" not in str(caught.value)


# -------------------------------------------------------------- the package's own face


def test_dir_shows_every_name_and_module():
    shown = dir(flamingo_lite)
    assert set(flamingo_lite.__all__) <= set(shown) and len(shown) == len(set(shown))
    modules = {path.stem for path in (ROOT / "flamingo_lite").glob("[a-z]*.py")}
    assert modules <= set(shown)
    for name in shown:
        assert getattr(flamingo_lite, name) is not None or name == "__loader__", name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flamingo_lite.nothing  # noqa: B018


def test_the_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flamingo_lite.__version__ == project["version"]


PUBLIC = [extend_instance, FlamingoLayer, FlamingoLMMixin, load_language_model]
PUBLIC += [put_start_token, create_model_and_transforms, build_flamingo]
PUBLIC += [load_flamingo, save_flamingo, trained_tensors, smollm2_folder]


def hinted(function, skip=("self", "args", "kwargs")):
    """The parameters of a function, and "return", that lack a type."""
    for name, parameter in inspect.signature(function).parameters.items():
        plain = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if plain and name not in skip and parameter.annotation is inspect._empty:
            yield name
    if inspect.signature(function).return_annotation is inspect._empty:
        if function.__name__ != "__init__":
            yield "return"


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_public_functions_say_their_types(thing):
    methods = [thing]
    if inspect.isclass(thing):
        every = inspect.getmembers(thing, inspect.isfunction)
        methods = [
            function
            for name, function in every
            if function.__module__ == "flamingo_lite.layers"
            and (name == "__init__" or not name.startswith("_"))
        ]
        assert methods
    for function in methods:
        assert list(hinted(function)) == [], function.__qualname__


def test_openflamingos_arguments_come_first():
    """In their order: a script written for `open_flamingo` needs its import changed."""
    factory = pytest.importorskip("open_flamingo.src.factory", reason=WHY)
    theirs = list(inspect.signature(factory.create_model_and_transforms).parameters)
    ours = list(inspect.signature(create_model_and_transforms).parameters)
    assert ours[: len(theirs) - 1] == theirs[:-1]
