# Written by tools/sync.py from book/09_training.ipynb.
# Edit the notebook, not this file.
"""Training: from cached features, resumable, with a report against controls."""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from flamingo_lite.data import collate
from flamingo_lite.loss import IGNORE, shifted_cross_entropy


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
    embedding = model.lang_encoder.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("_gate"):
            gates.append(parameter)
        elif parameter.ndim == 2 and name.endswith(".weight") and (
            parameter is not embedding
        ):
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [
        {"params": gates, "weight_decay": 0.0, "peak": lr * gate_factor},
        {"params": matrices, "weight_decay": 0.05, "peak": lr},
        {"params": others, "weight_decay": 0.0, "peak": lr},
    ]


def orthogonalise(matrices, rounds=5):
    """Push all singular values of (..., rows, columns) near 1, by Newton-Schulz."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.transpose(-2, -1)  # (..., short, short)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.transpose(-2, -1)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices only (Jordan et al. 2024).

    A step has the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that the same
    learning rate serves both. A (3 d, d) matrix of queries, keys and values is three.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: share of the old direction that is kept.
        weight_decay: as AdamW's.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Move every matrix that has a gradient, once."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                rows, columns = p.shape
                blocks = 3 if rows == 3 * columns else 1
                update = orthogonalise(ahead.view(blocks, rows // blocks, columns))
                size = 0.2 * max(rows // blocks, columns) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * size)


def make_optimizers(model, lr, gate_factor=30.0, with_muon=True):
    """Muon for matrices and AdamW for the rest; or AdamW for all: list of optimizers.

    Args:
        model, lr, gate_factor: see `parameter_groups`.
        with_muon: False, AdamW for all.
    """
    gates, matrices, others = parameter_groups(model, lr, gate_factor)
    first = [Muon([matrices], lr=lr)] if with_muon else []
    rest = [gates, others] if with_muon else [gates, matrices, others]
    return [*first, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), fused=True)]


def schedule(step, n_steps, warmup=50):
    """A share of the peak rate: up over `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def batch_for_step(n_pictures, batch_size, step, seed):
    """Picture numbers of batch `step`; each epoch has an order of its own."""
    per_epoch = max(1, n_pictures // batch_size)
    epoch, number = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(n_pictures)
    return order[number * batch_size : (number + 1) * batch_size].tolist()


def save_checkpoint(path, model, optimizers, **progress):
    """Write what is trained and where we are, whole or not at all."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    trained = {name: t for name, t in model.state_dict().items() if name in names}
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"trained": trained, "optimizers": states, **progress}
    temporary = Path(path).with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path, model, optimizers):
    """Go on from a checkpoint: (steps done, history).

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    try:
        state = torch.load(path, weights_only=True)
        unexpected = model.load_state_dict(
            state["trained"], strict=False
        ).unexpected_keys
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except Exception as error:
        raise ValueError(
            f"cannot go on from {path}; delete it to start anew: {error}"
        ) from error
    if unexpected:
        raise ValueError(f"{path} is of another model: it has {unexpected[:3]}")
    return state["step"], state["history"]


def train(
    model,
    tokenizer,
    features,
    texts,
    n_steps,
    batch_size=64,
    lr=1e-3,
    gate_factor=30.0,
    with_muon=True,
    seed=0,
    checkpoint=None,
    report_every=100,
    report=print,
):
    """Train what is not frozen, on cached features of single pictures.

    Args:
        model, tokenizer: from `build_flamingo`.
        features: (pictures, F, v, d_img), see `encode_pictures`.
        texts: a caption for each picture.
        n_steps: optimizer steps of `batch_size` pictures.
        lr, gate_factor, with_muon: see `make_optimizers`.
        seed: of the order of the pictures.
        checkpoint: a file; if it is there, training goes on from it.
        report_every: steps between two lines, and between two checkpoints.
        report: called with each line.

    Returns:
        list of {"step", "loss", "gates"}, one for each step: tanh of every gate.

    Raises:
        ValueError: not as many texts as pictures, or a checkpoint that does not fit.
    """
    if len(features) != len(texts):
        raise ValueError(f"{len(features)} pictures, but {len(texts)} texts")
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, lr, gate_factor, with_muon)
    gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
    trained = [p for p in model.parameters() if p.requires_grad]
    first, history = 0, []
    if checkpoint is not None and Path(checkpoint).exists():
        first, history = load_checkpoint(checkpoint, model, optimizers)
    model.train()
    started = time.perf_counter()
    for step in range(first, n_steps):
        rows = batch_for_step(len(features), batch_size, step, seed)
        batch = collate([(features[i][None], [texts[i]]) for i in rows], tokenizer)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * schedule(step, n_steps)
        loss = model(None, **batch).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        opened = [round(gate.tanh().item(), 4) for gate in gates]
        history.append({"step": step + 1, "loss": loss.item(), "gates": opened})
        done = step + 1
        if done % report_every == 0 or done == n_steps:
            recent = [entry["loss"] for entry in history[-report_every:]]
            pace = (done - first) / (time.perf_counter() - started)
            report(
                f"step {done:5d} of {n_steps}  loss {sum(recent) / len(recent):.3f}  "
                f"{pace * batch_size:.0f} pictures/s  "
                f"{(n_steps - done) / pace:.0f} s left"
            )
            if checkpoint is not None:
                save_checkpoint(
                    checkpoint, model, optimizers, step=done, history=history
                )
    model.eval()
    return history


@torch.no_grad()
def caption_losses(model, tokenizer, features, texts, batch_size=100):
    """Mean loss per token of each caption, (pictures,). Arguments as for `train`."""
    losses, device = [], next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        rows = range(start, min(start + batch_size, len(texts)))
        batch = collate([(features[i][None], [texts[i]]) for i in rows], tokenizer)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")  # (B, T_txt)
        logits = model(None, **batch).logits  # (B, T_txt, vocab)
        per_token = shifted_cross_entropy(logits, labels, reduction="none")
        losses.append(per_token.sum(dim=1) / (labels[:, 1:] != IGNORE).sum(dim=1))
    return torch.cat(losses).cpu()


@torch.no_grad()
def caption_features(model, tokenizer, features, batch_size=100, max_new_tokens=24):
    """Write a caption for each picture, greedily: list of strings.

    Args: as for `train`; a caption that does not end is cut at `max_new_tokens`.
    """
    device = next(model.parameters()).device
    prompt = tokenizer("<image>", return_tensors="pt").input_ids  # (1, T_txt)
    captions = []
    for start in range(0, len(features), batch_size):
        some = features[start : start + batch_size, None]  # (B, 1, F, v, d_img)
        lang_x = prompt.to(device).expand(len(some), -1)  # (B, T_txt)
        ids = model.generate(
            None,
            lang_x,
            attention_mask=torch.ones_like(lang_x),
            vision_features=some.float().to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = ids[:, lang_x.shape[1] :]  # (B, new)
        captions += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [caption.strip() for caption in captions]


def score_captions(captions, scenes):
    """Compare captions with the truth.

    Args:
        captions: list of strings.
        scenes: as many dicts with "text" and "things".

    Returns:
        dict of two lists of numbers, one for each scene: "exact", 0 or 1, and "things",
        the share of its things that the caption names.
    """
    exact, named = [], []
    for caption, scene in zip(captions, scenes, strict=True):
        words = f" {caption} "
        exact.append(float(caption == scene["text"]))
        found = [f" {thing} " in words for thing in scene["things"]]
        named.append(sum(found) / len(found))
    return {"exact": exact, "things": named}


def bootstrap_interval(values, n_samples=2000, seed=0):
    """Mean and 95 % bootstrap interval of some numbers: (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)  # draws: (n_samples, values)
    draws = rng.integers(0, len(values), (n_samples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
