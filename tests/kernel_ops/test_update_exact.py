"""The gradient step against what we did not write: finite differences, autograd and torch.optim.Adam, in float64."""

import pytest
import torch

import kernels
from tests.support.kernels import choose_kernels


def loss(phi, tau, g, table):
    """What the closed form differentiates: the reward is linear in the soft embedding with slope g."""
    return ((phi / tau[:, None]).softmax(-1) @ table * g).sum()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradient_by_finite_differences(make_case, backend):
    case = make_case(3, 41, 5, torch.float64, "cpu", seed=60)
    g = case.normal(case.n, case.d) * 1e-8  # so small that Adam's epsilon keeps the step from being a sign
    state = case.begin(backend)
    soft = kernels.mix(state, case.table, case.tokens, case.w).soft
    kernels.update(state, [kernels.Term(g, case.table, soft)])
    step = (state.phi() - case.logits) / case.params.eta[:, None]
    gradient = 1e-8 * step / (1 - step.abs())  # inverts step = gradient / (|gradient| + eps)
    h = 1e-5
    for row in range(case.n):
        for column in range(0, case.v, 5):
            delta = torch.zeros_like(case.logits)
            delta[row, column] = h
            high, low = (loss(case.logits + s * delta, case.params.tau, g * 1e8, case.table) for s in (1, -1))
            expected = float(high - low) / (2 * h) * 1e-8
            assert abs(float(gradient[row, column]) - expected) < 1e-9 * 1e-8 + 1e-7 * abs(expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("hint", [False, True])
def test_steps_are_those_of_torch_optim_adam(make_case, backend, hint):
    """Six updates with several reward models: autograd and torch.optim.Adam against the closed form."""
    case = make_case(7, 1100, 6, torch.float64, "cpu", seed=61)
    tables = [case.table, case.normal(case.v, 4)]
    state = case.begin(backend, updates=6 if hint else None)
    eta = case.params.eta
    leaves = [case.logits[row].clone().requires_grad_() for row in range(case.n)]
    groups = [{"params": [leaf], "lr": float(eta[row])} for row, leaf in enumerate(leaves)]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8, maximize=True)
    for _ in range(6):
        gs = [case.normal(case.n, table.shape[1]) for table in tables]
        softs = [kernels.mix(state, table, case.tokens, case.w).soft for table in tables]
        kernels.update(state, [kernels.Term(g, t, s) for g, t, s in zip(gs, tables, softs, strict=True)])
        adam.zero_grad()
        total = sum(loss(torch.stack(leaves), case.params.tau, g, t) for g, t in zip(gs, tables, strict=True))
        total.backward()
        adam.step()
        difference = (state.phi() - torch.stack(leaves).detach()).abs()
        # A gradient of 1e-16 (where the softmax underflows) has no correct digits, but also no weight.
        assert float(difference.max()) < 1e-6
        assert float(difference.median()) < 1e-12


def test_a_split_state_goes_on_as_the_whole_would(implementation, make_case):
    """Both parts share the memory of the whole; each gets its own number of updates, in turn with the other's."""
    n, v, d, at = (5, 300, 9, 2) if implementation.interpreted else (20, 1300, 9, 13)
    parts = slice(0, at), slice(at, None)
    for before in (0, 2) if implementation.interpreted else (0, 1, 2, 3):
        case = make_case(n, v, d, implementation.dtypes[0], implementation.device, seed=65)
        whole, expected = case.begin(implementation.backend, before + 3), case.begin(implementation.backend)

        def advance(state, g, rows, case=case):
            soft = kernels.mix(state, case.table, case.tokens[rows], case.w[rows]).soft
            kernels.update(state, [kernels.Term(g[rows], case.table, soft)])

        gs = [case.normal(n, d) * 1e-9 for _ in range(before + 3)]
        for g in gs[:before]:
            advance(whole, g, slice(None))
            advance(expected, g, slice(None))
        first, others = whole.split(at, before + 1)
        assert (first.rows, others.rows) == (at, n - at)
        for t, g in enumerate(gs[before:]):
            advance(expected, g, slice(None))
            advance(first, g, parts[0])
            if t == 0:
                advance(others, g, parts[1])
                left = expected.phi()[at:].clone()
        torch.testing.assert_close(first.phi(), expected.phi()[:at], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(others.phi(), left, rtol=2e-5, atol=2e-5)
        assert kernels.draw(first, case.keys()[:at]).equal(kernels.draw(expected, case.keys())[:at])
        with pytest.raises(ValueError, match="updates only"):
            advance(others, gs[0], parts[1])


def test_logits_are_left_alone_and_base_statistics_stay(implementation, make_case):
    case = make_case(5, 300, 4, torch.float32, implementation.device, seed=63)
    before = case.logits.clone()
    state = case.begin(implementation.backend, updates=3)
    base, entropy = state.stats, state.stats.entropy_tau.clone()
    argmax = base.argmax.clone()
    for _ in range(3):
        soft = kernels.mix(state, case.table, case.tokens, case.w).soft
        kernels.update(state, [kernels.Term(case.normal(5, 4), case.table, soft)])
    assert case.logits.equal(before)
    assert base.entropy_tau.equal(entropy)
    assert base.argmax.equal(argmax)
    assert not state.stats.entropy_tau.equal(entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_and_library_products_agree(implementation, make_case, monkeypatch, dtype):
    if implementation.backend != "fused":
        pytest.skip("about the fused backend")
    n, v, d = (3, 300, 33) if implementation.interpreted else (150, 3001, 65)
    if dtype == torch.float32 or (implementation.interpreted and dtype == torch.float16):
        pytest.skip("float32 products stay with the library; the interpreter is slow")
    moved = []
    choose_kernels(monkeypatch, BFLOAT16="0")
    for backend in ("triton", "fused"):
        case = make_case(n, v, d, dtype, implementation.device, seed=80)
        table = case.table.to(dtype)
        state = case.begin(backend)
        for _ in range(3):
            g = (case.normal(n, d) * 1e-9).to(dtype).float()
            soft = kernels.mix(state, table, case.tokens, case.w).soft
            kernels.update(state, [kernels.Term(g, table, soft)])
        moved.append((state.phi(), state.stats.entropy_tau, kernels.draw(state, case.keys())))
    (phi, entropy, drawn), (fused_phi, fused_entropy, fused_drawn) = moved
    step = (phi - case.logits.float()).norm()
    # Weights of 16 bits are rounded relative to different maxima.
    assert (phi - fused_phi).norm() <= 2**-7 * step + 1e-7 * phi.norm()
    torch.testing.assert_close(entropy, fused_entropy, rtol=2**-10, atol=1e-5)
    assert drawn.equal(fused_drawn)


def test_a_row_is_computed_alike_in_every_batch(implementation, make_case):
    """Bit for bit, whatever rows are beside it, also where its learning rate is so large for its temperature that its
    weights are written anew: a library chooses its product by the number of rows, the fused kernels do not."""
    if implementation.backend != "fused":
        pytest.skip("about the fused backend")
    n, v, d = (18, 300, 17) if implementation.interpreted else (300, 3001, 65)
    case = make_case(n, v, d, torch.bfloat16, implementation.device, seed=81)
    case.params.tau[1], case.params.eta[1] = 0.01, 1.0
    table, gs = case.table.bfloat16(), [case.normal(n, d) for _ in range(3)]
    found = []
    for rows in (torch.arange(n), torch.tensor([n - 1, 1])):
        index = rows.to(case.device)
        state = kernels.begin(case.logits[index], case.params.select(index), backend="fused", updates=3)
        for g in gs:
            mixed = kernels.mix(state, table, case.tokens[index], case.w[index])
            kernels.update(state, [kernels.Term(g[index], table, mixed.soft)])
            found.append(mixed.embeds)
        found.append(state.phi())
    assert torch.isfinite(torch.cat([x.flatten() for x in found])).all()
    together, alone = found[:4], found[4:]
    assert all(a[[n - 1, 1]].equal(b) for a, b in zip(together, alone, strict=True))


def test_rows_past_two_to_the_31_elements(implementation):
    """Offsets are 64-bit: the last row of a (14,200, 151,936) tensor is read where it is."""
    if not implementation.on_triton or implementation.interpreted:
        pytest.skip("about Triton; needs 4.3 GB of device memory")
    n, v = 14_200, 151_936
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 20.0
    column = torch.ones(n, device="cuda")
    params = kernels.RowParams(column, column, torch.full_like(column, v).long(), column > 2, column)
    state = kernels.begin(logits, params, backend=implementation.backend)
    assert int(state.stats.argmax[-1]) == v - 1
    assert int(state.stats.argmax[-2]) == 0
