"""Loggers: each step's values as TensorBoard events, or to any logger that `transformers` knows.

`TransformersLogger` drives the callbacks of `transformers` as its `Trainer` does: on_init_end and on_train_begin at the first
step, on_step_end and on_log after each step, on_train_end when the training ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError, needs
from bayes_klrl.inference.svi.callbacks.callbacks import StepRecord
from bayes_klrl.typing import LanguageModel

__all__ = ["TensorBoard", "TransformersLogger"]

_FOLDER = "bayes-klrl-out"


class TensorBoard:
    """Write each step's values as TensorBoard events; needs the tensorboard package (extra `tensorboard`).

    Parameters
    ----------
    folder
        The folder of the events.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> callbacks = [bk.TensorBoard("runs/first")]  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        with needs("bk.TensorBoard", "tensorboard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, record: StepRecord, guide: LanguageModel) -> None:
        """Write the values."""
        for name, value in finite(record.logged).items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file of the events; a further training opens another one in the folder."""
        self._writer.close()


class TransformersLogger:
    """Send each step's values to loggers that `transformers` knows: wandb, MLflow, Trackio, TensorBoard and others.

    The values are those of `StepRecord.logged`, in nats, under the number of steps that were taken; values that are not finite
    are left out. The recipe of the training and the guide's configuration are logged as its parameters. A training that is
    resumed goes on at the step where it was; whether it is the same run for the logger is told to the logger (for wandb by the
    environment variables WANDB_RUN_ID and WANDB_RESUME).

    Parameters
    ----------
    loggers
        Names, those of `report_to` in `transformers.TrainingArguments`, or `transformers.TrainerCallback` objects. The name
        "all" stands for every logger whose package is installed. A callback that sets `control.should_training_stop` ends the
        training.
    options
        Fields of `transformers.TrainingArguments` that loggers read: `run_name`, `project` (Trackio), or `output_dir`, under
        which TensorBoard writes its events (by default "bayes-klrl-out").

    Raises
    ------
    BayesKLRLError
        If no logger is given, if a name is unknown, if the package of a logger is missing, or if an option is none of
        `transformers.TrainingArguments`; all of this before any training.

    Examples
    --------
    With a logger by its name:

    >>> import bayes_klrl as bk
    >>> callbacks = [bk.TransformersLogger("wandb", run_name="first")]  # doctest: +SKIP

    With a callback of your own:

    >>> import numpy as np
    >>> from transformers import TrainerCallback
    >>> class Printed(TrainerCallback):
    ...     def on_log(self, args, state, control, logs=None, **kwargs):
    ...         print(state.global_step, "of", state.max_steps, "elbo" in logs)
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(2).fit(posterior, seed=0, callbacks=[bk.TransformersLogger(Printed())])
    1 of 2 True
    2 of 2 True
    """

    def __init__(self, *loggers: Any, **options: Any) -> None:
        self._callbacks = [callback for logger in loggers for callback in callbacks_of(logger)]
        if not self._callbacks:
            raise BayesKLRLError('Name at least one logger, for example bk.TransformersLogger("wandb").')
        self._options = {"output_dir": _FOLDER, **options}
        self._arguments = arguments_of(self._options)
        self._state: Any = None  # of the training that goes on; None between trainings
        self._control: Any = None
        self._models: dict[str, Any] = {}

    def __call__(self, record: StepRecord, guide: LanguageModel) -> bool:
        """Log the values of a step, and return whether a callback ends the training."""
        self._models = {"model": getattr(guide, "module", None), "processing_class": guide.tokenizer}
        if self._state is None:
            self._begin(record)
        self._state.global_step = record.step + 1
        self._send("on_step_end")
        logs = finite(record.logged)
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._send("on_log", logs=logs)
        return bool(self._control.should_training_stop)

    def close(self) -> None:
        """Tell the loggers that the training has ended, unless none has begun."""
        if self._state is None:
            return
        try:
            with ExitStack() as all_of_them:  # also those after one that raises an error
                for callback in reversed(self._callbacks):
                    all_of_them.callback(self._call, callback, "on_train_end")
        finally:
            self._state, self._models = None, {}

    def _begin(self, record: StepRecord) -> None:
        """Tell the loggers that a training begins."""
        from transformers import TrainerControl, TrainerState

        self._arguments.described = {**described(record), **plain(self._options)}
        self._arguments.max_steps = record.num_steps
        self._control = TrainerControl()
        self._state = TrainerState(global_step=record.step, max_steps=record.num_steps, logging_steps=1)
        self._send("on_init_end")
        self._send("on_train_begin")

    def _send(self, event: str, **values: Any) -> None:
        for callback in self._callbacks:
            self._call(callback, event, **values)

    def _call(self, callback: Any, event: str, **values: Any) -> None:
        """Call one callback as `transformers.Trainer` does."""
        unused = dict.fromkeys(("optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"))
        given = {**self._models, **unused, **values}
        changed = getattr(callback, event)(self._arguments, self._state, self._control, **given)
        if changed is not None:
            self._control = changed


def callbacks_of(logger: Any) -> list[Any]:
    """Return the `TrainerCallback` objects of a logger's name, or the one that is given.

    Raises
    ------
    BayesKLRLError
        If the name is unknown, or the logger's package is missing.
    """
    from transformers import TrainerCallback
    from transformers.integrations import get_reporting_integration_callbacks, is_mlflow_available

    if isinstance(logger, TrainerCallback):
        return [logger]
    if not isinstance(logger, str):
        raise BayesKLRLError(
            f'A logger is a name such as "wandb", or a transformers.TrainerCallback object; got {logger!r}.'
        )
    try:
        kinds = get_reporting_integration_callbacks(logger)
    except ValueError as error:
        raise BayesKLRLError(f"transformers knows no logger of this name: {error}") from error
    if logger == "mlflow" and not is_mlflow_available():  # half-made, its callback raises an error when it is collected
        raise BayesKLRLError("The logger 'mlflow' needs a package: pip install mlflow")
    try:
        return [kind() for kind in kinds]
    except (ImportError, RuntimeError) as error:
        raise BayesKLRLError(f"The logger {logger!r} needs a package. {error}") from error


def arguments_of(options: Mapping[str, Any]) -> Any:
    """Return `transformers.TrainingArguments` for loggers to read: with our parameters, and without a set-up of devices.

    Raises
    ------
    BayesKLRLError
        If an option is no field of theirs.
    """
    from transformers import TrainingArguments

    class Arguments(TrainingArguments):  # type: ignore[misc, unused-ignore]
        """Loggers write what `to_dict` returns. The Trainer's own learning rate and batch size would be wrong there."""

        described: Mapping[str, Any] = {}

        def __post_init__(self) -> None:
            """Do nothing: the Trainer's own set-up chooses devices, and needs the package accelerate."""

        def to_dict(self) -> dict[str, Any]:
            return dict(self.described)

        def to_sanitized_dict(self) -> dict[str, Any]:
            return self.to_dict()

    try:
        return Arguments(**{"logging_steps": 1, "report_to": "none", **options})
    except TypeError as error:
        raise BayesKLRLError(
            f"Options of TransformersLogger are fields of transformers.TrainingArguments: {error}"
        ) from error


def described(record: StepRecord) -> dict[str, Any]:
    """Return the parameters of a training: the fields of its recipe, and the numbers of its posterior."""
    posterior, recipe = record.posterior, record.recipe
    entries = {each.name: getattr(recipe, each.name) for each in fields(recipe)} if is_dataclass(recipe) else {}
    numbers = {
        "num_steps": record.num_steps,
        "alpha": posterior.alpha,
        "num_prompts": posterior.num_prompts,
        "max_new_tokens": posterior.max_new_tokens,
    }
    return {**plain(entries), **numbers}


def plain(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries of which all but numbers and texts are replaced by their description."""
    return {
        name: value if value is None or isinstance(value, bool | int | float | str) else repr(value)
        for name, value in entries.items()
    }


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return the finite values, as floats."""
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}
