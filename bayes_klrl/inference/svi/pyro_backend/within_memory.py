"""A step's gradient where the memory of a device runs out: the same draws, of which fewer are differentiated at once.

A chunk of completions stores activations for itself alone (`models/torch_lm/scoring.py`), so that half as large chunks take
half of the memory, and have the same gradient up to rounding. The step begins again with the random numbers and with what
critic and loss had learned before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bayes_klrl.errors import DeviceMemoryError
from bayes_klrl.models.out_of_memory import CURES, attempted, is_out_of_memory

__all__ = ["gradient_within_memory", "optimizer_within_memory"]


def gradient_within_memory(
    compute: Callable[[], Any], guide: Any, parameters: Sequence[torch.Tensor], learners: Sequence[Any], num_rows: int
) -> None:
    """Add the gradient of a step to the parameters', which is computed again in smaller chunks if memory runs out.

    Parameters
    ----------
    compute
        A function that draws and adds the gradient.
    guide
        The guide; if it cannot be scored in chunks, the error of the device is raised as it is.
    parameters
        The parameters, whose gradients are None before.
    learners
        What learns while a step is computed, the critic and the loss; those with `state` and `load_state` are put back.
    num_rows
        The number of completions of a step, over all prompts.

    Raises
    ------
    DeviceMemoryError
        If memory runs out for one completion at a time.
    """
    halve = getattr(guide, "halve_scored", None)
    if halve is None:
        compute()
        return
    learners = [learner for learner in learners if hasattr(learner, "load_state")]
    while True:
        random, before = torch.get_rng_state(), [copied(learner.state()) for learner in learners]
        if attempted(lambda _: compute(), None):
            return
        halve(num_rows, gradient=True)
        torch.set_rng_state(random)
        for learner, state in zip(learners, before, strict=True):
            learner.load_state(state)
        for parameter in parameters:
            parameter.grad = None


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose arrays are copies, as NumPy, which is what a checkpoint is restored from."""
    return {name: torch.as_tensor(value).detach().cpu().numpy().copy() for name, value in state.items()}


@contextmanager
def optimizer_within_memory() -> Iterator[None]:
    """Turn the device's error inside of an optimizer's step, which cannot be divided, into one that says what to do."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            "The memory of the device ran out in the optimizer's step, which holds numbers for each parameter. Train an "
            f"adapter (SVI(adapter='lora')). {CURES}"
        ) from error
