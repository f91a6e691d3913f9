"""Language models and rewards: everything that a posterior is made of.

Read `decoding` first: it is the one loop by which every model draws completions and scores what it drew. The rooms are
`ngram_lm` (small exact models in NumPy), `torch_lm` (any Hugging Face model), `jax_lm` (the same checkpoints, jitted),
`automata` (rewards computed by a finite machine), `twists` (log psi, what an unfinished completion is worth) and
`programs` (the posterior as a Pyro and as a NumPyro program). Beside them lie `mixture` (several models as one),
`prefix_policy` (a policy as a table over prefixes), `rewards` (ready-made reward functions), and what all models share:
`token_ids` and `checkpoint_files`. The folder `shipped` holds the weights of the language model that comes with the package.
The protocol of a language model is `LanguageModel` in `bayes_klrl.typing`; docs/extending.md writes two models, one of them
behind an inference server.
"""
