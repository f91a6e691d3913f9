"""TRL's own trainers at work: their folders as they leave them, pickles and all, certified against enumerated truth.

Skipped where TRL is not installed, which is everywhere but in `make trl`. `tests/policies` keeps small folders that the same
script made, for the tests that run everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.truth import Truth
from tests.policies import make

pytest.importorskip("trl", reason="TRL is not installed: make trl installs it apart and runs these tests")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # what TRL, transformers and datasets warn of is theirs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All runs of `make`, where adapters name their base by its path from there."""
    folder = tmp_path_factory.mktemp("trl")
    make.make(folder)
    with chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def truth(runs: Path) -> Truth:
    return Truth(make.posterior_of(runs / "base"))


NAMES = [*make.TRAINERS, *(f"{name}_lora" for name in make.TRAINERS), "grpo_beta0", "rloo_on_sft", "rloo_after_sft"]


@pytest.mark.parametrize("name", NAMES)
def test_each_checkpoint_has_its_true_distance(name: str, runs: Path, truth: Truth) -> None:
    assert (runs / name / "checkpoint-6" / "training_args.bin").is_file()  # a pickle, and in nobody's way
    curve = bk.certify_checkpoints(truth.posterior, runs / name, seed=0, num_draws=64)
    assert curve.steps.tolist() == [3, 6]
    assert not curve.skipped
    for step, certificate in curve.certificates.items():
        policy = bk.TorchLM.from_pretrained(runs / name / f"checkpoint-{step}", eos_token_id=0)
        as_prior = bk.Posterior(policy, truth.posterior.likelihood, prompts=make.PROMPTS, max_new_tokens=3)
        log_q = as_prior.log_prior(truth.sequences)
        reverse = (np.exp(log_q) * (log_q - truth.log_posterior)).sum(axis=1)
        forward = (truth.p * (truth.log_posterior - log_q)).sum(axis=1)
        assert np.allclose(certificate.reverse_kl, reverse[:, None], atol=1e-3)
        assert np.allclose(certificate.forward_kl, forward[:, None], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_the_training(name: str, runs: Path, truth: Truth) -> None:
    """By what TRL logs today: a release that logs other things would be noticed here."""
    certificate = bk.certify(truth.posterior, runs / name, seed=0, num_draws=256)
    expected = {"grpo_beta0": "beta = 0", "rloo_on_sft": "not the prior", "rloo_after_sft": "not the prior"}
    if name in expected:
        assert expected[name] in certificate.verdict
    else:
        assert not certificate.findings
    log = bk.certify_checkpoints(truth.posterior, runs / name, seed=0, num_draws=32).log
    assert log is not None
    trainer = name.partition("_")[0]
    assert log.reward_name == {"sft": "loss", "dpo": "rewards/margins"}.get(trainer, "reward")
    assert log.kl_name == ("kl" if trainer in ("rloo", "grpo") and name != "grpo_beta0" else None)


def test_rloo_goes_towards_the_posterior_and_logs_its_kl_per_token(runs: Path, truth: Truth) -> None:
    """The row after checkpoint-3 is of its policy: times the length it is the KL of a completion, within its noise."""
    curve = bk.certify_checkpoints(truth.posterior, runs / "rloo", seed=0, num_draws=1024)
    start = truth.kl(truth.posterior.prior).mean()
    ends = [each.pooled.reverse_kl[0] for each in curve.certificates.values()]
    assert start > ends[0] > ends[1]
    assert curve.log is not None
    per_token, length = (curve.log.at(name, 4) for name in ("kl", "completions/mean_length"))
    draws = curve.certificates[3].draws
    log_ratio = (draws.log_proposal - draws.log_prior).ravel()
    error = log_ratio.std() / np.sqrt(32)  # of the batch of 32 completions that was logged
    assert abs(per_token * length - log_ratio.mean()) < 4 * error
    assert abs(per_token - log_ratio.mean()) > 4 * error / length  # taken for that of a completion, it would be far off
