"""Muon in float32: momentum whose step for a matrix is made orthogonal.

torch.optim.Muon does the same in bfloat16, which is very slow on many CPUs. Follows
Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the step is scaled to
the size of AdamW's as in Liu et al. 2025 (arXiv 2502.16982, section 2.2).
"""

import torch


def orthogonalise(matrix, iterations=5):
    """Near the orthogonal matrix closest to (..., rows, columns): Newton-Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.transpose(-2, -1)
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrix.shape[-2] <= matrix.shape[-1] else x.transpose(-2, -1)


class Muon(torch.optim.Optimizer):
    """For matrices only; a (3d, d) matrix of queries, keys, values counts as three."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self):
        """Move every matrix once."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                rows, columns = ahead.shape
                blocks = 3 if rows == 3 * columns else 1
                update = orthogonalise(ahead.view(blocks, rows // blocks, columns))
                scale = 0.2 * max(rows // blocks, columns) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)
