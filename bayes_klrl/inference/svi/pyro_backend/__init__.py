"""SVI on torch, by Pyro.

Read `training` first (the loop), then `elbo` (our gradient estimators as Pyro ELBOs), `sites` (the term of
each site of a program in the log-weight) and `trust_region` (steps that are shortened to a number of nats).
"""
