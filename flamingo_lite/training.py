# Written by tools/sync.py from book/09_training.ipynb.
# Edit the notebook, not this file.
"""Training: from cached features, resumable, with a report against controls."""

import contextlib
import math
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from flamingo_lite.batches import Examples, check_examples, make_batch
from flamingo_lite.checkpoints import (
    learning_parameters,
    load_checkpoint,
    random_states,
    run_settings,
    save_checkpoint,
    trained_rows,
)
from flamingo_lite.data import check_texts
from flamingo_lite.loss import IGNORE, shifted_cross_entropy
from flamingo_lite.model import token_tables
from flamingo_lite.precision import Precision, choose_precision


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

    A step has the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that the same
    learning rate serves both. A (3 d, d) matrix of queries, keys and values is three.

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


def make_optimizers(model, lr, gate_factor=30.0, with_muon=True):
    """Muon for matrices and AdamW for the rest; or AdamW for all: list of optimizers.

    Args:
        model, lr, gate_factor: see `parameter_groups`.
        with_muon: False, AdamW for all.
    """
    gates, matrices, others = parameter_groups(model, lr, gate_factor)
    rounds_in = torch.bfloat16 if _counts_in_bfloat16(model) else None
    first = [Muon([matrices], lr=lr, dtype=rounds_in)] if with_muon else []
    rest = [gates, others] if with_muon else [gates, matrices, others]
    return [*first, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), fused=True)]


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
    for table, rows in trained_rows(model).items():
        if table.grad is not None:
            kept = table.grad[rows]  # (2, d_txt), a copy
            table.grad.zero_()[rows] = kept


def read_batch(model, batch):
    """What the model makes of a batch from `make_batch`: its output."""
    inputs = dict(batch)
    return model(inputs.pop("vision_x", None), **inputs)


def _shares(batches):
    """Of the labelled tokens of all micro-batches the share of each: (), numbers."""
    if len(batches) == 1:
        return [1.0]
    counts = [(b["labels"][:, 1:] != IGNORE).sum() for b in batches]  # () each
    return [count / sum(counts) for count in counts]


def training_step(model, batch, optimizers, rate, precision=None):
    """Move everything that is not frozen once, at a share `rate` of the peak rates.

    Args:
        model: a Flamingo.
        batch: from `make_batch`; or a list of them, whose gradients are added: as if
            their rows were one batch, but with the memory of one.
        optimizers: from `make_optimizers`.
        rate: see `schedule`.
        precision: a `Precision`, which sees what is left out; None, float32.

    Returns:
        The loss before the step, per labelled token, and the length of the gradient.
        Both stay on the device, (), so that a GPU need not wait for anybody.

    Raises:
        NotFinite: the loss or the gradient is; nothing has moved. Only on a CPU: on a
            GPU nothing moves either, and `precision.stopped` says so.
    """
    precision = precision or Precision("float32", next(model.parameters()).device)
    batches = batch if isinstance(batch, list) else [batch]
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak"] * rate
    model.zero_grad()
    loss = 0.0
    for part, share in zip(batches, _shares(batches), strict=True):
        with precision.autocast():
            part_loss = read_batch(model, part).loss * share
        precision.backward(part_loss)
        loss = loss + part_loss.detach().float()
    keep_old_rows(model)
    learning = list(learning_parameters(model).values())
    precision.unscale(learning)
    norm = torch.nn.utils.clip_grad_norm_(learning, 1.0).detach().float()
    _move(model, optimizers, precision, loss, norm)
    return loss, norm


def _move(model, optimizers, precision, loss, norm):
    """Let the optimizers step, if loss and gradient are finite."""
    left_out = precision.judge(loss, norm)
    if is_read_at_once(left_out.device):
        if precision.stopped:
            model.zero_grad()
            raise NotFinite(f"the {_fault(loss.item(), norm.item())}")
        if left_out:
            return
        left_out = None
    for optimizer in optimizers:
        # Both read these: where found_inf is 1, they compute and change nothing.
        optimizer.grad_scale, optimizer.found_inf = None, left_out
        optimizer.step()


def is_read_at_once(device):
    """Does it cost nothing to look at a number there? A GPU has to be waited for."""
    return device.type == "cpu"


def _fault(loss, norm):
    """Which of two numbers is not finite, in words."""
    is_loss = not math.isfinite(loss)
    return f"loss is {loss}" if is_loss else f"length of the gradient is {norm}"


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
    if len(features.shape) == 4 and features.shape[-1] != model.vis_dim:
        widths = f"width {features.shape[-1]}, the model reads {model.vis_dim}"
        raise ValueError(f"features are of another vision encoder: {widths}")
    for kind in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(kind):
            raise RuntimeError(
                "train was called inside torch.autocast, which keeps copies of the"
                " weights as they were at the first step: call it outside, with"
                " precision="
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


class _Notes:
    """Loss and gates of each step, left on the device until somebody wants them."""

    def __init__(self, model, history):
        named = model.named_parameters()
        self.gates = [p for name, p in named if name.endswith("_gate")]
        self.history, self._waiting = history, []

    def add(self, stopped, loss, norm):
        """Keep what a step gave, without looking at it. Args: () each."""
        gates = [gate.detach().tanh().reshape(()) for gate in self.gates]
        numbers = [stopped.float(), loss, norm, *gates]
        self._waiting.append(torch.stack([number.float() for number in numbers]))

    def is_full(self):
        """Is it time to look, or else too much would wait?"""
        return len(self._waiting) >= 100

    def read(self):
        """Bring all that waits into `history`, at once.

        Raises:
            NotFinite: a step was not taken, nor any after it; they are not in it.
        """
        if not self._waiting:
            return
        waiting, self._waiting = torch.stack(self._waiting).tolist(), []
        for stopped, loss, norm, *gates in waiting:
            if stopped:
                raise NotFinite(f"the {_fault(loss, norm)}")
            opened = [round(gate, 4) for gate in gates]
            done = len(self.history) + 1
            self.history.append({"step": done, "loss": loss, "gates": opened})


class _CtrlC:
    """Inside this block Ctrl-C waits: `asked` says that it came. A second one does not.

    So that no step is half taken when a checkpoint is written.
    """

    def __enter__(self):
        self.asked, self.before = False, None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):  # else somebody wants it to be ignored
                self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_):
        if self.asked:
            raise KeyboardInterrupt("stopped in the middle of a step, nothing is saved")
        self.asked = True

    def __exit__(self, *error):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _memory(device):
    """The most bytes in use so far: of a GPU, or of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


class _NextPicture:
    """Features in which each picture is the next one: each text gets another's."""

    def __init__(self, features):
        self.features, self.shape = features, tuple(features.shape)

    def __len__(self):
        return len(self.features)

    def __getitem__(self, numbers):
        return self.features[[(number + 1) % len(self) for number in numbers]]


def _look(model, tokenizer, validation, precision):
    """Losses of texts beside their own pictures, and beside others': dict."""
    features, texts, *sequences = validation
    beside = {"true": features, "shuffled": _NextPicture(features)}
    device, losses = precision.device, {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        for name, mine in beside.items():
            with precision.autocast():
                some = _summed_losses(model, tokenizer, mine, texts, 64, *sequences)
            total, count = (part.sum().item() for part in some)
            losses[name] = total / count
        model.train()
    return losses


def _progress_line(numbers, n_steps):
    """One line about a run, from the numbers that `log` gets."""
    looks = [f"{n} {numbers[n]:.3f}  " for n in ("true", "shuffled") if n in numbers]
    skipped = f"  {numbers['skipped']} steps left out" * bool(numbers["skipped"])
    return (
        f"step {numbers['step']:5d} of {n_steps}  loss {numbers['loss']:.3f}  "
        f"{''.join(looks)}{numbers['pictures_per_second']:.0f} pictures/s  "
        f"{numbers['seconds_left']:.0f} s left{skipped}"
    )


def is_report(done, n_steps, report_every):
    """Is there a report after this step? After 1 and 10 too, if that is early."""
    early = done in (1, 10) and 10 * done <= report_every
    return early or is_checkpoint(done, n_steps, report_every)


def is_checkpoint(done, n_steps, report_every):
    """After this step, is a checkpoint written?"""
    return done == n_steps or (report_every > 0 and done % report_every == 0)


def _start(checkpoint, model, optimizers, settings, precision, report):
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
    first, history = load_checkpoint(checkpoint, model, optimizers, settings, precision)
    report(f"going on from step {first} of {settings['n_steps']}, {checkpoint}")
    return first, history


def _out_of_memory(error, step, batch_size, accumulate):
    """The same error, with what to do about it."""
    says = str(error).split(". ")[0]
    smaller = max(1, batch_size // 2)
    return torch.OutOfMemoryError(
        f"step {step + 1}: {says}. Take batch_size={smaller} and accumulate="
        f"{accumulate * (batch_size // smaller)}, the same steps with less memory; or "
        "build the model with gradient_checkpointing=True, which takes more time"
    )


class _Run:
    """A training under way: what moves, what it reads, how far it is."""

    def __init__(
        self, model, optimizers, examples, precision, settings, first, history
    ):
        self.model, self.optimizers = model, optimizers
        self.examples, self.precision, self.settings = examples, precision, settings
        self.device, self.first, self.done = precision.device, first, first
        self.notes, self.is_whole = _Notes(model, history), True
        self.random, self.started = random_states(self.device), time.perf_counter()

    def take_step(self, step):
        """One step, and a note of it."""
        settings = self.settings
        batches = self.examples.batches(step, self.device)
        rate = schedule(step, settings["n_steps"], settings["warmup"])
        self.is_whole = False
        with self._named():
            try:
                numbers = training_step(
                    self.model, batches, self.optimizers, rate, self.precision
                )
            except torch.OutOfMemoryError as error:
                sizes = settings["batch_size"], settings["accumulate"]
                raise _out_of_memory(error, step, *sizes) from error
        self.notes.add(self.precision.stopped, *numbers)
        self.random, self.done = random_states(self.device), step + 1
        self.is_whole = True
        if is_read_at_once(self.device) or self.notes.is_full():
            self.read()

    @contextlib.contextmanager
    def _named(self):
        """Say of which step a NotFinite is, and what may be to blame."""
        try:
            yield
        except NotFinite as error:
            step = len(self.notes.history)
            why = self.examples.suspects(step)
            if name := _spoilt(self.model.named_parameters()):
                why = f"{name} of the model holds something other than finite numbers"
            if self.precision.is_scaled:
                why += ". Or a number was over 65,504: try precision='float32'"
            raise NotFinite(f"step {step + 1} not taken: {error}. {why}") from error

    def read(self):
        """Bring losses and gates of all steps so far into the history."""
        with self._named():
            self.notes.read()

    def numbers(self, per_step, report_every):
        """What a report says: dict, see `train`."""
        self.read()
        if name := _spoilt(learning_parameters(self.model).items()):
            raise NotFinite(f"after step {self.done}, {name} is not finite any more")
        recent = self.notes.history[-(report_every or 100) :]
        pace = (self.done - self.first) / (time.perf_counter() - self.started)
        return {
            "step": self.done,
            "loss": sum(note["loss"] for note in recent) / len(recent),
            "pictures_per_second": pace * per_step,
            "seconds_left": (self.settings["n_steps"] - self.done) / pace,
            "memory": _memory(self.device),
            "skipped": int(self.precision.skipped),
        }

    def save(self, checkpoint):
        """Write all that the next step depends on."""
        self.read()
        state = {"step": self.done, "history": self.notes.history}
        state |= {"settings": self.settings, "random": self.random}
        state["precision"] = self.precision.state_dict()
        save_checkpoint(checkpoint, self.model, self.optimizers, **state)

    def stop(self, checkpoint):
        """Save at once, if the last step is whole; and how to go on: a sentence."""
        if not self.is_whole:
            return "interrupted in the middle of a step: what was saved last is there"
        after = f"interrupted after step {self.done} of {self.settings['n_steps']}"
        if checkpoint is None:
            return f"{after}. Nothing is saved: give train a checkpoint= for that"
        if self.done > self.first:
            self.save(checkpoint)
        return f"{after}, saved: call train with the same arguments and it goes on"


def muon_pays(model, most=20e6):
    """Are the trained matrices so few that Muon's rounds cost little beside a step?"""
    _, matrices, _ = parameter_groups(model, 1.0)
    return sum(p.numel() for p in matrices["params"]) < most


def train(
    model,
    tokenizer,
    features,
    texts,
    n_steps,
    batch_size=64,
    lr=1e-3,
    gate_factor=30.0,
    with_muon=None,
    seed=0,
    checkpoint=None,
    report_every=100,
    report=print,
    sequences=None,
    precision=None,
    accumulate=1,
    warmup=50,
    validation=None,
    log=None,
):
    """Train what is not frozen, on cached features of pictures.

    Of the table of tokens only `<image>` and `<|endofchunk|>` can move. Afterwards, and
    after any error, the model is in eval mode.

    Args:
        model, tokenizer: from `build_flamingo`.
        features: (pictures, F, v, d_img), see `encode_pictures`; or (pictures, F, 3, H,
            W), pixels, which the vision encoder reads in each step. A tensor, or any
            object with `shape`, `len()` and [list of numbers], which gives a tensor.
        texts: a text for each picture; with `sequences`, a list of texts for each, one
            for each of its pictures. A text may be a pair, see `collate`; or a list of
            texts, of which each epoch draws one.
        n_steps: optimizer steps. The rates fall to 0 over them, so they are part of
            what a run is. A step that float16 leaves out counts.
        batch_size: about how many pictures go through the model at a time.
        lr, gate_factor: see `make_optimizers`.
        with_muon: see `make_optimizers`; None, what `muon_pays` says.
        seed: of the order of the pictures, and of the texts that are drawn.
        checkpoint: a file; if it is there, training goes on from it, to the same end.
        report_every: steps between two lines, and between two checkpoints; 0, only at
            the end. If they are many, there are lines after steps 1 and 10, too.
        report: called with each line.
        sequences: which pictures follow each other, lists of picture numbers; None,
            each picture stands alone.
        precision: a name of `precision.DTYPES`; None, what `choose_precision` says.
        accumulate: batches in a step. Their losses are averaged over all labelled
            tokens, so that a step is that of one batch, so many times larger.
        warmup: steps until the rates are at their peak.
        validation: (features, texts), or (features, texts, sequences), that are not
            trained on: their loss is measured at each report.
        log: called at each report with a dict of numbers: step, loss (mean since the
            last report), pictures_per_second, seconds_left, memory (the most bytes in
            use so far), skipped (steps that float16 left out); with `validation`, true
            and shuffled, its losses beside its own and beside exchanged pictures.

    Returns:
        list of {"step", "loss", "gates"}, one for each step: tanh of every gate.

    Raises:
        ValueError: pictures, texts and sequences do not fit each other or the model, a
            text cannot be used, or a checkpoint does not fit: before the first step.
        NotFinite, a ValueError: a loss or a gradient is infinite or no number. The step
            is not taken, and the last checkpoint stays. On a GPU it is noticed at the
            next report, and no step after it was taken either.
        RuntimeError: inside `torch.autocast`, `no_grad` or `inference_mode`.
        OSError: a checkpoint cannot be written or read; the last good one is left.
        KeyboardInterrupt: after the step under way, and after a checkpoint of it.
    """
    model.eval()
    texts, sequences = check_examples(features, texts, sequences)
    counts = {"n_steps": (n_steps, 0), "batch_size": (batch_size, 1)}
    counts |= {"report_every": (report_every, 0), "seed": (seed, 0)}
    counts |= {"accumulate": (accumulate, 1), "warmup": (warmup, 0)}
    _check_numbers(lr, gate_factor, **counts)
    _check_model(model, features)
    check_texts(texts, tokenizer, sequences is not None)
    if validation is not None:
        validation = _check_validation(validation, features, tokenizer)
    with_muon = muon_pays(model) if with_muon is None else with_muon
    settings = run_settings(
        *(features, texts, n_steps, batch_size, lr, gate_factor, with_muon, seed),
        *(sequences, accumulate, warmup),
    )
    optimizers = make_optimizers(
        model, settings["lr"], settings["gate_factor"], with_muon
    )
    precision = Precision(precision, next(model.parameters()).device)
    first, history = _start(checkpoint, model, optimizers, settings, precision, report)
    data = tokenizer, features, texts, sequences
    examples = Examples(*data, batch_size, accumulate, seed)
    run = _Run(model, optimizers, examples, precision, settings, first, history)
    try:
        model.train()
        with _CtrlC() as ctrl_c:
            for step in range(first, n_steps):
                run.take_step(step)
                if ctrl_c.asked:
                    raise KeyboardInterrupt
                if is_report(step + 1, n_steps, report_every):
                    numbers = run.numbers(batch_size * accumulate, report_every)
                    if validation is not None:
                        numbers |= _look(model, tokenizer, validation, precision)
                    report(_progress_line(numbers, n_steps))
                    if log is not None:
                        log(numbers)
                if checkpoint and is_checkpoint(step + 1, n_steps, report_every):
                    run.save(checkpoint)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(run.stop(checkpoint)) from error
    finally:
        model.eval()
    return history


def _check_validation(validation, features, tokenizer):
    """(features, texts, sequences) of a validation, checked as those of a training."""
    if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
        raise ValueError("validation: want (features, texts) or with sequences")
    mine, *others = validation
    try:
        texts, sequences = check_examples(mine, *others)
        check_texts(texts, tokenizer, sequences is not None)
        if tuple(mine.shape[1:]) != tuple(features.shape[1:]):
            shapes = f"{tuple(mine.shape)}, those of training {tuple(features.shape)}"
            raise ValueError(f"features are {shapes}")
    except ValueError as error:
        raise ValueError(f"validation: {error}") from error
    return mine, texts, sequences


@torch.no_grad()
def _summed_losses(model, tokenizer, features, texts, batch_size, sequences=None):
    """The loss of each sequence and its labelled tokens, (sequences,) each."""
    sums, counts, device = [], [], next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        rows = range(start, min(start + batch_size, len(texts)))
        batch = make_batch(rows, features, texts, tokenizer, device, sequences)
        labels = batch.pop("labels")  # (B, T_txt)
        logits = read_batch(model, batch).logits  # (B, T_txt, vocab)
        per_token = shifted_cross_entropy(logits, labels, reduction="none")
        sums.append(per_token.sum(dim=1))
        counts.append((labels[:, 1:] != IGNORE).sum(dim=1))
    return torch.cat(sums), torch.cat(counts)


def caption_losses(model, tokenizer, features, texts, batch_size=100, sequences=None):
    """Mean loss per labelled token of each sequence, (sequences,).

    Args: as for `train`; of several texts for a picture the first is taken.
    """
    texts, sequences = check_examples(features, texts, sequences)
    data = features, texts, batch_size, sequences
    sums, counts = _summed_losses(model, tokenizer, *data)
    return (sums / counts).cpu()


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
