"""Two processes that `accelerate launch` starts train the guide that one process trains."""

from __future__ import annotations

import functools
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.cli import app
from bayes_klrl.inference.svi import svi
from bayes_klrl.inference.svi.checkpoint import FILE
from bayes_klrl.inference.svi.ranks import group
from bayes_klrl.inference.svi.ranks.group import Ranks
from tests.inference.svi.ranks.launched import RECIPES, SPREAD, Watching, failing, fitted, log_probs

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[4]
ON_CPU = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
FSDP = ["--config_file", str(ROOT / "examples" / "accelerate_fsdp.yaml")]
ROUNDING = 5e-5
"""What float32 leaves of a log-prob after five steps; a draw that is left out changes it by 0.01 and more."""


def start(options: list[str], *words: Any, **more: Any) -> subprocess.Popen[str]:
    """Start two ranks in a session of their own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"]
    return subprocess.Popen(
        [*command, "--main_process_port", "0", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **more,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks, to whom one process has left its checkpoint, have written what they found."""
    folder = tmp_path_factory.mktemp("launched")
    with pytest.raises(RuntimeError, match="logger"):
        fitted("elbo", callbacks=[failing], checkpoint=folder / "of one")
    process = start(FSDP, Path(__file__).with_name("launched.py"), folder)
    shown, _ = process.communicate(timeout=280)
    assert process.returncode == 0, shown
    assert [(folder / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["left", "left"]
    return folder


def found_in(folder: Path) -> list[Any]:
    """Return what each rank has found."""
    return [np.load(folder / f"rank{rank}.npz") for rank in (0, 1)]


@functools.cache
def of_one(name: str) -> np.ndarray:
    """Return log q of the guide that one process trains by a recipe."""
    return log_probs(fitted(name))


@pytest.mark.slow
def test_two_ranks_train_the_guide_of_one_process(folder: Path) -> None:
    first, second = found_in(folder)
    for name in RECIPES:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], of_one(name), rtol=0, atol=ROUNDING, err_msg=name)
    assert [int(each["watched steps"]) for each in (first, second)] == [3, 3]  # callbacks are called on rank 0 alone
    assert [int(each["calls"]) for each in (first, second)] == [3, 0]
    watched = log_probs(fitted("elbo", callbacks=[Watching()]))  # which takes random numbers of the training
    np.testing.assert_allclose(first["watched"], watched, rtol=0, atol=ROUNDING)
    assert all(each["interrupted"].tolist() == [True, 2] for each in (first, second))
    assert str(first["failing"]) == "RuntimeError: the disk of the logger is full"
    assert str(second["failing"]) == "BayesKLRLError: Rank 0 of 2 raised RuntimeError: the disk of the logger is full"
    # begun by one and ended by two, and the other way round
    np.testing.assert_allclose(first["resumed"], of_one("elbo"), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(
        log_probs(fitted("elbo", resume=folder / "state")), of_one("elbo"), rtol=0, atol=ROUNDING
    )
    for each in (first, second):
        assert "seed: 0 on rank 0, 1 on rank 1" in str(each["other seeds"])
        assert "started 8 processes, but its state knows of 2" in str(each["other launcher"])


@pytest.mark.slow
def test_so_do_two_ranks_that_have_half_of_the_parameters_each(folder: Path) -> None:
    """FSDP, by the file in examples; on a CPU with gloo."""
    first, second = ({name.removeprefix("spread, "): each[name] for name in each.files} for each in found_in(folder))
    for name in SPREAD:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], of_one(name), rtol=0, atol=ROUNDING, err_msg=name)
    assert 0.45 < float(first["share"]) < 0.55
    assert str(first["whole"]) == "Parameter"
    assert "RuntimeError: the disk of the logger is full" in str(second["failing"])
    np.testing.assert_allclose(first["resumed"], of_one("elbo"), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(
        log_probs(fitted("elbo", resume=folder / "spread state")), of_one("elbo"), rtol=0, atol=ROUNDING
    )
    assert "FSDP spreads the parameters of a bk.TorchLM" in str(first["table"])


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


POSTERIOR = """
import time
import numpy as np, bayes_klrl as bk

def ones(tokens, lengths):
    time.sleep({pause})
    return (tokens == 1).sum(axis=1) * 1.0

prior = bk.NgramLM(np.log([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]]), eos_token_id=2)
posterior = bk.Posterior(prior, bk.TokenReward(ones, alpha=0.7), prompts=[[0], [1]], max_new_tokens=4)
"""


def test_more_ranks_than_particles_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tune` as rank 0 of three, whose group is found without starting the others: there is nothing to exchange yet."""
    for module in (group, svi):  # where `tune` and the recipe ask
        monkeypatch.setattr(module, "launched_ranks", lambda: Ranks(0, 3))
    file = tmp_path / "posterior.py"
    file.write_text(POSTERIOR.format(pause=0))
    with pytest.raises(SystemExit) as caught:
        app(["tune", str(file), "--particles", "2", "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    assert "3 ranks cannot share num_particles=2" in capsys.readouterr().err
    assert not (tmp_path / "out" / "training").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks of a launcher in /proc")
def test_tune_is_killed_and_goes_on_to_one_policy(tmp_path: Path) -> None:
    file, words = tmp_path / "posterior.py", ["--steps", "25", "--particles", "7", "--quiet"]
    file.write_text(POSTERIOR.format(pause=0.05))
    out = tmp_path / "out"
    process = start(ON_CPU, "-m", "bayes_klrl.cli", "tune", file, *words, "--out", out)
    for _ in range(1200):
        if (out / "training" / FILE).is_file() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    for pid in [process.pid, *children_of(process.pid)]:  # ranks are in sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "policy").exists()
    file.write_text(POSTERIOR.format(pause=0))
    process = start(ON_CPU, "-m", "bayes_klrl.cli", "tune", file, *words, "--out", out, "--resume")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert shown.count("Wrote") == 1
    assert not (out / "training").exists()
    alone = bk.SVI(25, 7).fit(runpy.run_path(str(file))["posterior"], seed=0)
    tuned = bk.NgramLM.from_pretrained(out / "policy")
    np.testing.assert_allclose(tuned.log_probs, alone.guide.log_probs, rtol=0, atol=1e-9)  # type: ignore[attr-defined]
