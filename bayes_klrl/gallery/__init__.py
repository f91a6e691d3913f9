"""Examples of what KL-regularised RL as inference is good for, one file each, each ending in a report.

`bayes-klrl gallery NAME` runs one, and `examples/gallery` is a link to this folder. Read `soft_values` first: a gridworld as a
language model over actions. An example has a function `main(out, *, seed)`, which writes `report.html` into a folder and
returns it; the first line of its docstring is its title.
"""
