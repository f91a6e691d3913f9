"""The map: the tasks of the benchmark, the rows of each, and which of them are run by default.

    SAMPLING   N 64, 256, 1,024 x T 32, 128, 512 x models and vocabularies x prompts of 8 and 256 tokens x 1 and 32 prompts
    EVIDENCE   N 64, 256, 1,024 particles on each task of `benchmarks.peers.truth`
    TUNING     60 and 600 steps of 256 completions

By default one factor at a time departs from the base, 64 completions of 32 tokens from GPT-2 4 x 128 with 2,000 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from benchmarks.peers.models import SHAPES, num_parameters

__all__ = ["DEFAULT", "VOCABULARIES", "Cell", "Row", "cells", "needed_gib", "rows"]

VOCABULARIES = {
    "4x128": (2_000, 50_000, 150_000),
    "12x256": (2_000, 50_000, 150_000),
    "gpt2": (50_257,),
    "smollm2": (49_152,),
}


@dataclass(frozen=True)
class Cell:
    """One task: what is drawn, estimated or trained, at which size.

    Parameters
    ----------
    kind
        "sampling", "evidence" or "tuning".
    num
        Completions per prompt; particles; completions per step.
    tokens, shape, vocab_size, prompt_length, num_prompts
        Of "sampling": length of completions, a key of `SHAPES`, V, tokens per prompt, prompts.
    task, steps
        Of the others: the task in `benchmarks.peers.truth`, and the steps of "tuning".
    """

    kind: str
    num: int
    tokens: int = 0
    shape: str = ""
    vocab_size: int = 0
    prompt_length: int = 8
    num_prompts: int = 1
    task: str = ""
    steps: int = 0

    @property
    def name(self) -> str:
        """The name by which `--cell` chooses it.

        Examples
        --------
        >>> Cell("evidence", 64, task="constraint").name
        'evidence-constraint-N64'
        """
        if self.kind == "sampling":
            return (
                f"sampling-{self.shape}-V{self.vocab_size}-N{self.num}-T{self.tokens}"
                f"-L{self.prompt_length}-P{self.num_prompts}"
            )
        return f"{self.kind}-{self.task}-N{self.num}" + (f"-S{self.steps}" if self.steps else "")

    def job(self) -> dict[str, Any]:
        """Return the cell as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One way of doing a task: a peer, its module, a method, and which environment it needs."""

    peer: str
    module: str
    method: str
    environment: str = "peers"

    @property
    def name(self) -> str:
        """The peer and its method, as the table calls them."""
        return f"{self.peer}: {self.method}"


_OURS = Row("bayes_klrl", "ours", "draws")
_GENERATE = Row("transformers", "generate", "generate")
_BY_SMC = (Row("llamppl", "llamppl_peer", "smc_standard"), Row("genlm-control", "genlm_peer", "SMC"))
RATES = {"RLOO": "5e-4", "GRPO": "2.5e-4", "DPG": "2e-3"}
"""Learning rates: the best of 2.5e-4, 5e-4, 1e-3, 2e-3 and 4e-3 (DPG: of the last three) on gpt2-8x4 after 60 steps."""


def rows(cell: Cell) -> tuple[Row, ...]:
    """Return the rows of a cell. Drawing by the libraries of SMC is measured where the map begins only: it is slow.

    Examples
    --------
    >>> [row.method for row in rows(Cell("evidence", 64, task="constraint"))]
    ['IS', 'SMC', 'SMC, twisted', 'smc_standard', 'smc_steer', 'AWRS']
    """
    if cell.kind == "sampling":
        begins = replace(cell, num=_BASE.num) == _BASE and cell.num <= 256
        return (_OURS, _GENERATE, *(_BY_SMC if begins else ()))
    if cell.kind == "evidence":
        constrained = cell.task == "constraint"
        twisted = ("SMC, twisted",) if constrained else ()
        return (
            *(Row("bayes_klrl", "ours", method) for method in ("IS", "SMC", *twisted)),
            *(Row("llamppl", "llamppl_peer", method) for method in ("smc_standard", "smc_steer")),
            Row("genlm-control", "genlm_peer", "AWRS" if constrained else "SMC"),
        )
    return (
        *(Row("bayes_klrl", "ours", method) for method in ("SVI", "SVI, natural")),
        *(Row("TRL", "trl_peer", f"{name} at {RATES[name]}") for name in ("RLOO", "GRPO")),
        Row("disco", "disco_peer", f"DPG at {RATES['DPG']}", "disco"),
    )


_BASE = Cell("sampling", 64, 32, "4x128", 2_000)
DEFAULT: tuple[Cell, ...] = (
    _BASE,
    Cell("sampling", 256, 32, "4x128", 2_000),
    Cell("sampling", 1024, 32, "4x128", 2_000),
    Cell("sampling", 64, 128, "4x128", 2_000),
    Cell("sampling", 64, 512, "4x128", 2_000),
    Cell("sampling", 64, 32, "4x128", 50_000),
    Cell("sampling", 64, 32, "4x128", 150_000),
    Cell("sampling", 64, 32, "12x256", 2_000),
    Cell("sampling", 64, 32, "4x128", 2_000, prompt_length=256),
    Cell("sampling", 64, 32, "4x128", 2_000, num_prompts=32),
    Cell("sampling", 64, 32, "gpt2", 50_257),
    Cell("sampling", 64, 32, "smollm2", 49_152),
    Cell("evidence", 256, task="gpt2-8x4"),
    Cell("evidence", 256, task="constraint"),
    Cell("tuning", 256, task="gpt2-8x4", steps=60),
)


def cells(*, full: bool = False) -> tuple[Cell, ...]:
    """Return the cells of the map, or the default ones.

    Examples
    --------
    >>> len(cells()), len(cells(full=True))
    (15, 306)
    """
    return tuple(_all_cells()) if full else DEFAULT


def _all_cells() -> Iterator[Cell]:
    for shape in SHAPES:
        for vocab_size, num, tokens, length, num_prompts in product(
            VOCABULARIES[shape], (64, 256, 1024), (32, 128, 512), (8, 256), (1, 32)
        ):
            yield Cell("sampling", num, tokens, shape, vocab_size, length, num_prompts)
    for task in ("gpt2-8x4", "gpt2-7x5", "gpt2-8x4-sharp", "constraint"):
        for num in (64, 256, 1024):
            yield Cell("evidence", num, task=task)
    for task, steps in product(("gpt2-8x4", "gpt2-7x5", "gpt2-8x4-sharp"), (60, 600)):
        yield Cell("tuning", 256, task=task, steps=steps)


def needed_gib(cell: Cell) -> float:
    """Return about what `generate` needs for a cell in float32: weights, keys and values, and logits three times over.

    Examples
    --------
    >>> round(needed_gib(Cell("sampling", 1024, 512, "gpt2", 50_257)), 1)
    38.1
    """
    if cell.kind != "sampling":
        return 1.0
    sizes = SHAPES[cell.shape]
    share = sizes.get("kv_heads", sizes["heads"]) / sizes["heads"]
    num_rows = cell.num * cell.num_prompts
    kept = 2 * sizes["layers"] * sizes["hidden"] * share * (cell.prompt_length + cell.tokens)
    numbers = num_parameters(cell.shape, cell.vocab_size) + num_rows * (kept + 3 * cell.vocab_size)
    return 0.5 + 4 * numbers / 2**30
