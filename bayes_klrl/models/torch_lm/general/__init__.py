"""Networks that call a Hugging Face model's own forward, for all models that the tight forward does not know.

Read `general` first (the four networks), then `heads` (the head of a model apart from its body) and `blocks` (blocks whose
activations are computed again in the backward pass).
"""

from bayes_klrl.models.torch_lm.general.general import CachedNetwork as CachedNetwork
from bayes_klrl.models.torch_lm.general.general import EncoderDecoderNetwork as EncoderDecoderNetwork
from bayes_klrl.models.torch_lm.general.general import PlainEncoderDecoderNetwork as PlainEncoderDecoderNetwork
from bayes_klrl.models.torch_lm.general.general import PlainNetwork as PlainNetwork
from bayes_klrl.models.torch_lm.general.general import equal_lengths as equal_lengths
from bayes_klrl.models.torch_lm.general.general import general_networks as general_networks
from bayes_klrl.models.torch_lm.general.general import last_positions as last_positions
