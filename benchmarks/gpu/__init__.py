"""One CUDA card: is everything right on it, and how fast is it? Run by `bash benchmarks/gpu.sh`.

Read `main` first (the sections and their time), then `checks`, `measure`, `shapes` and `report`.
"""
