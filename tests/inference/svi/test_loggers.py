"""Loggers: what `TransformersLogger` tells the callbacks of transformers, and what TensorBoard has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import bayes_klrl as bk
from bayes_klrl.inference.svi.callbacks.callbacks import StepRecord
from tests.helpers.jax_table import JaxTable
from tests.helpers.tiny_models import tiny_gpt2
from tests.helpers.truth import full_table

COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
NAMES = {"elbo", "kl_to_prior", "log_weight_sd", "step_kl", "ess", "reward"}


def posterior(lm: Any = COIN) -> bk.Posterior:
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7)
    return bk.Posterior(lm, reward, prompts=[[0], [1]], max_new_tokens=4)


class Recorder(TrainerCallback):
    """A callback of transformers that keeps what it is told."""

    def __init__(self, stop_at: int | None = None, fails_at: str | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.stop_at, self.fails_at = stop_at, fails_at

    def told(self, event: str, state: Any) -> None:
        self.events.append((event, state.global_step))
        assert state.is_world_process_zero
        if event == self.fails_at:
            raise OSError("no connection")

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told("init_end", state)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.told("train_begin", state)
        self.arguments, self.model, self.max_steps = args, model, state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.told("step_end", state)
        control.should_training_stop = state.global_step == self.stop_at
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told("log", state)
        self.logs.append(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told("train_end", state)


def whole(first: int, last: int) -> list[tuple[str, int]]:
    """The events of a training of steps first, ..., last - 1."""
    each = [(event, step + 1) for step in range(first, last) for event in ("step_end", "log")]
    return [("init_end", first), ("train_begin", first), *each, ("train_end", last)]


def test_the_protocol_is_that_of_a_trainer() -> None:
    recorder = Recorder()
    fit = bk.SVI(3, 8).fit(posterior(), seed=0, callbacks=[bk.TransformersLogger(recorder)])
    assert recorder.events == whole(0, 3)
    assert recorder.max_steps == recorder.arguments.max_steps == 3
    assert recorder.model is None  # a table is no module
    for step, logs in enumerate(recorder.logs):
        assert logs["elbo"] == fit.history["elbo"][step]
        assert logs["kl_to_prior"] == fit.history["kl"][step]
        assert logs["ess"] == fit.history["ess"][step]
        assert all(type(value) is float and np.isfinite(value) for value in logs.values())
    assert recorder.logs[0].keys() >= NAMES


def test_a_second_training_begins_anew() -> None:
    recorder = Recorder()
    logger = bk.TransformersLogger(recorder)
    bk.SVI(2, 8).fit(posterior(), seed=0, callbacks=[logger])
    bk.SVI(3, 8).fit(posterior(), seed=0, callbacks=[logger])
    assert recorder.events == whole(0, 2) + whole(0, 3)
    logger.close()
    assert len(recorder.events) == len(whole(0, 2) + whole(0, 3))


def test_parameters_are_ours_and_not_those_of_a_trainer() -> None:
    recorder = Recorder()
    prior = bk.TorchLM(tiny_gpt2(6))
    logger = bk.TransformersLogger(recorder, run_name="first", output_dir="somewhere")
    fit = bk.SVI(1, 8, learning_rate=0.03, adapter="lora").fit(posterior(prior), seed=0, callbacks=[logger])
    logged = recorder.arguments.to_sanitized_dict()
    assert logged == recorder.arguments.to_dict()
    expected = {
        "learning_rate": 0.03,
        "num_particles": 8,
        "adapter": "lora",
        "alpha": 0.7,
        "num_prompts": 2,
        "num_steps": 1,
    }
    assert logged.items() >= {**expected, "run_name": "first"}.items()
    assert "num_train_epochs" not in logged
    assert (recorder.arguments.run_name, recorder.arguments.output_dir) == ("first", "somewhere")
    assert recorder.model is fit.guide.module  # type: ignore[attr-defined]


def test_numbers_that_are_not_finite_are_left_out() -> None:
    recorder = Recorder()
    fit = bk.SVI(2, 8, max_step_kl=np.inf).fit(posterior(), seed=0, callbacks=[bk.TransformersLogger(recorder)])
    assert np.isnan(fit.history["step_kl"]).all()
    assert all("step_kl" not in logs and "elbo" in logs for logs in recorder.logs)


def test_a_resume_goes_on_at_the_step_where_it_was(tmp_path: Path) -> None:
    first, second = Recorder(stop_at=3), Recorder()
    svi = bk.SVI(5, 8)
    svi.fit(posterior(), seed=0, checkpoint=tmp_path, callbacks=[bk.TransformersLogger(first)])
    fit = svi.fit(posterior(), seed=0, resume=tmp_path, callbacks=[bk.TransformersLogger(second)])
    assert first.events == whole(0, 3)
    assert second.events == whole(3, 5)
    assert [logs["elbo"] for logs in first.logs + second.logs] == fit.history["elbo"].tolist()


def stop(record: StepRecord, guide: Any) -> bool:
    return record.step == 1


def fail(record: StepRecord, guide: Any) -> None:
    if record.step == 1:
        raise bk.BayesKLRLError("enough")


def interrupt(record: StepRecord, guide: Any) -> None:
    if record.step == 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize("end", [stop, fail, interrupt])
def test_the_end_is_told_however_it_comes(end: Any) -> None:
    recorder, other = Recorder(), Recorder()
    callbacks = [bk.TransformersLogger(recorder, other), end]
    if end is fail:
        with pytest.raises(bk.BayesKLRLError, match="enough") as caught:
            bk.SVI(5, 8).fit(posterior(), seed=0, callbacks=callbacks)
        assert caught.value.fit is not None
    elif end is interrupt:
        with pytest.warns(UserWarning, match="interrupted"):
            assert bk.SVI(5, 8).fit(posterior(), seed=0, callbacks=callbacks).interrupted
    else:
        bk.SVI(5, 8).fit(posterior(), seed=0, callbacks=callbacks)
    assert recorder.events == other.events == whole(0, 2)


def test_a_logger_that_fails_at_the_end_does_not_lose_the_guide() -> None:
    first, last = Recorder(), Recorder()
    logger = bk.TransformersLogger(first, Recorder(fails_at="train_end"), last)
    with pytest.warns(UserWarning, match=r"TransformersLogger\.close\(\) raised OSError: no connection"):
        fit = bk.SVI(2, 8).fit(posterior(), seed=0, callbacks=[logger])
    assert len(fit.history["elbo"]) == 2
    assert first.events == last.events == whole(0, 2)


def test_one_that_fails_at_the_beginning_ends_the_training_and_the_others() -> None:
    recorder = Recorder()
    logger = bk.TransformersLogger(recorder, Recorder(fails_at="train_begin"))
    with pytest.raises(OSError, match="no connection"):
        bk.SVI(2, 8).fit(posterior(), seed=0, callbacks=[logger])
    assert recorder.events == [("init_end", 0), ("train_begin", 0), ("train_end", 0)]


def test_names_and_options_are_checked_before_any_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import integrations
    from transformers.integrations import integration_utils

    for name in ("wandb", "mlflow", "trackio"):
        for module in (integrations, integration_utils):
            monkeypatch.setattr(module, f"is_{name}_available", lambda: False, raising=False)
        with pytest.raises(bk.BayesKLRLError, match=f"'{name}' needs a package.*pip install {name}"):
            bk.TransformersLogger(name)
    with pytest.raises(bk.BayesKLRLError, match=r"no logger of this name: nonsense .*wandb"):
        bk.TransformersLogger("nonsense")
    with pytest.raises(bk.BayesKLRLError, match="at least one logger"):
        bk.TransformersLogger()
    with pytest.raises(bk.BayesKLRLError, match="got 3"):
        bk.TransformersLogger(3)
    with pytest.raises(bk.BayesKLRLError, match=r"fields of transformers\.TrainingArguments.*run_nam"):
        bk.TransformersLogger(Recorder(), run_nam="first")


def scalars(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """The steps and the values of an event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found = events.Scalars(name)
    return [event.step for event in found], [event.value for event in found]


def test_tensorboard_of_transformers_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = bk.TransformersLogger("tensorboard", output_dir=str(tmp_path))
    fit = bk.SVI(4, 8).fit(posterior(bk.TorchLM(tiny_gpt2(6))), seed=0, callbacks=[logger])
    (folder,) = (tmp_path / "runs").iterdir()
    for name in NAMES - {"step_kl"}:
        steps, values = scalars(folder, f"train/{name}")
        assert steps == [1, 2, 3, 4]
        np.testing.assert_allclose(values, fit.history["kl" if name == "kl_to_prior" else name], rtol=1e-6)


def test_our_own_tensorboard_ends_its_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = bk.TensorBoard(tmp_path)
    bk.SVI(2, 8).fit(posterior(), seed=0, callbacks=[board])
    assert board._writer.all_writers is None
    bk.SVI(2, 8).fit(posterior(), seed=0, callbacks=[board])  # which opens another
    assert len(list(tmp_path.iterdir())) == 2


def test_the_effective_sample_size_is_kishs_of_each_prompt() -> None:
    from bayes_klrl.inference.svi.pyro_backend.elbo import ElboTerms
    from bayes_klrl.inference.svi.pyro_backend.training import effective_size

    weights = np.array([[1.0, 2.0], [1.0, 1.0], [1.0, 1.0]])  # (N, P)
    expected = np.mean([3.0, 16 / 6])
    log_w = torch.as_tensor(np.log(weights))
    assert np.isclose(effective_size(ElboTerms(log_w, log_w, log_w, log_w, 0)), expected)
    elsewhere = torch.tensor([[0.5, 0.25], [0.25, 0.5], [0.25, 0.25]], dtype=torch.float64)  # drawn by another policy
    corrected = ElboTerms(log_w, log_w, log_w, log_w, 0, importance=elsewhere)
    assert np.isclose(effective_size(corrected), np.mean([16 / 6, 25 / 9]))


@pytest.mark.parametrize("prior", ["table", pytest.param("jax", marks=pytest.mark.slow)])
def test_at_the_posterior_the_effective_sample_size_is_that_of_all_draws(prior: str) -> None:
    lm = COIN if prior == "table" else JaxTable(full_table(COIN, 2))
    nothing = bk.TokenReward(lambda tokens, lengths: 0.0 * lengths, alpha=1.0)
    fit = bk.SVI(1, 8).fit(bk.Posterior(lm, nothing, prompts=[[0]], max_new_tokens=4), seed=0)
    np.testing.assert_allclose(fit.history["ess"], 8, rtol=1e-5)
