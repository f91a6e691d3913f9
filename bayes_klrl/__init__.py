"""KL-regularised reinforcement learning of language models, as the Bayesian inference that it is.

prior x exp(reward / alpha) / evidence: see `Posterior` for the model, `SVI`, `SMC`, `AnnealedSMC`, `SuffixMH`,
`ImportanceSampling`, `RejectionSampling`, `QuasiRejection`, `BestOfN` and `Exact` for the algorithms, `compare` for all of
them side by side. Names are loaded when first used, so that importing the package loads neither torch nor transformers nor
arviz.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayes_klrl.certificate import Certificate as Certificate
    from bayes_klrl.certificate import certify as certify
    from bayes_klrl.comparison import Comparison as Comparison
    from bayes_klrl.comparison import compare as compare
    from bayes_klrl.contract import check_posterior as check_posterior
    from bayes_klrl.draws import Draws as Draws
    from bayes_klrl.errors import BayesKLRLError as BayesKLRLError
    from bayes_klrl.errors import BudgetError as BudgetError
    from bayes_klrl.errors import CheckpointError as CheckpointError
    from bayes_klrl.errors import ConvergenceError as ConvergenceError
    from bayes_klrl.errors import RewardError as RewardError
    from bayes_klrl.errors import SupportError as SupportError
    from bayes_klrl.errors import TextRewardError as TextRewardError
    from bayes_klrl.errors import UnboundedLossError as UnboundedLossError
    from bayes_klrl.inference.annealing import AnnealedSMC as AnnealedSMC
    from bayes_klrl.inference.bayesian_svi import BayesianFit as BayesianFit
    from bayes_klrl.inference.bayesian_svi import BayesianSVI as BayesianSVI
    from bayes_klrl.inference.best_of_n import BestOfN as BestOfN
    from bayes_klrl.inference.conditional_smc import ConditionalSMC as ConditionalSMC
    from bayes_klrl.inference.distilled_twist import DistilledTwist as DistilledTwist
    from bayes_klrl.inference.exact import Exact as Exact
    from bayes_klrl.inference.importance import ImportanceSampling as ImportanceSampling
    from bayes_klrl.inference.learned_twist import LearnedTwist as LearnedTwist
    from bayes_klrl.inference.mcmc import SuffixMH as SuffixMH
    from bayes_klrl.inference.oracles import myopic_policy as myopic_policy
    from bayes_klrl.inference.oracles import posterior_policy as posterior_policy
    from bayes_klrl.inference.quasi_rejection import QuasiRejection as QuasiRejection
    from bayes_klrl.inference.rejection import RejectionSampling as RejectionSampling
    from bayes_klrl.inference.reward_ensemble import EnsembleReward as EnsembleReward
    from bayes_klrl.inference.reward_model import RewardModel as RewardModel
    from bayes_klrl.inference.smc import SMC as SMC
    from bayes_klrl.inference.svi import SVI as SVI
    from bayes_klrl.inference.svi import Fit as Fit
    from bayes_klrl.likelihood import Constraint as Constraint
    from bayes_klrl.likelihood import Likelihood as Likelihood
    from bayes_klrl.likelihood import Reward as Reward
    from bayes_klrl.likelihood import TokenReward as TokenReward
    from bayes_klrl.models.automaton import Automaton as Automaton
    from bayes_klrl.models.automaton_reward import AutomatonConstraint as AutomatonConstraint
    from bayes_klrl.models.automaton_reward import AutomatonReward as AutomatonReward
    from bayes_klrl.models.hmm_lm import HmmLM as HmmLM
    from bayes_klrl.models.jax_lm import JaxLM as JaxLM
    from bayes_klrl.models.mixture_lm import MixtureLM as MixtureLM
    from bayes_klrl.models.ngram_lm import NgramLM as NgramLM
    from bayes_klrl.models.preferences import Preferences as Preferences
    from bayes_klrl.models.preferences import Scores as Scores
    from bayes_klrl.models.reward_features import HiddenStates as HiddenStates
    from bayes_klrl.models.reward_features import TokenFeatures as TokenFeatures
    from bayes_klrl.models.reward_posterior import RewardPosterior as RewardPosterior
    from bayes_klrl.models.torch_lm import TorchLM as TorchLM
    from bayes_klrl.models.torch_losses import LossInputs as LossInputs
    from bayes_klrl.models.twist import PartialRewardTwist as PartialRewardTwist
    from bayes_klrl.models.twist_counting import CountingTwist as CountingTwist
    from bayes_klrl.models.twisted_lm import TwistedLM as TwistedLM
    from bayes_klrl.moment_constraints import MomentConstraint as MomentConstraint
    from bayes_klrl.moment_constraints import moment_constraint as moment_constraint
    from bayes_klrl.posterior import Posterior as Posterior
    from bayes_klrl.reward_frontier import Frontier as Frontier
    from bayes_klrl.reward_frontier import frontier as frontier
    from bayes_klrl.sequences import Sequences as Sequences
    from bayes_klrl.suite import SuiteResult as SuiteResult
    from bayes_klrl.suite import run_suite as run_suite
    from bayes_klrl.trainer_audit import Audit as Audit
    from bayes_klrl.trainer_audit import audit as audit
    from bayes_klrl.typing import Algorithm as Algorithm
    from bayes_klrl.typing import LanguageModel as LanguageModel
    from bayes_klrl.typing import Twist as Twist
    from bayes_klrl.uncertain_rewards import RewardUncertainty as RewardUncertainty
    from bayes_klrl.uncertain_rewards import reward_uncertainty as reward_uncertainty

__version__ = "0.1.0"

_HOME = {
    "Algorithm": "bayes_klrl.typing",
    "AnnealedSMC": "bayes_klrl.inference.annealing",
    "Audit": "bayes_klrl.trainer_audit",
    "Automaton": "bayes_klrl.models.automaton",
    "AutomatonConstraint": "bayes_klrl.models.automaton_reward",
    "AutomatonReward": "bayes_klrl.models.automaton_reward",
    "BayesKLRLError": "bayes_klrl.errors",
    "BayesianFit": "bayes_klrl.inference.bayesian_svi",
    "BayesianSVI": "bayes_klrl.inference.bayesian_svi",
    "BestOfN": "bayes_klrl.inference.best_of_n",
    "BudgetError": "bayes_klrl.errors",
    "Certificate": "bayes_klrl.certificate",
    "CheckpointError": "bayes_klrl.errors",
    "Comparison": "bayes_klrl.comparison",
    "ConditionalSMC": "bayes_klrl.inference.conditional_smc",
    "Constraint": "bayes_klrl.likelihood",
    "ConvergenceError": "bayes_klrl.errors",
    "CountingTwist": "bayes_klrl.models.twist_counting",
    "DistilledTwist": "bayes_klrl.inference.distilled_twist",
    "Draws": "bayes_klrl.draws",
    "EnsembleReward": "bayes_klrl.inference.reward_ensemble",
    "Exact": "bayes_klrl.inference.exact",
    "Fit": "bayes_klrl.inference.svi",
    "Frontier": "bayes_klrl.reward_frontier",
    "HiddenStates": "bayes_klrl.models.reward_features",
    "HmmLM": "bayes_klrl.models.hmm_lm",
    "ImportanceSampling": "bayes_klrl.inference.importance",
    "JaxLM": "bayes_klrl.models.jax_lm",
    "LanguageModel": "bayes_klrl.typing",
    "LearnedTwist": "bayes_klrl.inference.learned_twist",
    "Likelihood": "bayes_klrl.likelihood",
    "LossInputs": "bayes_klrl.models.torch_losses",
    "MixtureLM": "bayes_klrl.models.mixture_lm",
    "MomentConstraint": "bayes_klrl.moment_constraints",
    "NgramLM": "bayes_klrl.models.ngram_lm",
    "PartialRewardTwist": "bayes_klrl.models.twist",
    "Posterior": "bayes_klrl.posterior",
    "Preferences": "bayes_klrl.models.preferences",
    "QuasiRejection": "bayes_klrl.inference.quasi_rejection",
    "RejectionSampling": "bayes_klrl.inference.rejection",
    "Reward": "bayes_klrl.likelihood",
    "RewardError": "bayes_klrl.errors",
    "RewardModel": "bayes_klrl.inference.reward_model",
    "RewardPosterior": "bayes_klrl.models.reward_posterior",
    "RewardUncertainty": "bayes_klrl.uncertain_rewards",
    "SMC": "bayes_klrl.inference.smc",
    "SVI": "bayes_klrl.inference.svi",
    "Scores": "bayes_klrl.models.preferences",
    "Sequences": "bayes_klrl.sequences",
    "SuffixMH": "bayes_klrl.inference.mcmc",
    "SuiteResult": "bayes_klrl.suite",
    "SupportError": "bayes_klrl.errors",
    "TextRewardError": "bayes_klrl.errors",
    "TokenFeatures": "bayes_klrl.models.reward_features",
    "TokenReward": "bayes_klrl.likelihood",
    "TorchLM": "bayes_klrl.models.torch_lm",
    "Twist": "bayes_klrl.typing",
    "TwistedLM": "bayes_klrl.models.twisted_lm",
    "UnboundedLossError": "bayes_klrl.errors",
    "audit": "bayes_klrl.trainer_audit",
    "certify": "bayes_klrl.certificate",
    "check_posterior": "bayes_klrl.contract",
    "compare": "bayes_klrl.comparison",
    "frontier": "bayes_klrl.reward_frontier",
    "moment_constraint": "bayes_klrl.moment_constraints",
    "myopic_policy": "bayes_klrl.inference.oracles",
    "posterior_policy": "bayes_klrl.inference.oracles",
    "reward_uncertainty": "bayes_klrl.uncertain_rewards",
    "run_suite": "bayes_klrl.suite",
}

__all__ = [
    "Algorithm",
    "AnnealedSMC",
    "Audit",
    "Automaton",
    "AutomatonConstraint",
    "AutomatonReward",
    "BayesKLRLError",
    "BayesianFit",
    "BayesianSVI",
    "BestOfN",
    "BudgetError",
    "Certificate",
    "CheckpointError",
    "Comparison",
    "ConditionalSMC",
    "Constraint",
    "ConvergenceError",
    "CountingTwist",
    "DistilledTwist",
    "Draws",
    "EnsembleReward",
    "Exact",
    "Fit",
    "Frontier",
    "HiddenStates",
    "HmmLM",
    "ImportanceSampling",
    "JaxLM",
    "LanguageModel",
    "LearnedTwist",
    "Likelihood",
    "LossInputs",
    "MixtureLM",
    "MomentConstraint",
    "NgramLM",
    "PartialRewardTwist",
    "Posterior",
    "Preferences",
    "QuasiRejection",
    "RejectionSampling",
    "Reward",
    "RewardError",
    "RewardModel",
    "RewardPosterior",
    "RewardUncertainty",
    "SMC",
    "SVI",
    "Scores",
    "Sequences",
    "SuffixMH",
    "SuiteResult",
    "SupportError",
    "TextRewardError",
    "TokenFeatures",
    "TokenReward",
    "TorchLM",
    "Twist",
    "TwistedLM",
    "UnboundedLossError",
    "audit",
    "certify",
    "check_posterior",
    "compare",
    "frontier",
    "moment_constraint",
    "myopic_policy",
    "posterior_policy",
    "reward_uncertainty",
    "run_suite",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'bayes_klrl' has no attribute {name!r}")
    from bayes_klrl.errors import needs_jax

    with needs_jax(f"bk.{name}"):
        value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
