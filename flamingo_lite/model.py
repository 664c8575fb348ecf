"""The whole model: vision encoder, Perceiver and a language model of Flamingo layers."""

import json
import os
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import flamingo_lite
from flamingo_lite.layers import FlamingoLMMixin, extend_instance
from flamingo_lite.perceiver import PerceiverResampler
from flamingo_lite.vision import load_vision_encoder

DATA = Path(flamingo_lite.__file__).parents[1] / "data"
SIZES = {
    "tiny": {
        "clip_vision_encoder_path": f"local-dir:{DATA / 'tiny_clip'}",
        "clip_vision_encoder_pretrained": None,
        "lang_encoder_path": str(DATA / "tiny_opt"),
        "tokenizer_path": str(DATA / "tiny_opt"),
        "perceiver_kwargs": {"depth": 2, "num_latents": 16, "heads": 4, "dim_head": 48},
        "cross_attn_kwargs": {"heads": 4, "dim_head": 48},
    },
    "paper": {
        "clip_vision_encoder_path": "ViT-L-14",
        "clip_vision_encoder_pretrained": "openai",
        "lang_encoder_path": "facebook/opt-125m",
        "tokenizer_path": "facebook/opt-125m",
    },
}
DECODER_LAYERS = {
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
}


class Flamingo(nn.Module):
    """A language model that reads text with pictures in it (Flamingo, section 2).

    Args:
        vision_encoder: a `VisionEncoder`, or anything whose `visual(pixels)` returns
            (pooled, tokens), tokens (pictures, v, d_img).
        lang_encoder: a language model extended with `FlamingoLMMixin`.
        eoc_token_id: id of `<|endofchunk|>`.
        media_token_id: id of `<image>`.
        vis_dim: d_img.
        cross_attn_every_n_layers: N puts cross-attention before layers N, 2N, …
        gradient_checkpointing: recompute decoder layers in backward, to save memory.
        perceiver_kwargs: for `PerceiverResampler`.
        cross_attn_kwargs: for `GatedCrossAttentionBlock`.
    """

    def __init__(
        self,
        vision_encoder,
        lang_encoder,
        eoc_token_id,
        media_token_id,
        vis_dim,
        cross_attn_every_n_layers=1,
        gradient_checkpointing=False,
        perceiver_kwargs=None,
        cross_attn_kwargs=None,
    ):
        super().__init__()
        self.eoc_token_id = eoc_token_id
        self.media_token_id = media_token_id
        self.vis_dim = vis_dim
        self.lang_dim = lang_encoder.config.hidden_size
        self.vision_encoder = vision_encoder.visual
        self.perceiver = PerceiverResampler(dim=vis_dim, **(perceiver_kwargs or {}))
        self.lang_encoder = lang_encoder
        self.lang_encoder.init_flamingo(
            media_token_id=media_token_id,
            lang_hidden_size=self.lang_dim,
            vis_hidden_size=vis_dim,
            cross_attn_every_n_layers=cross_attn_every_n_layers,
            gradient_checkpointing=gradient_checkpointing,
            **(cross_attn_kwargs or {}),
        )

    def train(self, mode=True):
        """Train mode for what is trained; the frozen parts stay in eval mode."""
        super().train(mode)
        self.vision_encoder.eval()
        self.lang_encoder.eval()
        self.lang_encoder.gated_cross_attn_layers.train(mode)
        return self

    def forward(
        self,
        vision_x,
        lang_x,
        attention_mask=None,
        labels=None,
        clear_conditioned_layers=True,
        past_key_values=None,
        use_cache=False,
        vision_features=None,
    ):
        """Read pictures and text, and predict every next token.

        Args:
            vision_x: (B, T_img, F, 3, H, W) pixels; None with `vision_features`, or after
                `cache_media`.
            lang_x: (B, T_txt) token ids.
            attention_mask: (B, T_txt), 0 at padding.
            labels: (B, T_txt), -100 where no loss is wanted; see `make_labels`.
            clear_conditioned_layers: forget the pictures afterwards.
            past_key_values, use_cache: the language model's cache.
            vision_features: (B, T_img, F, v, d_img), as the vision encoder gives them.

        Returns:
            The language model's output: `loss` if there are labels, `logits`
            (B, T_txt, vocab).

        Raises:
            ValueError: a row has more `<image>` than pictures, or there are none at all.
        """
        if not self.lang_encoder._use_cached_vision_x:
            self._encode_vision_x(vision_x, vision_features, lang_x)
        elif vision_x is not None or vision_features is not None:
            raise ValueError("pictures are cached already: call uncache_media first")
        try:
            return self.lang_encoder(
                input_ids=lang_x,
                attention_mask=attention_mask,
                labels=labels,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
        finally:
            if clear_conditioned_layers:
                self.lang_encoder.clear_conditioned_layers()

    @torch.no_grad()
    def generate(
        self, vision_x, lang_x, attention_mask=None, vision_features=None, **kwargs
    ):
        """Continue the text, until `<|endofchunk|>` unless told otherwise.

        Args: as `forward`; `**kwargs` go to transformers' `generate`.

        Returns:
            (B * num_return_sequences, T_txt + new) ids, the prompt first.
        """
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        kwargs.setdefault("eos_token_id", self.eoc_token_id)
        kwargs.setdefault("pad_token_id", self.lang_encoder.config.pad_token_id)
        kwargs.setdefault("suppress_tokens", [self.media_token_id])
        self._encode_vision_x(vision_x, vision_features, lang_x, copies)
        try:
            return self.lang_encoder.generate(
                input_ids=lang_x, attention_mask=attention_mask, **kwargs
            )
        finally:
            self.uncache_media()

    def _encode_vision_x(self, vision_x, vision_features, lang_x, copies=1):
        """Pictures to latents, (B, T_img, n, d_img), left in every Flamingo layer."""
        if vision_features is None:
            if vision_x is None:
                raise ValueError("no pictures: give vision_x or vision_features")
            if vision_x.ndim != 6:
                raise ValueError(f"want (B, T_img, F, 3, H, W), got {tuple(vision_x.shape)}")
            B, T_img, F = vision_x.shape[:3]
            flat = rearrange(vision_x, "B T_img F c H W -> (B T_img F) c H W")
            with torch.no_grad():
                tokens = self.vision_encoder(flat)[1]  # (B * T_img * F, v, d_img)
            vision_features = tokens.unflatten(0, (B, T_img, F))
        T_img = vision_features.shape[1]
        for row, count in enumerate((lang_x == self.media_token_id).sum(dim=1).tolist()):
            if count > T_img:
                raise ValueError(f"row {row} has {count} <image> tokens, but {T_img} pictures")
        media = self.perceiver(vision_features)  # (B, T_img, n, d_img)
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(media.repeat_interleave(copies, dim=0))

    def cache_media(self, input_ids, vision_x, vision_features=None):
        """Keep pictures, and where `<image>` stands in `input_ids`, for calls to come."""
        self._encode_vision_x(vision_x, vision_features, input_ids)
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_media_locations(input_ids == self.media_token_id)
        self.lang_encoder._use_cached_vision_x = True

    def uncache_media(self):
        """Forget what `cache_media` kept."""
        self.lang_encoder.clear_conditioned_layers()
        self.lang_encoder._use_cached_vision_x = False


def create_model_and_transforms(
    clip_vision_encoder_path,
    clip_vision_encoder_pretrained,
    lang_encoder_path,
    tokenizer_path,
    cross_attn_every_n_layers=1,
    use_local_files=False,
    decoder_layers_attr_name=None,
    freeze_lm_embeddings=False,
    cache_dir=None,
    **flamingo_kwargs,
):
    """Load the backbones, freeze them, and put a new Flamingo around them.

    Args:
        clip_vision_encoder_path, clip_vision_encoder_pretrained: see `load_vision_encoder`.
        lang_encoder_path, tokenizer_path: names on the hub, or folders in its format.
        cross_attn_every_n_layers: N puts cross-attention before layers N, 2N, …
        use_local_files: never ask the network.
        decoder_layers_attr_name: where the language model keeps its decoder layers.
        freeze_lm_embeddings: do not train the embeddings of the two new tokens either.
        cache_dir: where downloads are kept.
        **flamingo_kwargs: for `Flamingo`.

    Returns:
        Flamingo, image processor (PIL picture to (3, H, W)), tokenizer.

    Raises:
        OSError: a backbone is not here and cannot be fetched.
        ValueError: the language model's kind is unknown and its layers were not named.
    """
    vision_encoder, image_processor = load_vision_encoder(
        clip_vision_encoder_path, clip_vision_encoder_pretrained, cache_dir
    )
    where = {"local_files_only": use_local_files, "cache_dir": cache_dir}
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, **where)
        lang_encoder = AutoModelForCausalLM.from_pretrained(
            lang_encoder_path, dtype=torch.float32, **where
        )
    except OSError as error:
        raise OSError(
            f"cannot load the language model {lang_encoder_path!r}. Without a network, give "
            'a folder made by save_pretrained, or use build_flamingo("tiny"), which needs no '
            f"download. transformers says: {error}"
        ) from error
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|endofchunk|>", "<image>"]}
    )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    kind = lang_encoder.config.model_type
    if decoder_layers_attr_name is None and kind not in DECODER_LAYERS:
        raise ValueError(
            f"where does a {kind!r} model keep its decoder layers? Say it with "
            f'decoder_layers_attr_name, e.g. "model.layers" (known: {", ".join(DECODER_LAYERS)})'
        )
    extend_instance(lang_encoder, FlamingoLMMixin)
    lang_encoder.set_decoder_layers_attr_name(
        decoder_layers_attr_name or DECODER_LAYERS[kind]
    )
    lang_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    eoc, media = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    model = Flamingo(
        vision_encoder,
        lang_encoder,
        eoc,
        media,
        vis_dim=vision_encoder.dim,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
        **flamingo_kwargs,
    )
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    if not freeze_lm_embeddings:
        train_new_rows_only(lang_encoder.get_input_embeddings(), [eoc, media])
    return model.train(False), image_processor, tokenizer


def train_new_rows_only(embedding, rows):
    """Let gradient reach only these rows of an embedding table, (vocab, d_txt).

    Tied input and output embeddings give every row a gradient; the old rows must not move.
    Keep weight decay off this tensor: it needs no gradient to act.
    """
    keep = torch.zeros(len(embedding.weight), 1)
    keep[rows] = 1.0
    embedding.weight.requires_grad_(True)
    embedding.weight.register_hook(lambda gradient: gradient * keep.to(gradient))


def build_flamingo(size=None, **kwargs):
    """The short way to a new, untrained Flamingo.

    Args:
        size: "tiny", with the embedded backbones, or "paper", CLIP ViT-L-14 and OPT-125m;
            None asks the environment variable FLAMINGO_LITE_SIZE, and takes "tiny" if it
            is not set.
        **kwargs: for `create_model_and_transforms`, over what the size says.

    Returns:
        Flamingo, image processor, tokenizer.
    """
    size = size or os.environ.get("FLAMINGO_LITE_SIZE", "tiny")
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are {', '.join(map(repr, SIZES))}")
    model, image_processor, tokenizer = create_model_and_transforms(
        **{**SIZES[size], **kwargs}
    )
    model.config = {"size": size, **kwargs}
    return model, image_processor, tokenizer


def trained_tensors(model):
    """What training changes: {name: tensor}, of the embeddings only the two new rows."""
    embedding = model.lang_encoder.get_input_embeddings().weight
    tensors = {
        f"perceiver.{name}": tensor for name, tensor in model.perceiver.state_dict().items()
    }
    for name, tensor in model.lang_encoder.gated_cross_attn_layers.state_dict().items():
        tensors[f"lang_encoder.gated_cross_attn_layers.{name}"] = tensor
    tensors["new_embeddings"] = embedding.data[[model.eoc_token_id, model.media_token_id]]
    return tensors


def save_flamingo(model, folder, dtype=None):
    """Write what was trained, and how the model was built, to a folder.

    Args:
        model: a Flamingo from `build_flamingo`.
        folder: made if it is not there; gets `flamingo.safetensors` and `config.json`.
        dtype: e.g. torch.float16 halves the file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in trained_tensors(model).items()
    }
    temporary = folder / "flamingo.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, folder / "flamingo.safetensors")  # whole, or not there
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def load_flamingo(folder_or_name="tiny"):
    """Build the model that a folder describes and load what was trained.

    Args:
        folder_or_name: a folder from `save_flamingo`, or "tiny" for the embedded one.

    Returns:
        Flamingo in eval mode, image processor, tokenizer.

    Raises:
        OSError: no such folder, or its weights file cannot be read.
        ValueError: the weights are of another size or of another model.
    """
    folder = DATA / "tiny_flamingo" if folder_or_name == "tiny" else Path(folder_or_name)
    weights = folder / "flamingo.safetensors"
    if not weights.is_file() or not (folder / "config.json").is_file():
        raise OSError(f"no flamingo.safetensors and config.json in {folder}")
    config = json.loads((folder / "config.json").read_text())
    model, image_processor, tokenizer = build_flamingo(**config)
    try:
        saved = load_file(weights)
    except SafetensorError as error:
        raise OSError(f"{weights} is damaged or not a safetensors file: {error}") from error
    wanted = trained_tensors(model)
    problems = [f"missing: {name}" for name in wanted.keys() - saved.keys()]
    problems += [f"unexpected: {name}" for name in saved.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(saved[name].shape)}, want {tuple(wanted[name].shape)}"
        for name in wanted.keys() & saved.keys()
        if saved[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:5])
        raise ValueError(f"{weights} does not fit size {config['size']!r}:\n  {shown}")
    embedding = model.lang_encoder.get_input_embeddings().weight
    rows = [model.eoc_token_id, model.media_token_id]
    with torch.no_grad():
        embedding[rows] = saved.pop("new_embeddings").to(embedding.dtype)
    model.load_state_dict(
        {name: tensor.float() for name, tensor in saved.items()}, strict=False
    )
    return model, image_processor, tokenizer
