"""The kinds of adapters that peft has: which can be a guide, which are whole in their folder, which can be merged.

Read `known` first (what was tried, and what is refused with its reason; docs/adapters.md is the table), then `trial` (the
short check of a kind that peft has had only since).
"""
