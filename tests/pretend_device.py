"""A device that is not there: what a GPU would refuse, refused on a CPU.

A `DeviceTensor` holds a CPU tensor and says that it is on another device, "meta". As on
a GPU, it does not meet tensors of the CPU (those with no axes excepted), NumPy cannot
have it, and reading a number back is slow, so it is counted, in READS. What it computes
is what the CPU computes.

    with PretendDevice():
        model.to("meta")  # or to_device(model), also without the `with`
        READS.clear()
        loss = model(None, **{k: t.to("meta") for k, t in batch.items()}).loss
    assert not READS  # Counter of (what was called, file and line in our package)

Threads that are started meanwhile have it, too.
"""

import functools
import os
import sys
from collections import Counter
from pathlib import Path
from threading import Thread

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
READS = Counter()
UPLOADS = {"_to_copy", "copy_"}  # the only ones that may have tensors of both
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COUNTING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}


def note_read(name):
    """Count a number that is read back, with the line of ours that wants it."""
    frame, where = sys._getframe(1), "elsewhere"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "flamingo_lite":
            where = f"{path.name}:{frame.f_lineno}"
            break
        frame = frame.f_back
    READS[name, where] += 1


class DeviceTensor(torch.Tensor):
    """A tensor of the device that is not there, with its values.

    Args:
        values: a CPU tensor; it is not copied.
    """

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )

    def __init__(self, values):
        self.values_here = values

    is_meta = False  # "meta" only in name: there are values
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        if new.shape != self.shape or new.dtype != self.dtype:
            raise AssertionError("only values of the same shape and kind")
        self.values_here = new.values_here.detach()

    def _read(self, how, *args):
        note_read(how)
        return getattr(self.values_here.detach(), how)(*args)

    def item(self):
        return self._read("item")

    def tolist(self):
        return self._read("tolist")

    def __bool__(self):
        return self._read("__bool__")

    def __int__(self):
        return self._read("__int__")

    def __index__(self):
        return self._read("__index__")

    def __float__(self):
        return self._read("__float__")

    def __format__(self, spec):
        return format(self.item(), spec) if self.ndim == 0 else repr(self)

    def __repr__(self, *, tensor_contents=None):
        return f"DeviceTensor({self.values_here!r})"

    def __getitem__(self, index):
        return super().__getitem__(positions(index))

    def __setitem__(self, index, new):
        super().__setitem__(positions(index), new)

    def data_ptr(self):
        return self.values_here.data_ptr()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of a device to numpy: use .cpu() first")

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def new_tensor(self, data, **kwargs):
        return DeviceTensor(self.values_here.new_tensor(data, **kwargs))

    def __reduce_ex__(self, protocol):  # into a file, as values
        return self.values_here.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = DeviceTensor(self.values_here.detach().clone())
            copy.requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]


def positions(index):
    """An index with tensors for its lists: PyTorch would make them out of our sight."""
    if isinstance(index, tuple):
        return tuple(positions(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def is_of_device(device):
    return device is not None and torch.device(device).type == DEVICE.type


def check_together(name, args, ours, others):
    """Raise RuntimeError, as a GPU does, for tensors of two devices in one operation.

    Args:
        name: of the operation.
        args: its arguments.
        ours, others: the tensors among them, of the device and with axes of the CPU.
    """
    if not (ours and others) or name in UPLOADS:
        return
    if name in INDEXING and isinstance(args[0], DeviceTensor):
        indices = [t for t in tree_leaves(args[1]) if t is not None]
        others = [t for t in others if all(t is not index for index in indices)]
        if not others:  # positions may come from the CPU
            return
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (ours, others)]
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found two: "
        f"aten::{name}, shapes {shapes[0]} on the device, {shapes[1]} on the CPU"
    )


def reads_back(name, args, kwargs, ours):
    """True if a GPU would have to wait: the CPU needs a number, or must know a size."""
    if not ours:
        return False
    if name in COUNTING:
        return True
    if name == "repeat_interleave":
        return "output_size" not in kwargs or kwargs["output_size"] is None
    if name in INDEXING:  # by a mask, unless one number is put there
        masks = [t for t in tree_leaves(args[1]) if t is not None]
        is_mask = any(t.dtype in (torch.bool, torch.uint8) for t in masks)
        is_fill = len(args) > 2 and args[2].ndim == 0
        return is_mask and not is_fill
    to_cpu = "device" in kwargs and not is_of_device(kwargs["device"] or DEVICE)
    into_cpu = name == "copy_" and not isinstance(args[0], DeviceTensor)
    return into_cpu or (name == "_to_copy" and to_cpu)


def compute(func, args, kwargs):
    """Do one operation of PyTorch's with the values, and say where the result is."""
    name = func.overloadpacket._qualified_op_name.split("::")[1]
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    others = [t for t in tensors if not isinstance(t, DeviceTensor) and t.ndim > 0]
    if empty := [t for t in tensors if type(t) is torch.Tensor and t.is_meta]:
        raise AssertionError(f"aten::{name}: {len(empty)} tensors without values")
    check_together(name, args, ours, others)
    if reads_back(name, args, kwargs, ours):
        note_read(name)
    device = kwargs.get("device")
    stays = is_of_device(device) if device is not None else bool(ours)
    values = functools.partial(tree_map_only, DeviceTensor, lambda t: t.values_here)
    with_values = dict(values(kwargs))
    if is_of_device(device):
        with_values["device"] = torch.device("cpu")
    if with_values.get("pin_memory"):
        with_values["pin_memory"] = False
    result = func(*values(args), **with_values)
    if not stays or name in ("_local_scalar_dense", "equal"):
        return result
    if name == "copy_" and not isinstance(args[0], DeviceTensor):
        return args[0]
    result = tree_map_only(
        torch.Tensor, lambda t: t if isinstance(t, DeviceTensor) else wrap(t), result
    )
    if func._schema.is_mutable and ours:  # in place: give back what came in
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def wrap(tensor):
    return DeviceTensor(tensor.detach())


class _Operations(TorchDispatchMode):
    """Operations without a tensor of ours, such as torch.zeros(2, device="meta")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """`torch.tensor` and its like, which do not ask a dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        makes = func in (torch.tensor, torch.as_tensor, torch.asarray)
        if makes and is_of_device(kwargs.get("device")):
            del kwargs["device"]
            if isinstance(args[0], DeviceTensor):
                return args[0].to(**kwargs)
            return wrap(func(*args, **kwargs))
        return func(*args, **kwargs)


def to_device(module):
    """Move a module in place; tied parameters stay tied, and hooks go along."""
    moved = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or isinstance(parameter, DeviceTensor):
                continue
            if id(parameter) not in moved:
                values = DeviceTensor(parameter.detach().clone())
                new = torch.nn.Parameter(values, parameter.requires_grad)
                for hook in (parameter._backward_hooks or {}).values():
                    new.register_hook(hook)
                moved[id(parameter)] = parameter, new
            part._parameters[name] = moved[id(parameter)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, DeviceTensor):
                part._buffers[name] = DeviceTensor(buffer.detach().clone())
    return module


def as_cpu(arguments):
    """Arguments with our kind of device named "cpu": autocast knows no other."""
    change = lambda kind: "cpu" if kind == DEVICE.type else kind  # noqa: E731
    if isinstance(arguments, dict):
        return {name: change(kind) for name, kind in arguments.items()}
    return [change(kind) for kind in arguments]


class PretendDevice:
    """`with PretendDevice():` there is such a device, and modules can be moved to it.

    While it lasts, fused optimizers take its tensors, as they take those of a GPU.
    """

    def __enter__(self):
        self.undo, to = [], torch.nn.Module.to

        @functools.wraps(to)
        def module_to(module, *args, **kwargs):
            named = kwargs.get("device", args[0] if args else None)
            is_name = isinstance(named, (str, torch.device))
            if is_name and is_of_device(named):
                return to_device(module)
            return to(module, *args, **kwargs)

        self._replace(torch.nn.Module, "to", module_to)
        fused = "_get_fused_kernels_supported_devices"
        for name in ("optim.adam", "optim.adamw", "optim.optimizer"):
            module = sys.modules[f"torch.{name}"]
            if hasattr(module, fused):
                known = getattr(module, fused)()
                self._replace(module, fused, lambda k=known: [*k, DEVICE.type])
        asks, autocast = torch.is_autocast_enabled, torch.autocast
        self._replace(torch, "is_autocast_enabled", lambda *kind: asks(*as_cpu(kind)))
        for owner in (torch, torch.amp):
            new = lambda *kind, **kwargs: autocast(*as_cpu(kind), **as_cpu(kwargs))  # noqa: E731
            self._replace(owner, "autocast", new)
        run = Thread.run

        def run_with_device(thread):
            with _Constructors(), _Operations():  # a thread begins without
                run(thread)

        self._replace(Thread, "run", run_with_device)
        self.modes = _Constructors(), _Operations()
        for mode in self.modes:
            mode.__enter__()
        return self

    def _replace(self, owner, name, new):
        self.undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)
        for owner, name, old in reversed(self.undo):
            setattr(owner, name, old)


def run_notebook(path):
    """Run a notebook's code cells in its folder, as if there were such a device.

    What a cell tries with the CPU's tensors, where the model is on the device, fails
    here as it would on a GPU.
    """
    import matplotlib
    import nbformat

    matplotlib.use("Agg")
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    os.environ["FLAMINGO_LITE_DEVICE"] = DEVICE.type
    cells, names = nbformat.read(path, as_version=4).cells, {"__name__": "__main__"}
    with PretendDevice():
        for number, cell in enumerate(cells):
            if cell.cell_type == "code":
                code = compile(cell.source, f"{path.name}, cell {number}", "exec")
                exec(code, names)
    moved = [
        name
        for name, value in names.items()
        if isinstance(value, torch.nn.Module)
        and any(isinstance(p, DeviceTensor) for p in value.parameters())
    ]
    print("on the device:", *sorted(moved))


if __name__ == "__main__":
    run_notebook(Path(sys.argv[1]).resolve())
