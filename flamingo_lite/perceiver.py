"""Perceiver Resampler: any number of visual tokens in, a fixed number of latents out."""

import torch
from einops import rearrange, repeat
from torch import nn


def FeedForward(dim, mult=4):
    """Two linear layers with a GELU between, after a LayerNorm (Flamingo, appendix A.1.2).

    Args:
        dim: width d in and out.
        mult: how many times wider the middle is.

    Returns:
        nn.Sequential that maps (..., d) to (..., d).
    """
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


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

    def forward(self, x, latents):
        """Return what the latents read.

        Args:
            x: (B, T_img, F * v, d) visual tokens.
            latents: (B, T_img, n, d).

        Returns:
            (B, T_img, n, d), to be added to the latents.
        """
        tokens = self.norm_media(x)
        asking = self.norm_latents(latents)
        q = self.to_q(asking)
        k, v = self.to_kv(torch.cat((tokens, asking), dim=-2)).chunk(2, dim=-1)
        split = "B T_img tokens (h d) -> B T_img h tokens d"
        q, k, v = (rearrange(t, split, h=self.heads) for t in (q, k, v))
        read = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, T_img, h, n, d_head)
        return self.to_out(rearrange(read, "B T_img h n d -> B T_img n (h d)"))


class PerceiverResampler(nn.Module):
    """Turn F * v visual tokens per image into n latents per image (Flamingo, 2.1).

    Args:
        dim: width d of the visual tokens and of the latents.
        depth: number of layers.
        dim_head, heads: see `PerceiverAttention`.
        num_latents: n.
        max_num_media: give image number 1, 2, … of a sequence its own learned embedding.
        max_num_frames: give frame number 1, 2, … of an image its own learned embedding.
        ff_mult: see `FeedForward`.
    """

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
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads),
                    FeedForward(dim=dim, mult=ff_mult),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        """Resample.

        Args:
            x: (B, T_img, F, v, d) visual tokens.

        Returns:
            (B, T_img, n, d) latents.

        Raises:
            ValueError: `x` is not 5-dimensional, or has more images or frames than embeddings.
        """
        if x.ndim != 5:
            raise ValueError(f"want (B, T_img, F, v, d), got {tuple(x.shape)}")
        B, T_img, F = x.shape[:3]
        for name, table, size in (
            ("frames", self.frame_embs, F),
            ("images", self.media_time_embs, T_img),
        ):
            if table is not None and size > len(table):
                raise ValueError(f"{size} {name}, but embeddings for {len(table)} only")
        if self.frame_embs is not None:
            x = x + rearrange(self.frame_embs[:F], "F d -> F 1 d")
        tokens = rearrange(x, "B T_img F v d -> B T_img (F v) d")
        if self.media_time_embs is not None:
            tokens = tokens + self.media_time_embs[:T_img]
        latents = repeat(self.latents, "n d -> B T_img n d", B=B, T_img=T_img)
        for attention, feed_forward in self.layers:
            latents = attention(tokens, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm(latents)
