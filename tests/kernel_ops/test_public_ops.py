"""What the package's functions refuse, what they choose, and what importing them does not do."""

import subprocess
import sys

import pytest
import torch

import kernels


@pytest.fixture
def case(make_case):
    return make_case(4, 50, 3, torch.float32, "cpu", seed=70)


def test_importing_kernels_does_not_import_triton():
    code = "import sys, kernels, kernels.random; print('triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_an_unknown_backend_is_refused_with_the_known_ones(case):
    with pytest.raises(ValueError, match=r"unknown kernel backend 'numpy'; known: reference, torch, cpp"):
        case.begin("numpy")


def test_cpp_refuses_float64(make_case):
    if "cpp" not in kernels.available_backends():
        pytest.skip("no C++ compiler")
    with pytest.raises(ValueError, match="float64"):
        make_case(2, 9, 2, torch.float64, "cpu").begin("cpp")


def test_float64_logits_run_in_torch(make_case):
    case = make_case(2, 9, 2, torch.float64, "cpu")
    assert kernels.begin(case.logits, case.params).backend == "torch"


def test_info_names_what_runs(case):
    info = kernels.backend_info()
    assert set(info) == {"row_stats", "draw", "filtered_stats", "mix", "update"}
    if not torch.cuda.is_available():
        assert set(info.values()) == {kernels.begin(case.logits, case.params).backend}


def test_shapes_that_do_not_fit_are_refused(case):
    p = case.params
    with pytest.raises(ValueError, match="floating-point"):
        kernels.begin(case.logits[0], p)
    with pytest.raises(ValueError, match="floating-point"):
        kernels.begin(case.logits.long(), p)
    short = kernels.RowParams(p.tau[:2], p.top_p, p.top_k, p.greedy, p.eta)
    with pytest.raises(ValueError, match=r"params\.tau"):
        kernels.begin(case.logits, short)
    state = kernels.begin(case.logits, p)
    with pytest.raises(ValueError, match="keys"):
        kernels.draw(state, case.keys(3))
    with pytest.raises(ValueError, match="tokens"):
        kernels.filtered_stats(state, case.tokens[:2])
    with pytest.raises(ValueError, match="table"):
        kernels.mix(state, case.table[:10], case.tokens, case.w)
    with pytest.raises(ValueError, match="tokens and w"):
        kernels.mix(state, case.table, case.tokens, case.w[:1])
    with pytest.raises(ValueError, match="rows"):
        kernels.draw(state, case.keys(1), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="at least one term"):
        kernels.update(state, [])
    g = case.normal(4, 3)
    with pytest.raises(ValueError, match="a term"):
        kernels.update(state, [kernels.Term(g[:2], case.table, g)])


def test_more_updates_than_announced_are_refused(case):
    state = kernels.begin(case.logits, case.params, updates=1)
    term = kernels.Term(case.normal(4, 3), case.table, case.normal(4, 3))
    kernels.update(state, [term])
    with pytest.raises(ValueError, match="1 updates only"):
        kernels.update(state, [term])


def test_no_gradient_flows_through_the_operations(case):
    logits = case.logits.clone().requires_grad_()
    state = kernels.begin(logits, case.params)
    mixed = kernels.mix(state, case.table.requires_grad_(), case.tokens, case.w)
    assert not mixed.embeds.requires_grad
    assert not state.phi().requires_grad
    assert not state.stats.entropy_1.requires_grad
