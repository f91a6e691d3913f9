"""Examples of what KL-regularised RL as inference is good for, one file each, each ending in a report.

`bayes-klrl gallery NAME` runs one, and `examples/gallery` has a link to each. `language` has the examples whose completions
are text, `decisions` those whose completions are labels or actions. `data` reads what other packages ship, and `models` has
language models of our own. Read `decisions` first, and in it `soft_values`: a gridworld as a language model over actions.

An example has a function `main(out, *, seed)`, which writes `report.html` into a folder and returns a `Finding` (`finding`);
the first line of its docstring is its title, and its constant GLANCE (`glance`) is its row of the table "At a glance". `index`
finds the examples and runs them, and `page` writes the page with the table, what each found, and links to their reports.
`packages` asks for what an example needs, `means` has means with their standard errors, and `calibration` the scores of
answers whose truth is known, and their picture.
"""
