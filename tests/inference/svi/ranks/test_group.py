"""What ranks exchange, and how a process finds out that it is one."""

from __future__ import annotations

import builtins
import multiprocessing
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.checkpoint import lasting_name
from bayes_klrl.inference.svi.ranks.group import ALONE, Ranks, launched_ranks
from bayes_klrl.inference.svi.ranks.interruption import Interruption
from tests.inference.svi.ranks.threads import on_ranks

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize("total", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_shares_of_all_ranks_are_all_rows_once(total: int, size: int) -> None:
    shares = [range(total)[Ranks(rank, size).share(total)] for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("total", [1, 2, 5, 7])
def test_nothing_is_dropped_where_shares_differ(total: int) -> None:
    rows = torch.arange(2.0 * total).reshape(total, 2)
    for found in on_ranks(3, lambda ranks: ranks.gathered(rows[ranks.share(total)], total)):
        torch.testing.assert_close(found, rows, rtol=0, atol=0)


def test_gradients_are_summed_and_none_stays_none() -> None:
    def work(ranks: Ranks) -> list[Any]:
        parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4)), torch.zeros(1)]
        parameters[0].grad = torch.full((2, 3), 1.0 + ranks.rank)
        if ranks.rank == 1:
            parameters[1].grad = torch.arange(4.0)
        ranks.sum_gradients(parameters)
        return [parameter.grad for parameter in parameters]

    for both, one, none in on_ranks(2, work):
        assert none is None
        assert both.tolist() == [[3.0] * 3] * 2
        assert one.tolist() == [0, 1, 2, 3]


def test_all_follow_the_first() -> None:
    def work(ranks: Ranks) -> Any:
        tensor = torch.full((3,), float(ranks.rank))
        ranks.follow_first([tensor])
        return tensor.tolist(), ranks.of_first(ranks.rank), ranks.any(ranks.rank == 2)

    assert on_ranks(3, work) == [([0.0] * 3, 0, True)] * 3


def test_an_error_of_one_is_raised_on_all() -> None:
    def work(ranks: Ranks) -> BaseException:
        def compute() -> None:
            if ranks.rank == 1:
                raise bk.RewardError("The reward is wrong.")

        with pytest.raises(bk.BayesKLRLError) as caught, ranks.together():
            compute()
        return caught.value

    others, own, _ = on_ranks(3, work)
    assert isinstance(own, bk.RewardError)
    assert str(others) == "Rank 1 of 3 raised RewardError: The reward is wrong."
    assert all(error.known_to_first for error in (own, others))  # type: ignore[attr-defined]


def test_an_interrupt_waits_for_the_step_and_the_handler_is_put_back() -> None:
    class Two(Ranks):
        def any(self, flag: bool) -> bool:
            return flag

    before = signal.getsignal(signal.SIGINT)
    with Interruption(Two(0, 2)) as interruption:
        interruption.check()
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "4", "RANK": "1"},  # torchrun, whose processes may do work of their own
        {**LAUNCHED, "WORLD_SIZE": "1"},
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"WORLD_SIZE": "many", "ACCELERATE_USE_CPU": "true"},
    ],
)
def test_a_process_is_alone_unless_accelerate_has_launched_it(environ: dict[str, str]) -> None:
    assert launched_ranks(environ) is ALONE


def test_the_worker_of_a_rank_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a rank")
    assert launched_ranks(LAUNCHED) is ALONE


@pytest.mark.parametrize(
    "option,message",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision=bf16"),
    ],
)
def test_what_the_training_would_not_do_is_refused(option: dict[str, str], message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        launched_ranks({**LAUNCHED, **option})


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("accelerate"):
            raise ModuleNotFoundError(name, name=name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(bk.BayesKLRLError, match=r"pip install 'bayes_klrl\[accelerate\]'"):
        launched_ranks(LAUNCHED)


@pytest.mark.slow
def test_a_training_of_one_process_does_not_import_accelerate_nor_jax() -> None:
    """Nor transformers, for a table. `test_svi_numpyro.py` has the opposite: training on JAX imports no torch."""
    code = """
import sys, numpy as np, bayes_klrl as bk
prior = bk.NgramLM(np.log(np.full((3, 3, 3), 1 / 3)), eos_token_id=2)
longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
before = "accelerate" in sys.modules
bk.SVI(2, 4).fit(bk.Posterior(prior, longer, max_new_tokens=2), seed=0).run(10, seed=0)
from bayes_klrl.inference.svi.ranks import group
print(before, "accelerate.state" in sys.modules and bool(sys.modules["accelerate.state"].PartialState._shared_state))
print(*[name in sys.modules for name in ("torch", "pyro", "jax", "numpyro", "transformers")])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False", "True", "True", "False", "False", "False"]


class Configuration:
    """What is written like a configuration of peft, which makes a set of a list of names."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"Configuration(targets={{{', '.join(map(repr, self.names))}}}, options={{'a': {{}}, 'r': 8}})"


def test_a_set_has_one_name_in_every_process() -> None:
    names = {lasting_name(Configuration(names)) for names in (["b", "a", "c"], ["c", "b", "a"])}
    assert names == {"Configuration(targets={'a', 'b', 'c'}, options={'a': {}, 'r': 8})"}
