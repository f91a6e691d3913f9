"""Sequence classifiers and scalar reward models of Hugging Face as likelihoods.

Read `reward` first (`ClassifierReward`), then `heads` (which number of the classifier's output is the reward). `network` runs
the model on texts, in batches whose padding cannot change a value, and `prefixes` finds the texts that begin other texts:
one pass of a causal model scores them together.
"""
