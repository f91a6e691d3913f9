"""SVI on JAX, by NumPyro.

Read `training` first (the loop), then `elbo` (our gradient estimators as NumPyro ELBOs), `scores` (the other objectives, as
weights of scores) and `sites` (checks of programs and of the log-probs of their sites).
"""
