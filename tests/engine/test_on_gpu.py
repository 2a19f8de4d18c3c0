"""The list of ``python -m tests.engine`` as tests, which is slower: one case at a time. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.engine.cases import all_cases
from tests.engine.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("engine"), torch.cuda.device_count())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=pytest.mark.skipif(torch.cuda.device_count() < case.cards, reason=f"needs {case.cards} CUDA devices"),
            id=case.name,
        )
        for case in all_cases()
    ],
)
def test_engine(case, runner):
    (row,) = runner.run([case], lambda _: None)
    assert row["result"] == "passed", row["detail"]
