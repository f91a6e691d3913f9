"""Language models and rewards: everything that a posterior is made of.

Read `decoding` first: the one loop in which every model draws completions and scores them. The folders are `ngram_lm` (small
exact models in NumPy), `torch_lm` (any Hugging Face model), `jax_lm` (the same checkpoints, jitted), `automata` (rewards
computed by a finite automaton), `twists` (log psi, the value of an unfinished completion) and `programs` (the posterior as a
Pyro and as a NumPyro program). The files are `mixture` (several models as one), `prefix_policy` (a policy as a table over
prefixes), `rewards` (ready-made reward functions), and the helpers that all models share: `completions` (what was drawn),
`memory` and `passes` (how much is computed at once), `out_of_memory` (what is done when that was too much), `token_ids` and
`checkpoint_files`. The folder `shipped` holds the weights of the language model that comes with the package. The protocol of
a language model is `LanguageModel` in `bayes_klrl.typing`; docs/extending.md writes two models, one of them behind an
inference server.
"""
