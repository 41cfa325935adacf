"""Several tensors in one copy to a device. `meta` stands for one: it has shapes and no values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.transfer import upload_all

META = torch.device("meta")


@dataclass(frozen=True)
class Some:
    """Tensors among other things."""

    first: Tensor
    second: Tensor | None
    name: str


def things():
    shared = torch.arange(7, dtype=torch.int32)
    there = torch.ones(2, device=META)
    some = Some(shared, None, "some"), Some(shared, there, "more")
    return [torch.rand(3, 5, dtype=torch.float64), *some, None, torch.ones(5) > 0, torch.empty(0, 4)], there


def test_on_a_cpu_everything_is_what_it_was():
    given, _ = things()
    assert all(got is was for got, was in zip(upload_all(given, "cpu"), given, strict=True))


def test_all_goes_in_one_copy(monkeypatch):
    given, there = things()
    copies = []
    original = Tensor.to

    def to(x, *arguments, **options):
        copies.append(x)
        return original(x, *arguments, **options)

    monkeypatch.setattr(Tensor, "to", to)
    table, first, second, nothing, mask, empty = upload_all(given, META)
    assert len(copies) == 1
    assert nothing is None
    assert (first.name, first.second, second.name) == ("some", None, "more")
    assert second.second is there
    for got, was in zip(
        (table, first.first, second.first, mask, empty),
        (given[0], given[1].first, given[2].first, *given[4:]),
        strict=True,
    ):
        assert (got.device, got.dtype, got.shape) == (META, was.dtype, was.shape)
    assert first.first is second.first
    # What was copied holds every value, each tensor from a multiple of 16 bytes on.
    buffer = copies[0]
    assert buffer[: 15 * 8].view(torch.float64).equal(given[0].flatten())
    assert buffer[128 : 128 + 28].view(torch.int32).equal(given[1].first)
    assert buffer[160 : 160 + 5].view(torch.bool).equal(given[4])
