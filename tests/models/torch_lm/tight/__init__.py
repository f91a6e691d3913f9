"""Tests of `bayes_klrl.models.torch_lm.tight`, file by file."""
