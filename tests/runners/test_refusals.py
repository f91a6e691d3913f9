"""What a runner refuses, and says: before anything is run, by name, with the cure."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.runners.processes import load_of
from bayes_klrl.runners.runner import Task, outcomes_of
from bayes_klrl.typing import FloatArray, IntArray

COIN = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
LONGER = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
POSTERIOR = bk.Posterior(COIN, LONGER, max_new_tokens=3)


def refused(posterior: bk.Posterior, **rows: bk.Algorithm) -> str:
    with pytest.raises(bk.RunnerError) as error:
        bk.compare(posterior, rows or {"SMC": bk.SMC(8)}, seed=0, runner=bk.ProcessRunner(1))
    return str(error.value)


def test_a_reward_with_an_open_file_or_a_lock_is_named_before_anything_is_run(tmp_path: Path) -> None:
    lock, calls = threading.Lock(), []

    def guarded(tokens: IntArray, lengths: IntArray) -> IntArray:
        calls.append(1)
        with lock:
            return lengths

    reward = LONGER * bk.TokenReward(guarded, alpha=1.0, name="guarded")
    message = refused(bk.Posterior(COIN, reward, max_new_tokens=3))
    assert message.startswith(
        "The reward 'guarded' cannot be sent to another process: cannot pickle '_thread.lock' object."
    )
    assert "bk.SerialRunner()" in message
    assert not calls
    with (tmp_path / "log").open("w") as log:
        written = bk.Constraint(lambda completion_ids: [log.write("") == 0 for _ in completion_ids])
        message = refused(bk.Posterior(COIN, written, max_new_tokens=3))
    assert message.startswith("The constraint ")


def test_an_algorithm_or_a_column_that_cannot_be_sent_is_named() -> None:
    held = threading.Lock()

    def twist(posterior: bk.Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        with held:
            return np.zeros(len(prefixes))

    assert refused(POSTERIOR, plain=bk.SMC(8), twisted=bk.SMC(8, twist=twist)).startswith(
        "'twisted', or what belongs to it"
    )
    posterior = bk.Posterior(COIN, LONGER, max_new_tokens=3, lock=[held])
    assert refused(posterior).startswith("The column 'lock' cannot be sent")


class Lacking:
    """An object that can only be loaded where a package is, which another process lacks."""

    def __reduce__(self) -> Any:
        return load_lacking, (os.getpid(),)


def load_lacking(number: int) -> Lacking:
    if os.getpid() != number:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    return Lacking()


class Unsendable:
    def __reduce__(self) -> Any:
        raise TypeError("it is tied to this place")


def lacking_task(value: object, *, progress: bool) -> None:
    """Nothing: it is not reached."""


def unsendable_task(*, progress: bool) -> object:
    return Unsendable()


def test_a_package_that_workers_lack_and_a_result_that_cannot_come_back_are_named() -> None:
    with bk.ProcessRunner(1) as runner:
        (lacks,) = outcomes_of(runner, [Task("lacks", lacking_task, (Lacking(),))])
        (stays,) = outcomes_of(runner, [Task("stays", unsendable_task, ())])
    assert isinstance(lacks.error, bk.RunnerError)
    assert "A worker cannot import 'no_such_package', which the tasks need" in str(lacks.error)
    assert "Install it" in str(lacks.error)
    assert isinstance(stays.error, bk.RunnerError)
    assert "What 'stays' returned, a Unsendable, cannot be sent back" in str(stays.error)


def test_numbers_of_processes_that_cannot_be_are_refused() -> None:
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(bk.BayesKLRLError, match="num_processes must be an integer of at least 1"):
            bk.ProcessRunner(wrong)  # type: ignore[arg-type]
    with pytest.raises(bk.BayesKLRLError, match="threads_per_process"):
        bk.ProcessRunner(1, threads_per_process=0)
    assert bk.ProcessRunner().num_workers >= 1


def test_ray_is_named_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'bayes_klrl\[ray\]'"):
        bk.RayRunner()


def test_what_is_shared_is_packed_once() -> None:
    """Eight tasks on one posterior take the bytes of one."""
    tasks = [Task("row", lacking_task, (POSTERIOR,), (POSTERIOR,)) for _ in range(8)]
    assert load_of(tasks)[1].num_bytes < 1.5 * load_of(tasks[:1])[1].num_bytes
