"""A fast forward pass of our own for GPT-2 and Llama relatives, from the model's own modules.

Read `forward` first (the network and its loop), then `families` (one layer of each family, and the list of models for which
the loop is known to be right), `cache` (how keys and values are stored while completions grow), `pool` (memory for them that
is used again), `attention` (over the parts of a cache), `products` (of hidden states and weights, by the faster of two
libraries) and `activation` (GPT-2's activation in one exponential).
"""

from bayes_klrl.models.torch_lm.tight.forward import TightNetwork as TightNetwork
from bayes_klrl.models.torch_lm.tight.forward import tight_network as tight_network
