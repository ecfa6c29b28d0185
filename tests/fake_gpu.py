"""A GPU for tests on a machine without one: a device "gpu:0" that keeps its numbers in the CPU's memory.

    with FakeGPU() as gpu:
        model.to("gpu")  # and everything else in torch that takes a device
        work(model)
    gpu.waits    # Counter: (what waited, the line of ours that asked) -> how often
    gpu.kernels  # Counter: operation -> how often it was launched

A tensor there is an `OnGPU`, which holds a tensor of the CPU. Each operation first makes CUDA's checks, then runs on
the tensors that are held. So the numbers are real: loops that depend on them run, and results can be compared with
those of the CPU. (torch's FakeTensorMode knows shapes only.)

What is checked and counted, as a GPU with CUDA does it:

    devices   a CPU tensor beside a GPU tensor is an error. Allowed: a CPU tensor without dimensions where CUDA
              takes it as a number, and indices on the CPU
    waits     what makes Python wait until the GPU has caught up: reading a number, sizes that depend on numbers
              (nonzero, masks as indices), copies in both directions
    kernels   operations that are not views; on a real GPU some of them launch several

What it does not know: streams, memory, the speed and rounding of real kernels, and code that asks for "cuda" by name.

The hooks are torch's, and experimental. `missing()` says whether this torch has them. `install()` has to come before
the first backward pass of the process, because torch starts a thread for each kind of device then.
"""
import sys
from collections import Counter
from functools import cache
from linecache import getline
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parent.parent) + "/"
HOOK = "_setup_privateuseone_for_python_backend"  # of torch.utils.backend_registration

COPIES = {"_to_copy", "copy_", "clone", "lift_fresh", "detach", "alias"}  # may name two devices
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# The GPU alone knows the result, or how large it is.
READS = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_dim", "unique_consecutive", "masked_select",
         "equal", "repeat_interleave"}
# Elsewhere CUDA takes a CPU tensor without dimensions for a number; these want every tensor on the GPU.
STRICT = {"cat", "stack", "mm", "bmm", "addmm", "baddbmm", "embedding", "gather", "scatter", "scatter_", "index_select",
          "index_add", "index_add_", "index_copy", "index_copy_", "searchsorted", "convolution", "_grouped_mm"}
WITHOUT_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach",
                  "_local_scalar_dense"}


def missing() -> str:
    """Return why this torch cannot have the fake device, in one line; "" if it can."""
    return "" if hasattr(backend_registration, HOOK) else f"torch {torch.__version__} has no {HOOK}"


class Backend:
    """What torch asks the module of a device: there is one device, and its random state is empty."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.zeros(1))
    set_rng_state = staticmethod(lambda state, device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class OnGPU(torch.Tensor):
    """A tensor that says it is on gpu:0. held: the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("gpu", 0),
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if FakeGPU.active is None:
            raise RuntimeError(f"{func}: this tensor needs `with FakeGPU():`")
        return FakeGPU.active.compute(func, args, kwargs or {})

    def __tensor_flatten__(self):
        """With this and the next method, Module.to moves a weight in place, so that tied weights stay tied."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return OnGPU(inner["held"])

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        self.held = value.held
        torch.Tensor.data.__set__(self, value)

    def tolist(self):  # torch's own is C++ that reads the memory, which it does not find
        FakeGPU.active.note("tolist")
        return self.held.tolist()

    def untyped_storage(self):  # safetensors asks which weights share memory
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol):
        """Pickle as a CPU tensor. That is what torch.load makes of any GPU tensor with map_location="cpu"."""
        return self.held.__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnGPU({self.held})"


class FakeGPU(TorchDispatchMode):
    """Inside the `with` block there is a device "gpu", and what happens on it is checked and counted."""

    active = None  # the one whose block is running; the backward pass finds it here, from another thread

    def __init__(self):
        super().__init__()
        self.waits, self.kernels = Counter(), Counter()

    def __enter__(self):
        FakeGPU.active = self
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device="gpu") is copied there, as by CUDA
        return super().__enter__()

    def __exit__(self, *reason):
        FakeGPU.active = None
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*reason)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def note(self, what: str) -> None:
        self.waits[what, our_line()] += 1

    def compute(self, func, args: tuple, kwargs: dict):
        """Run one operation of torch: on the CPU as it is, or on the tensors that the GPU's tensors hold."""
        tensors, device = tensors_in((args, kwargs)), kwargs.get("device")
        made_there = device is not None and torch.device(device).type == "gpu"
        if not made_there and not any(isinstance(x, OnGPU) for x in tensors):
            return func(*args, **kwargs)
        known = facts(func)
        if known.composite:
            with Parts(self):  # inference mode hands such an operation over whole
                return func.decompose(*args, **kwargs)
        check_devices(known.name, args, kwargs, tensors)
        for reason in why_wait(known.name, args, device, made_there):
            self.note(reason)
        self.kernels[known.name] += known.launches
        on_cpu, options = mapped(held, args), mapped(held, kwargs)
        if made_there:
            options["device"] = torch.device("cpu")
        if known.name == "histc":  # the CPU has it for floats only
            out = func(on_cpu[0].float(), *on_cpu[1:], **options).to(on_cpu[0].dtype)
        else:
            out = func(*on_cpu, **options)
        to_cpu = (device is not None and not made_there) or (known.name == "copy_" and not isinstance(args[0], OnGPU))
        return out if to_cpu else moved(known, args, kwargs, out)


class Parts(TorchDispatchMode):
    """Hands the parts of a composite operation to the FakeGPU, whose own mode is off while it computes."""

    def __init__(self, gpu: FakeGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.gpu.compute(func, args, kwargs or {})


# ------------------------------------------------------------------------------------------------------ one operation


class Facts(NamedTuple):
    """What its schema says of an operation."""

    name: str
    composite: bool  # made of other operations
    view: bool  # its result shares the memory of its argument
    changes: bool  # it changes its argument, or its `out`
    launches: bool  # it runs a kernel on the GPU


@cache
def facts(func) -> Facts:
    name = func.overloadpacket.__name__
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    aliases = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
    view = any(not alias.is_write for alias in aliases)
    changes = any(alias.is_write for alias in aliases)
    return Facts(name, composite, view, changes, launches=not view and name not in WITHOUT_KERNEL)


def held(x):
    """Return the CPU tensor of an OnGPU, and anything else as it is."""
    return x.held if isinstance(x, OnGPU) else x


def wrapped(x):
    """Return the OnGPU of a CPU tensor, and anything else as it is."""
    return OnGPU(x) if isinstance(x, torch.Tensor) else x


def mapped(change, value):
    """Apply a function to everything in nested tuples, lists and dicts. (torch's tree_map takes four times as long.)"""
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {key: mapped(change, part) for key, part in value.items()}
    return change(value)


def tensors_in(value) -> list[torch.Tensor]:
    """Return all tensors in nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [x for part in value for x in tensors_in(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def our_line() -> str:
    """Return "FILE:NUMBER: CODE" of the innermost line of this project that is running now."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != __file__ and "site-packages" not in file:
            return f"{file.removeprefix(ROOT)}:{frame.f_lineno}: {getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "not a line of ours"


def check_devices(name: str, args: tuple, kwargs: dict, tensors: list) -> None:
    """Raise RuntimeError where CUDA would, because tensors of both devices meet."""
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a generator of the GPU, found one of the CPU, in {our_line()}")
    if name in COPIES:
        return
    if name in INDEXING:
        there = isinstance(args[0], OnGPU)
        if not there and any(isinstance(x, OnGPU) for x in tensors_in(args[1])):
            raise RuntimeError(f"{name}: indices should be on the CPU, like the indexed tensor, in {our_line()}")
        wrong = [x for x in tensors_in(args[2:3]) if isinstance(x, OnGPU) != there and x.dim()]
    else:
        wrong = [x for x in tensors if not isinstance(x, OnGPU) and (x.dim() or name in STRICT)]
    if wrong:
        found = ", ".join(f"{x.device} {list(x.shape)}" for x in tensors)
        raise RuntimeError(f"{name}: expected all tensors on the same device, found {found}, in {our_line()}")


def why_wait(name: str, args: tuple, device, made_there: bool) -> list[str]:
    """Return the reasons for which CUDA makes Python wait in this operation."""
    reasons = [name] if name in READS else []
    if name in INDEXING:
        indices = tensors_in(args[1])
        reasons += ["index from the CPU"] * any(not isinstance(x, OnGPU) for x in indices)
        reasons += ["mask as an index"] * any(x.dtype == torch.bool for x in indices)
    if name == "copy_":
        source, to_gpu = args[1], isinstance(args[0], OnGPU)
    elif name == "_to_copy" and device is not None:
        source, to_gpu = args[0], made_there
    else:
        return reasons
    if isinstance(source, OnGPU) != to_gpu:
        reasons.append("copy from the CPU" if to_gpu else "copy to the CPU")
    return reasons


def moved(known: Facts, args: tuple, kwargs: dict, out):
    """Return a result as tensors of the GPU. An operation in place returns the tensor that it has changed."""
    if known.changes:
        return kwargs.get("out", args[0])
    # in inference mode a view of an ordinary tensor is an ordinary tensor
    ordinary = known.view and isinstance(args[0], OnGPU) and not args[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not ordinary):
        return mapped(wrapped, out)


def install() -> None:
    """Make torch know the device "gpu", once in a process."""
    getattr(backend_registration, HOOK)("gpu", Backend())
    library = torch.library.Library("aten", "IMPL")  # what torch's C++ makes on the device, below any mode

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnGPU(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnGPU(torch.empty_strided(size, stride, dtype=dtype))

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    FakeGPU.library = library  # which undoes itself when it is collected
