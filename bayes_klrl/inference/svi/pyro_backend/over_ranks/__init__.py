"""A step that several ranks share: who computes which completions, and who keeps which parameters.

Read `rows` first (each rank computes its completions, and all know all), then `spread` (models of which each rank has a part
alone, FSDP). The group of the ranks itself is `svi.ranks`, which uses no torch.
"""
