"""SVI on JAX, by NumPyro.

Read `training` first (the loop), then `elbo` (our gradient estimators as NumPyro ELBOs) and `sites` (checks of programs
and of the log-probs of their sites).
"""
