"""From A to L: every architecture that transformers builds in a second has right numbers or a refusal (theory.md 9.6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.torch_lm.sweep import case_names, check_case

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", [case for case in case_names() if case < "m"])
def test_numbers_are_its_own_and_whole_runs_work_or_it_is_refused(case: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    check_case(case, tmp_path)
