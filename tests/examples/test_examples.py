"""The examples say what is true, by enumeration."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq

import bayes_klrl as bk
from tests.helpers.joint import joint_kl, moment_tolerances
from tests.helpers.truth import Truth

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_another_trainers_policies_are_certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GRPO is further from the posterior than leave-one-out, and both certificates hold what enumeration says."""
    example = runpy.run_path(str(EXAMPLES / "certify_other_trainer.py"))
    posterior, certificates = example["main"](tmp_path)
    truth = Truth(posterior)
    reverse = {}
    for name, certificate in certificates.items():
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["checkpoint-100", "checkpoint-33"]
        policy = bk.TorchLM.from_pretrained(tmp_path / name / "checkpoint-100")
        kl = reverse[name] = truth.kl(policy)
        log_q = log_probs(policy, truth)
        forward = (truth.p * (truth.log_posterior - log_q)).sum(axis=1)
        sampled = bk.certify(posterior, tmp_path / name, seed=1, sampling_only=True)
        assert sampled.grade == certificate.grade == "A"
        for found in (certificate, sampled):
            assert contains(found.reverse_kl, kl)
            assert contains(found.forward_kl, forward)
            assert contains(found.log_evidence_bounds, truth.log_evidence)
        assert np.ptp(certificate.reverse_kl) < 1e-3
        assert abs(certificate.frontier_gap - frontier_gap(truth, log_q)) < 1e-6
        assert abs(sampled.frontier_gap - frontier_gap(truth, log_q)) < 4 * sampled.frontier_gap_se
    assert reverse["leave_one_out"] < 0.1 < 0.2 < reverse["grpo"]
    grpo, other = certificates["grpo"], certificates["leave_one_out"]
    assert grpo.frontier_gap > 0.1  # it also pays more for the reward that it has
    assert other.frontier_gap < grpo.frontier_gap / 2
    assert not grpo.notes + other.notes  # nothing extrapolated
    printed = capsys.readouterr().out
    assert f"GRPO is {reverse['grpo'][0]:.2f} nats from the posterior" in printed
    assert f"leave-one-out is {reverse['leave_one_out'][0]:.2f}" in printed


@pytest.mark.slow
def test_the_benchmark_of_trainers_runs_without_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's rows are its reference and cannot be run here; what they are compared with can."""
    bench = runpy.run_path(str(ROOT / "benchmarks" / "bench_trainers.py"))
    monkeypatch.setattr(
        "sys.argv", ["bench_trainers.py", "--only", "bare", "svi", "--steps", "3", "--out", str(tmp_path)]
    )
    with warnings.catch_warnings():  # it changes the filters
        bench["main"]()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["bare", "svi"]
    assert sorted(path.name for path in (tmp_path / "gpt2-8x4" / "0").iterdir()) == ["bare", "svi"]
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr("sys.argv", ["bench_trainers.py", "--only", "svi", "trl-rloo"])
    with pytest.raises(SystemExit, match=r"pip install 'trl==1\.16"):
        bench["main"]()


def test_a_reward_function_of_trls_signature_is_the_tasks_reward() -> None:
    """The benchmark's posteriors are one: in text for TRL, in token ids for the bare loop."""
    bench = runpy.run_path(str(ROOT / "benchmarks" / "bench_trainers.py"))
    base = bench["gpt2_task"]("gpt2-7x5")
    posterior = bench["text_posterior"](base)
    assert posterior.prompt_ids == base.prompt_ids
    draws = bk.ImportanceSampling(500).run(base, seed=0)
    assert np.allclose(posterior.reward(draws), draws.reward)
    assert np.allclose(posterior.log_prior(draws), draws.log_prior, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_preferences", [pytest.param(0, marks=pytest.mark.slow), 6])
def test_a_joint_program_finds_reward_weights_and_completions(num_preferences: int) -> None:
    """Moments of theta and f(x) against enumeration times quadrature, as near as the fit's own KL to the posterior allows."""
    import pyro
    import torch

    example = runpy.run_path(str(EXAMPLES / "joint_pyro.py"))
    preferences = example["PREFERENCES"][:num_preferences]
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        found = example["drawn"](*example["fit"](preferences))
        guide = {name: pyro.param(name).detach().numpy() for name in ("loc", "slope", "log_sd")}
        logits = pyro.get_param_store()["table$$$logits"].detach().log_softmax(-1)
    table = bk.NgramLM(logits.numpy().reshape((4,) * 4), eos_token_id=3)
    truth = example["exact"](preferences)
    kl = joint_kl(example, preferences, table, **guide)
    # with preferences theta | x is no Gaussian whose mean is linear in f: the family itself costs some thousandths
    assert 0 <= kl < (0.01 if num_preferences else 0.004)
    tolerances = moment_tolerances(example, kl, truth[2:4], 20_000)
    assert (np.abs(found - truth) < tolerances).all(), (found, truth, tolerances)
    # joint, so optimistic: without data the weights would stand at 0 if generations did not inform them
    assert num_preferences or (truth[:2] > 0.4).all()


@pytest.mark.slow
@pytest.mark.parametrize("num_preferences", [0, 6])
def test_a_joint_program_finds_the_same_in_numpyro(num_preferences: int) -> None:
    """On JAX, the prior a transformer."""
    example = runpy.run_path(str(EXAMPLES / "joint_numpyro.py"))
    preferences = example["PREFERENCES"][:num_preferences]
    guide, params = example["fit"](preferences)
    found = example["drawn"](guide, params)
    truth = example["exact"](preferences)
    policy = example["PRIOR"].with_parameters(params["lm"])
    normal = [np.asarray(params[name], dtype=np.float64) for name in ("loc", "slope", "log_sd")]
    kl = joint_kl(example, preferences, policy, *normal, prompt_ids=example["START"])
    # with preferences theta | x is no Gaussian whose mean is linear in f: the family itself costs some thousandths
    assert 0 <= kl < (0.012 if num_preferences else 0.004)
    tolerances = moment_tolerances(example, kl, truth[2:4], 20_000)
    assert (np.abs(found - truth) < tolerances).all(), (found, truth, tolerances)


@pytest.mark.slow
def test_a_power_sampler_and_an_imitation_of_best_of_n_are_certified(capsys: pytest.CaptureFixture[str]) -> None:
    """Both against sums over all texts: p0^3, and the law of the best of eight with ties broken at random."""
    example = runpy.run_path(str(ROOT / "examples" / "power_and_best_of_n.py"))
    example["main"]()
    printed = capsys.readouterr().out

    posterior, local, certificate, draws = example["power_sampler"]()
    truth = Truth(posterior)
    log_p = 3 * truth.log_prior[0] - np.log(np.exp(3 * truth.log_prior[0]).sum())
    log_q = log_probs(local, truth)[0]
    kl = float(np.exp(log_q) @ (log_q - log_p))
    assert kl > 1
    assert contains(certificate.reverse_kl, np.array([kl]))
    assert f"{kl:.2f} nats from the posterior" in printed
    begins = truth.sequences.tokens[0, :, 0] == example["TWO"]
    assert np.exp(log_p)[begins].sum() > 3 * np.exp(log_q)[begins].sum()  # what the low temperature gets wrong
    assert abs(draws.log_evidence[0] - np.log(np.exp(3 * truth.log_prior[0]).sum())) < 0.1
    assert abs(example["starts"](draws) - np.exp(log_p)[begins].sum()) < 0.1

    posterior, guide, certificate = example["best_of_n"]()
    truth = Truth(posterior)
    p0 = np.exp(truth.log_prior[0])
    score = np.array(example["different"](truth.sequences.tokens[0], truth.sequences.lengths[0]))
    levels = np.array([p0[score == level].sum() for level in range(score.max() + 1)])
    up, below = levels.cumsum()[score], (levels.cumsum() - levels)[score]
    best = p0 * (up**8 - below**8) / (up - below)
    assert np.isclose(best.sum(), 1)
    log_q = log_probs(guide, truth)[0]
    kl = float(np.exp(log_q) @ (log_q - np.log(best)))
    assert contains(certificate.reverse_kl, np.array([kl]))
    assert contains(certificate.log_evidence_bounds, np.array([-np.log(8)]))
    assert f"{kl:.2f} nats from the posterior" in printed
    assert kl < 0.3


def log_probs(policy: bk.LanguageModel, truth: Truth) -> np.ndarray:
    posterior = truth.posterior
    prompts = [list(ids) for ids in posterior.prompt_ids]
    as_prior = bk.Posterior(policy, posterior.likelihood, prompts=prompts, max_new_tokens=posterior.max_new_tokens)
    return as_prior.log_prior(truth.sequences)


def frontier_gap(truth: Truth, log_q: np.ndarray) -> float:
    """KL(q || p0) less that of the posterior, at whatever alpha, that has the reward of q."""
    log_prior, reward, q = truth.log_prior[0], truth.reward[0], np.exp(log_q[0])

    def tilted(b: float) -> tuple[float, float]:
        joint = np.exp(log_prior + b * reward)
        mean = float(joint @ reward / joint.sum())
        return mean, b * mean - float(np.log(joint.sum()))

    b = brentq(lambda b: tilted(b)[0] - q @ reward, 0.01, 100.0)
    return float(q @ (log_q[0] - log_prior)) - tilted(b)[1]


def contains(interval: np.ndarray, values: np.ndarray) -> bool:
    return bool(((interval[:, 0] <= values) & (values <= interval[:, 1])).all())
