"""The Triton backend's own choices: fused and library updates agree; random numbers; large offsets.

Runs on a CUDA device, or in triton's interpreter (see test_triton_interpreter.py)."""

import pytest
import torch

import kernels
from kernels.random import row_keys, uniform
from tests.support.kernels import choose_kernels

if "triton" not in kernels.available_backends():
    pytest.skip("neither a CUDA device nor triton's interpreter", allow_module_level=True)


@pytest.fixture
def triton_only(implementation):
    if implementation.backend != "triton":
        pytest.skip("about the Triton backend")
    return implementation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_and_library_updates_agree(triton_only, make_case, monkeypatch, dtype):
    n, v, d = (3, 300, 33) if triton_only.interpreted else (150, 3001, 65)
    if not triton_only.interpreted and dtype == torch.float32:
        pytest.skip("float32 products stay with the library on a GPU")
    moved = []
    choose_kernels(monkeypatch, BFLOAT16="0")
    for fused in "01":
        choose_kernels(monkeypatch, FUSED=fused)
        case = make_case(n, v, d, dtype, triton_only.device, seed=80)
        table = case.table.to(dtype)
        state = case.begin("triton")
        for _ in range(3):
            g = (case.normal(n, d) * 1e-9).to(dtype).float()
            soft = kernels.mix(state, table, case.tokens, case.w).soft
            kernels.update(state, [kernels.Term(g, table, soft)])
        moved.append((state.phi(), state.stats.entropy_tau, kernels.draw(state, case.keys())))
    (phi, entropy, drawn), (fused_phi, fused_entropy, fused_drawn) = moved
    step = (phi - case.logits.float()).norm()
    assert (phi - fused_phi).norm() <= 1e-5 * step + 1e-7 * phi.norm()
    torch.testing.assert_close(entropy, fused_entropy, rtol=1e-5, atol=1e-5)
    assert drawn.equal(fused_drawn)


def test_random_numbers_are_those_of_the_specification(triton_only):
    """A row of two equal values draws id 1 exactly when its uniform is a half or more."""
    n = 12
    position = torch.arange(n, device=triton_only.device)
    seed = position * 0 - 12345678901234567
    keys = row_keys(seed, position, position + 3, position + 70_000, position % 5, position + (1 << 30))
    params = kernels.RowParams(*(torch.ones(n, device=triton_only.device) for _ in range(2)), *(
        position * 0 + 2, position < 0, torch.ones(n, device=triton_only.device),
    ))  # fmt: skip
    state = kernels.begin(torch.zeros(n, 2, device=triton_only.device), params, backend="triton")
    assert kernels.draw(state, keys).equal((uniform(keys, 0) >= 0.5).long())


def test_rows_past_two_to_the_31_elements(triton_only):
    """Offsets are 64-bit: the last row of a (14,200, 151,936) tensor is read where it is."""
    if triton_only.interpreted:
        pytest.skip("needs 4.3 GB of device memory")
    n, v = 14_200, 151_936
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 20.0
    column = torch.ones(n, device="cuda")
    params = kernels.RowParams(column, column, torch.full_like(column, v).long(), column > 2, column)
    state = kernels.begin(logits, params, backend="triton")
    assert int(state.stats.argmax[-1]) == v - 1
    assert int(state.stats.argmax[-2]) == 0
