"""One HTML page that shows what was found: `bk.report`.

Read `report` first (what is put together), then `reported` (what each kind of result contributes; a new kind is one function
there), `folder` (the same for an output folder of `bayes-klrl`), `samples` (completions before and after, token by token) and
`page` (the document, with the style and the script of `assets`).
"""
