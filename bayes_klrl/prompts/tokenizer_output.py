"""The output of a Hugging Face tokenizer as prompts: its ids, without padding."""

from __future__ import annotations

from typing import Any

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.kinds import TOKENIZER_OUTPUT, as_list, class_names, is_id

__all__ = ["made_by_tokenizer", "unpadded"]


def made_by_tokenizer(given: Any) -> bool:
    """Return whether this is what a Hugging Face tokenizer returns; told by the name of its class, without transformers."""
    return TOKENIZER_OUTPUT in class_names(given) and "input_ids" in given


def unpadded(encoded: Any) -> list[Any]:
    """Return the ids of a tokenizer's output, the list of one prompt or one list per prompt, without padding."""
    ids = as_list("encoded['input_ids']", encoded["input_ids"])
    rows = [ids] if ids and all(map(is_id, ids)) else [as_list("encoded['input_ids']", row) for row in ids]
    masks = _masks(encoded, rows)
    if masks is not None:
        if len(masks) != len(rows):
            raise _misfit(f"{len(masks)} rows for {len(rows)} prompts")
        rows = [_kept(p, row, mask) for p, (row, mask) in enumerate(zip(rows, masks, strict=True))]
    return rows[0] if ids and all(map(is_id, ids)) else rows


def _masks(encoded: Any, rows: list[Any]) -> list[Any] | None:
    """Return the rows of the attention mask, or those that a fast tokenizer remembers; None if there is neither."""
    if "attention_mask" in encoded:
        mask = as_list("encoded['attention_mask']", encoded["attention_mask"])
        flat = bool(mask) and all(isinstance(entry, int) for entry in mask)
        return [mask] if flat else [as_list("encoded['attention_mask']", row) for row in mask]
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
