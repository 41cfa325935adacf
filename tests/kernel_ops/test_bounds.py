"""What lies beside logits and outputs in memory is neither read nor written."""

import torch

import kernels


def test_logits_may_lie_in_a_larger_tensor_of_odd_row_stride(implementation, make_case):
    """Poison before, between and after the rows changes no result, and stays as it is."""
    n, v, d = (3, 301, 5) if implementation.interpreted else (9, 1301, 5)
    for dtype in implementation.dtypes[-1:] if implementation.interpreted else implementation.dtypes:
        case = make_case(n, v, d, dtype, implementation.device, seed=90)
        around = torch.full((n + 2, v + 10), torch.nan, dtype=dtype, device=case.device)
        inside = around[1:-1, 3 : 3 + v]
        inside.copy_(case.logits)
        poisoned = around.isnan()
        results = []
        for logits in (case.logits, inside):
            state = kernels.begin(logits, case.params, backend=implementation.backend, updates=3)
            tokens, found = kernels.draw(state, case.keys()), []
            for step in range(3):
                mixed = kernels.mix(state, case.table, tokens, case.w)
                g = torch.full_like(mixed.soft, 1e-9 * (step + 1))
                kernels.update(state, [kernels.Term(g, case.table, mixed.soft)])
                tokens = kernels.draw(state, case.keys(inner=step), never=7)
                stats = kernels.filtered_stats(state, tokens)
                found += [mixed.soft, mixed.embeds, tokens, state.stats.entropy_1, stats.neg_entropy, stats.margin]
            results.append([*found, state.phi()])
        assert all(torch.isfinite(x).all() for x in results[1])
        assert all(a.equal(b) for a, b in zip(*results, strict=True))
        assert around.isnan().equal(poisoned)
        assert inside.equal(case.logits)


def test_embeds_go_where_the_reward_model_reads_them(implementation, make_case):
    """To the named rows of a larger tensor in its dtype, and nowhere else; -1 is its last row, which nobody reads."""
    n, v, d = (5, 301, 17) if implementation.interpreted else (150, 1301, 65)
    case = make_case(n, v, d, torch.float32, implementation.device, seed=91)
    state = case.begin(implementation.backend)
    mixed = kernels.mix(state, case.table, case.tokens, case.w)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((2 * n, d), torch.nan, dtype=dtype, device=case.device)
        place = torch.randperm(2 * n - 1, generator=torch.Generator().manual_seed(0))[:n].to(case.device)
        place[::3] = -1
        soft = kernels.mix_into(state, case.table, case.tokens, case.w, out, place)
        assert soft.equal(mixed.soft)
        written = place[place >= 0]
        cut_off = implementation.interpreted and dtype == torch.bfloat16  # where a device rounds
        expected = mixed.embeds[place >= 0].to(dtype)
        torch.testing.assert_close(out[written], expected, rtol=2**-7 if cut_off else 0, atol=0)
        assert int(out[:-1].isnan().all(-1).sum()) == 2 * n - 1 - len(written)
