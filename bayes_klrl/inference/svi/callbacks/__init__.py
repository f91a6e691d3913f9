"""Who looks at a training after each step: callbacks.

Read `callbacks` first (what a callback is and sees, checkpoints, early stopping), then `alphas` (alphas that change) and
`loggers` (TensorBoard, and the loggers that `transformers` knows). Callbacks that analyse the guide are in the package's
room `analysis/callbacks`.
"""

from bayes_klrl.inference.svi.callbacks.callbacks import Callback as Callback
from bayes_klrl.inference.svi.callbacks.callbacks import Checkpoint as Checkpoint
from bayes_klrl.inference.svi.callbacks.callbacks import EarlyStopping as EarlyStopping
from bayes_klrl.inference.svi.callbacks.callbacks import StepRecord as StepRecord
from bayes_klrl.inference.svi.callbacks.callbacks import call_all as call_all
from bayes_klrl.inference.svi.callbacks.callbacks import close_all as close_all
