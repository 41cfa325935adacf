"""A GPU that is not there: torch's own code paths for CUDA, on tensors that have shapes and no values.

Inside `Pretend` a tensor on `meta` says that it is on `cuda:0`, whatever is asked to be made on a GPU is made on
`meta`, and what torch says about the device is what an H100 would say. So the engine, autograd and the choice of
kernels run as they would there. Values that are copied back, as `kernels.transfer.download` does it, or read as a list
are made up, and each such wait is counted; what needs a value in any other way cannot go on. Hence a run that ends has
waited for the device nowhere else. Triton kernels are not run but noted, with what would be compiled for them.

With `fake` tensors are torch's fake ones instead, which are on `cuda:0` and `cpu` as far as torch is concerned: it
refuses to mix the two. Autograd needs the device itself, so a gradient is then a tensor like what it belongs to.
Without `counts` operators are not counted, and a graph's replay costs nothing: what is left is the host's own time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.settings import has_triton

DEVICE = torch.device("cuda", 0)
NAME = "H100 (pretended)"
MEMORY = 80 * 10**9
"""Bytes."""

FREE = frozenset({
    "view", "_unsafe_view", "view_as", "reshape", "unflatten", "unfold", "as_strided", "alias", "detach", "lift_fresh",
    "t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "slice", "select", "narrow", "diagonal", "chunk",
    "split", "split_with_sizes", "unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "set_", "resize_", "is_pinned", "device", "stride", "sym_size",
})  # fmt: skip
"""Operators that launch nothing."""


@dataclass(slots=True)
class Tally:
    """What was launched. `kernels` by phase; `launches` are the host's: kernels outside graphs, graphs, and copies."""

    kernels: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    triton: Counter[str] = field(default_factory=Counter)
    graphs: int = 0
    outside: int = 0
    uploads: int = 0
    waits: int = 0

    @property
    def launches(self) -> int:
        """Of the host."""
        return self.outside + self.graphs + self.uploads + self.waits


class Pretend:
    """The pretended device. Use it as a context; `tally` is of all that happened since it was last replaced."""

    def __init__(self, *, fake: bool = False, counts: bool = True) -> None:
        self.fake, self.counts = fake, counts
        self.tally = Tally()
        self.variants: set[tuple[Any, ...]] = set()
        self.phase = "rest"
        self._in_graph = False
        self._random = np.random.default_rng(0)
        self._stack = ExitStack()

    # -- what happens ------------------------------------------------------------------------------------------------

    def kernel(self, name: str) -> None:
        """Note one kernel."""
        self.tally.kernels[self.phase] += 1
        self.tally.operators[name] += 1
        self.tally.outside += not self._in_graph

    def recorder(self) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """In place of `kernels.recording.recorder`: a replay runs the function again, as one launch."""

        def record(function: Callable[[], Any]) -> Callable[[], Any]:
            outputs: list[Any] = []

            def replay() -> Any:
                self.tally.graphs += 1
                if outputs and not self.counts:
                    return outputs[0]
                self._in_graph = True
                try:
                    outputs[:] = [function()]
                    return outputs[0]
                finally:
                    self._in_graph = False

            return replay

        return record

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count kernels of this phase, unless one is counted already."""
        before, self.phase = self.phase, phase if self.phase == "rest" else self.phase
        try:
            yield
        finally:
            self.phase = before

    def tagged(self, owner: Any, name: str, phase: str, *, back: str = "") -> None:
        """Let a method's kernels be those of a phase; with `back` it returns a result and a function, whose kernels are
        those of that one."""
        method = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                result = method(*args, **kwargs)
            return (result[0], self._counting(result[1], back)) if back else result

        self._stack.enter_context(patch.object(owner, name, run))

    def _counting(self, function: Callable[[], Any], phase: str) -> Callable[[], Any]:
        def run() -> Any:
            with self.during(phase):
                return function()

        return run

    def values(self, like: Tensor) -> Tensor:
        """Made-up values in ordinary memory."""
        shape, drawn = tuple(like.shape), self._random
        with unset_fake_temporarily():
            of = drawn.random(shape) if like.is_floating_point() else drawn.integers(65, 90, shape)
            return torch.from_numpy(of).to(like.dtype)

    def launch(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a Triton kernel, and the variant that it would be compiled to."""
        self.kernel(kernel.__name__)
        self.tally.triton[kernel.__name__] += 1
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        rest = tuple(sorted((k, v) for k, v in options.items() if k not in names and k not in ("grid", "warmup")))
        key = tuple(_specialised(parameter, given[parameter.name]) for parameter in kernel.params)
        self.variants.add((kernel.__name__, key, rest))

    # -- the device --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Pretend:
        import triton.runtime.jit as jit

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self.launch(kernel, args, options)

        cuda = torch.cuda
        stands = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "device": lambda device: nullcontext(),
            "device_of": lambda tensor: nullcontext(),
            "get_device_name": lambda device=None: NAME,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (MEMORY, MEMORY),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "current_stream": lambda device=None: _Stream(self),
        }
        has_triton.cache_clear()
        self._stack.callback(has_triton.cache_clear)
        with patch.object(cuda, "is_available", stands["is_available"]):
            has_triton()
        for name, stand in stands.items():
            # Fake tensors would take a device that is available, and there, at its word.
            if not (self.fake and name in ("is_available", "device_count", "current_device")):
                self._stack.enter_context(patch.object(cuda, name, stand))
        self._stack.enter_context(patch.object(jit.JITFunction, "run", run))
        if self.fake:
            self._stack.enter_context(patch.object(torch, "enable_grad", torch.no_grad))
            self._stack.enter_context(patch.object(torch.autograd, "grad", _like_inputs))
            self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(_Functions(self))
        if self.counts:
            self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Stream:
    def __init__(self, pretend: Pretend) -> None:
        self._pretend = pretend

    def synchronize(self) -> None:
        """The one wait of a download."""
        self._pretend.tally.waits += 1


_IS_CUDA, _DEVICE = Tensor.is_cuda.__get__, Tensor.device.__get__  # type: ignore[attr-defined]


class _Functions(TorchFunctionMode):
    """What is called by name: devices that are asked for, and copies back."""

    def __init__(self, pretend: Pretend) -> None:
        super().__init__()
        self._pretend = pretend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _IS_CUDA:
            return _away(args[0])
        if func == _DEVICE:
            device = func(*args)
            return DEVICE if device.type == "meta" else device
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        if name == "tolist" and _away(args[0]):  # the rewards of an answer
            self._pretend.tally.waits += 1
            return self._pretend.values(args[0]).tolist()
        if name == "numpy" and not _away(args[0]):
            with unset_fake_temporarily():
                return (self._pretend.values(args[0]) if isinstance(args[0], FakeTensor) else args[0]).numpy()
        if name == "copy_" and _away(args[1]) and not _away(args[0]):
            with unset_fake_temporarily():
                return args[0].copy_(self._pretend.values(args[1]))
        given = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if kwargs and kwargs.get("pin_memory"):  # for what is copied back
            with unset_fake_temporarily():
                return func(*args, **given)
        if not self._pretend.fake:
            args, given = map(_there, args), {key: _there(value) for key, value in given.items()}
        return func(*args, **given)


def _away(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _like_inputs(outputs: object, inputs: Sequence[Tensor], *_: object, **__: object) -> list[Tensor]:
    return [torch.empty_like(each) for each in inputs]


def _there(value: Any) -> Any:
    """`meta` in place of a GPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("meta")
    return "meta" if isinstance(value, str) and value.startswith("cuda") else value


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Everything that runs, that of autograd too."""

    def __init__(self, pretend: Pretend) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pretend = pretend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FREE:
            return out
        given, results = (
            [leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in ((args, kwargs), out)
        )
        if not any(map(_away, (*given, *results))):
            return out
        if name in ("_to_copy", "copy_") and not _away(given[-1]):
            self._pretend.tally.uploads += 1
        else:
            self._pretend.kernel(name)
        return out


def _specialised(parameter: Any, value: Any) -> tuple[Any, ...]:
    """What of an argument Triton compiles a variant for."""
    if parameter.is_constexpr:
        return ("constant", value)
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        hinted = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        return (value.dtype, aligned and hinted)
    if isinstance(value, bool) or value is None or not isinstance(value, int):
        return (type(value).__name__,)
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    if parameter.do_not_specialize:
        return (width,)
    divides = value % 16 == 0 and not parameter.do_not_specialize_on_alignment
    return ("constant", 1) if value == 1 else (width, divides)
