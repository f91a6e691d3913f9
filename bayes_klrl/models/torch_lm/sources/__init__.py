"""Where a model comes from, before its weights are read.

Read `located` first (the folder, file or hub id behind a name, and its tokenizer). `gguf_cache` keeps what was dequantised
once, and `unloaded` makes a model of shapes without weights, for plans.
"""
