"""Worker processes: the same bits, one copy of a model, deaths that are named, and an end at once."""

import os
import pickle
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.runners.processes import load_of, reply_outcome
from bayes_klrl.runners.runner import Task, outcomes_of
from bayes_klrl.runners.transport import finder, write_packed
from bayes_klrl.runners.worker import Settings, work
from tests.runners.posteriors import differing, numbered_posterior
from tests.runners.test_blocks import ROWS

POSTERIOR = numbered_posterior()


@pytest.fixture(scope="module")
def runner() -> Iterator[bk.ProcessRunner]:
    with bk.ProcessRunner(2) as processes:
        yield processes


def same(first: Any, second: Any) -> None:
    """All rows of two comparisons are equal in every bit."""
    assert first.draws.keys() == second.draws.keys()
    assert first.failures == second.failures
    for name in first.draws:
        for one, other in zip(first.draws[name], second.draws[name], strict=True):
            assert not differing(one, other), name


@pytest.mark.slow
def test_every_algorithm_gives_the_same_bits_in_processes(runner: bk.ProcessRunner) -> None:
    rows = {name: each for name, each in ROWS.items() if "number" not in name}
    rows |= {"exact": bk.Exact(), "annealed, a pilot": bk.AnnealedSMC(40), "tight": bk.RejectionSampling(150, 1500)}
    here = bk.compare(POSTERIOR, rows, seed=1, repeats=2)
    there = bk.compare(POSTERIOR, rows, seed=1, repeats=2, runner=runner)
    same(here, there)
    assert there["importance"].tokens.flags.writeable
    assert there.posterior is POSTERIOR


@pytest.mark.slow
def test_a_network_and_its_guides_give_the_same_bits() -> None:
    """A guide comes back on the posterior it was trained for, adapters on the very memory of the prior's weights.

    In one worker: loading torch and transformers is most of what each costs.
    """
    prior = bk.TorchLM.from_pretrained("austen")
    excited = bk.Reward(lambda completions: [c.count("!") for c in completions], alpha=1.0)
    posterior = bk.Posterior(prior, excited, prompts=["It was a", "My dear"], max_new_tokens=3)
    rows = {
        "importance": bk.ImportanceSampling(512),
        "SMC": bk.SMC(512),
        "SVI": bk.SVI(1, 8, num_draws=512, adapter="lora"),
    }
    with bk.ProcessRunner(1) as runner:
        here, there = (bk.compare(posterior, rows, seed=0, runner=each) for each in (None, runner))
    same(here, there)
    fit = there.fits["SVI"]
    assert fit.posterior is posterior
    assert there["SVI"].guide is fit.guide
    own = {each.data_ptr() for each in prior.module.parameters() if each.nbytes >= 4096}
    assert own <= {parameter.data_ptr() for parameter in fit.guide.module.parameters()}


@pytest.mark.slow
def test_certificates_frontiers_islands_and_the_suite_give_the_same_bits(runner: bk.ProcessRunner) -> None:
    policy = bk.NgramLM(np.log(np.random.default_rng(1).dirichlet(np.ones(6), size=6)), eos_token_id=5)
    options: dict[str, Any] = {"seed": 0, "num_draws": 300, "sampling_only": True, "num_runs": 8}
    here, there = (bk.certify(POSTERIOR, policy, runner=each, **options) for each in (None, runner))
    for name in ("elbo", "log_evidence_bounds", "reverse_kl", "forward_kl"):
        assert np.array_equal(getattr(here, name), getattr(there, name)), name
    assert here.cost.model_tokens == there.cost.model_tokens
    curves = [bk.frontier(POSTERIOR, num_draws=300, seed=0, runner=each) for each in (None, runner)]
    assert np.array_equal(curves[0].kl, curves[1].kl)
    smc = bk.SMC(64, num_islands=5)
    assert not differing(smc.run(POSTERIOR, seed=0), smc.run(POSTERIOR, seed=0, runner=runner))
    suites = [
        bk.run_suite(["P1"], ["prior-is", "smc-exact-twist"], budget=2000, repeats=2, runner=each)
        for each in (None, runner)
    ]
    errors = [[cell.log_evidence_error for cell in result.cells] for result in suites]
    assert errors[0] == errors[1]


def arrays_of(posterior: bk.Posterior, *, progress: bool) -> tuple[int, str]:
    """Where a worker has the prior's table: its address, and the line of /proc about it."""
    address = posterior.prior.log_probs.__array_interface__["data"][0]  # type: ignore[attr-defined]
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return os.getpid(), line
    return os.getpid(), ""


def test_workers_share_one_copy_of_a_model_in_a_file_that_is_gone_afterwards(runner: bk.ProcessRunner) -> None:
    lm = bk.NgramLM(np.log(np.full((200, 200), 1 / 200)), eos_token_id=0)
    posterior = bk.Posterior(
        lm, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), prompts=[[1]], max_new_tokens=2
    )
    places = [each.value[1] for each in outcomes_of(runner, [Task("place", arrays_of, (posterior,))] * 4)]
    files = {line.split()[-1] for line in places}
    assert len(files) == 1
    file = Path(files.pop())
    assert file.name == "tasks"
    assert not file.parent.exists()


class Deadly:
    """An algorithm that ends its process: always, or the first time."""

    def __init__(self, marker: Path | None = None) -> None:
        self.marker = marker

    def run(self, posterior: bk.Posterior, *, seed: int, progress: bool = False) -> bk.Draws:
        if self.marker is None or not self.marker.exists():
            if self.marker is not None:
                self.marker.touch()
            os._exit(3)
        return bk.ImportanceSampling(20).run(posterior, seed=seed)


@pytest.mark.slow
def test_a_worker_that_dies_once_is_replaced_and_one_that_dies_twice_is_named(
    runner: bk.ProcessRunner, tmp_path: Path
) -> None:
    rows = {
        "before": bk.ImportanceSampling(20),
        "once": Deadly(tmp_path / "died"),
        "always": Deadly(),
        "after": bk.SMC(20),
    }
    result = bk.compare(POSTERIOR, rows, seed=0, runner=runner)
    assert set(result.draws) == {"before", "once", "after"}
    assert set(result.failures) == {"always"}
    assert "failed: the worker process died twice at the task 'always'" in result.table().loc["always", "note"]
    alone = bk.compare(POSTERIOR, {"after": bk.SMC(20)}, seed=0)
    assert not differing(alone["after"], result["after"])


def warning_task(text: str, *, progress: bool) -> None:
    warnings.warn(text, UserWarning, stacklevel=1)


def failing_task(*, progress: bool) -> None:
    raise ZeroDivisionError("by nothing")


def test_warnings_and_mistakes_in_code_come_back(runner: bk.ProcessRunner) -> None:
    with pytest.warns(UserWarning, match="look out") as seen:
        outcomes_of(runner, [Task("warn", warning_task, ("look out",))] * 3)
    assert len(seen) == 1
    with pytest.raises(ZeroDivisionError, match="by nothing") as caught:
        outcomes_of(runner, [Task("fail", failing_task, ())])
    assert "in failing_task" in caught.value.__notes__[0]


class TwoReasons(Exception):
    """An exception as many are: it can be pickled, but not made again from its one argument."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def failing_for_two_reasons(*, progress: bool) -> None:
    raise TwoReasons("late", "wrong")


def test_an_exception_that_cannot_be_made_again_is_told_in_words(runner: bk.ProcessRunner) -> None:
    """It ends what it belongs to, as every mistake in code does, and says where it is."""
    with pytest.raises(RuntimeError, match=r"^'fail' raised TwoReasons in a worker: late and wrong") as caught:
        outcomes_of(runner, [Task("fail", failing_for_two_reasons, ())])
    assert "in failing_for_two_reasons" in caught.value.__notes__[0]


def leaving_task(*, progress: bool) -> None:
    raise SystemExit("enough")


def test_a_task_that_leaves_is_named_with_what_it_raised(runner: bk.ProcessRunner) -> None:
    (outcome,) = outcomes_of(runner, [Task("leave", leaving_task, ())])
    assert "The task 'leave' could not be run: SystemExit('enough')" in str(outcome.error)


def test_what_goes_through_the_pipe_is_written_at_once(tmp_path: Path) -> None:
    """A worker that is killed between two writes leaves half a message, for whose end the parent would wait for ever."""
    tasks = [Task("array", random_numbers, (num,)) for num in (1, 100, 400, 1200, 100_000)]
    tasks += [Task("warn", warning_task, ("look out " * 1000,)), Task("fail", failing_task, ())]
    load, sent = load_of(tasks)
    places = write_packed(sent, tmp_path / "tasks")
    for index, task in enumerate(tasks):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            reply = work(tmp_path / "tasks", index, Settings())
            assert len(pickle.dumps(reply)) < select.PIPE_BUF - 512  # the executor adds a little
            outcome = reply_outcome(index, reply, load.shared, finder(places, sent.buffers), set())
        assert len(seen) == (task.name == "warn")
        if task.name == "array":
            np.testing.assert_array_equal(outcome.value, random_numbers(*task.arguments, progress=False))
            assert outcome.value.flags.writeable
    assert [each.name for each in tmp_path.iterdir()] == ["tasks"]


def random_numbers(num: int, *, progress: bool) -> np.ndarray:
    return np.random.default_rng(0).random(num)


def test_progress_moves_with_the_tasks(runner: bk.ProcessRunner) -> None:
    seen: list[str] = []
    tasks = [Task(f"task {i}", arrays_of, (POSTERIOR,)) for i in range(3)]
    outcomes_of(runner, tasks, advance=lambda status: seen.append(status))  # noqa: PLW0108
    assert sorted(seen) == ["task 0", "task 1", "task 2"]


SCRIPT = """
import os, signal, sys, time
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it

import numpy as np
import bayes_klrl as bk

def slow(tokens, lengths):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(0.0 if len(sys.argv) > 2 else 600.0)
    return lengths

coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
posterior = bk.Posterior(coin, bk.TokenReward(slow, alpha=1.0), prompts=[[0], [0, 0]], max_new_tokens=3)
rows = {"SMC": bk.SMC(600), "IS": bk.ImportanceSampling(600)}
print(bk.compare(posterior, rows, seed=0, runner=bk.ProcessRunner(2)).table())
"""


@pytest.mark.slow
def test_a_script_needs_no_guard_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "script.py", str(tmp_path), "quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "SMC" in run.stdout
    assert run.stdout.count("log evidence") == 1
    check_gone(tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", str(tmp_path)], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for(lambda: len([each for each in tmp_path.iterdir() if each.name.isdigit()]) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert process.returncode != 0
    check_gone(tmp_path)
    assert not list(Path("/dev/shm").glob(f"bayes-klrl-{process.pid}-*"))


@pytest.mark.slow
def test_no_worker_and_no_file_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, "script.py", str(tmp_path)], cwd=tmp_path)
    wait_for(lambda: len([each for each in tmp_path.iterdir() if each.name.isdigit()]) == 2)
    process.kill()
    process.wait(timeout=20)
    check_gone(tmp_path)
    assert not list(Path("/dev/shm").glob(f"bayes-klrl-{process.pid}-*"))


def check_gone(folder: Path) -> None:
    """The processes that left their number in a folder are gone."""
    numbers = [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
    assert numbers
    wait_for(lambda: not any(is_alive(number) for number in numbers))


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
