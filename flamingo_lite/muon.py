# Written by tools/book/sync.py from book/D_muon.ipynb.
# Edit the notebook, not this file.
"""Muon: an optimizer for matrices whose steps are equally long in all directions."""

__all__ = [
    "orthogonalise",
    "Muon",
]

import torch


def orthogonalise(matrices, rounds=5, dtype=None):
    """Push all singular values of (..., rows, columns) near 1, by Newton-Schulz.

    With `dtype` the rounds are computed in it, e.g. torch.bfloat16 on a GPU.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(dtype or x.dtype)
    for _ in range(rounds):
        square = x @ x.transpose(-2, -1)  # (..., short, short)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    x = x.to(matrices.dtype)
    return x if wide else x.transpose(-2, -1)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices only (Jordan et al. 2024).

    A step has the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that a
    learning rate means about the same to both. A (3 d, d) matrix of queries, keys and
    values is three.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: share of the old direction that is kept.
        weight_decay: as AdamW's.
        dtype: for `orthogonalise`; None, that of the matrices.

    Attributes:
        found_inf: None, or (), 1.0 for a step that is to change nothing, as with
            PyTorch's fused optimizers.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, dtype=None):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.dtype, self.found_inf = dtype, None

    @torch.no_grad()
    def step(self, closure=None):
        """Move every matrix that has a gradient, once."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not (state := self.state[p]):
                    state["momentum"] = torch.zeros_like(p)
                update = self._update(p.grad, state["momentum"], group["momentum"])
                length = -group["lr"] * 0.2 * max(update.shape[-2:]) ** 0.5
                kept = 1 - group["lr"] * group["weight_decay"]
                most = torch.finfo(p.dtype).max  # beyond it is an error of PyTorch's
                length, kept = max(length, -most), max(kept, -most)
                update = update.reshape(p.shape)
                if self.found_inf is None:
                    p.mul_(kept).add_(update, alpha=length)
                else:  # computed all the same, and not taken where it is 1
                    moved = p * kept + length * update
                    p.copy_(torch.where(self.found_inf > 0, p, moved))

    def _update(self, grad, momentum, kept):
        """The orthogonal direction of one matrix: (blocks, rows, columns)."""
        if self.found_inf is not None:  # a momentum stays as it was
            grad = torch.where(self.found_inf > 0, momentum, grad)
        momentum.lerp_(grad, 1 - kept)
        ahead = grad.lerp(momentum, kept)  # Nesterov
        rows, columns = grad.shape
        blocks = 3 if rows == 3 * columns else 1
        wide = ahead.view(blocks, rows // blocks, columns)  # (blocks, rows, columns)
        return orthogonalise(wide, dtype=self.dtype)
