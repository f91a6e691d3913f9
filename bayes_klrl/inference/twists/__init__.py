"""Fitting twists: by gradient steps, or as the exact twist of a simpler model.

Read `learned` first (`LearnedTwist`), then `training` and `losses` behind it, and `distilled` (`DistilledTwist`, the exact
twist of an n-gram model that imitates the prior).
"""
