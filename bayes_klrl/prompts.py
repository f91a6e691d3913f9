"""Prompts in every form in which users have them, as a tuple of texts or of token-id tuples; and the data beside them.

A prompt is a text or a list of token ids; ids may also be in an array of any library, and in the output of a tokenizer. What
only looks like a list of prompts, because one can iterate over it, is refused by name: a dictionary would give its keys.
Further data about the prompts are columns, one value of any type per prompt; `prompts_and_columns` reads both from a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import numpy as np

from bayes_klrl.batch import RESERVED_NAMES
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import LanguageModel

__all__ = [
    "as_prompts",
    "check_context",
    "checked_columns",
    "chosen_prompts",
    "encoded_prompts",
    "prompt_list",
    "prompts_and_columns",
]

_TOKENIZER_OUTPUT = "BatchEncoding"
_TABLES = {"DataFrame", "LazyFrame", "Table"}
_TEMPLATE = "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"


def prompt_list(prompts: Any) -> tuple[Any, ...]:
    """Return the prompts as a tuple of texts or of token-id tuples.

    Parameters
    ----------
    prompts
        One prompt or several: texts, lists or arrays of token ids, or the output of a Hugging Face tokenizer. Several may be
        in an iterator, which is read once.

    Raises
    ------
    BayesKLRLError
        If it is something else, or there is no prompt.
    """
    given = as_prompts(prompts)
    listed = [given] if isinstance(given, str) or (given and all(map(_is_id, given))) else given
    if not listed:
        raise BayesKLRLError("prompts is empty; give at least one prompt (the empty text '' is one).")
    if all(isinstance(prompt, str) for prompt in listed):
        return tuple(listed)
    if all(isinstance(prompt, list) and all(map(_is_id, prompt)) for prompt in listed):
        return tuple(tuple(int(token) for token in prompt) for prompt in listed)
    raise BayesKLRLError(
        f"prompts must be one text or list of token ids, or a list of such, all of one kind; got {given!r}."
    )


def as_prompts(prompts: Any) -> Any:
    """Return the prompts as a text or as a list, in which arrays, tuples and a tokenizer's output have become lists.

    Raises
    ------
    BayesKLRLError
        If the prompts, or one of them, are something that has no prompts in order.
    """
    if isinstance(prompts, str):
        return prompts
    if _made_by_tokenizer(prompts):
        return _unpadded(prompts)
    listed = list(prompts) if isinstance(prompts, Iterator) else prompts
    _check_kind("prompts", listed)
    return [_one_prompt(p, prompt) for p, prompt in enumerate(_as_list("prompts", listed))]


def encoded_prompts(prompts: tuple[Any, ...], prior: LanguageModel) -> tuple[tuple[int, ...], ...]:
    """Return the prompts' token ids; an empty prompt becomes BOS where the model has one."""
    texts = all(isinstance(prompt, str) for prompt in prompts)
    if texts and prior.tokenizer is None and any(prompts):
        raise BayesKLRLError(
            f"The prompt {next(p for p in prompts if p)!r} is text, but the prior has no tokenizer. Give token ids, or "
            "the model a tokenizer."
        )
    ids = prior.encode(list(prompts)) if texts and prior.tokenizer is not None else [list(p) for p in prompts]
    bos = getattr(prior, "bos_token_id", None)
    for p, row in enumerate(ids):
        outside = [token for token in row if not 0 <= token < prior.vocab_size]
        if outside:
            raise BayesKLRLError(
                f"Prompt {p} has the token id {outside[0]}, outside the vocabulary 0..{prior.vocab_size - 1}."
            )
        if not row and bos is None and not getattr(prior, "accepts_empty_prompt", False):
            raise BayesKLRLError(
                f"Prompt {p} is empty, and the model has no BOS token to start from. Give a prompt of at least one token."
            )
    return tuple(tuple(row) if row or bos is None else (int(bos),) for row in ids)


def check_context(prompt_ids: tuple[tuple[int, ...], ...], max_new_tokens: int, lm: LanguageModel) -> None:
    """Refuse a prompt and completion that do not fit into the model's context."""
    context = getattr(lm, "context_length", None)
    longest = max(len(row) for row in prompt_ids)
    apart = getattr(lm, "prompt_apart", False)
    needed = max(longest, max_new_tokens) if apart else longest + max_new_tokens
    if context is not None and needed > context:
        raise BayesKLRLError(
            f"A prompt of {longest} tokens and max_new_tokens = {max_new_tokens} exceed the model's context of {context} "
            "tokens. Shorten one of them."
        )


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
        unordered = isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set) or _TABLES & _names(values)
        sized = hasattr(values, "__len__") and getattr(values, "ndim", 1) != 0 and not isinstance(values, type)
        read, got = tuple(values) if sized and not unordered else None, repr(values)
    if read is None or len(read) != num_prompts:
        raise BayesKLRLError(f"Column {name!r} needs one value per prompt, a list of length {num_prompts}; got {got}.")
    return read


def chosen_prompts(indices: Any, num_prompts: int) -> list[int]:
    """Return the indices of the prompts that a list or array of indices, a slice, or a mask of P bools means.

    Raises
    ------
    BayesKLRLError
        If it means no prompt, a prompt that is not there, or nothing at all.
    """
    listed = _listed_indices(indices, num_prompts)
    if listed and all(isinstance(index, bool | np.bool_) for index in listed):
        if len(listed) != num_prompts:
            raise BayesKLRLError(
                f"A mask of prompts has one bool per prompt, so it has length {num_prompts} here; got one of length "
                f"{len(listed)}."
            )
        listed = [p for p, is_chosen in enumerate(listed) if is_chosen]
    wrong = [index for index in listed if not _is_id(index) or not -num_prompts <= index < num_prompts]
    if wrong or not listed:
        raise BayesKLRLError(
            f"Indices of prompts are from 0 to {num_prompts - 1}, at least one of them; got {wrong or 'none'}."
        )
    return [int(index) for index in listed]


def _listed_indices(indices: Any, num_prompts: int) -> list[Any]:
    """Return indices or bools as a list; those of a slice are counted out."""
    try:
        if isinstance(indices, slice):
            return list(range(num_prompts)[indices])
        if isinstance(indices, str | bytes | Mapping | Set) or getattr(indices, "ndim", 1) != 1:
            raise TypeError
        listed: list[Any] = _as_list("indices", list(indices))
    except (TypeError, ValueError):
        raise BayesKLRLError(
            f"Prompts are chosen by a list or array of indices, by a slice, or by one bool per prompt; got {indices!r}."
        ) from None
    return listed


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
        if _is_id(given) or getattr(given, "ndim", 1) == 0:
            raise BayesKLRLError(
                f"In row {n} {prompt!r} is the number {given!r}. A prompt is a text or a list of token ids."
            )
    return prompts, columns


def _is_table(rows: Any) -> bool:
    """Return whether this is a DataFrame or has the interface of a `datasets.Dataset`: columns by name, and a length."""
    names = getattr(rows, "column_names", None)
    return hasattr(rows, "__len__") and (bool(_TABLES & _names(rows)) or isinstance(names, list | tuple))


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


def _one_prompt(p: int, prompt: Any) -> Any:
    """Return one item of a list of prompts: a text, a list of ids, or an id; anything else as it is."""
    if isinstance(prompt, str) or not hasattr(prompt, "__iter__"):
        return prompt
    if _made_by_tokenizer(prompt):
        ids = _unpadded(prompt)
        rows = [ids] if all(map(_is_id, ids)) else ids
        if len(rows) != 1:
            raise BayesKLRLError(
                f"In the list of prompts, prompt {p} is a {type(prompt).__name__} of {len(rows)} prompts. Give one for each "
                "prompt, or a single one for all."
            )
        return rows[0]
    _check_kind(f"prompt {p}", prompt)
    if not hasattr(prompt, "tolist") and not isinstance(prompt, Sequence):
        return prompt
    return _as_list(f"prompt {p}", prompt)


def _as_list(what: str, given: Any) -> Any:
    """Return a sequence or array as a list, the items of which are Python's own numbers where an array holds them."""
    axes = getattr(given, "ndim", 1 if hasattr(given, "__len__") else 0)
    if axes == 0:
        raise BayesKLRLError(f"{what} must be a text or a list; got {given!r}.")
    if axes > 2:
        raise BayesKLRLError(
            f"{what} must be an array of token ids with one axis, or two for several prompts; got one with {axes} axes."
        )
    listed = given.tolist() if hasattr(given, "tolist") else list(given)
    return [item.tolist() if getattr(item, "ndim", 1) == 0 and hasattr(item, "tolist") else item for item in listed]


def _check_kind(what: str, given: Any) -> None:
    """Refuse what one can iterate over, but what holds no prompts in order."""
    kind = type(given).__name__
    if _is_message(given) or (isinstance(given, list | tuple) and any(map(_is_message, given))):
        raise BayesKLRLError(
            f"{what} holds messages, a conversation, which is not a prompt yet. Make a text of each conversation: "
            f"{_TEMPLATE}."
        )
    if isinstance(given, Mapping) and type(given) is dict:
        cure = (
            'Give its ids alone, encoded["input_ids"].' if "input_ids" in given else "Give a list of its texts or ids."
        )
        raise BayesKLRLError(f"{what} is a plain dict with the keys {list(given)}, not a list. {cure}")
    if isinstance(given, Mapping):
        raise BayesKLRLError(
            f"{what} is a {kind} with the keys {list(given)}. Of a mapping only what a tokenizer returns is read, a "
            f"{_TOKENIZER_OUTPUT} with 'input_ids'. Give a list of texts or token ids."
        )
    if _TABLES & _names(given):
        column = next(iter(getattr(given, "columns", ())), "prompt")
        raise BayesKLRLError(
            f"{what} is a {kind}, a table, of which it is not clear which column is meant. Give the column: "
            f"df[{column!r}].tolist()."
        )
    if isinstance(given, Set):
        raise BayesKLRLError(f"{what} is a {kind}, which has no order. Give a list.")
    if isinstance(given, bytes | bytearray | memoryview):
        raise BayesKLRLError(
            f"{what} is {kind}, which is neither text nor token ids. Decode it to a text: prompt.decode('utf-8')."
        )
    if isinstance(given, Iterator):
        raise BayesKLRLError(f"{what} is a {kind}, which can be read only once. Make a list of it: list(prompts).")


def _unpadded(encoded: Any) -> list[Any]:
    """Return the ids of a tokenizer's output, the list of one prompt or one list per prompt, without padding."""
    ids = _as_list("encoded['input_ids']", encoded["input_ids"])
    rows = [ids] if ids and all(map(_is_id, ids)) else [_as_list("encoded['input_ids']", row) for row in ids]
    masks = _masks(encoded, rows)
    if masks is not None:
        if len(masks) != len(rows):
            raise _misfit(f"{len(masks)} rows for {len(rows)} prompts")
        rows = [_kept(p, row, mask) for p, (row, mask) in enumerate(zip(rows, masks, strict=True))]
    return rows[0] if ids and all(map(_is_id, ids)) else rows


def _masks(encoded: Any, rows: list[Any]) -> list[Any] | None:
    """Return the rows of the attention mask, or those that a fast tokenizer remembers; None if there is neither."""
    if "attention_mask" in encoded:
        mask = _as_list("encoded['attention_mask']", encoded["attention_mask"])
        flat = bool(mask) and all(isinstance(entry, int) for entry in mask)
        return [mask] if flat else [_as_list("encoded['attention_mask']", row) for row in mask]
    remembered = [list(each.attention_mask) for each in getattr(encoded, "encodings", None) or []]
    same = [len(row) for row in rows] == [len(mask) for mask in remembered]
    return remembered if same else None


def _kept(p: int, row: list[int], mask: list[int]) -> list[int]:
    """Return a prompt's ids where its attention mask is 1, which must be all but one end."""
    if len(mask) != len(row):
        raise _misfit(f"{len(mask)} entries for the {len(row)} ids of prompt {p}")
    if any(entry not in (0, 1) for entry in mask):
        raise _misfit(f"the entries {mask} for prompt {p}; an entry is 0 or 1")
    ids = [token for token, inside in zip(row, mask, strict=True) if inside]
    start = mask.index(1) if ids else 0
    ends = (start, len(mask) - start - len(ids))
    if min(ends) > 0 or mask[start : start + len(ids)] != [1] * len(ids):
        raise BayesKLRLError(
            f"The attention_mask of prompt {p} is {mask}, which is neither left nor right padding. A model here reads a whole "
            "prompt: take out of input_ids what is not to be read, and give lists of token ids."
        )
    return ids


def _misfit(problem: str) -> BayesKLRLError:
    """Return the error about an attention mask that does not fit its ids."""
    return BayesKLRLError(
        f"The attention_mask of the prompts has {problem}. Give the tokenizer's output as it is, or lists of token ids."
    )


def _made_by_tokenizer(given: Any) -> bool:
    """Return whether this is what a Hugging Face tokenizer returns; told by the name of its class, without transformers."""
    return _TOKENIZER_OUTPUT in _names(given) and "input_ids" in given


def _names(given: Any) -> set[str]:
    """Return the names of an object's class and of the classes that it inherits from."""
    return {kind.__name__ for kind in type(given).__mro__}


def _is_message(item: object) -> bool:
    """Return whether this is a message of a conversation."""
    return isinstance(item, Mapping) and "role" in item


def _is_id(item: object) -> bool:
    """Return whether something can be a token id."""
    return isinstance(item, int | np.integer) and not isinstance(item, bool)
