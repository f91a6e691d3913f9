"""The shipped example that the commands run when no file is given: Jane Austen in a good mood.

Each file is what a file of yours would be. Read `one_prompt` first, which most commands run; `many_prompts` is for `amortise`,
and `openings` are its prompts.
"""
