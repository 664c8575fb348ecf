# Written by tools/book/sync.py from book/08c_precision.ipynb.
# Edit the notebook, not this file.
"""Numbers of 16 bits: where they are chosen, what must stay in 32, and a scaled loss.

Weights that learn, gates, optimizers and losses stay float32. Only products are made in
16 bits, and frozen backbones may be kept in them.
"""

__all__ = [
    "DTYPES",
    "choose_precision",
    "Precision",
    "freeze_in",
]

import contextlib

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_precision(device):
    """The number format for products that trains well and fast there: a name of DTYPES.

    "bfloat16" on CUDA devices that compute in it, "float16" on older ones, such as the
    T4, "float32" anywhere else.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "float32"
    newer = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if newer else "float16"


class Precision:
    """How one run computes: in 16 or 32 bits, and which of its steps are left out.

    Args:
        name: of DTYPES; None, what `choose_precision` says.
        device: where the model is.
        scale: what a loss is first multiplied by in float16, a power of 2.
        patience: after so many good steps the scale is doubled.

    Attributes:
        scale, good_steps, skipped, stopped: tensors () on the device.
        norm: that of the last step.
    """

    def __init__(self, name, device, scale=2.0**16, patience=2000):
        self.device = torch.device(device)
        self.name = choose_precision(self.device) if name is None else name
        if self.name not in DTYPES:
            raise ValueError(f"precision is one of {list(DTYPES)}, not {name!r}")
        self.patience, self.is_scaled = patience, self.name == "float16"
        first = scale if self.is_scaled else 1.0
        self.scale = torch.tensor(first, device=self.device)
        self.good_steps = torch.tensor(0, device=self.device)
        self.skipped = torch.tensor(0, device=self.device)
        self.stopped = torch.tensor(False, device=self.device)
        self.norm = None

    def autocast(self):
        """A block for one forward pass: it keeps copies of weights while it lasts."""
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.name])

    def backward(self, loss):
        """Gradients of a loss, times the scale."""
        (loss * self.scale if self.is_scaled else loss).backward()

    def unscale(self, parameters):
        """Take the scale out of the gradients again."""
        if self.is_scaled:
            for p in parameters:
                if p.grad is not None:
                    p.grad.div_(self.scale)

    def judge(self, loss, norm):
        """Is this step left out? 1.0 if it is, else 0.0, on the device: ().

        Args:
            loss: (), not scaled.
            norm: (), the length of the gradient, not scaled.
        """
        self.norm, overflow = norm, ~norm.isfinite()
        hopeless = ~loss.isfinite() | (overflow & (self.scale <= 1))
        self.stopped = self.stopped | hopeless
        left_out = self.stopped | overflow
        self.skipped = self.skipped + (overflow & ~self.stopped)
        if self.is_scaled:
            self.good_steps = torch.where(left_out, 0, self.good_steps + 1)
            doubled = self.good_steps >= self.patience
            self.good_steps = torch.where(doubled, 0, self.good_steps)
            larger = torch.where(doubled, self.scale * 2, self.scale)
            self.scale = torch.where(overflow, self.scale / 2, larger)
        return left_out.float()

    def state_dict(self):
        """What a checkpoint keeps: plain numbers, read from the device."""
        return {
            "name": self.name,
            "scale": self.scale.item(),
            "good_steps": int(self.good_steps.item()),
            "skipped": int(self.skipped.item()),
        }

    def load_state_dict(self, state):
        """Go on from `state_dict`. The scale is of one precision, the rest of a run."""
        self.skipped.fill_(state["skipped"])
        if state["name"] == self.name:
            self.scale.fill_(state["scale"])
            self.good_steps.fill_(state["good_steps"])


def _to_weight(module, inputs):
    """A hook before a layer: its input, in the format of its weight."""
    return tuple(x.to(module.weight.dtype) for x in inputs)


def _to_float(module, inputs, output):
    """A hook after a layer: its output in float32, where nobody else sees to that."""
    cast = torch.is_autocast_enabled(output.device.type)
    return output if cast else output.float()


def freeze_in(model, dtype):
    """Keep the frozen backbones of a Flamingo in 16 bits, to save memory.

    Args:
        model: a Flamingo; what learns, the table of tokens and norms stay float32.
        dtype: torch.bfloat16 or torch.float16.

    Returns:
        how many bytes that saved.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"want torch.bfloat16 or torch.float16, got {dtype}")
    if any(p.requires_grad for p in model.vision_encoder.parameters()):
        raise ValueError("the vision encoder is being trained: it stays float32")
    before = _n_bytes(model)
    model.vision_encoder.to(dtype)
    tables = (
        model.lang_encoder.get_input_embeddings(),
        model.lang_encoder.get_output_embeddings(),
    )
    for layer in model.lang_encoder.modules():
        is_matrix = isinstance(layer, torch.nn.Linear) and layer not in tables
        learns = any(p.requires_grad for p in layer.parameters())
        if is_matrix and not learns and layer.weight.dtype != dtype:
            if layer.weight.dtype == torch.float32:
                layer.register_forward_pre_hook(_to_weight)
                layer.register_forward_hook(_to_float)
            layer.to(dtype)
    return before - _n_bytes(model)


def _n_bytes(model):
    """Bytes of all parameters and buffers of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
