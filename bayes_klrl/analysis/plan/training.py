"""The tokens of what is fitted before anything is drawn: a guide by SVI, and twists.

    a step of SVI            3 (P N T + sum of prompt lengths)    tokens: drawn once and scored twice
    a step of LearnedTwist   drawn once and scored once, half of the draws from the twisted prior

A pilot, of a critic, an optimizer or a twist, is drawn from the prior once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bayes_klrl.analysis.plan.setting import Setting, Work
from bayes_klrl.inference.svi.objectives import ELBO, objective_of
from bayes_klrl.inference.svi.objectives.regressions import NUM_PILOT
from bayes_klrl.inference.svi.optimizers import KLSGD, optimizer_of
from bayes_klrl.inference.svi.pyro_backend.training import USES_FROM, default_optimizer
from bayes_klrl.inference.svi.svi import SVI
from bayes_klrl.inference.twists.distilled import DistilledTwist
from bayes_klrl.inference.twists.learned import LearnedTwist
from bayes_klrl.inference.twists.training import CALIBRATION_DRAWS, PILOT_DRAWS
from bayes_klrl.models.twists.simple import PartialRewardTwist

__all__ = ["training_work", "twist_tokens"]


def training_work(recipe: SVI, setting: Setting) -> Work:
    """Return the work of a training; its draws are counted by the caller."""
    lengths, num_tokens = setting.lengths, setting.posterior.max_new_tokens
    prompts = recipe.prompts_per_step or len(lengths)
    rows = prompts * recipe.num_particles
    read = prompts * float(np.mean(lengths))
    each_step = rows * num_tokens + read
    pilots, notes = _pilots(recipe, setting, each_step)
    chosen = sorted(lengths, reverse=True)[:prompts]
    split = setting.parts(chosen, recipe.num_particles)
    decoded = max(part.prompts.size * (part.last - part.first) for part in split)
    backward = prompts * min(recipe.num_particles, recipe.particles_per_pass or recipe.num_particles)
    return Work(
        0,
        round(recipe.num_steps * 3 * each_step) + pilots,
        decoded,
        2,
        step_rows=rows,
        rows_per_backward=backward,
        training=recipe,
        notes=notes,
        is_bound=not notes,
    )


def twist_tokens(twist: Any, setting: Setting) -> int | None:
    """Return the tokens of fitting a twist, 0 for one that is fitted; None if they are not known."""
    if isinstance(twist, PartialRewardTwist):
        return setting.pilot_tokens(twist.num_pilot)
    if isinstance(twist, DistilledTwist):
        return setting.decoding(twist.num_draws).tokens
    if isinstance(twist, LearnedTwist):
        num, num_prompts, read = twist.num_draws, len(setting.lengths), sum(setting.lengths)
        steps = twist.num_steps + -(-CALIBRATION_DRAWS // num)
        scored = num_prompts * num * setting.posterior.max_new_tokens + num * read
        return setting.pilot_tokens(PILOT_DRAWS) + steps * (2 * setting.pilot_tokens(num // 2) + scored)
    return None if hasattr(twist, "fit") and not callable(twist) else 0


def _pilots(recipe: SVI, setting: Setting, each_step: float) -> tuple[int, tuple[str, ...]]:
    """Return what critic and optimizer read besides the steps' own draws, and notes on what is not known of it."""
    optimizer = optimizer_of(recipe.optimizer or default_optimizer(recipe, setting.posterior.prior))
    objective, twist = objective_of(recipe.objective), recipe.twist
    uses_kl_sgd = isinstance(optimizer, KLSGD)
    if twist is None and uses_kl_sgd and isinstance(objective, ELBO):
        twist = PartialRewardTwist()  # the default critic, if rewards of prefixes are quick
    tokens, notes = 0, tuple[str, ...]()
    if isinstance(twist, PartialRewardTwist) or twist == "hidden_states":
        tokens += setting.pilot_tokens(setting.shared(NUM_PILOT))
        if twist == "hidden_states":  # the prior reads every draw for them
            tokens += round((recipe.num_steps + 2) * each_step) + setting.shared(NUM_PILOT) * sum(setting.lengths)
    elif twist is not None and twist != "none":
        fitting = twist_tokens(twist, setting)
        tokens += fitting or 0
        notes += () if fitting is not None else ("fitting the critic is not counted",)
    if isinstance(optimizer, KLSGD) and optimizer.frequency_scaling:
        tokens += setting.pilot_tokens(max(2, USES_FROM // len(setting.lengths)))
    if getattr(objective, "sampler", None) is not None:
        notes += ("what the sampler of the objective draws is not counted",)
    return tokens, notes
