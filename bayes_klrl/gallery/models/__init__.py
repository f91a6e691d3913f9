"""Models of our own for the examples.

Read `lstm_lm` first: a recurrent network in the format of transformers. `label_lm` is a classifier as a language model whose
completion is one label, with `digits_lm` (handwritten digits) and `passages_lm` (passages of novels) as two of them; `style`
is a style classifier for rewards. `worlds` has gridworlds as language models over actions, `beliefs` what an agent believes
about their rewards, and `policies` the exact distribution over policies that do not see where they are. `proxies` has
rewards that were learned from few preferences.
"""
