# Written by tools/book/sync.py from book/05_model.ipynb.
# Edit the notebook, not this file.
"""The whole model: vision encoder, Perceiver and a language model of Flamingo layers.

Shapes, from pictures to answers:

    vision_x  (B, T_img, F, 3, H, W)      pixels
    patches   (B, T_img, F, v, d_img)     from the frozen vision encoder
    media     (B, T_img, n, d_img)        from the Perceiver Resampler
    lang_x    (B, T_txt)                  token ids
    logits    (B, T_txt, vocab)           from the language model
"""

__all__ = [
    "as_weights",
    "pixels_to_patches",
    "check_pictures",
    "in_turn",
    "NOT_WITH_PICTURES",
    "asked_for",
    "check_options",
    "with_defaults",
    "Flamingo",
    "train_new_rows_only",
    "token_tables",
]

import copy
from functools import wraps
from inspect import signature
from threading import RLock, get_ident

import torch
from einops import rearrange
from torch import nn
from transformers import PretrainedConfig

from flamingo_lite.perceiver import PerceiverResampler

PIXELS, PATCHES = "B, T_img, F, 3, H, W", "B, T_img, F, v, d_img"


def as_weights(pictures, module):
    """Pixels, patches or latents in the number format of a module's weights."""
    if not pictures.is_floating_point():
        raise ValueError(
            f"pictures are {pictures.dtype}: give floats, as the image processor does"
        )
    return pictures.to(next(module.parameters(), pictures).dtype)


def pixels_to_patches(visual, pixels):
    """(B, T_img, F, 3, H, W) pixels to (B, T_img, F, v, d_img).

    The tower is frozen unless somebody has unfrozen it: then gradient reaches it.
    """
    if pixels.ndim != 6:
        raise ValueError(f"want ({PIXELS}), got {tuple(pixels.shape)}")
    flat = rearrange(pixels, "B T_img F c H W -> (B T_img F) c H W")
    learns = any(p.requires_grad for p in visual.parameters())
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        tokens = visual(as_weights(flat, visual))[1]  # (B * T_img * F, v, d_img)
    return tokens.unflatten(0, pixels.shape[:3])  # (B, T_img, F, v, d_img)


def check_pictures(
    pictures, media_locations, axes=PATCHES, spare=False, counted=False
):
    """Raise ValueError if these pictures cannot go with this text.

    Args:
        pictures: (B, T_img, F, …) as `axes` says; zeros where there is no picture.
        media_locations: (B, T_all) bool, True at `<image>`.
        spare: a row may have more pictures than `<image>` tokens.
        counted: they were counted before; only shapes are looked at.

    Returns:
        (B,) int64, how many pictures a row has before the zeros that fill it up; None
        if each has T_img, if there are zeros only (a blind model), or if `counted`.
    """
    if pictures.ndim != len(axes.split()):
        raise ValueError(f"want ({axes}), got {tuple(pictures.shape)}")
    B, T_img = pictures.shape[:2]
    if B != len(media_locations):
        raise ValueError(f"pictures for {B} rows, but {len(media_locations)} of text")
    if T_img == 0:
        raise ValueError("T_img is 0: give zeros for a row without pictures")
    if counted:
        return None
    counts = media_locations.sum(dim=1)  # (B,)
    flat = pictures.flatten(2)  # (B, T_img, numbers of one picture)
    shown = (flat.amax(dim=-1) != 0) | (flat.amin(dim=-1) != 0)  # (B, T_img)
    number = torch.arange(T_img, device=counts.device)  # (T_img,)
    left = (shown & (number >= counts[:, None])).sum(dim=1)  # (B,) never seen
    n_pictures = (shown * (number + 1)).amax(dim=1)  # (B,), zeros within them count
    rows = torch.stack((counts, left, n_pictures), dim=1).tolist()
    is_blind = not any(n for _, _, n in rows)
    for row, (count, over, n) in enumerate(rows):
        n = T_img if is_blind else n
        if count > n:
            zeros = "" if n == T_img else ", then zeros, which fill a row up"
            raise ValueError(
                f"row {row} has {count} <image> tokens, but {n} pictures{zeros}"
            )
        if over and not spare:
            raise ValueError(
                f"row {row} has {count} <image> tokens, and {over} pictures too many: "
                "take them out, put zeros in their place, or give forward or "
                "cache_media spare_pictures=True if their <image> is still to come"
            )
    return None if is_blind or all(n == T_img for _, _, n in rows) else n_pictures


class _Turns:
    """Whose turn it is: the layers hold the pictures of one call at a time."""

    def __init__(self):
        self.lock, self.running, self.last = RLock(), False, None

    def __reduce__(self):  # a copied model has layers of its own, and a lock
        return type(self), ()

    def check_who_left(self):
        """Raise ValueError if another thread than this one has left pictures."""
        if self.last not in (None, get_ident()):
            raise ValueError(
                "another thread has left its pictures in the layers (cache_media, or "
                "clear_conditioned_layers=False): go on there, then uncache_media"
            )


def in_turn(method):
    """Let a method of the model have the layers alone: other threads wait."""

    @wraps(method)
    def alone(self, *args, **kwargs):
        turns = self._turns
        with turns.lock:
            if turns.running:
                raise RuntimeError(
                    "the model was called from inside a call of its own, and would "
                    "wait for itself: call it when that is over, or call a copy"
                )
            if self.lang_encoder._use_cached_vision_x:
                turns.check_who_left()
            turns.running = True
            try:
                return method(self, *args, **kwargs)
            finally:
                turns.running = False

    return alone


class _ThreeParts(nn.Module):
    """The parts of a Flamingo, put together.

    Args:
        vision_encoder: a `VisionEncoder`, or anything whose `visual(pixels)` returns
            (pooled, tokens), tokens (pictures, v, d_img).
        lang_encoder: a language model extended with `FlamingoLMMixin`.
        eoc_token_id, media_token_id: ids of `<|endofchunk|>` and of `<image>`.
        vis_dim: d_img.
        cross_attn_every_n_layers: N puts cross-attention before layers N, 2N, …
        gradient_checkpointing: compute the layers of Perceiver and language model again
            in backward, to save memory.
        only_attend_immediate_media: False, tokens see all images before them.
        perceiver_kwargs, cross_attn_kwargs: for `PerceiverResampler` and
            `GatedCrossAttentionBlock`.

    Attributes:
        config: what transformers' tools ask of a model. `config.built_with` is a dict
            that says how to build it again, None if it was put together by hand.
        also_trained: see `note_unfrozen`.
    """

    also_trained = frozenset()

    def __init__(
        self,
        vision_encoder,
        lang_encoder,
        eoc_token_id,
        media_token_id,
        vis_dim,
        cross_attn_every_n_layers=1,
        gradient_checkpointing=False,
        only_attend_immediate_media=True,
        perceiver_kwargs=None,
        cross_attn_kwargs=None,
    ):
        super().__init__()
        self._turns = _Turns()
        self.eoc_token_id, self.media_token_id = eoc_token_id, media_token_id
        self.vis_dim, self.lang_dim = vis_dim, lang_encoder.config.hidden_size
        self.config = PretrainedConfig(hidden_size=self.lang_dim, built_with=None)
        self.vision_encoder = vision_encoder.visual
        self.perceiver = PerceiverResampler(dim=vis_dim, **(perceiver_kwargs or {}))
        self.perceiver.gradient_checkpointing = gradient_checkpointing
        self.lang_encoder = lang_encoder
        self.lang_encoder.init_flamingo(
            media_token_id=media_token_id,
            lang_hidden_size=self.lang_dim,
            vis_hidden_size=vis_dim,
            cross_attn_every_n_layers=cross_attn_every_n_layers,
            gradient_checkpointing=gradient_checkpointing,
            **{"only_attend_immediate_media": only_attend_immediate_media}
            | (cross_attn_kwargs or {}),
        )

    def note_unfrozen(self):
        """Names of backbone parameters that are unfrozen, or were in a forward pass.

        Somebody may have trained and frozen them again, and they must be saved.
        """
        lm = self.lang_encoder
        usual = [*self.perceiver.parameters(), *lm.gated_cross_attn_layers.parameters()]
        tables = lm.get_input_embeddings(), lm.get_output_embeddings()
        held = [table for table in tables if hasattr(table, "rows_that_learn")]
        usual += [table.weight for table in held]  # of others all rows may move
        known = set(map(id, usual))
        for name, p in self.named_parameters():
            if p.requires_grad and id(p) not in known:
                self.also_trained |= {name}
        return self.also_trained

    def train(self, mode=True):
        """Train mode for what is trained; the frozen parts stay in eval mode."""
        super().train(mode)
        self.vision_encoder.eval()
        self.lang_encoder.eval()
        self.lang_encoder.gated_cross_attn_layers.train(mode)
        return self


class _PictureMemory(_ThreeParts):
    """How pictures get into the Flamingo layers, and out again."""

    def alone(self):
        """`with model.alone():` keeps other threads waiting, for several calls."""
        return self._turns.lock

    def _encode_vision_x(
        self, vision_x, vision_features, media_locations, spare=False, counted=False
    ):
        """Leave the latents of the pictures in every layer."""
        self._turns.last = get_ident()
        if torch.is_grad_enabled():
            self.note_unfrozen()
        if (vision_x is None) == (vision_features is None):
            given = "no pictures" if vision_x is None else "pictures given twice"
            raise ValueError(f"{given}: give vision_x or vision_features")
        how = media_locations, PIXELS if vision_features is None else PATCHES
        given = vision_x if vision_features is None else vision_features
        n_pictures = check_pictures(given, *how, spare, counted)  # (B,) or None
        self.lang_encoder._n_pictures = n_pictures
        if vision_features is None:
            vision_features = pixels_to_patches(self.vision_encoder, vision_x)
        patches = as_weights(vision_features, self.perceiver)
        media = self.perceiver(patches)  # (B, T_img, n, d_img)
        media = as_weights(media, self.lang_encoder.gated_cross_attn_layers)
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(media)

    def _check_cached(self, media_locations):
        """Raise ValueError for more `<image>` tokens in a row than cached pictures."""
        media = self.lang_encoder._get_decoder_layers()[0].vis_x
        if len(media) == 1:  # one row of pictures will do for many of text
            media = media.expand(len(media_locations), -1, -1, -1)
        check_pictures(media, media_locations, "B, T_img, n, d_img", spare=True)
        n_pictures = self.lang_encoder._n_pictures  # (B,), of the rows that were cached
        if n_pictures is not None:
            surplus = media_locations.sum(dim=1) > n_pictures  # (B,)
            if surplus.any():
                row = int(surplus.nonzero()[0])
                raise ValueError(f"row {row} has more <image> tokens than pictures")

    def _repeat_rows(self, copies, keep_keys_values=True):
        """Make keys and values of each row's pictures, once, and copy all of it."""
        layers = self.lang_encoder._get_decoder_layers()
        media, locations = layers[0].vis_x, layers[0].media_locations
        media = media.repeat_interleave(copies, dim=0)  # (B * copies, T_img, n, d_img)
        if locations is not None:
            locations = locations.repeat_interleave(copies, dim=0)  # (B * copies, …)
        lm = self.lang_encoder
        if lm._n_pictures is not None:
            lm._n_pictures = lm._n_pictures.repeat_interleave(copies)  # (B * copies,)
        for layer in layers:
            if keep_keys_values and layer.keys_values is None:
                layer.keep_keys_values()
            kept = layer.keys_values  # (B, h, T_img * n, d_head) each
            layer.condition_vis_x(media)
            layer.condition_media_locations(locations)
            if kept is not None:
                layer.keys_values = [t.repeat_interleave(copies, dim=0) for t in kept]


class _PicturesThatStay(_PictureMemory):
    """Pictures that are kept for calls to come, until they are told to go."""

    @in_turn
    def cache_media(
        self, input_ids, vision_x, vision_features=None, spare_pictures=False
    ):
        """Keep pictures, and where `<image>` stands in `input_ids`, for calls to come.

        Until `uncache_media`, `forward` takes no pictures, and must be told
        `clear_conditioned_layers=False`, or it forgets them. With `spare_pictures`,
        there may be more of them than `<image>` in `input_ids`, for those to come.
        """
        locations = input_ids == self.media_token_id  # (B, T_txt)
        self._encode_vision_x(vision_x, vision_features, locations, spare_pictures)
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_media_locations(locations)
            layer.keep_keys_values()
        self.lang_encoder._use_cached_vision_x = True
        self.lang_encoder._cached_text = locations

    def uncache_media(self):
        """Forget all pictures."""
        with self.alone():
            self.lang_encoder.clear_conditioned_layers()
            self.lang_encoder._use_cached_vision_x = False


NOT_WITH_PICTURES = (  # would read a text beside the one that the layers know
    "assistant_early_exit",
    "guidance_scale",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "token_healing",
)


def asked_for(lang_encoder, options, name):
    """An option of `generate`: of the call, its configuration or the model's; None."""
    configs = options.get("generation_config"), lang_encoder.generation_config
    said = [options.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in said if value is not None), None)


def check_options(lang_encoder, options):
    """Raise ValueError for options that do not go with pictures in the layers."""
    for name in NOT_WITH_PICTURES:
        said = asked_for(lang_encoder, options, name)
        is_off = said is None or said is False or (name, said) == ("guidance_scale", 1)
        if not is_off:
            raise ValueError(f"{name} does not go with pictures: leave it out")
    if asked_for(lang_encoder, options, "cache_implementation") == "paged":
        raise ValueError('cache_implementation="paged" does not go with pictures')


def _check_mask(attention_mask, lang_x, n_past=0):
    """Raise ValueError for a mask that is not (B, T_all): what is cached, too."""
    B, T_txt = lang_x.shape
    want = (B, n_past + T_txt)
    if attention_mask is not None and tuple(attention_mask.shape) != want:
        cached = f", {n_past} cached tokens and {T_txt} new ones" if n_past else ""
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, want {want}{cached}"
        )


def _positions(lang_encoder, attention_mask, T_txt):
    """{"position_ids": (B, T_txt)}, which do not count padding, for those that do.

    OPT leaves padding out by itself. Empty, too, without a mask, (B, T_all), or for a
    language model that takes no positions.
    """
    if attention_mask is None or lang_encoder.config.model_type == "opt":
        return {}
    if "position_ids" not in signature(lang_encoder.forward).parameters:
        return {}
    places = attention_mask.long().cumsum(dim=1) - 1  # (B, T_all)
    return {"position_ids": places.clamp(min=0)[:, -T_txt:]}


def _copy_of_cache(cache, copies):
    """A cache of its own, which may grow, with so many copies of each row.

    No gradient reaches what it was made from.
    """
    kept = [t for layer in cache.layers for t in vars(layer).values()]
    tensors = [t for t in kept if isinstance(t, torch.Tensor)]
    own = copy.deepcopy(cache, {id(t): t.detach().clone() for t in tensors})
    if copies > 1:
        own.batch_repeat_interleave(copies)
    return own


def with_defaults(model, options):
    """Options of `generate`, with ours for those that nobody has said.

    Ours stop at `<|endofchunk|>` and bar `<image>`.
    """
    lm, config = model.lang_encoder, options.get("generation_config")
    ours = {
        "suppress_tokens": [model.media_token_id],
        "eos_token_id": model.eoc_token_id,
        "pad_token_id": lm.config.pad_token_id,
    }
    for name in ours:  # what a given configuration says, comes before ours
        said = getattr(config, name, None)
        if said not in (None, getattr(lm.generation_config, name, None)):
            ours[name] = said
    return {**ours, **options}


class Flamingo(_PicturesThatStay):
    """A language model that reads text with pictures in it (Flamingo, section 2)."""

    @in_turn
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
        spare_pictures=False,
        checked=False,
    ):
        """Read pictures and text, and predict every next token.

        Args:
            vision_x: (B, T_img, F, 3, H, W) pixels, or None after `cache_media`.
            lang_x: (B, T_txt) token ids.
            attention_mask: (B, T_txt), 0 at padding. With a cache (B, T_all), of the
                text in `past_key_values`, then of `lang_x`.
            labels: (B, T_txt), -100 where no loss is.
            clear_conditioned_layers: forget the pictures afterwards.
            past_key_values, use_cache: the language model's cache, which grows, as in
                transformers; `generate` works on a copy.
            vision_features: (B, T_img, F, v, d_img), instead of `vision_x`.
            spare_pictures: a row may have more pictures than `<image>`, for those to
                come; without it, only pictures of zeros may be left over.
            checked: the batch is one of `collate`'s: pictures fit, padding is on the
                right. Then a GPU is not asked for its numbers, and never waits.

        Returns: the language model's output, `logits` (B, T_txt, vocab), maybe `loss`.

        Raises: ValueError, pictures or a mask that do not go with the text.
        """
        lm, pictures = self.lang_encoder, (vision_x, vision_features)
        n_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if n_past > 0:
            self._turns.check_who_left()  # where `<image>` stood is still in the layers
        try:
            _check_mask(attention_mask, lang_x, n_past)
            locations = lm._locate_media(lang_x, past_key_values)  # (B, T_all)
            if not lm._use_cached_vision_x:
                self._encode_vision_x(*pictures, locations, spare_pictures, checked)
            elif vision_x is not None or vision_features is not None:
                raise ValueError("pictures are cached: call uncache_media first")
            else:
                self._check_cached(locations)
            if checked and lang_x.device.type != "cpu":
                attention_mask = None  # no token sees what comes after it anyway
            return lm(
                input_ids=lang_x,
                attention_mask=attention_mask,
                media_locations=locations,
                labels=labels,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **_positions(lm, attention_mask, lang_x.shape[1]),
            )
        finally:
            if clear_conditioned_layers:
                self.uncache_media()

    @in_turn
    @torch.no_grad()
    def generate(
        self,
        vision_x,
        lang_x,
        attention_mask=None,
        vision_features=None,
        keep_keys_values=True,
        **kwargs,
    ):
        """Continue the text until `<|endofchunk|>`, without a further `<image>`.

        Args: as `forward`; `keep_keys_values` makes keys and values of the pictures
            once instead of at each token; `**kwargs` go to transformers' `generate`,
            where `eos_token_id` and `suppress_tokens`, also those of a
            `generation_config`, change when to stop and what is barred.

        Returns: (B * num_return_sequences, T_txt + new) ids, the prompt first.

        Raises: ValueError, pictures are cached, an option of NOT_WITH_PICTURES, or
            pictures or a mask that do not go with the text.
        """
        lm = self.lang_encoder
        if lm._use_cached_vision_x:
            raise ValueError("pictures are cached: call uncache_media first")
        check_options(lm, kwargs)
        _check_mask(attention_mask, lang_x)
        how_many = ("num_beams", "num_return_sequences")
        copies = max(asked_for(lm, kwargs, name) or 1 for name in how_many)
        kwargs = with_defaults(self, kwargs)
        writes_image = self.media_token_id not in (kwargs["suppress_tokens"] or ())
        if kwargs.get("past_key_values") is not None:  # the caller's: it would grow
            past = _copy_of_cache(kwargs["past_key_values"], copies)
            kwargs["past_key_values"] = past
        try:
            locations = lang_x == self.media_token_id  # (B, T_txt)
            self._encode_vision_x(vision_x, vision_features, locations, writes_image)
            self._repeat_rows(copies, keep_keys_values)
            return lm.generate(lang_x, attention_mask=attention_mask, **kwargs)
        finally:
            self.uncache_media()


def train_new_rows_only(embedding, rows):
    """Let gradient reach only these rows of an embedding table, (vocab, d_txt).

    Tied input and output embeddings give every row a gradient; the old ones must not
    move. Keep weight decay off this tensor: it needs no gradient to act.
    """
    keep = torch.zeros(len(embedding.weight), 1)  # (vocab, 1)
    keep[rows] = 1.0
    embedding.weight.requires_grad_(True)
    embedding.rows_that_learn = list(rows)
    embedding.weight.register_hook(lambda gradient: gradient * keep.to(gradient))


def token_tables(lang_encoder):
    """The tables with a row for each token: {name: module}, one if they are tied."""
    first = lang_encoder.get_input_embeddings()
    last = lang_encoder.get_output_embeddings()
    tables = {"new_embeddings": first}
    if last is not None and last.weight is not first.weight:
        tables["new_output_embeddings"] = last
    return tables
