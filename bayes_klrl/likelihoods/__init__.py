"""Likelihoods that are made of language models, of classifiers, or of the prior itself (theory.md 1.9, 1.14).

Read `implicit` first (`ImplicitReward`: a tuned policy as the likelihood that it stands for) and then `power` (`Power`: the
prior to a power, and its twist). `quantile` (`QuantileReward`) and `best_of` (`BestOf`) are functions of how high a score
ranks under the prior, by `prior_ranks`; so their evidence is known. `scoring` has the log-probs of the completions of a
batch. `classifiers` is the room of `ClassifierReward`, for sequence classifiers and reward models of Hugging Face.
"""
