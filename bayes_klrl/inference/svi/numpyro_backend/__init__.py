"""SVI on JAX, by NumPyro.

Read `training` first (the loop), then `elbo` (our gradient estimators as NumPyro ELBOs) and `sites` (what each site of a
program adds to the log-weight).
"""
