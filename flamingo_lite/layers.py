# Written by tools/book/sync.py from book/04_flamingo_layer.ipynb.
# Edit the notebook, not this file.
"""Flamingo layers: put a gated cross-attention block before a frozen decoder layer."""

__all__ = [
    "extend_instance",
    "FlamingoLayer",
    "FlamingoLMMixin",
]

from functools import cache
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flamingo_lite.cross_attention import GatedCrossAttentionBlock


def extend_instance(obj: object, mixin: type) -> None:
    """Give one object, already made, the methods of `mixin` in front of its own."""
    obj.__class__ = _extended(mixin, type(obj))


@cache
def _extended(mixin, cls):
    return type(cls.__name__, (mixin, cls), {"__reduce_ex__": _reduce})


def _reduce(obj, protocol):
    """For pickle and copy: what to call to make an object like this one."""
    cls, mixins = type(obj), []
    while vars(cls).get("__reduce_ex__") is _reduce:
        mixin, cls = cls.__bases__
        mixins.insert(0, mixin)  # the one that was given first comes first
    # How Python would make it: a function; the class and its arguments; the state.
    _, (_, *args), *state = object.__reduce_ex__(obj, 2)
    return _make_extended, (cls, mixins, *args), *state


def _make_extended(cls, mixins, *args):
    for mixin in mixins:
        cls = _extended(mixin, cls)
    return cls.__new__(cls, *args)


class FlamingoLayer(nn.Module):
    """A gated cross-attention block (or None), then a decoder layer (Flamingo, 2.2).

    The layer is called by the language model's own forward, which knows of no images.
    So images and `<image>` positions are left here before: the layer is *conditioned*.
    """

    def __init__(
        self,
        gated_cross_attn_layer: nn.Module | None,
        decoder_layer: nn.Module,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer
        self.gradient_checkpointing = gradient_checkpointing
        self.vis_x = self.media_locations = self.keys_values = None
        self.use_cached_media = False

    def is_conditioned(self) -> bool:
        """True once images and `<image>` positions are known."""
        return self.vis_x is not None and self.media_locations is not None

    def condition_vis_x(self, vis_x: torch.Tensor | None) -> None:
        """Remember the latents, (B, T_img, n, d_img), or forget them with None."""
        self.vis_x, self.keys_values = vis_x, None

    def keep_keys_values(self) -> None:
        """Make keys and values of the latents now, for all the tokens to come."""
        if self.gated_cross_attn_layer is not None:
            attn = self.gated_cross_attn_layer.attn
            self.keys_values = attn.keys_values(self.vis_x)

    def condition_media_locations(self, media_locations: torch.Tensor | None) -> None:
        """Remember where `<image>` stands, (B, T_all) bool, or forget it with None."""
        self.media_locations = media_locations

    def condition_use_cached_media(self, use_cached_media: bool) -> None:
        """Remember whether the text to come is after all of `media_locations`."""
        self.use_cached_media = bool(use_cached_media)

    def __getstate__(self):
        """For pickle and copy: without the images that somebody has left here."""
        left = dict.fromkeys(("vis_x", "media_locations", "keys_values"))
        return {**super().__getstate__(), **left, "use_cached_media": False}

    def forward(self, lang_x: torch.Tensor, *args, **kwargs) -> Any:
        """(B, T_txt, d_txt) in; what the decoder layer returns, out.

        Raises:
            ValueError: the layer has cross-attention and was not conditioned.
        """
        if self.gated_cross_attn_layer is not None and not self.is_conditioned():
            raise ValueError(
                "no images: condition_vis_x and condition_media_locations come first "
                "(Flamingo.forward and Flamingo.generate do it for you)"
            )
        seen = self.vis_x, self.media_locations, self.use_cached_media, self.keys_values
        caches = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        if self.gradient_checkpointing and torch.is_grad_enabled() and not caches:
            # `seen` is handed over: images may be forgotten before backward runs again.
            rest = seen, args, kwargs
            return checkpoint(self._run, lang_x, *rest, use_reentrant=False)
        return self._run(lang_x, seen, args, kwargs)

    def _run(self, lang_x, seen, args, kwargs):
        if self.gated_cross_attn_layer is not None:
            lang_x = self.gated_cross_attn_layer(lang_x, *seen)  # (B, T_txt, d_txt)
        return self.decoder_layer(lang_x, *args, **kwargs)


class _DecoderLayers(nn.Module):
    """The part of `FlamingoLMMixin` that replaces the decoder layers."""

    def set_decoder_layers_attr_name(self, decoder_layers_attr_name: str) -> None:
        """Say where the list of decoder layers is, e.g. "model.decoder.layers"."""
        self.decoder_layers_attr_name = decoder_layers_attr_name

    def _get_decoder_layers(self):
        return attrgetter(self.decoder_layers_attr_name)(self)

    def _set_decoder_layers(self, layers):
        parent, _, name = self.decoder_layers_attr_name.rpartition(".")
        setattr(attrgetter(parent)(self) if parent else self, name, layers)

    def init_flamingo(
        self,
        media_token_id: int,
        lang_hidden_size: int,
        vis_hidden_size: int,
        cross_attn_every_n_layers: int,
        gradient_checkpointing: bool = False,
        **cross_attn_kwargs,
    ) -> None:
        """Replace every decoder layer by a `FlamingoLayer`.

        Args:
            media_token_id: id of `<image>`.
            lang_hidden_size: d_txt.
            vis_hidden_size: d_img.
            cross_attn_every_n_layers: N puts cross-attention before layers N, 2N, …
            gradient_checkpointing: compute layers again in backward, to save memory.
            **cross_attn_kwargs: for `GatedCrossAttentionBlock`.
        """
        n_layers, N = len(self._get_decoder_layers()), cross_attn_every_n_layers
        if N not in range(1, n_layers + 1):
            raise ValueError(
                f"cross_attn_every_n_layers is {N}, of {n_layers} layers: none would "
                f"read a picture. Want a whole number from 1 to {n_layers}"
            )
        self.media_token_id = media_token_id
        self.old_decoder_blocks = self._get_decoder_layers()
        self.gated_cross_attn_layers = nn.ModuleList(
            GatedCrossAttentionBlock(
                dim=lang_hidden_size, dim_visual=vis_hidden_size, **cross_attn_kwargs
            )
            if number % cross_attn_every_n_layers == 0
            else None
            for number in range(1, len(self.old_decoder_blocks) + 1)
        )
        pairs = zip(self.gated_cross_attn_layers, self.old_decoder_blocks, strict=True)
        layers = [FlamingoLayer(*pair, gradient_checkpointing) for pair in pairs]
        self._set_decoder_layers(nn.ModuleList(layers))
        self.only_attend_immediate_media = cross_attn_kwargs.get(
            "only_attend_immediate_media", True
        )
        self._use_cached_vision_x, self._n_apart = False, 0
        self._cached_text = self._n_pictures = None
        self.initialized_flamingo = True


class _ImageCount(_DecoderLayers):
    """The part of `FlamingoLMMixin` that keeps and clears what the layers remember."""

    def is_conditioned(self) -> bool:
        """True if every layer knows its images."""
        return all(layer.is_conditioned() for layer in self._get_decoder_layers())

    def clear_conditioned_layers(self) -> None:
        """Forget images and positions in every layer."""
        for layer in self._get_decoder_layers():
            layer.condition_vis_x(None)
            layer.condition_media_locations(None)
            layer.condition_use_cached_media(False)
        self._cached_text = self._n_pictures = None

    def _locate_media(self, input_ids, past):
        """(B, T_all) bool: `<image>` in all the text that ends with `input_ids`."""
        n_past = 0 if past is None else int(past.get_seq_length())
        before = self._get_decoder_layers()[0].media_locations  # (B, T_all)
        if n_past == 0:
            # After `cache_media`, a text without images follows the one cached there.
            has_image = (input_ids == self.media_token_id).any()
            follows = self._use_cached_vision_x and not has_image
            before = self._cached_text if follows else None
            self._n_apart = before.shape[1] if follows else 0
        elif before is not None and hasattr(past, "media_text"):
            # The layers know the text read last; this cache may be of another one.
            self._n_apart, before = past.media_text
        return self._after(self._n_apart + n_past, input_ids, before)

    def _after(self, n_before, input_ids, before):
        """(B, n_before + T_txt) bool: of `before` the beginning, then `input_ids`."""
        media_locations = input_ids == self.media_token_id  # (B, T_txt)
        if n_before == 0:
            return media_locations
        if before is None or before.shape[1] < n_before:
            raise ValueError(
                "where was <image> in the text before? Give the whole text, or pass "
                "clear_conditioned_layers=False when you run its beginning"
            )
        B = len(media_locations)
        if len(before) not in (1, B):
            raise ValueError(f"{B} rows of text after a text of {len(before)} rows")
        before = before[:, :n_before].expand(B, -1)
        return torch.cat((before, media_locations), dim=1)

    def _without_surplus(self, media_locations):
        """Let an `<image>` that has no picture open none, (B, T_all) bool or int64.

        A row with fewer pictures than the others ends in padding. If it writes one
        `<image>` more, what follows must not read that: under the immediate rule it
        jumps beyond all pictures, under the other one it does not count.
        """
        if self._n_pictures is None:  # every row has as many pictures as there are
            return media_locations
        number = (media_locations > 0).cumsum(dim=1)  # (B, T_all)
        surplus = (media_locations > 0) & (number > self._n_pictures[:, None])
        beyond = 0
        if self.only_attend_immediate_media:
            beyond = self._get_decoder_layers()[0].vis_x.shape[1] + 1
        return media_locations.long().masked_fill(surplus, beyond)


class FlamingoLMMixin(_ImageCount):
    """What a language model from transformers learns to become part of a Flamingo."""

    initialized_flamingo = False
    when_copied = None  # called with a copy, for what tensors do not take along

    def __init_subclass__(cls):
        """Show the language model's arguments as our own: `generate` looks for them."""
        super().__init_subclass__()

        def forward(self, *args, **kwargs):
            return FlamingoLMMixin.forward(self, *args, **kwargs)

        forward.__signature__ = signature(super().forward)
        cls.forward = forward

    def __getstate__(self):
        """For pickle and copy: without what is known of a text and its images."""
        left = {"_use_cached_vision_x": False, "_n_apart": 0}
        left |= {"_cached_text": None, "_n_pictures": None}
        return {**super().__getstate__(), **left}

    def __setstate__(self, state):
        super().__setstate__(state)  # of copy.deepcopy, or out of a pickle
        if self.when_copied is not None:
            self.when_copied(self)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        media_locations: torch.Tensor | None = None,
        **kwargs,
    ) -> Any:
        """Find `<image>` in `input_ids`, (B, T_txt), tell every layer, run the model.

        With `past_key_values`, `input_ids` goes on with the text that they hold, and so
        does the count of images, row by row. `media_locations`, (B, T_all) bool, may
        also come from outside.
        """
        if not self.initialized_flamingo:
            raise ValueError("call init_flamingo before forward")
        if media_locations is None:
            past = kwargs.get("past_key_values")
            media_locations = self._locate_media(input_ids, past)  # (B, T_all)
        opened = self._without_surplus(media_locations)  # (B, T_all)
        for layer in self._get_decoder_layers():
            layer.condition_media_locations(opened)
        out = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, **kwargs
        )
        cache = getattr(out, "past_key_values", None)
        if cache is not None:  # it says itself where `<image>` stood in its text
            n_apart = media_locations.shape[1] - int(cache.get_seq_length())
            cache.media_text = n_apart, media_locations
        return out

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args, **kwargs
    ) -> dict:
        """Hand on where `<image>` is in the whole text, also if only its end is run.

        A long prompt may be read in chunks, and `input_ids` is then one chunk: what was
        before it is still in the layers, from the forward of the last chunk.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        past = inputs.get("past_key_values")
        n_past = 0 if past is None else int(past.get_seq_length())
        n_before = max(0, n_past + inputs["input_ids"].shape[1] - input_ids.shape[1])
        before = self._get_decoder_layers()[0].media_locations  # (B, T_all)
        return {**inputs, "media_locations": self._after(n_before, input_ids, before)}
