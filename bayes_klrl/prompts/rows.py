"""The data beside the prompts: tables with a column of prompts, and columns with one value of any type per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import islice
from typing import Any

from bayes_klrl.batch import RESERVED_NAMES
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.kinds import TABLES, class_names, is_id

__all__ = ["checked_columns", "prompts_and_columns"]


def prompts_and_columns(rows: Any, prompt: str) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the column of prompts and the other columns of a table.

    Parameters
    ----------
    rows
        An iterable of mappings, a `datasets.Dataset`, or a pandas DataFrame.
    prompt
        The name of the column that holds the prompts.

    Raises
    ------
    BayesKLRLError
        If it is no such table, has no rows or no such column, or if the name of another column is reserved.
    """
    columns = _columns_of_table(rows) if _is_table(rows) else _columns_of_mappings(rows)
    if not isinstance(prompt, str) or prompt not in columns:
        raise BayesKLRLError(
            f"The rows have no column {prompt!r}; their columns are {list(columns)}. Say which one holds the prompts: "
            "prompt='...'."
        )
    prompts = columns.pop(prompt)
    for name in columns:
        if not isinstance(name, str):
            raise BayesKLRLError(f"The name of a column is a text; got {name!r}. Rename or drop the column.")
        if name in RESERVED_NAMES:
            raise BayesKLRLError(
                f"The rows have a column {name!r}: the name is reserved for what the posterior itself gives to reward "
                f"functions or takes. Rename or drop the column, say to 'given_{name}': dataset.rename_column or "
                "dataset.remove_columns, df.rename or df.drop."
            )
    for n, given in enumerate(prompts):
        if is_id(given) or getattr(given, "ndim", 1) == 0:
            raise BayesKLRLError(
                f"In row {n} {prompt!r} is the number {given!r}. A prompt is a text or a list of token ids."
            )
    return prompts, columns


def _is_table(rows: Any) -> bool:
    """Return whether this is a DataFrame or has the interface of a `datasets.Dataset`: columns by name, and a length."""
    names = getattr(rows, "column_names", None)
    return hasattr(rows, "__len__") and (bool(TABLES & class_names(rows)) or isinstance(names, list | tuple))


def _columns_of_table(table: Any) -> dict[Any, list[Any]]:
    """Return the columns of a DataFrame or `datasets.Dataset` by name."""
    names = getattr(table, "column_names", None)
    names = list(names if isinstance(names, list | tuple) else table.columns)
    if not len(table):
        raise _no_rows(table)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BayesKLRLError(f"The table has {names.count(twice[0])} columns {twice[0]!r}. Rename or drop one of them.")
    return {name: list(table[name]) for name in names}


def _columns_of_mappings(rows: Any) -> dict[Any, list[Any]]:
    """Return the columns of rows that are mappings with the same keys."""
    kind = type(rows).__name__
    if isinstance(rows, Mapping):
        raise BayesKLRLError(
            f"rows is a {kind} with the keys {list(rows)}, not a list of rows. Of a datasets.DatasetDict choose a split, "
            "such as rows['train']; of a dictionary of columns make bk.Posterior(..., prompts=rows['prompt'], ...)."
        )
    if isinstance(rows, str | bytes) or not hasattr(rows, "__iter__"):
        raise BayesKLRLError(
            f"rows must be a list of dictionaries, a datasets.Dataset or a pandas DataFrame; got {rows!r}."
        )
    listed = list(rows)
    if not listed:
        raise _no_rows(rows)
    for n, row in enumerate(listed):
        if not isinstance(row, Mapping):
            raise BayesKLRLError(f"Row {n} is a {type(row).__name__}, not a dictionary of values by column: {row!r}.")
        for one, other, problem in (
            (row, listed[0], "a key {!r}, which row 0 lacks"),
            (listed[0], row, "no key {!r}, which row 0 has"),
        ):
            different = [key for key in one if key not in other]
            if different:
                raise BayesKLRLError(
                    f"Row {n} has {problem.format(different[0])}. Give all rows the same keys; a value may be None."
                )
    return {key: [row[key] for row in listed] for key in listed[0]}


def _no_rows(rows: Any) -> BayesKLRLError:
    """Return the error about a table without rows."""
    return BayesKLRLError(f"rows, a {type(rows).__name__}, has no rows; a posterior needs at least one prompt.")


def checked_columns(columns: Mapping[str, Any], num_prompts: int) -> dict[str, tuple[Any, ...]]:
    """Return each column as a tuple of one value per prompt; reserved names and other numbers of values are refused."""
    for name in columns:
        if name in RESERVED_NAMES:
            raise BayesKLRLError(f"A column cannot be called {name!r}: the name is reserved. Choose another.")
    return {name: _one_per_prompt(name, values, num_prompts) for name, values in columns.items()}


def _one_per_prompt(name: str, values: Any, num_prompts: int) -> tuple[Any, ...]:
    """Return the values of a column, which must be in order and as many as there are prompts."""
    read: tuple[Any, ...] | None
    if isinstance(values, Iterator):
        read = tuple(islice(values, num_prompts + 1))  # an iterator may have no end
        got = f"a {type(values).__name__} of {len(read) if len(read) <= num_prompts else 'more'} values"
    else:
        unordered = isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set) or TABLES & class_names(
            values
        )
        sized = hasattr(values, "__len__") and getattr(values, "ndim", 1) != 0 and not isinstance(values, type)
        read, got = tuple(values) if sized and not unordered else None, repr(values)
    if read is None or len(read) != num_prompts:
        raise BayesKLRLError(f"Column {name!r} needs one value per prompt, a list of length {num_prompts}; got {got}.")
    return read
