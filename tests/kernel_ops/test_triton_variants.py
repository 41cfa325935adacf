"""The Triton backend's own choices: fused and library variants agree; random numbers and the choice table.

Runs on a CUDA device, or in triton's interpreter (see test_triton_interpreter.py)."""

from dataclasses import replace

import pytest
import torch

import kernels
from kernels.random import row_keys, uniform

if "triton" not in kernels.available_backends():
    pytest.skip("neither a CUDA device nor triton's interpreter", allow_module_level=True)


@pytest.fixture
def triton_only(implementation):
    if implementation.backend != "triton":
        pytest.skip("about the Triton backend")
    return implementation


def forced(**changes):
    from kernels.gpu import choices

    return choices.forced(replace(choices.Choice(), **changes))


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_and_library_updates_agree(triton_only, make_case, pieces, dtype):
    n, v, d = (3, 300, 33) if triton_only.interpreted else (150, 3001, 65)
    if not triton_only.interpreted and dtype == torch.float32:
        pytest.skip("float32 products stay with the library on a GPU")
    moved = []
    for update in ("library", "fused"):
        case = make_case(n, v, d, dtype, triton_only.device, seed=80)
        table = case.table.to(dtype)
        state = case.begin("triton")
        rows = torch.tensor([2, 0], device=case.device)
        with forced(update=update, update_pieces=pieces, update_rows=16 if triton_only.interpreted else 128):
            for t in range(3):
                g = (case.normal(n, d) * 1e-9).to(dtype).float()
                soft = kernels.mix(state, table, case.tokens, case.w).soft
                kernels.update(state, [kernels.Term(g, table, soft)], rows if t == 2 else None)
        moved.append((state.phi(rows), state.stats.entropy_tau[rows], kernels.draw(state, case.keys(2), rows)))
    (phi, entropy, drawn), (fused_phi, fused_entropy, fused_drawn) = moved
    step = (phi - case.logits[rows].float()).norm()
    assert (phi - fused_phi).norm() <= 1e-5 * step + 1e-7 * phi.norm()
    torch.testing.assert_close(entropy, fused_entropy, rtol=1e-5, atol=1e-5)
    assert drawn.equal(fused_drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_and_library_forwards_agree(triton_only, make_case, dtype):
    n, v, d = (3, 1031, 33) if triton_only.interpreted else (150, 3001, 165)
    case = make_case(n, v, d, dtype, triton_only.device, seed=81)
    case.logits[0, : v // 2] = -torch.inf  # a part of the vocabulary without any mass
    table = case.table.to(dtype)
    state = case.begin("triton")
    small = {"forward_rows": 16, "forward_hidden": 64, "programs": 4} if triton_only.interpreted else {}
    softs = []
    for forward in ("library", "fused"):
        with forced(forward=forward, **small):
            softs.append(kernels.mix(state, table, case.tokens, case.w))
            entropy_1, entropy_tau = state.fused_entropies(table)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(softs[1].soft, softs[0].soft, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(softs[1].embeds, softs[0].embeds, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy_1.float(), state.stats.entropy_1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_tau.float(), state.stats.entropy_tau, rtol=1e-5, atol=1e-5)


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


def test_without_a_measurement_the_library_variants_run(triton_only):
    from kernels.gpu import choices

    choice = choices.choose(torch.device("cpu"), torch.bfloat16, 10, 1000, 64)
    assert (choice.forward, choice.update) == ("library", "library")


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
