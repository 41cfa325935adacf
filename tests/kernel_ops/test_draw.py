"""The draw: its distribution, its filters, its ties, and what it must not depend on."""

import pytest
import scipy.stats
import torch

import kernels
from kernels.random import row_keys, uniform


def parameters(n, v, device, tau=1.0, top_p=1.0, top_k=None, greedy=False, dtype=torch.float32):
    def column(value, kind):
        return torch.full((n,), value, dtype=kind, device=device)

    return kernels.RowParams(
        tau=column(tau, dtype),
        top_p=column(top_p, dtype),
        top_k=column(v if top_k is None else top_k, torch.long),
        greedy=column(greedy, torch.bool),
        eta=column(0.5, dtype),
    )


def begin(implementation, logits, *filters, **others):
    """A state of these logits (N, V), the same `parameters` in each row."""
    logits = logits.to(implementation.device).contiguous()
    params = parameters(*logits.shape, implementation.device, *filters, **others)
    return kernels.begin(logits, params, backend=implementation.backend)


def keys_of(n: int, device: str, seed: int = 0) -> torch.Tensor:
    position = torch.arange(n, device=device)
    zero = torch.zeros_like(position)
    return row_keys(zero + seed, zero, zero, zero, zero, position)


def row_of(kind: str, v: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(11)
    if kind == "flat":
        return torch.randn(v, generator=g) * 0.1
    if kind == "peaked":
        return torch.randn(v, generator=g) * 4
    if kind == "tied":
        return torch.randint(0, 4, (v,), generator=g).float()
    assert kind == "bf16-tied"
    return (torch.randn(v, generator=g) * 2 + 8).bfloat16()


def filtered(row, tau, top_p, top_k, never=None):
    """One row's filtered distribution in float64, by the definition: sort by (value desc, id asc), cut, leave `never`
    out, renormalise."""
    q = (row.double() / tau).softmax(-1).tolist()
    ranked = sorted(range(len(q)), key=lambda i: (-float(row[i]), i))
    kept, before = [], 0.0
    for rank, i in enumerate(ranked):
        if rank and (before > top_p or rank >= top_k):
            break
        kept.append(i)
        before += q[i]
    kept = [i for i in kept if i != never] or [next(i for i in ranked if i != never)]
    result = torch.zeros(len(q), dtype=torch.float64)
    result[kept] = torch.tensor([q[i] for i in kept], dtype=torch.float64)
    return result / result.sum()


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "bf16-tied"])
@pytest.mark.parametrize(
    ("top_p", "top_k", "rank"),
    [(1.0, None, None), (0.9, None, 0), (0.6, None, None), (1.0, 20, 2), (0.8, 15, 0), (0.3, 3, 1), (1.0, 3, None)],
)
def test_distribution(implementation, kind, top_p, top_k, rank):
    """With the token of some rank never drawn, or with none."""
    if implementation.interpreted:
        pytest.skip("too many rows for the interpreter, which compares tokens with the reference instead")
    v, n, tau = 96, 3000, 0.8
    row = row_of(kind, v)
    never = None if rank is None else int(row.float().sort(descending=True, stable=True).indices[rank])
    expected = filtered(row, tau, top_p, top_k or v, never)
    state = begin(implementation, row.expand(n, v), tau, top_p, top_k)
    tokens = kernels.draw(state, keys_of(n, implementation.device, 5), never=never).cpu()
    counts = torch.bincount(tokens, minlength=v)
    assert counts[expected == 0].sum() == 0  # nothing outside the nucleus, ever
    likely = expected * n >= 5
    observed = [*counts[likely].tolist(), int(counts[~likely].sum())]
    wanted = [*(expected[likely] * n).tolist(), float(expected[~likely].sum() * n)]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) > 1:
        assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-4


def test_random_numbers_are_those_of_the_specification(implementation):
    """A row of V equal values draws id floor(u V)."""
    n, v = (12, 256) if implementation.interpreted else (500, 4096)
    g = torch.Generator().manual_seed(0)
    seed, *columns = (torch.randint(0, 2**bound, (n,), generator=g) for bound in (62, 16, 16, 31, 8, 31))
    keys = row_keys(torch.where(seed % 2 == 0, seed, -seed), *columns).to(implementation.device)
    state = begin(implementation, torch.zeros(n, v))
    assert kernels.draw(state, keys).equal((uniform(keys, 0) * v).long())


def test_same_tokens_as_the_reference(implementation, make_case):
    """Every implementation draws the same token for the same key: exactly in float64, and but for a draw within
    rounding of a boundary in float32 (a chance below 1e-4 a row)."""
    for n, v in [(12, 37), (3, 600)] if implementation.interpreted else [(300, 37), (300, 1500), (60, 9001)]:
        for dtype in implementation.dtypes:
            case = make_case(n, v, 2, dtype, implementation.device, seed=n + v)
            state, reference = case.begin(implementation.backend), case.begin("reference")
            for inner, never in enumerate((None, int(reference.stats.argmax[0]), None)):
                actual = kernels.draw(state, case.keys(inner=inner), never=never)
                expected = kernels.draw(reference, case.keys(inner=inner), never=never)
                different = int((actual != expected).sum())
                assert different <= (0 if dtype == torch.float64 else 1)
                if dtype == torch.float64:  # and after updates
                    g = case.normal(case.n, case.d)
                    for each in (state, reference):
                        soft = kernels.mix(each, case.table, expected, case.w).soft
                        kernels.update(each, [kernels.Term(g, case.table, soft)])


def test_a_token_that_is_never_drawn_leaves_the_rule_as_it_is(implementation):
    """The rule of algorithm.md 1.4 written out for one row at a time, for every id of a small vocabulary."""
    v, n = 5, 4 if implementation.interpreted else 40
    row = torch.tensor([2.0, 1.0, 2.0, -1.0, 0.5])
    for top_p, top_k in ((1.0, 5), (0.7, 5), (1.0, 2), (0.5, 1)):
        state = begin(implementation, row.expand(n, v), 0.7, top_p, top_k)
        keys = keys_of(n, implementation.device, 3)
        cumulative = (row.double() / 0.7).softmax(-1).cumsum(-1).tolist()
        for never in range(v):
            accepted = filtered(row, 0.7, top_p, top_k, never) > 0
            expected = []
            for key in keys.cpu():
                u = (float(uniform(key[None], round_)) for round_ in range(64))
                drawn = (next(i for i in range(v) if cumulative[i] > each or i == v - 1) for each in u)
                expected.append(next(x for x in drawn if accepted[x]))
            assert kernels.draw(state, keys, never=never).tolist() == expected


def test_where_a_token_that_is_never_drawn_is_all_there_is(implementation):
    """The best other token is taken: by greedy rows, where nothing else is kept, where all others are impossible, and
    (among equal ones, by the rule) where the others' mass is too small for a number. Statistics stay as they are."""
    v = 140 if implementation.interpreted else 1100
    for never, best in ((0, 1), (v - 1, v - 50)) if implementation.interpreted else ((0, 1), (7, 3), (v - 1, v - 50)):
        logits = torch.full((5, v), -30.0)
        logits[:, best] = -20.0
        logits[:, min(best + 20, v - 2)] = -20.0  # equal, with a higher id
        logits[:, never] = 5.0
        logits[3] = -torch.inf
        logits[3, never] = 5.0
        logits[4, :] -= 2000.0
        logits[4, never] = 5.0
        params = parameters(5, v, implementation.device, 0.9, 1.0)
        params.greedy[0], params.top_k[1], params.top_p[2] = True, 1, 0.9
        state = kernels.begin(logits.to(implementation.device), params, backend=implementation.backend)
        reference = kernels.begin(logits.to(implementation.device), params, backend="reference")
        keys = keys_of(5, implementation.device, 1)
        tokens = kernels.draw(state, keys, never=never).tolist()
        assert tokens[:4] == [best, best, best, 1 if never == 0 else 0]
        assert tokens[4] in (best, best + 20)
        assert tokens == kernels.draw(reference, keys, never=never).tolist()
        assert kernels.draw(state, keys)[:4].tolist() == [never] * 4
        assert state.stats.argmax.tolist() == [never] * 5
        assert kernels.filtered_stats(state, torch.full_like(state.stats.argmax, never)).token_probability[1] == 1


@pytest.mark.parametrize("top_k", [1, 3])
def test_hard_filters_fall_back_to_the_kept_ids(implementation, make_case, top_k):
    """On flat rows two tokens of thousands are kept, so nearly every row spends its 64 rejections."""
    n, v = (2, 300) if implementation.interpreted else (200, 3000)
    case = make_case(n, v, 2, torch.float32, implementation.device, seed=30)
    logits = (case.logits * 0.01).float()
    params = parameters(n, v, implementation.device, 0.9, 1.0, top_k)
    states = [kernels.begin(logits, params, backend=b) for b in (implementation.backend, "reference")]
    for never in (None, int(logits[0].argmax())):
        actual, expected = (kernels.draw(state, case.keys(), never=never) for state in states)
        assert int((actual != expected).sum()) <= 1
        allowed = (actual[:, None] == logits.topk(top_k, dim=-1).indices).any(-1)
        assert allowed[1 if never is not None else 0 :].all()  # the first row's may be the best other token


def test_the_kept_set_ends_at_exactly_one_id(implementation):
    """Of thousands of ids, by the definition: the last kept one has its probability, the next one none. Rows are
    smooth, nearly constant, full of equal values or of zeros of both signs, or of 16 bits; mass ends what is kept, or
    the count, or both."""
    v = 2 * 2048 + 9
    filters = ((0.9, None), (1.0, 3), (0.5, 30), (1.0, 3000), (0.999, None), (0.2, 3000))
    kinds = ("flat", "peaked", "tied", "bf16-tied", "constant", "far")
    rows = {kind: row_of(kind, v) for kind in kinds[:4]}
    rows |= {"constant": rows["flat"] * 1e-4 + 7, "far": rows["peaked"] * 4 - 300}
    rows["zeros"] = (rows["flat"] * 4 + 0.3).round()  # most values, each with its own sign
    chosen = [(kind, each) for index, kind in enumerate(kinds) for each in filters[index % 2 :: 2]]
    chosen.append(("zeros", (1.0, 3000)))
    params = parameters(len(chosen), v, implementation.device, 0.8)
    ends = []
    for index, (kind, (top_p, top_k)) in enumerate(chosen):
        params.top_p[index], params.top_k[index] = top_p, top_k or v
        expected = filtered(rows[kind].float(), 0.8, top_p, top_k or v)
        ranked = rows[kind].float().sort(descending=True, stable=True).indices
        count = int((expected > 0).sum())
        ends.append((int(ranked[count - 1]), int(ranked[count]), expected))
    logits = torch.stack([rows[kind].float() for kind, _ in chosen]).to(implementation.device)
    state = kernels.begin(logits, params, backend=implementation.backend)
    last, dropped = (torch.tensor([each[k] for each in ends], device=implementation.device) for k in (0, 1))
    stats = kernels.filtered_stats(state, last)
    probability = torch.tensor([float(expected[end]) for end, _, expected in ends])
    torch.testing.assert_close(stats.token_probability.cpu(), probability, rtol=1e-4, atol=0)
    assert (kernels.filtered_stats(state, dropped).token_probability == 0).all()
    entropy = torch.stack([torch.special.entr(expected).sum() for *_, expected in ends])
    torch.testing.assert_close(-stats.neg_entropy.cpu().double(), entropy, rtol=1e-4, atol=1e-5)


def test_equal_values_are_ranked_by_id(implementation):
    """All values equal: top_k 3 keeps ids 0, 1, 2; top_p just below a half keeps the lower half (the last crosses)."""
    n, v = (3, 300) if implementation.interpreted else (2000, 1030)
    keys, half = keys_of(n, implementation.device), v // 2
    logits = torch.zeros(n, v)
    state = begin(implementation, logits, top_k=3)
    drawn = set(kernels.draw(state, keys).tolist())
    assert drawn <= {0, 1, 2} if implementation.interpreted else drawn == {0, 1, 2}
    # Not a half, which the mass of the lower half hits exactly, where rounding would decide.
    state = begin(implementation, logits, top_p=0.4999)
    assert int(kernels.draw(state, keys).max()) < half
    last = torch.full((n,), half - 1, device=implementation.device)
    probability = kernels.filtered_stats(state, last).token_probability
    torch.testing.assert_close(probability, torch.full_like(probability, 1 / half))
    assert (kernels.filtered_stats(state, last + 1).token_probability == 0).all()


def test_a_row_does_not_depend_on_the_batch(implementation, make_case):
    case = make_case(5 if implementation.interpreted else 64, 1700, 2, torch.float32, implementation.device, seed=50)
    keys = case.keys()
    together = kernels.draw(case.begin(implementation.backend), keys)
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(1)).to(case.device)
    shuffled = kernels.begin(case.logits[order], case.params.select(order), backend=implementation.backend)
    assert kernels.draw(shuffled, keys[order]).equal(together[order])
    subset = order[:5]
    assert kernels.draw(case.begin(implementation.backend), keys[subset], subset).equal(together[subset])
    for row in range(0, case.n, 9):
        one = torch.tensor([row], device=case.device)
        alone = kernels.begin(case.logits[one], case.params.select(one), backend=implementation.backend)
        assert kernels.draw(alone, keys[one]).equal(together[one])


def test_rows_that_are_not_numbers_still_give_an_id(implementation):
    """The engine notices broken logits by their statistics; a draw from them must only stay inside the vocabulary."""
    v = 1100
    logits = torch.randn(3, v, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.nan
    logits[1, 7] = torch.nan
    state = begin(implementation, logits, 0.7, 0.9)
    tokens = kernels.draw(state, keys_of(3, implementation.device))
    assert ((tokens >= 0) & (tokens < v)).all()
    assert not torch.isfinite(state.stats.entropy_tau[:2]).any()
    assert torch.isfinite(state.stats.entropy_tau[2])


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_a_greedy_state_draws_the_best_token_beside_one_and_leaves_its_own_state_alone(
    implementation, make_case, updates
):
    case = make_case(5, 300, 3, torch.float32, implementation.device)
    state, other = case.begin(implementation.backend), case.begin(implementation.backend)
    for _ in range(updates):
        for each in (state, other):
            soft = kernels.mix(each, case.table, case.tokens, case.w).soft
            kernels.update(each, [kernels.Term(case.normal(5, 3) * 0 + 1, case.table, soft)])
    never = int(state.stats.argmax[0])
    rest = state.phi().clone()
    rest[:, never] = -torch.inf
    keys = keys_of(5, implementation.device)
    assert kernels.draw(state.greedy(), keys, never=never).tolist() == rest.argmax(-1).tolist()
    assert kernels.draw(state, keys).tolist() == kernels.draw(other, keys).tolist()
