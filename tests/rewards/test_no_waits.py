"""On a GPU the host must not wait for the device inside the inner steps. What would wait there is recognised here, on a
CPU, by the operator: one whose result the host needs (a number, a shape), or a copy from or to ordinary memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import varlen
from kernels.random import row_keys
from kernels.transfer import upload
from server.diffusion.schedule import plan
from server.guidance.assembly import Objective, Responses, Timings
from server.guidance.prefixes import RewardContext
from server.guidance.steer import Steered, steer
from server.methods import METHODS, Method, gradient_methods
from server.rewards.graphs import GraphedPasses
from server.rewards.reward_model import RewardModel
from server.text.template import split_at_response
from server.types import DiffusionParams, GuidanceParams, Message
from tests.support.graphs import again
from tests.support.models import CPU, load_reward
from tests.support.rewards import EOS, PAD, Pass, contexts

VOCABULARY = 512


class Waits(AssertionError):
    """On a GPU this would wait."""


READS = {
    "tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
    "equal", "allclose",
}  # fmt: skip
"""Functions that bring values to the host. On a CPU some of them reach no operator at all."""

aten = torch.ops.aten
SHAPES = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.unique_dim_consecutive, aten.bincount, aten.histogram, aten.equal, aten.is_nonzero,
    aten._assert_scalar,
}  # fmt: skip
"""Operators that give a number, or a tensor whose shape depends on values."""


class _Operators(TorchDispatchMode):
    """Everything that runs, that of autograd too."""

    paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if not self.paused:
            if packet in SHAPES:
                raise Waits(str(func))
            if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
                raise Waits(f"{func} without output_size")
            indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) else ()
            if any(index is not None and index.dtype == torch.bool for index in indices):
                raise Waits(f"{func} with a mask")
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """What is called by name: reads of values, and ordinary memory on its way to a device."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self.operators = operators
        self.ordinary: dict[int, Tensor] = {}  # by id, kept so that no other tensor gets it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        uploads = _inside(upload)
        if not self.operators.paused:
            if name in READS:
                raise Waits(name)
            if name in ("tensor", "as_tensor", "asarray") and kwargs.get("device") is not None:
                raise Waits(f"torch.{name} with a device")
            if name in ("to", "cuda", "copy_") and any(id(x) in self.ordinary for x in args) and not uploads:
                raise Waits(f"{name} of ordinary memory")
        result = func(*args, **kwargs)
        if name in ("tensor", "as_tensor", "asarray", "frombuffer"):
            self.ordinary[id(result)] = result
        elif uploads and name == "to":
            self.ordinary.pop(id(result), None)
        return result


def _inside(function: Callable[..., Any]) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class NoWaits:
    """Raises `Waits` inside at what would wait. Two things may look at values here, for on a GPU each is one kernel:
    the attention's specification, and a draw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operators = _Operators()
        self.functions = _Functions(self.operators)
        from_numpy = torch.from_numpy  # which function modes do not see

        def ordinary(array: Any) -> Tensor:
            made = from_numpy(array)
            self.functions.ordinary[id(made)] = made
            return made

        monkeypatch.setattr(torch, "from_numpy", ordinary)
        monkeypatch.setitem(varlen._IMPLEMENTATIONS, "reference", self._may_look(varlen.reference))
        monkeypatch.setattr(kernels, "draw", self._may_look(kernels.draw))

    def _may_look(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            self.operators.paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self.operators.paused = False

        return run

    def __enter__(self) -> None:
        self.operators.__enter__()
        self.functions.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.functions.__exit__(kind, error, trace)
        self.operators.__exit__(kind, error, trace)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> NoWaits:
    return NoWaits(monkeypatch)


OFFENCES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "index": lambda x: list(range(x.sum().long())),
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "any": lambda x: any(x > 0),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: torch.nonzero(x),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.__setitem__(x > 0, torch.zeros(3)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "tensor on the device": lambda x: torch.tensor([1, 2], device=x.device),
    "ordinary memory": lambda x: torch.tensor([1, 2]).to(x.device),
    "ordinary array": lambda x: torch.from_numpy(np.arange(3)).to(x.device),
    "copy of ordinary memory": lambda x: x.copy_(torch.from_numpy(np.arange(3))),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_what_would_wait_is_recognised(no_waits: NoWaits, offence: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    OFFENCES[offence](x.clone())  # it works
    with pytest.raises(Waits), no_waits:
        OFFENCES[offence](x)


def test_what_would_not_wait_passes(no_waits: NoWaits) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with no_waits:
        y = upload(torch.from_numpy(np.arange(3)), x.device).to(x.device)
        y = torch.where(x > 1, x[y], 0.0).masked_fill(x > 2, 5.0)
        y = torch.repeat_interleave(y, y.long(), output_size=7)
    assert y.tolist() == [2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0]


@pytest.fixture(scope="module")
def rewards() -> list[RewardModel]:
    """Two reward models with vocabularies of their own."""
    return [
        load_reward(family, torch.float32, beside="dream", attention="reference", vocab_fallback="zero")
        for family in ("dream", "llada")
    ]


TIMED = Method(
    "timed", "Sees all that a weight may see.", "this test", lambda rows: rows.time * rows.entropy_tau / (1 + rows.step)
)
NAMES = (*gradient_methods(), "timed")


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "timed", TIMED)


def steering(rewards: list[RewardModel], steps: int) -> Callable[[], Steered]:
    """Inner steps of one trajectory for each method."""
    rng = np.random.default_rng(5)
    canvases = [rng.integers(20, 500, 12) for _ in NAMES]
    places = plan(12, DiffusionParams(len(NAMES)), GuidanceParams())
    positions = [np.arange(2 * index, 12) for index in range(len(NAMES))]
    canvases[-1][2] = EOS  # revealed: all behind it is hidden
    canvases[1][1] = PAD
    responses = Responses.of(canvases, positions, eos_token_id=EOS, pad_token_id=PAD)
    count = len(responses.masked)
    ones = torch.ones(len(NAMES), dtype=torch.float64)
    objectives = [
        Objective(model, tuple(contexts(model, len(NAMES))), weight * ones)
        for weight, model in enumerate(rewards, start=1)
    ]
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(count, VOCABULARY, generator=generator)
    logits[20, EOS] = 30.0  # masked, and an EOS by its argmax
    params = kernels.RowParams(
        tau=torch.full((count,), 0.7), top_p=torch.full((count,), 0.9), eta=torch.full((count,), 0.5),
        top_k=torch.full((count,), VOCABULARY), greedy=torch.zeros(count, dtype=torch.bool),
    )  # fmt: skip
    state = kernels.begin(logits, params, backend="torch", updates=steps)

    def keys(inner: int) -> Tensor:
        columns = [np.full(count, value) for value in (1, 0, 0, 0, inner)]
        return row_keys(*(upload(torch.from_numpy(x), CPU) for x in (*columns, np.arange(count))))

    return lambda: steer(state, responses, objectives, NAMES, places, keys, steps, timings=Timings(), read_after=True)


@pytest.mark.parametrize("padded", [False, True], ids=["", "template ends in padding"])
@pytest.mark.parametrize("graphs", [False, True], ids=["kernels", "graphs"])
def test_inner_steps_wait_for_nothing(
    rewards: list[RewardModel], no_waits: NoWaits, graphs: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in rewards if padded else ():
        _, after = split_at_response(model.tokenizer, (Message("user", "Hello"),))
        monkeypatch.setattr(model, "pad_token_id", after[-1])
    expected = steering(rewards, 3)()
    run = steering(rewards, 3)
    for model in rewards:
        monkeypatch.setattr(model, "graphed_passes", GraphedPasses(model, again) if graphs else None)
    with torch.no_grad(), no_waits:
        steered = run()
    assert len(steered.rewards) == 4
    for got, wanted in zip(steered.rewards, expected.rewards, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3 if graphs else 0, atol=1e-3 if graphs else 0)
    assert len({tuple(each.tolist()) for each in steered.rewards}) == 4  # they moved


@pytest.mark.parametrize("way", ["kernels", "graphs", "asking"])
def test_a_pass_needs_no_values(way: str) -> None:
    """On `meta`, where tensors have shapes and no values, with torch's own variable-length attention: what asked for
    one, or brought one from elsewhere, would fail."""
    meta = torch.device("meta")
    model = load_reward("dream", torch.bfloat16, attention="varlen", device=meta, vocab_fallback="zero")
    (context,) = RewardContext.of(model, [(range(20), (3, 4))])
    one = Pass(model, [context] * 3, [np.arange(20, 32)] * 3, [np.arange(2, 12)] * 3, device=meta)
    embeds = torch.empty(30, model.hidden_size, device=meta)
    if way == "graphs":
        model.graphed_passes = GraphedPasses(model, again)
    if way == "asking":
        model.attention_backend = "sdpa"
        with pytest.raises(NotImplementedError, match="nonzero"):
            one.read(embeds)
        return
    rewards, g = one.read(embeds)
    assert (rewards.shape, g.shape) == ((3,), embeds.shape)
    assert (rewards.device, g.device) == (meta, meta)
