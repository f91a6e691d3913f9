"""Drawing on an accelerator without a round trip to the host for every token.

Read `lockstep` first (the rest of independent completions in one call, which `models/decoding.py` takes where the model is on
an accelerator), then `drawing` (one token of each row) and `static_step` (one step over caches of a fixed size, which a CUDA
graph can record; it is not the default).
"""

from bayes_klrl.models.torch_lm.on_device.lockstep import TorchLockstep as TorchLockstep
from bayes_klrl.models.torch_lm.on_device.lockstep import lockstep_of as lockstep_of
from bayes_klrl.models.torch_lm.on_device.static_step import static_steps as static_steps
