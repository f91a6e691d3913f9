"""Stochastic variational inference: a guide is trained on the ELBO, which is KL-regularised RL, exactly.

Read `svi` first (`SVI`, the recipe), then `fit` (`Fit`, its result), `loop` (the steps, their history, interruption) and the
seams that know nothing of one another: `objectives` (what is minimised, with critics and replay), `estimators` (the
leave-one-out baseline), `optimizers` and `steps` (how a step is made, and how long it is), `callbacks` (who looks),
`checkpoint` (what survives) and `refusals`. The rooms
`pyro_backend` and `numpyro_backend` each hold the training, the ELBO and the sites of one library; `bayesian` (experimental)
puts a distribution on the policy's parameters. `losses` are reference losses of trainers, written as `bk.audit` takes them.
"""
