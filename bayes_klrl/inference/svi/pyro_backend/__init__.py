"""SVI on torch, by Pyro.

Read `training` first (one training, step by step), then `elbo` (our gradient estimators as Pyro ELBOs), `scores` (any
objective and critic, token by token), `sites` (the term of each site of a program in the log-weight), `optimizers` (the
optimizers at work) and `trust_region` (steps that are shortened to a number of nats). The natural gradient is in
`natural_steps` (at work), `natural` (the regression and its step), `per_sample` (scores of single draws) and
`score_products` (their products, layer by layer).
"""
