"""What SVI minimises, and what weighs the score of each draw or token.

Read `weights` first (the objectives, as weights of whole draws), then `critics` (advantages of tokens),
`regressions` (critics that learn) and `replay` (earlier draws that are used again).
"""

from bayes_klrl.inference.svi.objectives.weights import ELBO as ELBO
from bayes_klrl.inference.svi.objectives.weights import JS as JS
from bayes_klrl.inference.svi.objectives.weights import OBJECTIVES as OBJECTIVES
from bayes_klrl.inference.svi.objectives.weights import TV as TV
from bayes_klrl.inference.svi.objectives.weights import ForwardKL as ForwardKL
from bayes_klrl.inference.svi.objectives.weights import LogVariance as LogVariance
from bayes_klrl.inference.svi.objectives.weights import LossObjective as LossObjective
from bayes_klrl.inference.svi.objectives.weights import Objective as Objective
from bayes_klrl.inference.svi.objectives.weights import objective_of as objective_of
