# Written by tools/book/sync.py from book/02_perceiver.ipynb.
# Edit the notebook, not this file.
"""Perceiver Resampler: any number of visual tokens in, n latents out.

Exported from book/02_perceiver.ipynb. Shapes:

    x        (B, T_img, F, v, d)   visual tokens of F frames, from CLIP
    tokens   (B, T_img, F * v, d)  the same, frames one after the other
    latents  (B, T_img, n, d)      n learned questions for each image

No position is added to the v tokens of a frame: CLIP has put it into them already.
"""

__all__ = [
    "LARGE",
    "FeedForward",
    "standardize",
    "PerceiverAttention",
    "PerceiverResampler",
]

import torch
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

LARGE = 2**20  # from so many numbers on, a GELU is computed again and not kept


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between, after a LayerNorm, as in OpenFlamingo.

    Maps (..., d) to (..., d). Where the middle has LARGE numbers or more, backward
    computes the GELU again, and only its input is kept.

    Args:
        dim: width d in and out.
        mult: how many times wider the middle is.
    """

    def __init__(self, dim, mult=4):
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim * mult, bias=False),
            nn.GELU(),
            nn.Linear(dim * mult, dim, bias=False),
        )

    def _narrow(self, wide):
        return self[3](self[2](wide))  # (..., d)

    def forward(self, x):
        wide = self[1](self[0](x))  # (..., mult * d)
        if wide.numel() < LARGE or not torch.is_grad_enabled():
            return self._narrow(wide)
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(self._narrow, wide, **settings)


def standardize(x):
    """Mean 0 and variance 1 in each row of (..., d): how any LayerNorm begins.

    Under autocast the result has its number format, as a matrix will want it.
    """
    plain, kind = nn.functional.layer_norm(x, x.shape[-1:]), x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return plain.to(torch.get_autocast_dtype(kind))
    return plain


class PerceiverAttention(nn.Module):
    """Latents ask; visual tokens and the latents themselves answer (Flamingo, 2.1).

    Args:
        dim: width d of tokens and latents.
        dim_head: width of one head.
        heads: number of heads h.
    """

    def __init__(self, *, dim, dim_head=64, heads=8):
        super().__init__()
        self.heads = heads
        inner_dim = dim_head * heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def _tokens_to_kv(self, plain):
        """`to_kv(norm_media(x))`, with the norm's weight and bias put into the matrix.

        So the way back ends at the matrix, and does not go on to tokens that need no
        gradient. `plain` is `standardize(x)`.
        """
        norm, matrix = self.norm_media, self.to_kv.weight  # (2 * h * d_head, d)
        bias = matrix @ norm.bias  # (2 * h * d_head,)
        return nn.functional.linear(plain, matrix * norm.weight, bias)

    def forward(self, x, latents, is_plain=False):
        """Return what the latents read.

        Args:
            x: (B, T_img, F * v, d) visual tokens.
            latents: (B, T_img, n, d).
            is_plain: `x` has gone through `standardize` already, for several layers.

        Returns:
            (B, T_img, n, d), to be added to the latents.
        """
        asking = self.norm_latents(latents)  # (B, T_img, n, d)
        q = self.to_q(asking)  # (B, T_img, n, h * d_head)
        plain = x if is_plain else standardize(x)  # (B, T_img, F * v, d)
        answers = torch.cat((self._tokens_to_kv(plain), self.to_kv(asking)), dim=-2)
        # Keys and values: (B, T_img, F * v + n, h * d_head) each.
        k, v = answers.chunk(2, dim=-1)
        # The library's fast attention wants four axes, so B and T_img become one.
        split = "B T_img tokens (h d) -> (B T_img) h tokens d"
        q, k, v = (rearrange(t, split, h=self.heads) for t in (q, k, v))
        read = nn.functional.scaled_dot_product_attention(q, k, v)
        join = "(B T_img) h n d -> B T_img n (h d)"
        return self.to_out(rearrange(read, join, B=len(x)))  # (B, T_img, n, d)


def _first_rows(table, size, what):
    """(size, ...): the first rows of a table of embeddings, if it has so many."""
    if size > len(table):
        raise ValueError(f"{size} {what}, but embeddings for {len(table)} only")
    return table[:size]


def _read_once(layer, plain, latents):
    """One layer of the Resampler: (B, T_img, n, d) latents in and out."""
    attention, feed_forward = layer
    latents = attention(plain, latents, is_plain=True) + latents  # (B, T_img, n, d)
    return feed_forward(latents) + latents  # (B, T_img, n, d)


class PerceiverResampler(nn.Module):
    """Turn F * v visual tokens per image into n latents per image (Flamingo, 2.1).

    Args:
        dim: width d of the visual tokens and of the latents.
        depth: number of layers.
        dim_head, heads: see `PerceiverAttention`.
        num_latents: n.
        max_num_media: give image 1, 2, … of a sequence its own learned embedding.
        max_num_frames: give frame 1, 2, … of an image its own learned embedding.
        ff_mult: see `FeedForward`.

    Attributes:
        gradient_checkpointing: compute layers again in backward, to save memory.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        *,
        dim,
        depth=6,
        dim_head=64,
        heads=8,
        num_latents=64,
        max_num_media=None,
        max_num_frames=None,
        ff_mult=4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = self.media_time_embs = None
        if max_num_frames is not None:
            self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim))
        if max_num_media is not None:
            self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads)
            self.layers.append(nn.ModuleList([attention, FeedForward(dim, ff_mult)]))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        """Map x, (B, T_img, F, v, d), to latents, (B, T_img, n, d).

        Raises:
            ValueError: not 5 axes, or more frames or images than embeddings.
        """
        if x.ndim != 5:
            raise ValueError(f"want (B, T_img, F, v, d), got {tuple(x.shape)}")
        B, T_img, F = x.shape[:3]
        if self.frame_embs is not None:
            x = x + _first_rows(self.frame_embs, F, "frames")[:, None]  # + (F, 1, d)
        tokens = rearrange(x, "B T_img F v d -> B T_img (F v) d")
        if self.media_time_embs is not None:  # + (T_img, 1, d)
            tokens = tokens + _first_rows(self.media_time_embs, T_img, "images")
        plain = standardize(tokens)  # for all layers, whose norms differ after that
        latents = repeat(self.latents, "n d -> B T_img n d", B=B, T_img=T_img)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            step = layer, plain, latents
            if again:
                latents = checkpoint(_read_once, *step, use_reentrant=False)
            else:
                latents = _read_once(*step)  # (B, T_img, n, d)
        return self.norm(latents)
