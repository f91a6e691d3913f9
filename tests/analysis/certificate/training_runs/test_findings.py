"""Three errors that no bound shows: the wrong prior, nothing learned, beta = 0. `test_curve` tests silence elsewhere."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.analysis.certificate.training_runs.trainer_log import TrainerLog, log_of
from tests.policies.make import BETA, HERE, sunny


@cache
def posterior_of(prior: Path) -> bk.Posterior:
    lm = bk.TorchLM.from_pretrained(prior)
    return bk.Posterior(lm, bk.Reward(sunny, alpha=BETA, bounds=(0, 2)), prompts="the day is", max_new_tokens=2)


def certificate(policy: Any, prior: Path = HERE / "base", **options: Any) -> bk.Certificate:
    return bk.certify(posterior_of(prior), policy, seed=0, **{"num_draws": 256, **options})


def test_an_adapter_that_went_on_from_another_was_not_tuned_from_the_base() -> None:
    """TRL keeps its reference beside it, in "ref", and that is named as the cure."""
    run = HERE / "rloo_after_sft" / "checkpoint-6"
    wrong = certificate(run)
    (finding,) = wrong.findings
    assert finding.startswith("this is not the prior it was tuned from: its trainer's reference is the adapter in")
    assert repr(str(run / "ref")) in finding
    assert wrong.verdict.endswith(finding)
    assert certificate(run, prior=run / "ref").findings == ()


def test_an_adapter_of_another_base_was_not_tuned_from_this_prior() -> None:
    """Without a log: the adapter is switched off, and what is left is not the prior."""
    (finding,) = certificate(HERE / "dpo_lora" / "checkpoint-6", prior=HERE / "sft").findings
    assert (
        finding
        == "this is not the prior it was tuned from: its adapter was trained on 'base', whose log-probs are others"
    )


def test_a_kl_that_was_not_logged_contradicts_the_prior() -> None:
    """A full model says nothing of its reference; its log does. Most of the KL to the base is that of the tuning before."""
    run = HERE / "rloo_on_sft"
    (finding,) = certificate(run).findings
    assert "this is not the prior it was tuned from: the KL to it is 0." in finding
    assert "nats per token, and" in finding
    assert certificate(run, prior=HERE / "sft").findings == ()


def test_a_kl_per_token_is_compared_per_token(tmp_path: Path) -> None:
    """The policy has 2 nats per completion of two words: 0.5 nats per token say the same, 0.5 per completion do not."""
    for name, num_findings in (("kl", 0), ("objective/kl", 1)):
        folder = Path(
            shutil.copytree(HERE / "rloo" / "checkpoint-6", tmp_path / name.partition("/")[0] / "checkpoint-6")
        )
        rows = [{"step": step, name: 0.5} for step in range(1, 7)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows, "global_step": 6}))
        found = certificate(folder)
        assert 1.6 < found.kl_prior < 3.0
        assert len(found.findings) == num_findings, name


def test_a_policy_much_nearer_than_logged_contradicts_the_prior_too() -> None:
    """The prior is the policy itself, after a training that logged 0.9 nats per token."""
    first, second = certificate(HERE / "rloo", prior=HERE / "rloo").findings
    assert first.startswith("nothing was learned")
    assert second.startswith("this is not the prior it was tuned from: the KL to it is 0 nats per token")


def test_nothing_was_learned(tmp_path: Path) -> None:
    """The KL to the prior is 0 to the last bit, in the verdict and for any kind of policy; not said of the prior itself."""
    shutil.copytree(HERE / "base", tmp_path / "checkpoint-5")
    found = certificate(tmp_path / "checkpoint-5")
    assert found.kl_prior == 0
    assert "nothing was learned" in found.verdict
    assert certificate(posterior_of(HERE / "base").prior).findings == ()
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    reward = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    posterior = bk.Posterior(coin, reward, max_new_tokens=3)
    assert "nothing was learned" in bk.certify(posterior, bk.NgramLM(coin.log_probs, eos_token_id=1), seed=0).verdict
    other = bk.NgramLM(np.log([0.501, 0.499]), eos_token_id=1)
    assert "nothing" not in bk.certify(posterior, other, seed=0).verdict


def test_beta_0_is_read_off_the_log_and_its_nats_above_the_frontier_are_in_the_verdict() -> None:
    """TRL logs a KL if and only if beta is not 0; training_args.bin is a pickle and stays shut."""
    found = certificate(HERE / "grpo_beta0", num_draws=1024)
    assert any("beta = 0" in text for text in found.findings)
    assert found.frontier_gap > 1.96 * found.frontier_gap_se
    assert f"spends {found.frontier_gap:.2f} nats more KL than the reward needs" in found.verdict
    assert "for which no posterior exists" in found.verdict
    assert not any("beta" in text for text in certificate(HERE / "sft").findings)  # no rewards were logged


def test_the_log_of_a_checkpoint_goes_on_in_that_of_a_later_one() -> None:
    """So that the row after it, which is of this very policy, is known; its step stays its own."""
    log = log_of(HERE / "rloo" / "checkpoint-3")
    assert log is not None
    assert (log.step, log.steps.tolist()) == (3, [1, 2, 3, 4, 5, 6])
    rows = json.loads((HERE / "rloo" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    kl = [row["kl"] for row in rows]
    assert log.around("kl", 3).tolist() == kl[:4]
    assert log.around("kl", 6).tolist() == kl[3:]
    last = log_of(HERE / "rloo")
    assert last is not None
    assert last.step == 6
    assert log_of(HERE / "base") is None


def test_the_log_of_another_training_in_the_same_folder_is_not_taken(tmp_path: Path) -> None:
    shutil.copytree(HERE / "rloo" / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copytree(HERE / "grpo" / "checkpoint-6", tmp_path / "checkpoint-6")
    log = log_of(tmp_path / "checkpoint-3")
    assert log is not None
    assert log.steps.tolist() == [1, 2, 3]


def test_a_log_with_odd_rows_is_read(tmp_path: Path) -> None:
    """NaN, texts, true and a row without a step; PPO's KL is one of completions."""
    rows: list[dict[str, Any]] = [
        {"step": 2, "objective/kl": 3.0, "reward": float("nan"), "note": "text"},
        {"step": 1, "objective/kl": 1.0, "flag": True},
        {"train_runtime": 3.0},
    ]
    (tmp_path / "state.json").write_text(json.dumps({"log_history": rows, "global_step": 2}))
    log = TrainerLog.read(tmp_path / "state.json")
    assert log.steps.tolist() == [1, 2]
    assert set(log.values) == {"objective/kl", "reward"}
    assert log.kl_name == "objective/kl"
    assert log.at("objective/kl", 1) == 1.0
    assert np.isnan(log.at("reward", 2))
    assert not log.without_kl
