"""Audits of losses: the policy that a trainer's loss converges to, found by training a table that can be any policy.

Read `audit` first, then `objectives` (the exact gradients that losses turn out to follow), `training` (training a table until
it settles) and `verdict` (the name of the result).
"""
