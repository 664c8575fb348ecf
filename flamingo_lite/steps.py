# Written by tools/book/sync.py from book/09_training.ipynb.
# Edit the notebook, not this file.
"""One step of a training: who learns how fast, and what stands before a step."""

__all__ = [
    "parameter_groups",
    "make_optimizers",
    "muon_pays",
    "schedule",
    "NotFinite",
    "keep_old_rows",
    "read_batch",
    "is_read_at_once",
    "fault_of",
    "spoilt",
    "training_step",
]

import math

import torch

from flamingo_lite.checkpoints import learning_parameters, trained_rows
from flamingo_lite.loss import loss_at_labels
from flamingo_lite.model import token_tables
from flamingo_lite.muon import Muon
from flamingo_lite.precision import Precision, choose_precision
from flamingo_lite.together import Together, spread, whole


def parameter_groups(model, lr, gate_factor=30.0):
    """Sort what is trained by what it needs: three groups for AdamW.

    Behind a closed gate nothing gets a gradient, so the gates learn `gate_factor` times
    faster. Weight decay is for matrices, but never for the embeddings, whose old rows
    must not move.

    Args:
        model: a Flamingo.
        lr: the peak learning rate of everything but the gates.
        gate_factor: how many times faster the gates learn.
    """
    gates, matrices, others = [], [], []
    tables = [table.weight for table in token_tables(model.lang_encoder).values()]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("_gate"):
            gates.append(parameter)
        elif parameter.ndim == 2 and name.endswith(".weight") and (
            all(parameter is not table for table in tables)
        ):
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [
        {"params": gates, "weight_decay": 0.0, "peak": lr * gate_factor},
        {"params": matrices, "weight_decay": 0.05, "peak": lr},
        {"params": others, "weight_decay": 0.0, "peak": lr},
    ]


def make_optimizers(model, lr, gate_factor=30.0, with_muon=True, rounds_in=None):
    """Muon for matrices and AdamW for the rest; or AdamW for all: list of optimizers.

    Args:
        model, lr, gate_factor: see `parameter_groups`.
        with_muon: False, AdamW for all.
        rounds_in: a torch.dtype for Muon's products; None, what suits the device.
    """
    gates, matrices, others = parameter_groups(model, lr, gate_factor)
    if rounds_in is None and _counts_in_bfloat16(model):
        rounds_in = torch.bfloat16
    first = [Muon([matrices], lr=lr, dtype=rounds_in)] if with_muon else []
    rest = [gates, others] if with_muon else [gates, matrices, others]
    return [*first, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), fused=True)]


def muon_pays(model, most=20e6):
    """Are the trained matrices so few that Muon's rounds cost little beside a step?"""
    _, matrices, _ = parameter_groups(model, 1.0)
    return sum(p.numel() for p in matrices["params"]) < most


def _counts_in_bfloat16(model):
    """Does the model's device make products of bfloat16 fast?"""
    return choose_precision(next(model.parameters()).device) == "bfloat16"


def schedule(step, n_steps, warmup=50):
    """A share of the peak rate: up over `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


class NotFinite(ValueError):
    """A loss or a gradient is infinite or no number; no step was taken."""


def keep_old_rows(model):
    """Take the gradient from each row of the table of tokens but the two new ones."""
    for weight, rows in trained_rows(model).items():
        if weight.grad is None:
            continue
        if whole(weight) is weight:
            kept = weight.grad[rows]  # (2, d_txt), a copy
            weight.grad.zero_()[rows] = kept
        else:  # of a table in parts the rows have other numbers
            old = torch.ones(len(weight), 1, dtype=torch.bool)  # (vocab, 1)
            old[rows] = False
            weight.grad.masked_fill_(spread(old, weight), 0.0)


def read_batch(model, batch):
    """What the model makes of a batch from `make_batch`: its output."""
    inputs = dict(batch)
    return model(inputs.pop("vision_x", None), **inputs, checked=True)


def is_read_at_once(device):
    """Does it cost nothing to look at a number there? A GPU has to be waited for."""
    return device.type == "cpu"


def fault_of(loss, norm):
    """Which of two numbers is not finite, in words."""
    is_loss = not math.isfinite(loss)
    return f"loss is {loss}" if is_loss else f"length of the gradient is {norm}"


def spoilt(named_parameters):
    """The name of one that holds an infinite number or none at all; else None."""
    return next((n for n, p in named_parameters if not whole(p.isfinite().all())), None)


def training_step(model, batch, optimizers, rate, precision=None, together=None):
    """Move everything that is not frozen once, at a share `rate` of the peak rates.

    Args:
        model: a Flamingo.
        batch: from `make_batch`; or a list of them, whose gradients are added: as if
            their rows were one batch, but with the memory of one.
        optimizers: from `make_optimizers`.
        rate: see `schedule`.
        precision: a `Precision`, which sees what is left out; None, float32.
        together: a `Together`, if other processes have other parts of the step.

    Returns:
        The loss before the step, per labelled token: (), on the device, so that a GPU
        need not wait for anybody. `precision.norm` has the length of the gradient.

    Raises:
        NotFinite: the loss or the gradient is; nothing has moved. Only on a CPU: on a
            GPU nothing moves either, and `precision.stopped` says so.
    """
    precision = precision or Precision("float32", next(model.parameters()).device)
    together = together or Together(None, model)
    batches = batch if isinstance(batch, list) else [batch]
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak"] * rate
    model.zero_grad()
    loss = 0.0
    for part, share in zip(batches, together.shares(batches), strict=True):
        with together.backward_of(part is batches[-1]):
            with precision.autocast():
                loss_here = together.loss_of(loss_at_labels, **part, checked=True)
                part_loss = loss_here * share
            precision.backward(part_loss)
        loss = loss + part_loss.detach().float()
    loss = together.sum(loss) / together.n
    keep_old_rows(model)
    learning = list(learning_parameters(model).values())
    precision.unscale(learning)
    norm = whole(torch.nn.utils.clip_grad_norm_(learning, 1.0)).detach().float()
    _move(model, optimizers, precision, loss, norm)
    return loss


def _move(model, optimizers, precision, loss, norm):
    """Let the optimizers step, if loss and gradient are finite."""
    left_out = precision.judge(loss, norm)
    if is_read_at_once(left_out.device):
        if precision.stopped:
            model.zero_grad()
            raise NotFinite(f"the {fault_of(loss.item(), norm.item())}")
        if left_out:
            return
        left_out = None
    for optimizer in optimizers:
        # Both read these: where found_inf is 1, they compute and change nothing.
        optimizer.grad_scale, optimizer.found_inf = None, left_out
        optimizer.step()
