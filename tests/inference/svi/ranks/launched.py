"""What a rank runs in `test_launched`: trainings whose results are written into a folder, one file per rank.

python launched.py FOLDER; the same trainings are functions, for the one process that they are compared with. One start does
for both kinds of sharing, because starting takes longer than training: `ACCELERATE_USE_FSDP`, which the launcher sets, is all
that tells them apart, and every training reads it anew.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import bayes_klrl as bk
from bayes_klrl.inference.svi.callbacks import StepRecord
from bayes_klrl.inference.svi.losses import LeaveOneOut
from bayes_klrl.inference.svi.ranks.group import launched_ranks
from tests.helpers.tiny_models import tiny_gpt2

__all__ = ["RECIPES", "SPREAD", "Watching", "failing", "fitted", "log_probs", "posterior"]

COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
RECIPES: dict[str, dict[str, Any]] = {
    "elbo": {},
    "rao-blackwell": {"estimator": "rao_blackwell"},
    "kl_sgd and critic": {"optimizer": "kl_sgd", "twist": bk.PartialRewardTwist()},
    "lora": {"adapter": "lora"},
    "js": {"objective": "js"},
    "replay": {"objective": bk.LogVariance(replay=8)},
    "sampler": {"objective": bk.ForwardKL(bk.SMC(16))},
    "loss": {"objective": LeaveOneOut()},
    "two at a time": {"particles_per_pass": 2},
    "a prompt at a time": {"prompts_per_step": 1},
}
SPREAD = ("elbo", "kl_sgd and critic", "lora", "two at a time")
NUM_STEPS = 5


@functools.cache
def posterior() -> bk.Posterior:
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7)
    return bk.Posterior(bk.TorchLM(tiny_gpt2(6)), reward, prompts=[[0], [1]], max_new_tokens=4)


def fitted(name: str, **options: Any) -> bk.Fit:
    """Seven completions, which two ranks cannot share equally."""
    return bk.SVI(NUM_STEPS, 7, **RECIPES[name]).fit(posterior(), **{"seed": 3, **options})


def log_probs(fit: bk.Fit) -> np.ndarray:
    """Return log q of every completion of two tokens, (36,)."""
    pairs = np.stack(np.meshgrid(range(6), range(6)), axis=-1).reshape(1, -1, 2)
    found = fit.guide.token_log_probs([[0]], bk.Sequences(pairs, np.full((1, 36), 2)))
    return torch.as_tensor(found).detach().double().sum(dim=2).numpy()[0]


class Watching:
    """Counts its calls, draws from torch's generator, and ends the training after step 2."""

    calls = 0

    def __call__(self, record: StepRecord, guide: Any) -> bool:
        self.calls += 1
        torch.rand(3)
        assert record.step + 1 == self.calls
        return record.step == 2


def interrupting(record: StepRecord, guide: Any) -> None:
    if record.step == 1:
        os.kill(os.getpid(), signal.SIGINT)


def failing(record: StepRecord, guide: Any) -> None:
    if record.step == 2:
        raise RuntimeError("the disk of the logger is full")


def words_of(fit: Any) -> str:
    try:
        fit()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def shared(folder: Path) -> dict[str, Any]:
    """Train by all recipes, and try what only ranks can get wrong."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {name: log_probs(fitted(name)) for name in RECIPES}
    watching = Watching()
    watched = fitted("elbo", callbacks=[watching])
    found["watched"], found["watched steps"] = log_probs(watched), len(watched.history["elbo"])
    found["calls"] = watching.calls
    stopped = fitted("elbo", callbacks=[interrupting])
    found["interrupted"] = [stopped.interrupted, len(stopped.history["elbo"])]
    found["failing"] = words_of(lambda: fitted("elbo", callbacks=[failing], checkpoint=folder / "state"))
    found["resumed"] = log_probs(fitted("elbo", resume=folder / "of one"))
    found["other seeds"] = words_of(lambda: fitted("elbo", seed=rank))
    found["other launcher"] = words_of(few)
    return found


def few() -> None:
    os.environ["WORLD_SIZE"] = "8"  # as a launcher of eight would say
    try:
        launched_ranks()
    finally:
        os.environ["WORLD_SIZE"] = "2"


def spread(folder: Path) -> dict[str, Any]:
    """Train with parameters that are spread over ranks."""
    from bayes_klrl.inference.svi.pyro_backend.training import TorchTraining

    found: dict[str, Any] = {name: log_probs(fitted(name)) for name in SPREAD}
    training = TorchTraining(bk.SVI(1, 7), posterior(), 0, launched_ranks())
    local = [parameter.to_local() for parameter in training.parameters]  # type: ignore[attr-defined]
    found["share"] = sum(p.numel() for p in local) / sum(p.numel() for p in training.parameters)
    found["whole"] = type(next(training.guide.parameters())).__name__
    found["failing"] = words_of(lambda: fitted("elbo", callbacks=[failing], checkpoint=folder / "spread state"))
    found["resumed"] = log_probs(fitted("elbo", resume=folder / "of one"))
    found["table"] = words_of(lambda: bk.SVI(1, 4).fit(bk.Posterior(COIN, bk.Power(2.0), max_new_tokens=3), seed=0))
    return found


def left(file: Path) -> None:
    """Note whether the group was closed when Python ended; handlers that were registered later have run before."""
    file.write_text("still there" if dist.is_initialized() else "left")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    atexit.register(left, place / f"rank{os.environ['RANK']}.txt")
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP")
    results = shared(place)
    os.environ["ACCELERATE_USE_FSDP"] = use_fsdp
    results |= {f"spread, {name}": value for name, value in spread(place).items()}
    np.savez(place / f"rank{os.environ['RANK']}.npz", **{name: np.asarray(value) for name, value in results.items()})
