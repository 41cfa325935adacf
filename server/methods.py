"""The guidance methods: one table, which the API, the engine, the documentation and the tests all read.

A gradient method is one weight w for each row, a row being one masked position of one trajectory: the reward model
reads e = soft + stopgrad(w * (hard - soft)) there (algorithm.md, section 2). `none` and `bon` have no weight, since
they move no logits. To add a method, register its row, here or in a module that the setting `plugins` names.

A weight uses the methods of the tensors that it is given: this file is read by the HTTP process, which has no torch.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from server.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor


class Rows(Protocol):
    """What a weight may need to know of N rows at an inner step, on the rows' device; all but V are (N,).

    `entropy_1` and `entropy_tau` are the entropies in nats of softmax(phi) and of softmax(phi / tau), phi being the
    logits as steered so far; `vocab_size` is V, the logits' width. `step` (int64) counts the denoising steps of a run
    from 0, and `time` is that step's t, in (0, 1], which falls from 1.
    """

    @property
    def entropy_1(self) -> Tensor: ...

    @property
    def entropy_tau(self) -> Tensor: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def step(self) -> Tensor: ...

    @property
    def time(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    `summary` says in one sentence what the method does, and `source` where it comes from. `weight` gives w (N,) in
    [0, 1]; no gradient flows through it. `draws` says whether w is ever above 0, so that hard tokens must be drawn.
    """

    name: str
    summary: str
    source: str
    weight: Callable[[Rows], Tensor] | None = None
    draws: bool = True

    def weigh(self, rows: Rows) -> Tensor:
        """w (N,) in the entropies' dtype. Raises ValueError where the method has no weight, or one of another shape."""
        if self.weight is None:
            raise ValueError(f"the method {self.name} has no weight")
        w = self.weight(rows)
        if w.shape != rows.entropy_1.shape:
            raise ValueError(f"the weight of {self.name} has shape {tuple(w.shape)}, not {tuple(rows.entropy_1.shape)}")
        return w.to(rows.entropy_1.dtype)


METHODS: dict[str, Method] = {}
"""By name, in the order of registration."""

SHORTHANDS: dict[str, dict[str, Any]] = {"smc": {"method": "bon", "resample": {"by": "reward"}}}
"""What else `guidance` may be as one word, by that word: sequential Monte Carlo is plain sampling that resamples."""


def register(method: Method) -> None:
    """Add a row to the table. Raises ConfigurationError where its name is taken, or not one word in small letters."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", method.name):
        raise ConfigurationError(f"the guidance method's name {method.name!r} is not one word in small letters")
    if method.name in METHODS or method.name in SHORTHANDS:
        raise ConfigurationError(f"there are two guidance methods with the name {method.name!r}")
    METHODS[method.name] = method


def gradient_methods() -> list[str]:
    """Names of the methods that move logits along a reward's gradient."""
    return [name for name, method in METHODS.items() if method.weight is not None]


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules that the setting `plugins` names; each may register rows. Raises ConfigurationError."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ConfigurationError as error:
            raise ConfigurationError(f"plugins: {module}: {error}") from error
        except Exception as error:  # whatever an operator's own module may raise
            raise ConfigurationError(
                f"plugins: {module} cannot be imported: {type(error).__name__}: {error}"
            ) from error


register(Method("none", "Samples `best_of` answers without a reward model.", "plain sampling"))
register(Method("bon", "Samples `best_of` answers and keeps the n that the reward model scores best.", "best of n"))
register(
    Method(
        "expectation",
        "Steers by the soft embedding alone, the mean of all tokens' embeddings (continuous relaxation).",
        "arXiv 2602.05000, section 3",
        lambda rows: rows.entropy_1.new_zeros(len(rows.entropy_1)),
        draws=False,
    )
)
register(
    Method(
        "aps",
        "Steers by the embedding of a drawn token, and differentiates the soft one (straight-through estimate).",
        "arXiv 2510.02291",
        lambda rows: rows.entropy_1.new_ones(len(rows.entropy_1)),
    )
)
register(
    Method(
        "entrgi",
        "Steers by a mix of both: the more certain a position is, the softer its embedding.",
        "arXiv 2602.05000, section 4",
        lambda rows: rows.entropy_1 / math.log(rows.vocab_size),
    )
)
