"""Posteriors with known truth: small enough to be exact, hard enough to tell methods apart.

Read `gold` first (problems of any length, solved by messages), then `gpt2_tasks` (tiny transformers, enumerated), `modes`,
`constraints`, `infilling`, `preferences` and `joint`. `record` says what a problem is, and the room `suite` runs methods
against all of them.
"""

from bayes_klrl.problems.constraints import constraint_text, masked_policy, rare_feature
from bayes_klrl.problems.gold import (
    audit_posterior,
    gold_constraint,
    gold_counter,
    gold_dense,
    gold_hidden,
    gold_posterior,
    gold_table,
)
from bayes_klrl.problems.gpt2_tasks import GPT2_TASKS, gpt2_task, random_gpt2_task
from bayes_klrl.problems.infilling import Infilling, infilling, infilling_truth
from bayes_klrl.problems.joint import JointTruth, joint_truth
from bayes_klrl.problems.modes import two_modes, two_modes_truth
from bayes_klrl.problems.preferences import Overoptimisation, overoptimisation
from bayes_klrl.problems.record import Problem, Truth, by_enumeration, by_messages
from bayes_klrl.problems.suite.catalogue import SUITE, problem_names

__all__ = [
    "GPT2_TASKS",
    "SUITE",
    "Infilling",
    "JointTruth",
    "Overoptimisation",
    "Problem",
    "Truth",
    "audit_posterior",
    "by_enumeration",
    "by_messages",
    "constraint_text",
    "gold_constraint",
    "gold_counter",
    "gold_dense",
    "gold_hidden",
    "gold_posterior",
    "gold_table",
    "gpt2_task",
    "infilling",
    "infilling_truth",
    "joint_truth",
    "masked_policy",
    "overoptimisation",
    "problem_names",
    "random_gpt2_task",
    "rare_feature",
    "two_modes",
    "two_modes_truth",
]
