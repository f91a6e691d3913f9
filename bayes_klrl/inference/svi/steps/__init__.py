"""The steps of a training: how long they are, and which prompts they use.

Read `steps` first (learning rates, clipping, the limit in nats), then `minibatches` (the prompts of each step).
"""

from bayes_klrl.inference.svi.steps.steps import MAX_GRADIENT_NORM as MAX_GRADIENT_NORM
from bayes_klrl.inference.svi.steps.steps import StepLimit as StepLimit
from bayes_klrl.inference.svi.steps.steps import learning_rate_schedule as learning_rate_schedule
