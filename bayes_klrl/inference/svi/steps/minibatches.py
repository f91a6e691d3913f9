"""Minibatches of prompts: which prompts a step uses is a function of the seed and the number of the step alone.

The prompts are read in shuffled epochs. With P prompts and B of them per step, step s uses the places sB, ..., sB + B - 1 of

    pi_0 pi_1 pi_2 ...,        pi_e the permutation of epoch e, drawn from (seed, e).

So each prompt is used once in each epoch, and nothing has to be remembered to go on with a training. A block that crosses the
end of an epoch takes the beginning of the next permutation, in which the prompts that the block has already are moved behind
the block. The rule treats all prompts alike, so each set of B prompts is equally likely at each step, and a gradient that is
multiplied by P / B is unbiased.
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.checks import check_count, check_prompts_per_step
from bayes_klrl.randomness import generator
from bayes_klrl.typing import IntArray

__all__ = ["prompts_of_step"]

_STREAM = 7_012  # its own stream of the seed


def prompts_of_step(seed: int, step: int, num_prompts: int, prompts_per_step: int) -> IntArray:
    """Return the indices of the prompts of a step, shape (prompts_per_step,), ascending.

    Parameters
    ----------
    seed
        The seed of the training.
    step
        The number of the step, from 0.
    num_prompts, prompts_per_step
        P, the number of prompts, and B, how many of them each step uses.

    Examples
    --------
    Three steps of two prompts are one epoch of six:

    >>> steps = [prompts_of_step(0, step, 6, 2) for step in range(3)]
    >>> sorted(int(prompt) for chosen in steps for prompt in chosen)
    [0, 1, 2, 3, 4, 5]
    """
    check_count("step", step, least=0)
    check_prompts_per_step(prompts_per_step, num_prompts)
    epoch, place = divmod(step * prompts_per_step, num_prompts)
    block = permutation(seed, epoch, num_prompts, prompts_per_step)[place : place + prompts_per_step]
    missing = prompts_per_step - len(block)
    if missing:
        following = permutation(seed, epoch + 1, num_prompts, prompts_per_step)
        block = np.concatenate([block, following[:missing]])
    return np.sort(block)


def permutation(seed: int, epoch: int, num_prompts: int, prompts_per_step: int) -> IntArray:
    """Return the order of the prompts in an epoch: those that a crossing block has already come after that block."""

    def taken(epoch: int) -> int:
        """Return how many places of the block that crosses the epoch's beginning are before it."""
        return epoch * num_prompts % prompts_per_step

    # only the first B places of an epoch change, so the epochs before it matter for its last places where P is small alone
    first = epoch
    while taken(first) > num_prompts - prompts_per_step:
        first -= 1
    order = shuffled(seed, max(first - 1, 0), num_prompts)
    for each in range(first, epoch + 1):
        used, order = order[num_prompts - taken(each) :], shuffled(seed, each, num_prompts)
        is_new = ~np.isin(order, used)
        is_first = is_new & (is_new.cumsum() <= prompts_per_step - taken(each))
        order = np.concatenate([order[is_first], order[~is_first]])
    return order


def shuffled(seed: int, epoch: int, num_prompts: int) -> IntArray:
    """Return the permutation that is drawn from (seed, epoch)."""
    return generator(seed, _STREAM, epoch).permutation(num_prompts)
