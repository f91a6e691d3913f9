"""What does the loss of a trainer converge to? The loss is run on a table that can be any policy.

Read `audit` first, then `objectives` (the exact gradients that losses turn out to follow), `training` (training a table until
it rests) and `verdict` (what the result is).
"""
