"""One algorithm on many prompts as several tasks, and their draws as one answer again.

An algorithm whose draws of a prompt do not depend on the other prompts says so by `rows_per_prompt`, the number of completions
per prompt that it decodes at once. Its prompts are then run in blocks of about as many completions as sampling decodes at
once, so that little is lost by the split. Equal prompts are told apart by their order (`randomness.prompt_keys`) and stay in
one block. All other algorithms are one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, BudgetError
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.prompts.decoder import PromptDecoder
from bayes_klrl.prompts.part import PosteriorPart
from bayes_klrl.runners.runner import Outcome, Runner, Task, outcomes_of
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import Algorithm, IntArray

__all__ = ["answer_of", "block_tasks", "joined_draws", "prompt_parts", "run_in_blocks"]

ROWS_PER_TASK = 512
"""About how many completions, over all prompts, one task decodes at once: as many as sampling does."""

_PER_DRAW = ("chain",)  # entries of `Draws.info` that say something of draws, the same for all prompts
_PER_DRAW_FIELDS = ("tokens", "lengths", "reward", "log_prior", "log_likelihood", "log_proposal", "log_weights")
_PER_PROMPT_FIELDS = ("log_evidence", "log_evidence_se", "elbo", "ess", "pareto_k")


def prompt_parts(prompt_ids: Sequence[Sequence[int]], rows_per_prompt: int | None) -> list[IntArray]:
    """Return the indices of the prompts of each task, each ascending; one part of all of them if they may not be split.

    Parts are as equal as can be: prompts of one length cost the same.

    Examples
    --------
    >>> [part.tolist() for part in prompt_parts([(1,), (2,), (1,), (3,)], 256)]
    [[0, 2], [1, 3]]
    >>> [part.tolist() for part in prompt_parts([(1,), (2,), (3,), (4,)], 64)]
    [[0, 1, 2, 3]]
    """
    num_prompts = len(prompt_ids)
    num_parts = 1 if rows_per_prompt is None else -(-num_prompts * rows_per_prompt // ROWS_PER_TASK)
    if min(num_parts, num_prompts) <= 1:
        return [np.arange(num_prompts)]
    copies: dict[tuple[int, ...], list[int]] = {}
    for p, ids in enumerate(prompt_ids):
        copies.setdefault(tuple(ids), []).append(p)
    size = max(1, ROWS_PER_TASK // int(rows_per_prompt or 1))
    size = -(-num_prompts // -(-num_prompts // size))  # as equal as can be
    parts: list[list[int]] = [[]]
    for equal in copies.values():
        if parts[-1] and len(parts[-1]) + len(equal) > size:
            parts.append([])
        parts[-1] += equal
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def block_tasks(
    name: str, algorithm: Algorithm, posterior: Posterior, seed: int, shared: tuple[Any, ...] = ()
) -> list[Task]:
    """Return the tasks that together are `algorithm.run(posterior, seed=seed)`."""
    parts = prompt_parts(posterior.prompt_ids, getattr(algorithm, "rows_per_prompt", None))
    wholes = parts if len(parts) > 1 else [None]
    known = (posterior, posterior.prior, *shared)
    return [Task(name, _run_block, (algorithm, posterior, part, seed), known) for part in wholes]


def _run_block(
    algorithm: Algorithm, posterior: Posterior, prompts: IntArray | None, seed: int, *, progress: bool
) -> Draws:
    """Return the draws of some prompts, or of all."""
    part = posterior if prompts is None else PosteriorPart(posterior, prompts)
    return algorithm.run(part, seed=seed, progress=progress)


def answer_of(
    posterior: Posterior, tasks: Sequence[Task], outcomes: Sequence[Outcome]
) -> tuple[Draws | None, BayesKLRLError | None]:
    """Return the draws of the blocks of one algorithm as one, and the error that ended one of them, if any.

    A `BudgetError` carries draws: all blocks are then cut to as many draws per prompt as each of them has, as they would be in
    one run. Other errors leave no draws.
    """
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    other = next((error for error in errors if not isinstance(error, BudgetError)), None)
    if other is not None:
        assert isinstance(other, BayesKLRLError), "outcomes_of raises all others"
        return None, other
    found: list[Any] = [
        outcome.error.draws if isinstance(outcome.error, BudgetError) else outcome.value for outcome in outcomes
    ]
    if len(tasks) == 1:
        return found[0], errors[0] if errors else None  # type: ignore[return-value]
    if not errors:
        return joined_draws(posterior, [task.arguments[2] for task in tasks], found), None
    num_drawn = [0 if draws is None else draws.shape[1] for draws in found]
    worst = min((i for i, each in enumerate(outcomes) if each.error is not None), key=lambda i: num_drawn[i])
    error = outcomes[worst].error
    assert isinstance(error, BudgetError)
    least = min(num_drawn)
    draws = None
    if least:
        cut = [draws if draws.shape[1] == least else _first_draws(draws, least) for draws in found]
        draws = joined_draws(posterior, [task.arguments[2] for task in tasks], cut)
    return draws, BudgetError(str(error), draws)


def run_in_blocks(
    runner: Runner,
    algorithm: Algorithm,
    posterior: Posterior,
    *,
    seed: int,
    progress: bool,
    name: str,
    shared: tuple[Any, ...] = (),
) -> Draws:
    """Return the draws of one algorithm, its prompts spread over the runner's workers; `shared` is that of `Task`.

    Raises
    ------
    BayesKLRLError
        What the algorithm raises.
    """
    tasks = block_tasks(name, algorithm, posterior, seed, shared)
    with track(name, len(tasks), progress and len(tasks) > 1) as advance:
        outcomes = outcomes_of(runner, tasks, progress=progress and len(tasks) == 1, advance=advance)
    draws, error = answer_of(posterior, tasks, outcomes)
    if error is not None:
        raise error
    assert draws is not None
    return draws


def joined_draws(posterior: Posterior, parts: Sequence[IntArray], draws: Sequence[Draws]) -> Draws:
    """Return the draws of parts of the prompts as draws of the whole posterior; costs are added up.

    Parameters
    ----------
    posterior
        The whole posterior.
    parts, draws
        The indices of the prompts of each part, and its draws, the same number per prompt in all parts.
    """
    order = np.argsort(np.concatenate(parts), kind="stable")

    def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        whole: np.ndarray = np.concatenate(arrays)[order]
        return whole

    info: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for each in draws for name in each.info):
        if name in _PER_DRAW:
            info[name] = draws[0].info[name]
        else:  # a part in which there was nothing to say has NaN
            info[name] = joined([each.info.get(name, np.full(each.shape[0], np.nan)) for each in draws])
    arrays: dict[str, Any] = {
        name: joined([getattr(each, name) for each in draws]) for name in (*_PER_DRAW_FIELDS, *_PER_PROMPT_FIELDS)
    }
    return replace(
        draws[0],
        **arrays,
        prompts=posterior.prompts,
        cost=sum((each.cost for each in draws), Cost()),
        info=info,
        decoder=PromptDecoder.of(posterior.prior, posterior.prompt_ids),
    )


def _first_draws(draws: Draws, num: int) -> Draws:
    """Return the first draws of each prompt, equally weighted ones without summaries."""
    sequences = Sequences(draws.tokens[:, :num], draws.lengths[:, :num])
    arrays = {name: getattr(draws, name)[:, :num] for name in _PER_DRAW_FIELDS[2:]}
    return replace(draws, tokens=sequences.tokens, lengths=sequences.lengths, **arrays)
