"""SVI on torch, by Pyro.

Read `training` first (one training, step by step), then `elbo` (our gradient estimators as Pyro ELBOs), `scores` (any
objective and critic, token by token), `loss_elbo` (any loss of a trainer), `sampled` (forward KL on draws of SMC), `sites`
(the term of each site of a program in the log-weight), `optimizers` (the optimizers at work), `trust_region` (steps that are
shortened to a number of nats) and `within_memory` (a gradient where the memory of a device runs out). The natural gradient
has the room `natural_gradient`, and a step that several processes share the room `over_ranks`.
"""
