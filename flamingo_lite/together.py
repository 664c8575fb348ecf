# Written by tools/book/sync.py from book/09_training.ipynb.
# Edit the notebook, not this file.
"""Together: one training in several processes, by Hugging Face's Accelerate.

Of each step every process reads its part of the batches, and all move the same. With
DDP each process holds the whole model; with FSDP2 it holds a part of every tensor.
"""

__all__ = [
    "whole",
    "spread",
    "Together",
    "TogetherInParts",
    "join",
]

import contextlib
import copy

import torch

from flamingo_lite.checkpoints import learning_parameters
from flamingo_lite.loss import IGNORE


def whole(tensor):
    """A tensor of which each process may hold a part, put together: tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(tensor, like):
    """This process's part of a whole tensor, cut as `like` is; whole if `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Each process has the whole: None says that nobody needs to send it.
    mesh, tensor = like.device_mesh, tensor.to(like.device)
    return distribute_tensor(tensor, mesh, like.placements, src_data_rank=None)


class _Called(torch.nn.Module):
    """Runs a function of a model as its own forward pass, where FSDP2 fetches parts."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args, **kwargs):
        """What `function(model, *args, **kwargs)` returns."""
        return function(self.model, *args, **kwargs)


class Together:
    """One process of several: each has a part of every step, and the same weights.

    See `join`. Each process may also be alone, or hold the whole model (DDP).

    Args:
        accelerator: of Hugging Face's Accelerate; None, a process that is alone.
        model: a Flamingo. It goes to the accelerator's device, where optimizers and
            precision will look for it.

    Raises:
        ValueError: the accelerator would choose the precision, too.

    Attributes:
        model: the one that is trained.
        number, n, is_first: which process this is, of how many; is it the first?
        is_cut: each process holds but a part of every tensor.
    """

    is_cut = False

    def __init__(self, accelerator, model):
        self.accelerator, self.model, self._runs = accelerator, model, model
        self.number, self.n, self.is_first = 0, 1, True
        if accelerator is not None:
            self.number, self.n = accelerator.process_index, accelerator.num_processes
            self.is_first = accelerator.is_main_process
            if (mixed := accelerator.mixed_precision) != "no":
                raise ValueError(
                    f"the accelerator has mixed_precision={mixed!r}, which would stay"
                    " in the model and scales no loss: make it with"
                    " mixed_precision='no', and give train a precision="
                )
            if not self.is_cut:
                model.to(accelerator.device)

    @property
    def device(self):
        """Where batches are wanted."""
        return next(self.model.parameters()).device

    def share(self, optimizers, make):
        """Let the processes have the model.

        Args:
            optimizers: of the model that was given.
            make: a function that makes such optimizers for a model.

        Returns:
            list of the optimizers that are to move `self.model`.
        """
        self._given = self.model, optimizers
        if self.accelerator is not None:
            self._runs = self.accelerator.prepare_model(self.model)
        if self.n > 1 and self._runs is self.model:
            kind = self.accelerator.distributed_type
            raise ValueError(
                f"{kind}: nothing would bring the gradients of {self.n} processes "
                "together, and each would train a model of its own. Take DDP or FSDP2"
            )
        return optimizers

    def gather(self, with_averages=False):
        """The model and the optimizers that were given, with all that was learned."""
        return self._given

    def loss_of(self, function, **batch):
        """What `function(model, **batch)` returns: a loss, for backward."""
        return function(self._runs, **batch)

    def read(self, function, *args):
        """What `function(model, *args)` returns, without a gradient."""
        return function(self.model, *args)

    def sum(self, number):
        """A number of each process, added up: (), on the device."""
        return number if self.n == 1 else self.accelerator.reduce(number, "sum")

    def shares(self, batches):
        """Of all labelled tokens of a step the share of each micro-batch: numbers.

        The mean of the processes' gradients is taken, so it is n times as much.
        """
        if self.n == len(batches) == 1:
            return [1.0]
        counts = [(b["labels"][:, 1:] != IGNORE).sum() for b in batches]  # () each
        total = self.sum(sum(counts).to(self.device))
        return [self.n * count.to(total.device) / total for count in counts]

    def backward_of(self, is_last):
        """A block in which gradients are exchanged only after the last micro-batch."""
        if self.n == 1 or is_last:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self._runs)

    def of_all(self, thing):
        """What each process has in its place: list."""
        things = [thing] * self.n
        if self.n > 1:
            torch.distributed.all_gather_object(things, thing)
        return things

    def wait(self):
        """For all the others."""
        if self.n > 1:
            self.accelerator.wait_for_everyone()


class TogetherInParts(Together):
    """One process of several that hold a part of every tensor each (FSDP2).

    A copy of the model is cut up and trained; the one that was given stays whole.

    Raises:
        ValueError: FSDP is asked for in a way that does not work here.
    """

    is_cut = True

    def __init__(self, accelerator, model):
        super().__init__(accelerator, model)
        plugin, why = accelerator.state.fsdp_plugin, None
        if plugin.fsdp_version != 2:
            why = "1 lays tensors end to end: take fsdp_version=2"
        elif plugin.cpu_ram_efficient_loading:
            why = "would untie the tables of tokens: cpu_ram_efficient_loading=False"
        if why:
            raise ValueError(f"FSDP {why}")

    @property
    def device(self):
        """Where batches are wanted; the model that was given may be elsewhere."""
        return self.accelerator.device

    def share(self, optimizers, make):
        """Cut a copy of the model up, and what the optimizers know of it; see above."""
        from accelerate.utils import fsdp2_prepare_model

        self._given = self.model, optimizers
        self.model = copy.deepcopy(self.model)
        self._runs = fsdp2_prepare_model(self.accelerator, _Called(self.model))
        self._moving = make(self.model)
        for ours, p, theirs, part in self._pairs():
            for name, known in ours.state.get(p, {}).items():
                is_number = known.shape != p.shape  # how many steps: each counts them
                cut = known.clone() if is_number else spread(known, part)
                theirs.state[part][name] = cut
        return self._moving

    @torch.no_grad()
    def gather(self, with_averages=False):
        """Bring what was learned back into the model and optimizers that were given.

        Args:
            with_averages: the optimizers' averages, too, in the first process.
        """
        parts = learning_parameters(self.model)
        for name, p in learning_parameters(self._given[0]).items():
            p.copy_(whole(parts[name].detach()))
        for ours, p, theirs, part in self._pairs() if with_averages else ():
            for name, known in theirs.state.get(part, {}).items():
                known = whole(known)  # all have to take part in this
                if self.is_first:
                    ours.state[p][name] = known
        return self._given

    def _pairs(self):
        """Each parameter that was given and its optimizer, with those that move."""
        for ours, theirs in zip(self._given[1], self._moving, strict=True):
            groups = zip(ours.param_groups, theirs.param_groups, strict=True)
            for mine, other in groups:
                for p, part in zip(mine["params"], other["params"], strict=True):
                    yield ours, p, theirs, part

    def loss_of(self, function, **batch):
        """As above, as a forward pass: there FSDP2 fetches the other parts."""
        return self._runs(function, **batch)

    def read(self, function, *args):
        """As above; all processes have to call it."""
        try:
            return self._runs(function, *args)
        finally:  # or `zero_grad` would see whole tensors that have no gradient
            self._runs.reshard()


def join(accelerator, model):
    """Be one process of several, in the way that the accelerator says: a `Together`.

    Args:
        accelerator: an `accelerate.Accelerator`, or None.
        model: a Flamingo.
    """
    kind = "" if accelerator is None else str(accelerator.distributed_type)
    return (TogetherInParts if "FSDP" in kind else Together)(accelerator, model)
