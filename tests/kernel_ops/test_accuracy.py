"""Every operation of every implementation against float64, relative to plain torch in the same dtype."""

import pytest
import torch

import kernels
from tests.support.kernels import choose_kernels

FLOATS = ("lse_1", "lse_tau", "entropy_1", "entropy_tau")


def cases(implementation, make_case, seed):
    for shape in implementation.shapes:
        for dtype in implementation.dtypes:
            yield make_case(*shape, dtype, implementation.device, seed=seed)


def three_states(case, implementation):
    """Of the implementation, of plain torch in the same dtype, and the truth."""
    state = case.begin(implementation.backend)
    assert state.backend == implementation.backend
    return state, case.begin("reference"), case.truth()


def test_row_stats(implementation, make_case, assert_as_good_as_torch):
    for case in cases(implementation, make_case, seed=0):
        stats, plain, truth = (s.stats for s in three_states(case, implementation))
        for name in FLOATS:
            assert_as_good_as_torch(getattr(stats, name), getattr(plain, name), getattr(truth, name), floor=8)
        # The lowest id among equal values, which bfloat16 rows are full of.
        top = case.logits == case.logits.amax(-1, keepdim=True)
        assert stats.argmax.tolist() == [int(torch.nonzero(row)[0, 0]) for row in top]


def test_row_stats_of_extreme_rows(implementation):
    """Rows with -inf, one possible token, all equal, huge spread, and a tiny temperature."""
    v = 1100
    logits = torch.zeros(6, v)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 1050] = 3.0
    logits[3] = torch.linspace(-300, 300, v)
    logits[4] = torch.linspace(-1, 1, v)
    logits[5, :1024] = -torch.inf
    n = len(logits)
    tau, half = torch.tensor([1.0, 0.7, 0.7, 0.7, 1e-3, 2.0]), torch.full((n,), 0.5)
    columns = tau, half + 0.4, torch.full((n,), v), half > 1, half
    logits, *columns = (x.to(implementation.device) for x in (logits, *columns))
    params = kernels.RowParams(*columns)
    stats = kernels.begin(logits, params, backend=implementation.backend).stats
    z = logits.double() / params.tau.double()[:, None]
    entropy = torch.special.entr(z.softmax(-1)).sum(-1)
    torch.testing.assert_close(stats.lse_tau.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy_tau.double(), entropy, rtol=2e-6, atol=2e-6)
    assert stats.argmax.tolist() == [1, 1050, 0, v - 1, v - 1, 1024]


def test_filtered_stats(implementation, make_case, assert_as_good_as_torch):
    for case in cases(implementation, make_case, seed=1):
        states = three_states(case, implementation)
        for subset in (None, torch.arange(0, case.n, 2, device=case.device)):
            tokens = case.tokens if subset is None else case.tokens[subset]
            actual, plain, truth = (kernels.filtered_stats(state, tokens, subset) for state in states)
            for name in ("neg_entropy", "token_probability", "margin"):
                assert_as_good_as_torch(getattr(actual, name), getattr(plain, name), getattr(truth, name), floor=16)


def test_mix(implementation, make_case, assert_as_good_as_torch):
    for case in cases(implementation, make_case, seed=2):
        actual, plain, truth = (
            kernels.mix(state, case.table.to(state.dtype), case.tokens, case.w.to(state.dtype))
            for state in three_states(case, implementation)
        )
        assert_as_good_as_torch(actual.soft, plain.soft, truth.soft, floor=16)
        assert_as_good_as_torch(actual.embeds, plain.embeds, truth.embeds, floor=16)


@pytest.mark.parametrize("native", ["0", "1"])
def test_mix_takes_a_table_in_another_dtype(implementation, make_case, assert_as_good_as_torch, monkeypatch, native):
    choose_kernels(monkeypatch, BFLOAT16=native)
    case = make_case(4, 300, 33, torch.bfloat16, implementation.device, seed=3)
    table = case.table.bfloat16()
    actual, plain, truth = (
        kernels.mix(state, table.double() if state.dtype == torch.float64 else table, case.tokens, case.w).soft
        for state in three_states(case, implementation)
    )
    # Where the device multiplies 16-bit numbers natively, the weights are rounded to the table's dtype for it, once.
    exact = implementation.device == "cpu" and implementation.backend != "fused" and native == "0"
    floor = 16 if exact else 2.0**-8 / 2.0**-23
    assert_as_good_as_torch(actual, plain, truth, floor=floor)


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
@pytest.mark.parametrize("known", [False, True])
def test_update(implementation, make_case, assert_as_good_as_torch, updates, known):
    """phi and its statistics after some updates, in the two regimes of Adam.

    Where the gradient is far below Adam's epsilon the step is linear in it, so phi - phi_0 must be as accurate as the
    gradient; where it is far above, the step is nearly its sign, and rounding of a gradient near zero can move phi by
    2 eta whoever computes it: there the mean error is compared.
    """
    if implementation.interpreted and (updates, known) not in {(1, False), (3, True), (4, False)}:
        pytest.skip("the interpreter takes a minute for what a GPU does in a blink")
    if implementation.interpreted and implementation.backend == "fused" and updates == 1:
        pytest.skip("the first of several updates is the same")
    for scale in (1e-9, 1.0):
        for case in cases(implementation, make_case, seed=4):
            states = [case.begin(b, updates if known else None) for b in (implementation.backend, "reference")]
            states.append(case.truth())
            softs = []
            for _ in range(updates):
                g, other = case.normal(case.n, case.d) * scale, case.normal(case.n, case.d) * scale
                softs = []
                for state in states:
                    table, w = case.table.to(state.dtype), case.w.to(state.dtype)
                    soft = kernels.mix(state, table, case.tokens, w).soft
                    softs.append(soft)
                    terms = [kernels.Term(g.to(state.dtype), table, soft)]
                    if implementation.backend != "fused":  # which leaves updates of several terms to the library
                        soft = kernels.mix(state, table.flip(0), case.tokens, w).soft
                        terms.append(kernels.Term(other.to(state.dtype), table.flip(0), soft))
                    kernels.update(state, terms)
            moved = [state.phi().double() - case.logits.double() for state in states]
            if scale < 1e-6:
                error, own = ((m - moved[2]).norm() for m in moved[:2])
                unit = torch.finfo(states[0].dtype).eps
                rounding = unit * case.logits.double().norm() + 32 * unit * moved[2].norm()
                assert error <= 3 * own + rounding, f"{case.logits.shape} {case.dtype}: {error:.3g} against {own:.3g}"
            else:
                error, own = ((m - moved[2]).abs().mean() for m in moved[:2])
                assert error <= 4 * own + 1e-5, f"{case.logits.shape} {case.dtype}: {error:.3g} against {own:.3g}"
            # Statistics must be those of the phi that the implementation itself has reached.
            phi, tau = states[0].phi().double(), case.params.tau.double()
            stats = states[0].stats
            torch.testing.assert_close(stats.lse_1.double(), phi.logsumexp(-1), rtol=1e-5, atol=1e-5)
            z = phi / tau[:, None]
            entropy = torch.special.entr(z.softmax(-1)).sum(-1)
            torch.testing.assert_close(stats.entropy_tau.double(), entropy, rtol=1e-4, atol=1e-4)
            at_argmax = phi.gather(-1, stats.argmax[:, None])[:, 0]
            assert (at_argmax >= phi.amax(-1) - 1e-5).all()
