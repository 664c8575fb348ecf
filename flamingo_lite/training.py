"""Training: from cached features, resumable, with a report against controls."""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from flamingo_lite.data import collate
from flamingo_lite.loss import shifted_cross_entropy


def parameter_groups(model, lr, gate_factor=30.0):
    """Sort what is trained by what it needs.

    Everything behind a closed gate gets almost no gradient, so the gates learn
    `gate_factor` times faster. Weight decay is for matrices; never for the embeddings,
    whose old rows must not move.
    """
    gates, matrices, others = [], [], []
    embedding = model.lang_encoder.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("_gate"):
            gates.append(parameter)
        elif parameter.ndim >= 2 and parameter is not embedding:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [
        {"params": gates, "weight_decay": 0.0, "peak": lr * gate_factor},
        {"params": matrices, "weight_decay": 0.05, "peak": lr},
        {"params": others, "weight_decay": 0.0, "peak": lr},
    ]


def schedule(step, n_steps, warmup=50):
    """A share of the peak learning rate: up over `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def save_checkpoint(path, state):
    """Write beside, then rename: a checkpoint is whole or is not there."""
    temporary = Path(path).with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(
    model,
    tokenizer,
    features,
    texts,
    n_steps,
    batch_size=64,
    lr=1e-3,
    gate_factor=30.0,
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
        lr, gate_factor: see `parameter_groups`.
        seed: of the order of the pictures.
        checkpoint: a file; if it is there, training goes on from it.
        report_every: steps between two lines, and between two checkpoints.
        report: called with each line.

    Returns:
        list of {"step", "loss", "gates"}, one entry every 10 steps: the mean loss, and
        tanh of each gate.

    Raises:
        ValueError: not as many texts as pictures.
    """
    if len(features) != len(texts):
        raise ValueError(f"{len(features)} pictures, but {len(texts)} texts")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, lr, gate_factor), lr=lr, betas=(0.9, 0.98), fused=True
    )
    gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
    trained = [p for p in model.parameters() if p.requires_grad]
    first, history, recent = 0, [], []
    if checkpoint is not None and Path(checkpoint).exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        first, history, recent = state["step"], state["history"], state["recent"]
    model.train()
    started, pictures = time.perf_counter(), torch.arange(len(features))
    for step in range(first, n_steps):
        batch_rows = batch_for_step(len(pictures), batch_size, step, seed)
        batch = collate([(features[i][None], [texts[i]]) for i in batch_rows], tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, n_steps)
        loss = model(None, **batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent.append(loss.item())
        done = step + 1
        if done % 10 == 0 or done == n_steps:
            opened = [round(gate.tanh().item(), 4) for gate in gates]
            history.append({"step": done, "loss": sum(recent) / len(recent), "gates": opened})
            recent = []
        if done % report_every == 0 or done == n_steps:
            seconds = time.perf_counter() - started
            pace = (done - first) / seconds
            left = (n_steps - done) / pace
            report(
                f"step {done:5d}/{n_steps}  loss {history[-1]['loss']:.3f}  "
                f"{pace * batch_size:.0f} pictures/s  {left:.0f} s left"
            )
            if checkpoint is not None:
                names = {n for n, p in model.named_parameters() if p.requires_grad}
                state = {n: t for n, t in model.state_dict().items() if n in names}
                save_checkpoint(
                    checkpoint,
                    {
                        "trained": state,
                        "optimizer": optimizer.state_dict(),
                        "step": done,
                        "history": history,
                        "recent": recent,
                    },
                )
    model.eval()
    return history


def batch_for_step(n_pictures, batch_size, step, seed):
    """Rows of batch number `step`: each epoch in an order of its own, known from the seed."""
    per_epoch = max(1, n_pictures // batch_size)
    epoch, number = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(n_pictures)
    return order[number * batch_size : (number + 1) * batch_size].tolist()


@torch.no_grad()
def caption_losses(model, tokenizer, features, texts, batch_size=100):
    """The mean loss per token of each caption: (pictures,).

    Args: as `train`.
    """
    losses = []
    for start in range(0, len(texts), batch_size):
        rows = range(start, min(start + batch_size, len(texts)))
        batch = collate([(features[i][None], [texts[i]]) for i in rows], tokenizer)
        labels = batch.pop("labels")
        logits = model(None, **batch).logits  # (B, T_txt, vocab)
        per_token = shifted_cross_entropy(logits, labels, reduction="none")
        losses.append(per_token.sum(dim=1) / (labels[:, 1:] != -100).sum(dim=1))
    return torch.cat(losses)


@torch.no_grad()
def caption_features(model, tokenizer, features, batch_size=100, max_new_tokens=20):
    """Write a caption for each picture, greedily: list of strings."""
    prompt = tokenizer("<image>", return_tensors="pt").input_ids  # (1, T_txt)
    captions = []
    for start in range(0, len(features), batch_size):
        some = features[start : start + batch_size, None].float()  # (B, 1, F, v, d_img)
        lang_x = prompt.expand(len(some), -1)
        ids = model.generate(
            None,
            lang_x,
            attention_mask=torch.ones_like(lang_x),
            vision_features=some,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        captions += tokenizer.batch_decode(ids[:, lang_x.shape[1] :], skip_special_tokens=True)
    return [caption.strip() for caption in captions]


def bootstrap_interval(values, n_samples=2000, seed=0):
    """Mean and 95 % bootstrap interval of some numbers: (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (n_samples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
