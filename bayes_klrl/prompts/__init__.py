"""Prompts in every form in which users have them: texts, token ids, conversations, and tables with a column of such.

Read `lists` first (what a prompt is, and several of them), then `chat` (conversations as prompts: messages, and what is shown
of them) and `template` (a conversation becomes text by the tokenizer's chat template, once). `context` has the token ids of
prompts for a model, `rows` the data beside them, `tokenizer_output` what a Hugging Face tokenizer returns, and `kinds` the
questions that all of these ask of an object. `words` has the names of prompts, by which verdicts, tables and pictures call
them, `decoder` the texts of completions as they follow their prompts, and
`part` some prompts of a posterior, for work that is split.
"""
