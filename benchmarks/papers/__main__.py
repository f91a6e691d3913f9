"""Measure what papers claim: `python -m benchmarks.papers [NAME ...] [--out FOLDER] [--seeds N] [--tiny]`.

Without a name all papers are run, in about seven CPU minutes on one thread. The tables are printed as Markdown; with
`--out` each paper is also written as NAME.json. `--tiny` is for trying the commands: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import time

import torch

from benchmarks.papers.record import Paper

NAMES = ("zhao2024", "go2023", "beirami2024", "amini2025", "gao2022", "korbak2022")


def study(name: str, *, num_seeds: int = 5, tiny: bool = False) -> Paper:
    """Return the study of a paper, with the CPU seconds that it took."""
    start = time.process_time()
    found: Paper = importlib.import_module(f"benchmarks.papers.{name}").study(num_seeds=num_seeds, tiny=tiny)
    return found.taking(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--out", metavar="FOLDER", help="where NAME.json is written")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the commands")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(NAMES)):
        parser.error(f"unknown papers {unknown}; choose of {list(NAMES)}")
    torch.set_num_threads(1)
    for name in arguments.names or NAMES:
        paper = study(name, num_seeds=arguments.seeds, tiny=arguments.tiny)
        print(f"\n## {paper.markdown()}", flush=True)
        if arguments.out is not None:
            print(f"\nwritten: {paper.write(arguments.out)}")


if __name__ == "__main__":
    main()
