"""The training of `SVI` on torch: a Pyro model, a Pyro guide, a loss and an optimizer."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pyro
import torch

from bayes_klrl.arrays import to_host
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.inference.svi.loop import Habits, TrainingPlan, trained
from bayes_klrl.inference.svi.objectives import ELBO, LossObjective, objective_of
from bayes_klrl.inference.svi.objectives.critics import TwistCritic
from bayes_klrl.inference.svi.objectives.regressions import PrefixRewardCritic, critic_of
from bayes_klrl.inference.svi.optimizers import KLSGD, Natural, optimizer_of
from bayes_klrl.inference.svi.pyro_backend.elbo import ElboTerms, LeaveOneOutELBO, RaoBlackwellELBO
from bayes_klrl.inference.svi.pyro_backend.loss_elbo import LossELBO
from bayes_klrl.inference.svi.pyro_backend.optimizers import AdamSteps, MomentumSteps, embedding_rows
from bayes_klrl.inference.svi.pyro_backend.over_ranks.rows import SharedLM, SharedPosterior
from bayes_klrl.inference.svi.pyro_backend.over_ranks.spread import (
    SpreadLM,
    spread_like,
    whole_tensor,
    write_whole_guide,
)
from bayes_klrl.inference.svi.pyro_backend.sampled import SampledForwardKL
from bayes_klrl.inference.svi.pyro_backend.scores import ScoreELBO
from bayes_klrl.inference.svi.pyro_backend.within_memory import gradient_within_memory, optimizer_within_memory
from bayes_klrl.inference.svi.ranks.group import ALONE, Ranks
from bayes_klrl.inference.svi.refusals import no_adapter
from bayes_klrl.inference.svi.steps.minibatches import prompts_of_step
from bayes_klrl.models.decoding import check_shares_vocabulary
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.models.programs.pyro_program import on_model_device, pyro_guide, pyro_model
from bayes_klrl.models.programs.turns import PYRO_TURN, in_turn
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.models.twists.simple import prior_pilot
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams, check_seed
from bayes_klrl.typing import LanguageModel
from bayes_klrl.weights import effective_sample_size

__all__ = ["USES_FROM", "TorchTraining", "fit_guide", "trainable_guide"]

_ELBOS = {"leave_one_out": LeaveOneOutELBO, "rao_blackwell": RaoBlackwellELBO}
USES_FROM = 128
_NO_MATTER = 0.5  # seconds
_MOST_OF_PREFIXES = 6.0  # a step of a small model takes about six times as long as its draws

LARGE = 200_000
"""Number of parameters of a transformer from which "kl_sgd" is the default."""


@in_turn(PYRO_TURN)
def fit_guide(plan: TrainingPlan, posterior: Posterior, habits: Habits, *, seed: int, progress: bool) -> Fit:
    """Return the guide after `plan.num_steps` steps; see `SVI.fit`."""
    start = time.perf_counter()
    with (
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        pyro.get_param_store().scope(),
        on_model_device(posterior.prior),
    ):
        torch.manual_seed(check_seed(seed))
        training = TorchTraining(plan, posterior, seed, habits.ranks)
        return trained(plan, posterior, training, habits, start=start, progress=progress)


class TorchTraining:
    """One training on torch, step by step; Pyro runs the programs.

    Parameters
    ----------
    plan, posterior
        The numbers of the training, and the posterior that the guide approximates.
    seed
        Seed for the critic's own draws and for the prompts of each step. All other random numbers come from torch's generator.
    ranks
        The group of processes that train together; `over_ranks.rows` says who computes which completions.
    """

    def __init__(self, plan: TrainingPlan, posterior: Posterior, seed: int, ranks: Ranks = ALONE) -> None:
        self.posterior, self.seed, self.ranks = posterior, seed, ranks
        self._prompts_per_step, self._discount = plan.prompts_per_step, plan.discount
        self._num_particles = plan.num_particles
        self.guide = starting_guide(plan, posterior)
        ranks.follow_first(parameters_of(self.guide))
        self._policy = shared_lm(self.guide, ranks)
        self._prior = shared_lm(posterior.prior, ranks)
        # the guide, or its copy that is spread over the ranks
        self._trained: Any = self._policy.whole if isinstance(self._policy, SharedLM) else self.guide
        self.parameters = parameters_of(self._trained)
        self._target = self._shared(posterior)
        self._recomputing = recomputation_of(plan, self._trained, posterior.prior)
        self.model = pyro_model(self._target, plan.prompts_per_step)
        optimizer = optimizer_of(plan.optimizer or default_optimizer(plan, self.guide))
        self.critic = critic_for(plan, optimizer, self._target, seed, ranks)
        self.objective = objective_of(plan.objective)
        self.elbo = self._loss(plan)
        drawn_by = self._target.prior if getattr(self.elbo, "from_prior", False) else None
        self.program = pyro_guide(self._target, self._policy, plan.prompts_per_step, drawn_by)
        self.steps = steps_of(plan, optimizer, self._trained, self.parameters, self.elbo, self._target)
        # what critic and optimizer have read before the first step
        self._tokens_before = sum(
            int(getattr(part, "model_tokens", 0)) for part in (self.critic, self.steps, self.elbo)
        )

    def _shared(self, posterior: Posterior) -> Posterior:
        """Return a posterior whose rows the ranks compute together; in a group of one, the posterior itself."""
        return posterior if self.ranks.size == 1 else SharedPosterior(posterior, self.ranks, self._prior)

    def _loss(self, plan: TrainingPlan) -> Any:
        """Return the loss of a step: a trainer's own, one on a sampler's draws, or one on the guide's."""
        if isinstance(self.objective, LossObjective):
            return LossELBO(plan.num_particles, self.objective.loss, lambda: self.posterior.alpha)
        sampler = getattr(self.objective, "sampler", None)
        if sampler is not None:
            in_parts = plan.prompts_per_step is not None
            return SampledForwardKL(sampler, self._policy, lambda: self._target, seed=self.seed, in_parts=in_parts)
        loss = loss_of(plan, self.critic, lambda: self.posterior.alpha, self.ranks)
        if isinstance(getattr(self.objective, "replay", 0), Draws):
            loss.replay.fill(self._target, self.objective.replay)
        return loss

    def step(self, number: int) -> dict[str, float]:
        """See `Training.step`."""
        prompts = self.prompts_of(number)
        if self.ranks.size > 1:  # a callback on rank 0 may have drawn from it
            torch.set_rng_state(self.ranks.of_first(torch.get_rng_state()))
        for parameter in self.parameters:
            parameter.grad = None
        if self.steps.needs_gradient:
            self._add_gradient(prompts)
            self.ranks.sum_gradients(self.parameters)
        else:
            self.elbo.loss(self.model, self.program, *prompts)
        terms = self.elbo.last
        check_finite_weights(
            terms.log_weights, self.posterior, zero=bool(getattr(self.objective, "zero_likelihood", False))
        )
        with optimizer_within_memory():
            taken = self.steps.step(terms.log_weights)
        tokens = terms.model_tokens + self._tokens_before
        self._tokens_before = 0
        return {
            "elbo": terms.mean(terms.log_weights),
            "reward": terms.mean(terms.log_likelihood) * self.posterior.alpha,
            "kl": terms.kl,
            "log_weight_sd": terms.log_weight_sd,
            "ess": effective_size(terms),
            **taken,
            "tokens": tokens,
        }

    def _add_gradient(self, prompts: tuple[torch.Tensor, ...]) -> None:
        """Draw, and add the gradient of the loss; in smaller chunks if the memory of the device runs out."""

        def compute() -> None:
            with self._recomputing():
                self.elbo.loss_and_grads(self.model, self.program, *prompts)

        if self.ranks.size > 1:  # the others would wait for this rank's second try
            compute()
            return
        num_rows = self._num_particles * (self._prompts_per_step or self.posterior.num_prompts)
        gradient_within_memory(compute, self.guide, self.parameters, (self.critic, self.elbo), num_rows)

    def prompts_of(self, number: int) -> tuple[torch.Tensor, ...]:
        """Return the argument of the programs that chooses a step's prompts; none where all are used."""
        size = self._prompts_per_step
        if size is None:
            return ()
        return (torch.as_tensor(prompts_of_step(self.seed, number, self.posterior.num_prompts, size)),)

    def aim_at(self, posterior: Posterior) -> None:
        """See `Training.aim_at`. A critic that learns keeps its features, and learns the new values as it goes."""
        if posterior is not self.posterior:
            if isinstance(self.critic, TwistCritic) and self._discount < 1:
                raise BayesKLRLError(
                    "A fixed twist is the critic of one alpha, and alpha is to change: with discount < 1 its guide would be "
                    "of no posterior. Take discount=1, or a critic that learns, such as twist=bk.PartialRewardTwist()."
                )
            self.posterior, self._target = posterior, self._shared(posterior)
            self.model = pyro_model(self._target, self._prompts_per_step)
            self.steps.forget_draws()

    def guide_so_far(self) -> LanguageModel:
        """See `Training.guide_so_far`. All ranks call it together where parameters are spread."""
        if self.ranks.spreads:
            write_whole_guide(self.parameters, parameters_of(self.guide))
        return self.guide.to_ngram() if isinstance(self.guide, TableLM) else self.guide

    def saved(self) -> dict[str, torch.Tensor]:
        """See `Training.saved`."""
        found = {f"guide.{i}": whole_tensor(parameter.detach()) for i, parameter in enumerate(self.parameters)}
        found |= {f"optimizer.{name}": value for name, value in self.steps.state().items()}
        for owner, name in ((self.critic, "critic"), (self.elbo, "loss")):
            if hasattr(owner, "state"):
                found |= {f"{name}.{key}": torch.as_tensor(value) for key, value in owner.state().items()}
        return found | {"random": torch.get_rng_state()}

    def restore(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """See `Training.restore`."""
        if bool(_part(arrays, "critic.")) != hasattr(self.critic, "state"):
            raise CheckpointError(
                "The checkpoint's training and this one differ in their critic, which the time of the reward decided. Say in "
                "both which one you want: SVI(twist=bk.PartialRewardTwist()) or SVI(twist='none')."
            )
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(spread_like(arrays[f"guide.{i}"], parameter))
        self.steps.load_state(_part(arrays, "optimizer."))
        for owner, name in ((self.critic, "critic."), (self.elbo, "loss.")):
            if hasattr(owner, "load_state"):
                owner.load_state({key: value.cpu().numpy() for key, value in _part(arrays, name).items()})
        self._tokens_before = 0
        torch.set_rng_state(arrays["random"].cpu())


def parameters_of(guide: Any) -> list[torch.Tensor]:
    """Return the parameters of a guide that are trained."""
    return [parameter for parameter in guide.parameters() if parameter.requires_grad]


def shared_lm(lm: Any, ranks: Ranks) -> Any:
    """Return a model as the ranks share it, each with a copy or with a part of it; in a group of one, the model itself."""
    if ranks.size == 1:
        return lm
    return SpreadLM(lm, ranks) if ranks.spreads else SharedLM(lm, ranks)


def effective_size(terms: ElboTerms) -> float:
    """Return the effective sample size of a step's draws for the posterior, a mean over prompts."""
    log_weights = terms.log_weights
    if terms.importance is not None:
        log_weights = log_weights + terms.importance.log()
    return float(effective_sample_size(to_host(log_weights).T).mean())


def _part(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the entries whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def loss_of(plan: TrainingPlan, critic: Any, alpha: Callable[[], float] = lambda: 1.0, ranks: Ranks = ALONE) -> Any:
    """Return the loss of the guide's own draws: those of whole completions for the plain ELBO, else the one of scores."""
    objective = objective_of(plan.objective)
    if isinstance(objective, ELBO) and critic is None and plan.particles_per_pass is None:
        return _ELBOS[plan.estimator](plan.num_particles)
    # a pass is shared by the ranks, and the bound is one for each of them
    per_pass = None if plan.particles_per_pass is None else plan.particles_per_pass * ranks.size
    return ScoreELBO(plan.num_particles, objective, critic, plan.discount, per_pass, alpha)


def default_optimizer(plan: TrainingPlan, guide: Any) -> str:
    """Return the name of the optimizer that is measured to be the better one for this kind of guide."""
    plain = isinstance(objective_of(plan.objective), ELBO) and plan.estimator == "leave_one_out"
    module = getattr(guide, "module", None)
    is_large = module is not None and sum(parameter.numel() for parameter in module.parameters()) >= LARGE
    return "kl_sgd" if plain and is_large and plan.learning_rate is None else "adam"


def critic_for(plan: TrainingPlan, optimizer: Any, posterior: Posterior, seed: int, ranks: Ranks = ALONE) -> Any:
    """Return the critic that is asked for, or by default the one of rewards of prefixes; None for none.

    Where these rewards would take much longer than the draws, there is none: a head on hidden states is measured to be no
    better than that on the shipped model (`benchmarks/bench_posterior.py "hidden states"`).
    """
    if plan.twist is not None:
        return None if plan.twist == "none" else critic_of(plan.twist, posterior, seed)
    if not isinstance(optimizer, KLSGD) or not isinstance(objective_of(plan.objective), ELBO):
        return None
    critic = PrefixRewardCritic(posterior, seed, forgiving=True)  # it was not asked for
    seconds = critic.seconds_of_prefixes
    share = seconds / max(critic.seconds_of_draws, 1e-9)
    if ranks.of_first(share > _MOST_OF_PREFIXES and seconds > _NO_MATTER):  # times differ, and ranks must agree
        warnings.warn(
            f"Rewards of prefixes would take {share:.0f} times as long as drawing the completions, so there is no critic. "
            "SVI(twist=bk.PartialRewardTwist()) has one all the same; twist='hidden_states' or 'none' says what is wanted.",
            stacklevel=2,
        )
        return None
    return critic


def steps_of(
    plan: TrainingPlan, recipe: Any, guide: Any, parameters: list[torch.Tensor], elbo: Any, posterior: Posterior
) -> Any:
    """Return the optimizer at work on a guide."""
    if isinstance(recipe, KLSGD):
        uses, model_tokens = token_uses(posterior) if recipe.frequency_scaling else (None, 0)
        scales = None if uses is None else embedding_rows(guide, parameters, uses)
        return MomentumSteps(recipe, plan.num_steps, parameters, elbo.guide_change, scales, model_tokens)
    if isinstance(recipe, Natural):
        from bayes_klrl.inference.svi.pyro_backend.natural_gradient.steps import NaturalSteps  # with transformers

        return NaturalSteps(recipe, guide, elbo, same_prompts=plan.prompts_per_step is None)
    rate = plan.learning_rate or default_learning_rate(plan, guide)
    return AdamSteps(parameters, rate, plan.num_steps, plan.max_step_kl, elbo.guide_change)


def token_uses(posterior: Posterior) -> tuple[torch.Tensor, int]:
    """Return the mean number of uses of each token in a completion of the prior, (V,), and the tokens of finding out."""
    pilot, _ = prior_pilot(posterior, max(2, USES_FROM // posterior.num_prompts), Streams.of(0, USES_FROM))
    inside = np.arange(pilot.tokens.shape[1]) < pilot.lengths[:, None]
    counts = np.bincount(pilot.tokens[inside], minlength=posterior.prior.vocab_size)
    return torch.as_tensor(counts / len(pilot.tokens), dtype=torch.float32), pilot.model_tokens


def starting_guide(plan: TrainingPlan, posterior: Posterior) -> Any:
    """Return the trainable model that the training starts from: the prior's copy, or that of another policy."""
    if plan.initial_guide is None:
        return trainable_guide(posterior.prior, plan.adapter)
    start = getattr(plan.initial_guide, "guide", plan.initial_guide)  # of a Fit
    if not hasattr(start, "token_log_probs"):
        raise BayesKLRLError(
            f"initial_guide is a language model, or a Fit whose guide it is; got {plan.initial_guide!r}. Of a folder give "
            "bk.TorchLM.from_pretrained(folder)."
        )
    guide = trainable_guide(start, plan.adapter)
    check_shares_vocabulary("initial_guide", guide, posterior.prior)
    module: Any = getattr(start, "module", None)
    if plan.adapter is None and hasattr(module, "peft_config"):  # go on with its adapter; its base stays as it is
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        for name, parameter in guide.module.named_parameters() if trained else ():
            parameter.requires_grad_(name in trained)
    return guide


def recomputation_of(
    plan: TrainingPlan, guide: Any, prior: LanguageModel
) -> Callable[[], AbstractContextManager[None]]:
    """Return the context in which a step's gradient is computed: with gradient checkpointing, or without."""
    if not plan.gradient_checkpointing:
        return nullcontext
    if not hasattr(guide, "recomputing"):
        from bayes_klrl.models.torch_lm.general.blocks import cannot_recompute

        raise cannot_recompute(prior)
    with guide.recomputing():  # refused here, before any work
        found: Callable[[], AbstractContextManager[None]] = guide.recomputing
    return found


def check_finite_weights(log_weights: torch.Tensor, posterior: Posterior, *, zero: bool = False) -> None:
    """Refuse to go on once the guide's log-probs are NaN; log-weights of -inf are allowed if likelihoods may be 0."""
    if not (torch.isfinite(log_weights) | (torch.isneginf(log_weights) & zero)).all():
        half = getattr(posterior.prior, "half_precision", False)
        cure = (
            "Load the prior in float32: its weights have fewer bits." if half else "Lower learning_rate or max_step_kl."
        )
        raise BayesKLRLError(f"The guide's log-probs are no longer finite, so the training has diverged. {cure}")


def default_learning_rate(plan: TrainingPlan, guide: Any) -> float:
    """Return the default learning rate for the kind of guide: a table of logits, adapters, or all weights of a transformer."""
    if isinstance(guide, TableLM):
        return 0.1
    return 2e-3 if plan.adapter is None else 5e-3


def trainable_guide(prior: LanguageModel, adapter: Any) -> Any:
    """Return a trainable model that starts as the prior.

    An `NgramLM` becomes a torch table of logits; a `TorchLM` a copy of itself, or with `adapter` LoRA layers over its
    own frozen weights; any other model with torch parameters is copied.
    """
    if isinstance(prior, NgramLM):
        guide: Any = TableLM(prior)
    elif hasattr(prior, "with_adapter"):
        return prior.copy() if adapter is None else prior.with_adapter(adapter)  # type: ignore[attr-defined]
    elif hasattr(prior, "parameters"):
        guide = copy.deepcopy(prior)
        for parameter in guide.parameters():
            parameter.requires_grad_(True)
    else:
        raise BayesKLRLError(
            f"SVI needs a prior with torch parameters (a bk.TorchLM, a bk.NgramLM, or a language model with a "
            f"`parameters()` method); got a {type(prior).__name__}."
        )
    no_adapter(prior, adapter)
    return guide
