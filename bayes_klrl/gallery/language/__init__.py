"""Examples whose completions are text.

Read `explain` first: which tokens the posterior moved. `generation` and `generation_lstm` tune small priors to several
rewards, `power_sampling` sharpens one without any reward; `dialogue`, `translation` and `question_answering` have prompts
that they were not trained on.
"""
