"""The engine itself on the Triton kernels, in triton's interpreter: the tokens of every method."""

import pytest
import torch

from server.methods import METHODS
from tests.kernel_ops.conftest import INTERPRETED
from tests.support.jobs import make_job, run
from tests.support.models import pair

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_interpreter.py")

ALGORITHMS = ("entropy", "maskgit_plus", "topk_margin", "threshold", "origin")
FILTERS = ({"top_p": 0.9}, {"top_k": 20}, {}, {"top_p": 0.8, "top_k": 40})


def jobs():
    """One of every method, which differ in all else that decides which kernels run."""
    return [
        make_job(
            method,
            method=method,
            seed=index,
            max_tokens=4,
            steps=2,
            gradient_steps=(3, 1, 4, 2)[index % 4],
            algorithm=ALGORITHMS[index % len(ALGORITHMS)],
            temperature=0.7,
            **FILTERS[index % len(FILTERS)],
        )
        for index, method in enumerate(METHODS)
    ]


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_all_methods_give_the_tokens_of_plain_torch_in_the_interpreter(backend):
    both = [run(pair("dream", dtype=torch.float32), jobs(), backend=name) for name in ("torch", backend)]
    expected, actual = ({name: result.trajectories[0].token_ids for name, result in each.items()} for each in both)
    assert actual == expected
    assert len(expected) == len(METHODS)
