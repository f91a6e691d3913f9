"""Checkpoints, callbacks and optimizers: what survives, who looks, how long a step is."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.callbacks import StepRecord
from bayes_klrl.inference.svi.checkpoint import FILE
from bayes_klrl.inference.svi.objectives import LogVariance
from bayes_klrl.inference.svi.optimizers import KLSGD, StepLength
from bayes_klrl.inference.svi.pyro_backend.optimizers import MomentumSteps
from tests.helpers.backends import prior_on
from tests.helpers.jax_table import JaxTable
from tests.helpers.tiny_models import tiny_gpt2
from tests.helpers.truth import Truth, full_table, random_posterior

COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
RECIPES = {
    "adam": {},
    "rao-blackwell": {"estimator": "rao_blackwell"},
    "kl_sgd": {"optimizer": "kl_sgd"},
    "kl_sgd and critic": {"optimizer": "kl_sgd", "twist": bk.PartialRewardTwist()},
    "replay": {"objective": LogVariance(replay=8)},
    "js": {"objective": "js"},
    "natural": {"optimizer": "natural"},
    "a prompt at a time": {"prompts_per_step": 1, "optimizer": "kl_sgd", "twist": bk.PartialRewardTwist()},
}


def posterior(lm: Any = COIN, **options: Any) -> bk.Posterior:
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7)
    return bk.Posterior(lm, reward, **({"prompts": [[0], [1]], "max_new_tokens": 4} | options))


class Stop(Exception):
    """What stands for the end of the process."""


def stop_after(step: int) -> Any:
    def callback(record: StepRecord, guide: Any) -> None:
        if record.step == step:
            raise Stop

    return callback


def same(first: bk.Fit, second: bk.Fit) -> None:
    for name in first.history:
        if name != "seconds":
            np.testing.assert_array_equal(first.history[name], second.history[name], err_msg=name)
    a, b = first.run(50, seed=1), second.run(50, seed=1)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.log_proposal, b.log_proposal)


# --- resume ---------------------------------------------------------------------------------------------------------


RESUMED = [(recipe, "table") for recipe in RECIPES]  # every recipe; and of many parameters, every optimizer
RESUMED += [(recipe, "transformer") for recipe in ("adam", "rao-blackwell", "kl_sgd and critic", "natural")]
RESUMED += [(recipe, "lora") for recipe in ("adam", "natural")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe,prior", RESUMED)
def test_a_training_that_goes_on_ends_as_if_nothing_had_happened(recipe: str, prior: str, tmp_path: Path) -> None:
    lm = COIN if prior == "table" else bk.TorchLM(tiny_gpt2(6))
    svi = bk.SVI(9, 8, adapter="lora" if prior == "lora" else None, **RECIPES[recipe])  # type: ignore[arg-type]
    target = posterior(lm)
    whole = svi.fit(target, seed=3)
    with pytest.raises(Stop):
        svi.fit(target, seed=3, checkpoint=bk.Checkpoint(tmp_path, every=4), callbacks=[stop_after(5)])
    with pytest.raises(Stop):  # and once more, before the next checkpoint is due
        svi.fit(
            target, seed=3, resume=tmp_path, checkpoint=bk.Checkpoint(tmp_path, every=100), callbacks=[stop_after(7)]
        )
    again = svi.fit(target, seed=3, resume=tmp_path)
    same(whole, again)
    assert again.training_tokens >= whole.training_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "prior, recipe",
    [("transformer", {"max_step_kl": np.inf}), ("table", {"objective": "js", "prompts_per_step": 1})],
    ids=["elbo", "moving evidence"],
)
def test_so_does_one_on_jax(prior: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    target = posterior(prior_on("jax", COIN) if prior == "transformer" else JaxTable(full_table(COIN, 2)))
    svi = bk.SVI(6, 8, **recipe)
    whole = svi.fit(target, seed=3)
    with pytest.raises(Stop):
        svi.fit(target, seed=3, checkpoint=bk.Checkpoint(tmp_path, every=2), callbacks=[stop_after(3)])
    same(whole, svi.fit(target, seed=3, resume=tmp_path))


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path: Path) -> None:
    code = f"""
        import sys
        import numpy as np, bayes_klrl as bk
        coin = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
        reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7)
        target = bk.Posterior(coin, reward, prompts=[[0], [1]], max_new_tokens=4)
        bk.SVI(250, 8).fit(target, seed=3, checkpoint=bk.Checkpoint({str(tmp_path)!r}, every=1))
        print("finished")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / FILE).is_file():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == ""
    svi = bk.SVI(250, 8)
    same(svi.fit(posterior(), seed=3), svi.fit(posterior(), seed=3, resume=tmp_path))


def test_a_finished_training_goes_on_to_itself(tmp_path: Path) -> None:
    svi = bk.SVI(4, 8)
    fit = svi.fit(posterior(), seed=0, checkpoint=tmp_path)
    same(fit, svi.fit(posterior(), seed=0, resume=tmp_path))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"svi": bk.SVI(5, 8)}, "recipe"),
        ({"target": {"prompts": [[1], [0]]}}, "prompts"),
        ({"target": {"max_new_tokens": 3}}, "max_new_tokens"),
        ({"lm": bk.NgramLM(np.log([0.4, 0.4, 0.2]), eos_token_id=2)}, "prior"),
    ],
)
def test_checkpoints_of_other_trainings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    bk.SVI(4, 8).fit(posterior(), seed=0, checkpoint=tmp_path)
    target = posterior(change.get("lm", COIN), **change.get("target", {}))
    with pytest.raises(bk.CheckpointError, match=message):
        change.get("svi", bk.SVI(4, 8)).fit(target, seed=change.get("seed", 0), resume=tmp_path)


def test_another_reward_is_refused(tmp_path: Path) -> None:
    bk.SVI(4, 8).fit(posterior(), seed=0, checkpoint=tmp_path)
    shorter = bk.TokenReward(lambda tokens, lengths: -lengths, alpha=0.7)
    other = bk.Posterior(COIN, shorter, prompts=[[0], [1]], max_new_tokens=4)
    with pytest.raises(bk.CheckpointError, match="reward"):
        bk.SVI(4, 8).fit(other, seed=0, resume=tmp_path)


def test_folders_without_a_whole_checkpoint_are_refused(tmp_path: Path) -> None:
    svi = bk.SVI(4, 8)
    with pytest.raises(bk.CheckpointError, match="holds none"):
        svi.fit(posterior(), seed=0, resume=tmp_path)
    (tmp_path / ".unfinished-0123abcd.safetensors").write_bytes(b"abc")
    with pytest.raises(bk.CheckpointError, match="not finished"):
        svi.fit(posterior(), seed=0, resume=tmp_path)
    (tmp_path / FILE).write_bytes(b"abc")
    with pytest.raises(bk.CheckpointError, match="cannot be read"):
        svi.fit(posterior(), seed=0, resume=tmp_path)


def test_a_checkpoint_with_another_critic_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is one may depend on the time that the reward takes."""
    from bayes_klrl.inference.svi.pyro_backend import training

    svi = bk.SVI(4, 8, optimizer="kl_sgd")
    svi.fit(posterior(), seed=0, checkpoint=tmp_path)
    monkeypatch.setattr(training, "critic_for", lambda *_: None)
    with pytest.raises(bk.CheckpointError, match=r"differ in their critic.*twist='none'"):
        svi.fit(posterior(), seed=0, resume=tmp_path)


def test_early_stopping_ends_at_the_same_step_after_a_resume(tmp_path: Path) -> None:
    target, svi = posterior(full_table(COIN, 5)), bk.SVI(200, 64)
    whole = svi.fit(target, seed=0, callbacks=[bk.EarlyStopping(gap=0.1)])
    middle = len(whole.history["elbo"]) // 2
    with pytest.raises(Stop):
        svi.fit(target, seed=0, checkpoint=tmp_path, callbacks=[stop_after(middle)])
    same(whole, svi.fit(target, seed=0, resume=tmp_path, callbacks=[bk.EarlyStopping(gap=0.1)]))


# --- callbacks ------------------------------------------------------------------------------------------------------


def test_callbacks_see_each_step_and_may_end_the_training(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def until_three(record: StepRecord, guide: Any) -> bool:
        seen.append((record.step, record.values["elbo"]))
        assert guide.vocab_size == 3
        assert {"elbo", "kl_to_prior", "log_weight_sd", "step_kl", "reward"} <= record.logged.keys()
        return record.step == 2

    fit = bk.SVI(9, 8).fit(posterior(), seed=0, callbacks=[until_three], checkpoint=tmp_path)
    assert [step for step, _ in seen] == [0, 1, 2]
    np.testing.assert_array_equal([elbo for _, elbo in seen], fit.history["elbo"])
    assert (tmp_path / FILE).is_file()


def test_early_stopping_waits_for_the_gap() -> None:
    target = posterior(full_table(COIN, 5))
    fit = bk.SVI(400, 64).fit(target, seed=0, callbacks=[bk.EarlyStopping(gap=0.02, least_steps=20)])
    assert 20 <= len(fit.history["elbo"]) < 400
    assert Truth(target).kl(fit.guide).mean() < 0.06
    with pytest.raises(bk.BayesKLRLError, match="gap"):
        bk.EarlyStopping(gap=0.0)


def test_certify_every_keeps_the_best(tmp_path: Path) -> None:
    every = bk.CertifyEvery(10, folder=tmp_path, options={"num_draws": 64})
    fit = bk.SVI(30, 16).fit(posterior(), seed=0, callbacks=[every])
    assert sorted(every.certificates) == [9, 19, 29]
    highs = {step: one.pooled.reverse_kl[1] for step, one in every.certificates.items()}
    assert every.best_step == min(highs, key=highs.__getitem__)
    assert isinstance(bk.NgramLM.from_pretrained(tmp_path), bk.NgramLM)
    assert len(fit.history["elbo"]) == 30


def test_what_a_callback_raises_leaves_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        bk.SVI(9, 8).fit(posterior(), seed=0, checkpoint=bk.Checkpoint(tmp_path, every=100), callbacks=[stop_after(2)])
    fit = bk.SVI(9, 8).fit(posterior(), seed=0, resume=tmp_path)
    assert len(fit.history["elbo"]) == 9


# --- optimizers -----------------------------------------------------------------------------------------------------


def test_steps_of_kl_sgd_have_the_length_asked_for() -> None:
    """KL(q || q_new) of a table, exactly, against the length in nats."""
    base = random_posterior(51, num_tokens=3)
    target = bk.Posterior(full_table(base.prior, 3), base.likelihood, prompts=[[]], max_new_tokens=3)  # type: ignore[arg-type]
    truth = Truth(target)
    laws: list[np.ndarray] = [truth.log_prior[0]]

    def keep(record: StepRecord, guide: Any) -> None:
        laws.append(np.asarray(guide.token_log_probs(target.prompt_ids, truth.sequences)).sum(axis=2)[0])

    recipe = KLSGD(relative=0.02)
    fit = bk.SVI(30, 2000, optimizer=recipe).fit(target, seed=0, callbacks=[keep])
    length, moved = StepLength(recipe, 30), []
    for step, (before, after) in enumerate(pairwise(laws)):
        asked = length.next(step, float(fit.history["log_weight_sd"][step] ** 2))
        moved.append(float(np.exp(before) @ (before - after)) / asked)
    assert 0.8 < np.median(moved[:10]) < 1.25
    assert max(moved[:10]) < 2
    assert fit.history["elbo"][-1] > fit.history["elbo"][0]


def test_a_measurement_that_fails_takes_no_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))

    def interrupted() -> float:
        raise KeyboardInterrupt

    steps = MomentumSteps(KLSGD(), 10, [parameter], interrupted)
    parameter.grad = torch.ones(3)
    with pytest.raises(KeyboardInterrupt):
        steps.step(torch.tensor([[0.0], [2.0]]))
    assert parameter.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"step_kl": 0.0}, {"relative": np.inf}])
def test_numbers_of_kl_sgd_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(bk.BayesKLRLError, match=next(iter(options))):
        KLSGD(**options)  # type: ignore[arg-type]


def test_a_training_may_begin_from_another_guide() -> None:
    target = posterior()
    first = bk.SVI(60, 64).fit(target, seed=0)
    second = bk.SVI(1, 64, initial_guide=first.guide, learning_rate=1e-9).fit(target, seed=1)
    truth = Truth(target)
    np.testing.assert_allclose(truth.kl(second.guide), truth.kl(first.guide), atol=1e-6)
    with pytest.raises(bk.CheckpointError, match="initial_guide"):
        bk.SVI(1, 8, initial_guide=bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)).fit(target, seed=0)


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "kl_sgd"}, {"optimizer": "natural"}, {"twist": bk.PartialRewardTwist()}, {"particles_per_pass": 2}],
)
def test_what_is_for_torch_alone_is_refused_on_jax(options: dict[str, Any]) -> None:
    with pytest.raises(
        bk.BayesKLRLError, match=f"{next(iter(options))}=.* on torch.*Leave .* out, or use a bk.TorchLM"
    ):
        bk.SVI(2, 4, **options).fit(posterior(prior_on("jax", COIN)), seed=0)


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit = bk.SVI(5, 8).fit(posterior(), seed=0, callbacks=[bk.TensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"elbo", "kl_to_prior", "log_weight_sd", "reward"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("elbo")]
    np.testing.assert_allclose(logged, fit.history["elbo"], rtol=1e-6)


def test_what_a_callback_raises_carries_the_fit() -> None:
    with pytest.raises(Stop) as raised:
        bk.SVI(5, 8).fit(posterior(), seed=3, callbacks=[stop_after(2)])
    fit: bk.Fit = raised.value.fit  # type: ignore[attr-defined]
    assert len(fit.history["elbo"]) == 3


@pytest.mark.parametrize("callbacks", [[3], bk.EarlyStopping(gap=0.1), "tensorboard"], ids=repr)
def test_callbacks_are_a_list_of_functions(callbacks: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="callbacks is a list of functions"):
        bk.SVI(5, 8).fit(posterior(), seed=3, callbacks=callbacks)


def test_folders_of_checkpoints_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", 3):
        with pytest.raises(bk.BayesKLRLError, match="written into a folder"):
            bk.SVI(5, 8).fit(posterior(), seed=3, checkpoint=wrong)  # type: ignore[arg-type]
    kept = bk.Checkpoint(tmp_path / "run", every=2)
    fit = bk.SVI(4, 8).fit(posterior(), seed=3, checkpoint=kept)
    same(fit, bk.SVI(4, 8).fit(posterior(), seed=3, resume=kept))  # type: ignore[arg-type]


def test_a_checkpoint_tells_lambdas_apart_and_names_what_differs(tmp_path: Path) -> None:
    first = bk.SVI(3, 8, objective=lambda batch: -(batch.rewards * batch.log_probs.sum(dim=1)).mean())
    other = bk.SVI(3, 8, objective=lambda batch: (5 * batch.rewards * batch.log_probs.sum(dim=1)).mean())
    first.fit(posterior(), seed=3, checkpoint=tmp_path)
    first.fit(posterior(), seed=3, resume=tmp_path)
    with pytest.raises(bk.CheckpointError, match="recipe objective: "):
        other.fit(posterior(), seed=3, resume=tmp_path)


def test_the_best_certificate_survives_a_resume(tmp_path: Path) -> None:
    """Steps that are far too long: an early guide is the best, before and after the resume."""
    svi = bk.SVI(20, 4, learning_rate=3.0, max_step_kl=np.inf)
    whole = bk.CertifyEvery(2, tmp_path / "whole", options={"num_draws": 64})
    svi.fit(posterior(), seed=2, callbacks=[whole])
    first = bk.CertifyEvery(2, tmp_path / "best", options={"num_draws": 64})
    with pytest.raises(Stop):
        svi.fit(posterior(), seed=2, callbacks=[first, stop_after(10)], checkpoint=bk.Checkpoint(tmp_path, every=1))
    again = bk.CertifyEvery(2, tmp_path / "best", options={"num_draws": 64})
    svi.fit(posterior(), seed=2, callbacks=[again], resume=tmp_path)
    assert again.best_step == whole.best_step
    other = bk.SVI(4, 8).fit(posterior(), seed=0, callbacks=[again])  # another training begins anew
    assert max(again.certificates) < len(other.history["elbo"])


@pytest.mark.parametrize("options", [{"num_drawz": 64}, {"seed": 1}], ids=str)
def test_options_of_certificates_are_checked_first(options: dict[str, int]) -> None:
    with pytest.raises(bk.BayesKLRLError, match="has no option"):
        bk.CertifyEvery(5, options=options)


@pytest.mark.slow
def test_under_a_constraint_the_forward_kl_selects() -> None:
    no_ones = bk.Constraint(lambda completion_ids: [1 not in ids for ids in completion_ids])
    target = bk.Posterior(COIN, no_ones, prompts=[[0]], max_new_tokens=3)
    every = bk.CertifyEvery(20)
    bk.SVI(100, 64, objective="forward_kl").fit(target, seed=0, callbacks=[every])
    forward = {step: float(np.mean(one.pooled.forward_kl)) for step, one in every.certificates.items()}
    assert every.best_step == min(forward, key=lambda step: forward[step])


def test_a_fit_may_be_the_guide_to_start_from() -> None:
    start = bk.SVI(5, 8).fit(posterior(), seed=0)
    by_fit = bk.SVI(3, 8, initial_guide=start).fit(posterior(), seed=1)
    by_guide = bk.SVI(3, 8, initial_guide=start.guide).fit(posterior(), seed=1)
    np.testing.assert_array_equal(by_fit.history["elbo"], by_guide.history["elbo"])
    with pytest.raises(bk.BayesKLRLError, match="initial_guide is a language model"):
        bk.SVI(3, 8, initial_guide="folder").fit(posterior(), seed=1)


def test_a_guide_that_cannot_be_saved_is_refused_at_the_first_step(tmp_path: Path) -> None:
    class Unsaved:
        """A guide with a draw and a score, and no files."""

    record = StepRecord(0, 50, {}, {}, posterior())
    with pytest.raises(bk.BayesKLRLError, match="Unsaved has no save_pretrained"):
        bk.CertifyEvery(20, tmp_path)(record, Unsaved())  # type: ignore[arg-type]
