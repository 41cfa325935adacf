"""What the package's functions refuse, what they choose, and what importing them does not do."""

import subprocess
import sys

import pytest
import torch

import kernels
from kernels import attention
from kernels.settings import settings
from tests.support.kernels import choose_kernels


@pytest.fixture
def case(make_case):
    return make_case(4, 50, 3, torch.float32, "cpu", seed=70)


def test_importing_kernels_does_not_import_triton():
    code = "import sys, kernels, kernels.random; print('triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_what_runs_where_none_is_named(case, make_case, monkeypatch):
    choose_kernels(monkeypatch, BACKEND="")
    expected = "cpp" if "cpp" in kernels.available_backends() else "torch"
    assert kernels.begin(case.logits, case.params).backend == expected
    if not torch.cuda.is_available():
        assert kernels.default_backend() == expected
    wide = make_case(2, 9, 2, torch.float64, "cpu")
    assert kernels.begin(wide.logits, wide.params).backend == "torch"
    if "cpp" in kernels.available_backends():
        with pytest.raises(ValueError, match="float64"):
            wide.begin("cpp")


def test_what_does_not_fit_is_refused(case):
    p, g = case.params, case.normal(4, 3)
    state = kernels.begin(case.logits, p)
    short = kernels.RowParams(p.tau[:2], p.top_p, p.top_k, p.greedy, p.eta)
    for message, call in (
        ("unknown kernel backend 'numpy'; known: reference, torch, cpp", lambda: case.begin("numpy")),
        ("floating-point", lambda: kernels.begin(case.logits[0], p)),
        ("floating-point", lambda: kernels.begin(case.logits.long(), p)),
        (r"params\.tau", lambda: kernels.begin(case.logits, short)),
        ("keys", lambda: kernels.draw(state, case.keys(3))),
        ("rows", lambda: kernels.draw(state, case.keys(1), torch.tensor([[0]]))),
        ("one id of several below 50", lambda: kernels.draw(state, case.keys(), never=-1)),
        ("one id of several below 50", lambda: kernels.draw(state, case.keys(), never=50)),
        ("tokens", lambda: kernels.filtered_stats(state, case.tokens[:2])),
        ("table", lambda: kernels.mix(state, case.table[:10], case.tokens, case.w)),
        ("tokens and w", lambda: kernels.mix(state, case.table, case.tokens, case.w[:1])),
        ("place", lambda: kernels.mix_into(state, case.table, case.tokens, case.w, g, case.tokens[:2])),
        ("at least one term", lambda: kernels.update(state, [])),
        ("a term", lambda: kernels.update(state, [kernels.Term(g[:2], case.table, g)])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_gradient_flows_through_the_operations(case):
    logits = case.logits.clone().requires_grad_()
    state = kernels.begin(logits, case.params)
    mixed = kernels.mix(state, case.table.requires_grad_(), case.tokens, case.w)
    assert not mixed.embeds.requires_grad
    assert not state.phi().requires_grad
    assert not state.stats.entropy_1.requires_grad


def test_the_environment_names_a_backend(make_case, monkeypatch):
    for name in ("reference", "torch"):
        choose_kernels(monkeypatch, BACKEND=name)
        for dtype in (torch.float32, torch.float64):
            case = make_case(2, 9, 2, dtype, "cpu")
            assert kernels.begin(case.logits, case.params).backend == name
    if "cpp" in kernels.available_backends():
        choose_kernels(monkeypatch, BACKEND="cpp")
        case = make_case(2, 9, 2, torch.float64, "cpu")
        assert kernels.begin(case.logits, case.params).backend == "torch"  # cpp cannot take float64
    choose_kernels(monkeypatch, BACKEND="cuda")
    with pytest.raises(ValueError, match="KERNELS_BACKEND is 'cuda'"):
        kernels.begin(case.logits, case.params)
    choose_kernels(monkeypatch, BACKEND="")
    for name, known in (("BFLOAT16", "0, 1"), ("CPP", "native, baseline, off")):
        with monkeypatch.context() as patch:
            choose_kernels(patch, **{name: "int8"})
            with pytest.raises(ValueError, match=f"KERNELS_{name} is 'int8'; known: {known}"):
                settings()


def test_the_environment_is_read_once(monkeypatch):
    choose_kernels(monkeypatch, BACKEND="torch")
    first = settings()
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert settings() is first
    choose_kernels(monkeypatch)
    assert settings().backend == "reference"


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_products_with_a_bfloat16_table_cost_its_rounding_and_no_more(make_case, backend, monkeypatch):
    """Where the processor has instructions for them, as tests may pretend; elsewhere they are float32 ones."""
    if backend not in kernels.available_backends():
        pytest.skip("no C++ compiler")
    case = make_case(9, 3001, 33, torch.bfloat16, "cpu", seed=71)
    exact, tables = case.truth(), [case.table.bfloat16(), case.table.flip(0).bfloat16()]
    moved = {}
    for native in "01":
        choose_kernels(monkeypatch, BFLOAT16=native)
        for count in (1, 2):  # reward models
            state, exact, g = case.begin(backend), case.truth(), [case.normal(9, 33) * 1e-9 for _ in range(count)]
            terms: list[list[kernels.Term]] = [[], []]
            for own, s in zip(terms, (state, exact), strict=True):
                for gradient, table in zip(g, tables, strict=False):
                    wide = table if s is state else table.double()
                    soft = kernels.mix(s, wide, case.tokens, case.w.to(s.dtype)).soft
                    own.append(kernels.Term(gradient.to(s.dtype), wide, soft))
                kernels.update(s, own)
            limit = 2**-7 if native == "1" else 2**-18
            for ours, true in zip(*terms, strict=True):
                assert (ours.soft.double() - true.soft).norm() <= limit * true.soft.norm()
            moved[native, count], true_step = (s.phi().double() - case.logits.double() for s in (state, exact))
            assert (moved[native, count] - true_step).norm() <= 4 * limit * true_step.norm() + 1e-5
    assert not moved["0", 1].equal(moved["1", 1])


def test_the_number_of_threads_changes_nothing(make_case):
    """Of what C++ computes by itself; a library's products may be summed in another order."""
    if "cpp" not in kernels.available_backends():
        pytest.skip("no C++ compiler")
    case, threads, results = make_case(9, 3001, 3, torch.float32, "cpu", seed=72), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            state = case.begin("cpp")
            tokens, (q, k) = kernels.draw(state, case.keys(), never=7), case.table[:60].view(2, 30, 1, 3)
            mixed = attention.attend(q, k, k, attention.Rows([9, 21], [9, 21]), causal=True)
            results.append([mixed, state.stats.entropy_tau, tokens, kernels.filtered_stats(state, tokens).neg_entropy])
        finally:
            torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_three_updates_hold_at_most_three_tensors(make_case):
    """Memory beyond the logits, in torch's allocator: Adam's state is two kept gradients, the rest is slabs."""
    from benchmarks.kernels import compare, measure

    shape = compare.Shape(128, 40_000, 16, 3, torch.float32, torch.device("cpu"))
    problem = compare.Problem(shape)
    for backend in set(kernels.available_backends()) & {"torch", "cpp"}:
        peak = measure.peak_bytes(lambda name=backend: compare.our_step(problem, name), shape.device)
        assert 2 * problem.logits.nbytes < peak <= 3 * problem.logits.nbytes
