"""Hugging Face checkpoints of the GPT-2 and Llama families as jitted JAX functions.

Read `lm` first (`JaxLM`, the language model), then `forward` (the network as a pure function), `steps`, `rows` and `decoding`
(drawing token by token and in one loop on the device), `lockstep` (several models at once), and `config` and `checkpoint`
(the supported configurations, and the reading and writing of weights).
"""

from bayes_klrl.models.jax_lm.lm import JaxLM as JaxLM
