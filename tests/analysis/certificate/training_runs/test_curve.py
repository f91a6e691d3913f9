"""What TRL 1.16 wrote (`tests/policies`), each checkpoint against its truth, counted with transformers and peft alone."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers as hf

import bayes_klrl as bk
from bayes_klrl.models.torch_lm.adapters import quiet_peft
from tests.helpers.pictures import png_size
from tests.policies.make import BETA, HERE, sunny

BASE = HERE / "base"
PRIOR = bk.TorchLM.from_pretrained(BASE)
RUNS = sorted(path.name for path in HERE.iterdir() if (path / "checkpoint-6").is_dir())
WRONG = ("grpo_beta0", "rloo_on_sft", "rloo_after_sft")  # for this prior; see `test_findings`
COMPLETIONS = [[0], *([first, last] for first in range(1, 16) for last in range(16))]  # two words, 0 is EOS


def posterior_of(prior: bk.LanguageModel) -> bk.Posterior:
    """The posterior of the runs, of one prompt and two words."""
    return bk.Posterior(prior, bk.Reward(sunny, alpha=BETA, bounds=(0, 2)), prompts="the day is", max_new_tokens=2)


POSTERIOR = posterior_of(PRIOR)


@cache
def log_probs(folder: Path) -> np.ndarray:
    """log q of all completions, (241,): by the network's plain forward, without a line of this package."""
    config = folder / "adapter_config.json"
    with quiet_peft():
        model = hf.AutoModelForCausalLM.from_pretrained(BASE if config.exists() else folder)
        if config.exists():
            model = peft.PeftModel.from_pretrained(model, folder)
    (prompt,) = POSTERIOR.prompt_ids
    ids = torch.tensor([[*prompt, *completion] for completion in COMPLETIONS[1:]])
    with torch.no_grad():
        first, last = model.eval()(ids).logits[:, -3:-1].double().log_softmax(-1).unbind(1)
    rows = torch.arange(len(ids))
    both = first[rows, ids[:, -2]] + last[rows, ids[:, -1]]
    return np.concatenate([first[:1, 0].numpy(), both.numpy()])


def truth(folder: Path, prior: Path = BASE) -> dict[str, float]:
    """Both KLs to the posterior, the KL to the prior and the mean reward of a policy, by sums."""
    log_q, log_p = log_probs(folder), log_probs(prior)
    reward = np.array(sunny(PRIOR.decode(COMPLETIONS)))
    joint = log_p + reward / BETA
    log_posterior = joint - np.log(np.exp(joint).sum())
    q, p = np.exp(log_q), np.exp(log_posterior)
    assert np.isclose(q.sum(), 1)
    return {
        "reverse_kl": float(q @ (log_q - log_posterior)),
        "forward_kl": float(p @ (log_posterior - log_q)),
        "kl_prior": float(q @ (log_q - log_p)),
        "reward": float(q @ reward),
    }


@cache
def curve_of(run: str) -> bk.CertificateCurve:
    return bk.certify_checkpoints(POSTERIOR, HERE / run, seed=0, num_draws=256)


def test_the_runs_are_those_of_all_four_trainers_full_and_adapters() -> None:
    names = {f"{trainer}{kind}" for trainer in ("sft", "dpo", "rloo", "grpo") for kind in ("", "_lora")}
    assert set(RUNS) == names | {"grpo_beta0", "rloo_on_sft", "rloo_after_sft"}


@pytest.mark.parametrize("run", RUNS)
def test_each_checkpoint_has_its_true_distance(run: str) -> None:
    """Exact to rounding where all is counted; the sampled mean reward and KL to the prior by their z-scores."""
    curve = curve_of(run)
    assert curve.steps.tolist() == [3, 6]
    for step, certificate in curve.certificates.items():
        true = truth(HERE / run / f"checkpoint-{step}")
        assert np.allclose(certificate.pooled.reverse_kl, true["reverse_kl"], atol=2e-4)
        assert np.allclose(certificate.pooled.forward_kl, true["forward_kl"], atol=2e-4)
        for found, name in ((certificate.draws.reward, "reward"), (kl_of(certificate), "kl_prior")):
            assert abs(found.mean() - true[name]) < 4 * found.std() / np.sqrt(found.size) + 1e-6
        assert certificate.grade == "A"
        assert bool(certificate.findings) == (
            run in WRONG
        )  # logged KLs are per token, and of the policy one update before
    assert curve.failure_probability == 0
    best = min((3, 6), key=lambda step: truth(HERE / run / f"checkpoint-{step}")["reverse_kl"])
    assert curve.best_step == best
    assert curve.verdict.startswith(f"checkpoint-{best} is nearest")


def kl_of(certificate: bk.Certificate) -> np.ndarray:
    return certificate.draws.log_proposal - certificate.draws.log_prior


@pytest.mark.slow
def test_sampled_bounds_hold_the_truth_too() -> None:
    """And each certificate of the curve is the one of `certify` alone, though SMC and exact draws are shared."""
    options = {"seed": 1, "num_draws": 128, "num_particles": 8, "num_runs": 8, "sampling_only": True}
    curve = bk.certify_checkpoints(POSTERIOR, HERE / "rloo", **options)  # type: ignore[arg-type]
    for step, certificate in curve.certificates.items():
        true = truth(HERE / "rloo" / f"checkpoint-{step}")
        for name in ("reverse_kl", "forward_kl"):
            low, high = certificate.pooled[name]
            assert low <= true[name] <= high
            assert np.isfinite(high)
    assert curve.failure_probability == pytest.approx(0.1)
    alone = bk.certify(POSTERIOR, HERE / "rloo" / "checkpoint-6", **options)  # type: ignore[arg-type]
    together = curve.certificates[6]
    assert str(alone) == str(together)
    assert np.array_equal(alone.reverse_kl, together.reverse_kl)
    assert np.array_equal(alone.draws.tokens, together.draws.tokens)
    assert curve.cost.model_tokens < sum(each.cost.model_tokens for each in curve.certificates.values())


@pytest.mark.parametrize("run", ["dpo", "grpo_lora"])
def test_a_runs_own_folder_is_its_last_policy(run: str) -> None:
    """As `trainer.save_model` left it; `certify` takes the folder as it is."""
    found = bk.certify(POSTERIOR, str(HERE / run), seed=0, num_draws=64)
    assert np.allclose(found.pooled.reverse_kl, truth(HERE / run / "checkpoint-6")["reverse_kl"], atol=2e-4)


def test_the_table_has_what_was_logged_beside_what_is_certified() -> None:
    table = curve_of("rloo").table()
    history = json.loads((HERE / "rloo" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    logged = {row["step"]: row for row in history}
    assert table.index.tolist() == [3, 6]
    for step in (3, 6):
        for name in ("reward", "kl", "loss"):
            assert table.loc[step, f"logged_{name}"] == logged[step][name]
    margins = curve_of("dpo").table()["logged_rewards/margins"]
    assert margins[6] > margins[3] > 0
    assert "logged_kl" not in curve_of("dpo").table()
    lines = str(curve_of("rloo")).splitlines()
    (heading,) = [line for line in lines if "step" in line and "logged" in line]
    assert heading.split()[-4:] == ["logged", "reward", "logged", "kl"]


@pytest.mark.slow
def test_it_is_written_as_table_text_and_picture(tmp_path: Path) -> None:
    curve = curve_of("grpo")
    out = curve.save(tmp_path / "out")
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "certificates.png",
        "certificates.txt",
        "table.csv",
    ]
    written = pd.read_csv(out / "table.csv", index_col="step")
    assert np.allclose(written["reverse_kl_high"], curve.table()["reverse_kl_high"])
    assert (out / "certificates.txt").read_text() == f"{curve}\n"
    assert min(png_size(out / "certificates.png")) > 300
    curve.save(out)  # a second time, over its own


def test_no_pickle_of_a_run_is_opened(tmp_path: Path) -> None:
    """training_args.bin is one, and would run what stands in it."""
    shutil.copytree(HERE / "rloo", tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (checkpoint / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    curve = bk.certify_checkpoints(POSTERIOR, tmp_path / "run", seed=0, num_draws=32)
    assert curve.steps.tolist() == [3, 6]
    assert not (tmp_path / "exploded").exists()


class _Bomb:
    """An object whose pickle makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_an_adapter_that_was_moved_with_its_base_still_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base is called "base", by the path from where the trainer was started."""
    shutil.copytree(HERE / "rloo_lora", tmp_path / "moved" / "runs" / "rloo_lora")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "moved" / "runs" / "rloo_lora"
    with pytest.raises(bk.CheckpointError, match="belongs to the model 'base', which cannot be loaded"):
        bk.certify(POSTERIOR, run, seed=0, num_draws=32)
    shutil.copytree(BASE, tmp_path / "moved" / "base")
    found = bk.certify(POSTERIOR, run, seed=0, num_draws=32)
    assert np.allclose(found.pooled.reverse_kl, truth(HERE / "rloo_lora" / "checkpoint-6")["reverse_kl"], atol=2e-4)


def test_a_policy_of_trl_is_a_likelihood_too() -> None:
    """At alpha = beta, on the prior that it was tuned from, the posterior is the policy and log Z = 0."""
    for run in ("dpo", "dpo_lora"):
        reward = bk.ImplicitReward(HERE / run, beta=BETA, alpha=BETA)
        posterior = bk.Posterior(PRIOR, reward, prompts="the day is", max_new_tokens=2)
        exact = bk.Exact().run(posterior, seed=0)
        assert np.allclose(exact.log_evidence, 0, atol=1e-5)
        assert np.allclose(posterior.log_joint(COMPLETIONS)[0], log_probs(HERE / run / "checkpoint-6"), atol=1e-4)
