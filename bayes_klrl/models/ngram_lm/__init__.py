"""Language models in NumPy, small enough to be exact about everything: n-grams and hidden Markov models.

Read `lm` first (`NgramLM`), then `tables` (dense and back-off storage of p(token | last n - 1 tokens)) and `hmm` (`HmmLM`).
"""

from bayes_klrl.models.ngram_lm.hmm import HmmLM as HmmLM
from bayes_klrl.models.ngram_lm.lm import NgramLM as NgramLM
