# Written by tools/sync.py from book/09_training.ipynb.
# Edit the notebook, not this file.
"""Training: from cached features, resumable, with a report against controls."""

import math
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from flamingo_lite.checkpoints import (
    learning_parameters,
    load_checkpoint,
    run_settings,
    save_checkpoint,
    trained_rows,
)
from flamingo_lite.data import check_texts, collate
from flamingo_lite.loss import IGNORE, loss_at_labels, shifted_cross_entropy
from flamingo_lite.model import token_tables


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


@lru_cache(maxsize=2)
def _epoch(lengths, batch_size, seed, epoch):
    """The batches of one epoch: list of lists of sequence numbers."""
    rng = np.random.default_rng((seed, epoch))
    order, lengths = rng.permutation(len(lengths)), np.asarray(lengths)
    batches = []
    for T_img in np.unique(lengths):
        mine = order[lengths[order] == T_img].tolist()
        rows = max(1, batch_size // int(T_img))
        n_whole = max(1, len(mine) // rows)
        batches += [mine[i * rows : (i + 1) * rows] for i in range(n_whole)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _place(lengths, batch_size, step, seed):
    """Where a step is: (epoch, number of the batch in it)."""
    return divmod(step, len(_epoch(lengths, batch_size, seed, 0)))


def batch_for_step(lengths, batch_size, step, seed):
    """Sequence numbers of batch `step`; each epoch has an order of its own.

    Args:
        lengths: tuple, the number of pictures T_img of each sequence. A batch holds
            sequences of one length. What does not fill a batch waits for the next
            epoch, with its other order.
        batch_size: about how many pictures.
        step, seed: they alone decide.
    """
    epoch, number = _place(lengths, batch_size, step, seed)
    return list(_epoch(lengths, batch_size, seed, epoch)[number])


def draw_text(text, *numbers):
    """Of a list of texts for one picture the one that `numbers` draw; else the text."""
    if not isinstance(text, list):
        return text
    return text[int(np.random.default_rng(numbers).integers(len(text)))]


def make_batch(rows, features, texts, tokenizer, device, sequences=None, lot=None):
    """Some sequences, as the model takes them: dict on `device`.

    Args:
        rows: sequence numbers, B of them.
        features, texts, sequences: as for `train`.
        lot: (seed, epoch), which of several texts for a picture is drawn; None, the
            first.
    """
    examples = []
    for row in rows:
        several = [texts[row]] if sequences is None else texts[row]
        told = [
            (text[0] if isinstance(text, list) else text)
            if lot is None
            else draw_text(text, *lot, row, number)
            for number, text in enumerate(several, 1)
        ]
        pictures = [row] if sequences is None else sequences[row]
        examples.append((features[pictures], told))
    batch = collate(examples, tokenizer)
    return {name: tensor.to(device) for name, tensor in batch.items()}


class NotFinite(ValueError):
    """A loss or a gradient is infinite or no number; no step was taken."""


def keep_old_rows(model):
    """Take the gradient from each row of the table of tokens but the two new ones."""
    for table, rows in trained_rows(model).items():
        if table.grad is not None:
            kept = table.grad[rows]  # (2, d_txt), a copy
            table.grad.zero_()[rows] = kept


def training_step(model, batch, optimizers, rate):
    """Move everything that is not frozen once, at a share `rate` of the peak rates.

    Returns:
        the loss before the step, a number.

    Raises:
        NotFinite: the loss or the gradient is; nothing has moved.
    """
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak"] * rate
    loss = loss_at_labels(model, **batch)
    model.zero_grad()
    loss.backward()
    keep_old_rows(model)
    learning = learning_parameters(model).values()
    norm = torch.nn.utils.clip_grad_norm_(learning, 1.0)
    loss, norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
    for what, number in (("loss", loss), ("length of the gradient", norm)):
        if not math.isfinite(number):
            model.zero_grad()
            raise NotFinite(f"the {what} is {number}")
    for optimizer in optimizers:
        optimizer.step()
    return loss


def check_examples(features, texts, sequences=None):
    """Check how pictures, texts and sequences fit: (texts, sequences), plain lists.

    Args: as for `train`.

    Raises:
        ValueError: they do not; which one is said.
    """
    if not isinstance(features, torch.Tensor) or features.ndim != 4:
        got = tuple(getattr(features, "shape", ())) or type(features).__name__
        raise ValueError(f"features: want a tensor (pictures, F, v, d_img), got {got}")
    if isinstance(texts, str):
        raise ValueError(f"want a list of texts, got one text, {texts[:40]!r}")
    texts, n, what = [_plain(text) for text in texts], len(features), "pictures"
    if sequences is not None:
        sequences = [_numbers(s, n, f"sequence {i}") for i, s in enumerate(sequences)]
        n, what = len(sequences), "sequences"
    if n != len(texts):
        raise ValueError(f"{n} {what}, but {len(texts)} texts")
    if not n or (sequences is not None and not all(sequences)):
        raise ValueError(f"there are no {what}, or one of them has no picture")
    for i, pictures in enumerate(sequences or []):
        if isinstance(texts[i], (str, list, tuple)) and len(pictures) != len(texts[i]):
            counts = f"{len(pictures)} pictures, but {len(texts[i])} texts"
            raise ValueError(f"sequence {i}: {counts}")
    return texts, sequences


def _plain(text):
    """A text, a pair or a list of them, with strings of numpy's made plain ones."""
    if type(text) in (list, tuple):
        return type(text)(_plain(part) for part in text)
    return str(text) if isinstance(text, str) else text


def _numbers(sequence, n, where):
    """Picture numbers as a list of ints; ValueError, naming `where`, for others."""
    try:
        given = list(sequence)
        numbers = [int(number) for number in given]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: want picture numbers, got {sequence!r}") from error
    for number, wanted in zip(numbers, given, strict=True):
        if number != wanted or not 0 <= number < n:
            raise ValueError(f"{where}: there is no picture {wanted} among {n}")
    return numbers


def _check_numbers(lr, gate_factor, **counts):
    """Raise ValueError for a number that `train` cannot use."""
    for name, (value, least) in counts.items():
        if value != int(value) or value < least:
            raise ValueError(f"{name}: want a whole number from {least}, got {value}")
    for name, value in (("lr", lr), ("gate_factor", gate_factor)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: want a finite number from 0, got {value}")


def _spoilt(named_parameters):
    """The name of one that holds an infinite number or none at all; else None."""
    return next((n for n, p in named_parameters if not p.isfinite().all()), None)


def _check_model(model, features):
    """Raise an error where training would go wrong, often without a word."""
    if features.shape[-1] != model.vis_dim:
        widths = f"width {features.shape[-1]}, the model reads {model.vis_dim}"
        raise ValueError(f"features are of another vision encoder: {widths}")
    for kind in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(kind):
            raise RuntimeError(
                "train was called inside torch.autocast, which keeps copies of the"
                " weights as they were at the first step: call it outside"
            )
    if not torch.is_grad_enabled():
        where = "torch.inference_mode or torch.no_grad"
        raise RuntimeError(f"train was called inside {where}: call it outside")
    learning = learning_parameters(model)
    if not learning:
        raise ValueError("every parameter is frozen: there is nothing to train")
    for name, p in learning.items():
        if p.is_inference():
            raise ValueError(f"{name} was made inside torch.inference_mode")
        if p.dtype not in (torch.float32, torch.float64):
            small = "which small steps do not move: call model.float() first"
            raise ValueError(f"{name} is {p.dtype}, {small}")
    if name := _spoilt(model.named_parameters()):
        raise ValueError(f"{name} holds something other than finite numbers")


def _start(checkpoint, model, optimizers, settings, report):
    """Where to begin, (steps done, history): at nothing, or at a checkpoint.

    Raises:
        OSError, ValueError: see `load_checkpoint`; or there is no folder to write to.
    """
    if checkpoint is None:
        return 0, []
    folder = Path(checkpoint).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to write checkpoints to")
    if not Path(checkpoint).exists():
        return 0, []
    first, history = load_checkpoint(checkpoint, model, optimizers, settings)
    report(f"going on from step {first} of {settings['n_steps']}, {checkpoint}")
    return first, history


def _suspects(model, rows, features, texts, sequences):
    """What may have made a loss of these rows infinite or no number: a sentence."""
    if name := _spoilt(model.named_parameters()):
        return f"{name} of the model holds something other than finite numbers"
    own = {row: [row] if sequences is None else sequences[row] for row in rows}
    numbers = list(dict.fromkeys(n for row in rows for n in own[row]))
    says = "Its features are finite, a lower lr may help"
    spoilt = [n for n in numbers if not features[n].isfinite().all()]
    bad = [row for row in rows if set(spoilt) & set(own[row])]
    if bad:
        says, numbers = "Features are not finite", spoilt
    some = ", ".join(repr(texts[row])[:60] for row in (bad or rows)[:3])
    more = ", …" * (len(bad or rows) > 3)
    return f"{says}: pictures {numbers} of the batch, with the texts {some}{more}"


def _progress_line(recent, n_steps, pace, batch_size):
    """One line about a run, from its last notes and its steps per second."""
    done, loss = recent[-1]["step"], sum(note["loss"] for note in recent) / len(recent)
    return (
        f"step {done:5d} of {n_steps}  loss {loss:.3f}  "
        f"{pace * batch_size:.0f} pictures/s  {(n_steps - done) / pace:.0f} s left"
    )


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
    sequences=None,
):
    """Train what is not frozen, on cached features of pictures.

    Of the table of tokens only `<image>` and `<|endofchunk|>` can move. Afterwards, and
    after any error, the model is in eval mode.

    Args:
        model, tokenizer: from `build_flamingo`.
        features: (pictures, F, v, d_img), see `encode_pictures`.
        texts: a text for each picture; with `sequences`, a list of texts for each, one
            for each of its pictures. A text may be a pair, see `collate`; or a list of
            texts, of which each epoch draws one.
        n_steps: optimizer steps of about `batch_size` pictures. The rates fall to 0
            over them, so they are part of what a run is.
        lr, gate_factor, with_muon: see `make_optimizers`.
        seed: of the order of the pictures, and of the texts that are drawn.
        checkpoint: a file; if it is there, training goes on from it, to the same end.
        report_every: steps between two lines, and between two checkpoints; 0, only at
            the end.
        report: called with each line.
        sequences: which pictures follow each other, lists of picture numbers; None,
            each picture stands alone.

    Returns:
        list of {"step", "loss", "gates"}, one for each step: tanh of every gate.

    Raises:
        ValueError: pictures, texts and sequences do not fit each other or the model, a
            text cannot be used, or a checkpoint does not fit: before the first step.
        NotFinite, a ValueError: a loss or a gradient is infinite or no number. The step
            is not taken, and the last checkpoint stays.
        RuntimeError: inside `torch.autocast`, `no_grad` or `inference_mode`.
        OSError: a checkpoint cannot be written or read; the last good one is left.
    """
    model.eval()
    texts, sequences = check_examples(features, texts, sequences)
    counts = {"n_steps": (n_steps, 0), "batch_size": (batch_size, 1)}
    counts |= {"report_every": (report_every, 0), "seed": (seed, 0)}
    _check_numbers(lr, gate_factor, **counts)
    _check_model(model, features)
    check_texts(texts, tokenizer, sequences is not None)
    numbers = n_steps, batch_size, lr, gate_factor, with_muon, seed
    settings = run_settings(features, texts, *numbers, sequences)
    optimizers = make_optimizers(
        model, settings["lr"], settings["gate_factor"], with_muon
    )
    first, history = _start(checkpoint, model, optimizers, settings, report)
    gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
    lengths = (1,) * len(texts) if sequences is None else tuple(map(len, sequences))
    device, started = next(model.parameters()).device, time.perf_counter()
    try:
        model.train()
        for step in range(first, n_steps):
            rows = batch_for_step(lengths, batch_size, step, seed)
            lot = seed, _place(lengths, batch_size, step, seed)[0]
            batch = make_batch(rows, features, texts, tokenizer, device, sequences, lot)
            try:
                loss = training_step(model, batch, optimizers, schedule(step, n_steps))
            except NotFinite as error:
                why = _suspects(model, rows, features, texts, sequences)
                raise NotFinite(f"step {step + 1} not taken: {error}. {why}") from error
            opened = [round(gate.tanh().item(), 4) for gate in gates]
            done = step + 1
            history.append({"step": done, "loss": loss, "gates": opened})
            if done == n_steps or (report_every and done % report_every == 0):
                pace = (done - first) / (time.perf_counter() - started)
                recent = history[-(report_every or 100) :]
                if name := _spoilt(learning_parameters(model).items()):
                    raise NotFinite(f"after step {done}, {name} is not finite any more")
                report(_progress_line(recent, n_steps, pace, batch_size))
                if checkpoint is not None:
                    state = {"step": done, "history": history, "settings": settings}
                    save_checkpoint(checkpoint, model, optimizers, **state)
    finally:
        model.eval()
    return history


@torch.no_grad()
def caption_losses(
    model, tokenizer, features, texts, batch_size=100, sequences=None
):
    """Mean loss per labelled token of each sequence, (sequences,).

    Args: as for `train`; of several texts for a picture the first is taken.
    """
    texts, sequences = check_examples(features, texts, sequences)
    losses, device = [], next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        rows = range(start, min(start + batch_size, len(texts)))
        batch = make_batch(rows, features, texts, tokenizer, device, sequences)
        labels = batch.pop("labels")  # (B, T_txt)
        logits = model(None, **batch).logits  # (B, T_txt, vocab)
        per_token = shifted_cross_entropy(logits, labels, reduction="none")
        losses.append(per_token.sum(dim=1) / (labels[:, 1:] != IGNORE).sum(dim=1))
    return torch.cat(losses).cpu()


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
    for text, scene in zip(captions, scenes, strict=True):
        words = f" {text} "
        exact.append(float(text == scene["text"]))
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
