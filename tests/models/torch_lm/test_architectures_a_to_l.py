"""From A to L: every architecture that transformers builds in a second has right numbers or a refusal (theory.md 9.6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.torch_lm.sweep import CERTIFIED, NETWORKS, case_names, check_case

pytestmark = pytest.mark.slow


def test_an_architecture_of_each_kind_is_certified() -> None:
    """That each gets its kind is seen where it is certified."""
    assert sorted(CERTIFIED.values()) == sorted(NETWORKS)
    assert set(CERTIFIED) <= set(case_names())


@pytest.mark.parametrize("case", [case for case in case_names() if case < "m"])
def test_numbers_are_its_own_and_whole_runs_work_or_it_is_refused(case: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    check_case(case, tmp_path)
