"""Callbacks of a training that analyse it while it runs.

Read `certify_every` first (a certificate every n steps, which selects the checkpoint), then `adaptive_alpha` (which looks for
the alpha at which the guide has a given KL or reward). Callbacks that need no analysis are in `inference/svi`.
"""
