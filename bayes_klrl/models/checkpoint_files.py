"""Files of saved models, for every backend: shipped models, tokenizer files, our own entry in config.json.

And whether a checkpoint is whole: a trainer may be writing it at this moment. transformers writes the weights first and
trainer_state.json last.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from bayes_klrl.errors import CheckpointError

__all__ = [
    "OWN_ENTRY",
    "TOKENIZER_FILES",
    "TRAINER_STATE",
    "check_has_weights",
    "checkpoint_number",
    "eos_union",
    "not_finite_error",
    "own_entries",
    "own_options",
    "read_object",
    "shipped_folder",
    "shipped_names",
    "weight_files",
    "why_not_whole",
]

OWN_ENTRY = "bayes_klrl"
"""The entry of config.json that holds the EOS ids and the temperature, which define the distribution beside the weights."""

INDEX = "model.safetensors.index.json"
"""The file that says which shard of a large model holds which weight."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)

TRAINER_STATE = "trainer_state.json"
"""The file of a checkpoint with what its trainer logged, which is written last."""

_LARGEST_STEP = 2**63 - 1
_NEEDED_WHOLE = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    *(name for name in TOKENIZER_FILES if name.endswith(".json")),
)


def eos_union(*entries: Any) -> Any:
    """Return the EOS ids of several configurations together; None if none of them names any.

    Those of instruction-tuned checkpoints often stand in the generation configuration alone.

    Examples
    --------
    >>> eos_union(2, [2, 7]), eos_union(None, 3), eos_union(None, None)
    ([2, 7], [3], None)
    """
    known = [
        entry if isinstance(entry, list | tuple | set | frozenset) else [entry]
        for entry in entries
        if entry is not None
    ]
    return list(dict.fromkeys(token for entry in known for token in entry)) if known else None


def own_entries(eos_token_ids: Collection[int], temperature: float) -> dict[str, Any]:
    """Return the entries of config.json for sampling: `eos_token_id`, which all programs read, and our own entry."""
    eos = sorted(eos_token_ids)
    entry = eos[0] if len(eos) == 1 else eos or None
    return {"eos_token_id": entry, OWN_ENTRY: {"eos_token_id": eos, "temperature": temperature}}


def own_options(entry: Any) -> dict[str, Any]:
    """Return our own entry of a config.json as options of a language model; {} if there is none."""
    entry = {} if entry is None else entry
    if not isinstance(entry, Mapping) or not entry.keys() <= {"eos_token_id", "temperature"}:
        raise CheckpointError(
            f"The entry {OWN_ENTRY!r} of config.json may hold eos_token_id and temperature only; got {entry!r}. "
            "Remove the entry."
        )
    return dict(entry)


def shipped_folder() -> Path:
    """Return the folder of the models that come with the package."""
    return Path(str(resources.files("bayes_klrl.models"))) / "shipped"


def shipped_names() -> list[str]:
    """Return the names of the models that come with the package."""
    folder = shipped_folder()
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def check_has_weights(folder: Path) -> None:
    """Refuse a folder without config.json, or without its safetensors weights, the only kind that is read, all shards of them.

    Raises
    ------
    CheckpointError
        If one of them is missing; the message says what to do. No weight is read before.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} is not a model's folder: it has no config.json. Give the folder that save_pretrained wrote."
        )
    if not any(folder.glob("*.safetensors")):
        old = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        cure = (
            "convert its pickled weights with save_pretrained of transformers." if old else "is the download complete?"
        )
        raise CheckpointError(f"{str(folder)!r} has no safetensors weights, the only kind that is read: {cure}")
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a model's weights: model.safetensors, else the shards that the index names, else all there are.

    Raises
    ------
    CheckpointError
        If the index cannot be read or names a shard that is not there.
    """
    usual, index = folder / "model.safetensors", folder / INDEX
    if usual.is_file() or not index.is_file():  # transformers too prefers one file to an index
        return [usual] if usual.is_file() else sorted(folder.glob("*.safetensors"))
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, Mapping) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"The {INDEX} in {str(folder)!r} names no shards. Is the download complete?")
    names = sorted(set(shards.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(missing)} of the {len(names)} shards that its {INDEX} names: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Is the download complete?"
        )
    return [folder / name for name in names]


def read_object(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object; raise `CheckpointError` if it does not."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise CheckpointError(f"The {file.name} in {str(file.parent)!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"The {file.name} in {str(file.parent)!r} must hold an object; got {content!r}.")
    return content


def not_finite_error(name: str, source: str) -> CheckpointError:
    """Return the error for a tensor with NaN or infinite numbers."""
    return CheckpointError(
        f"{name} in {source!r} holds NaN or infinite numbers: the training run that wrote it has diverged. Use an "
        "earlier checkpoint."
    )


def checkpoint_number(folder: Path) -> int | None:
    """Return N of a folder checkpoint-N; None for any other name, and for an N that is too large for a step.

    Examples
    --------
    >>> checkpoint_number(Path("run/checkpoint-30")), checkpoint_number(Path("run/checkpoint-best"))
    (30, None)
    """
    prefix, _, number = folder.name.partition("-")
    if prefix != "checkpoint" or not (number.isascii() and number.isdigit()):
        return None
    return int(number) if int(number) <= _LARGEST_STEP else None


def why_not_whole(folder: Path, has_states: bool) -> str | None:
    """Return what is missing from a checkpoint, None if nothing is; no weight is read.

    Parameters
    ----------
    folder
        The checkpoint.
    has_states
        Whether checkpoints of the run have a trainer_state.json.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "it has neither config.json nor adapter_config.json, so it is being written or is no model"
    for name in (*_NEEDED_WHOLE, TRAINER_STATE):
        if (folder / name).is_file() and not is_object(folder / name):
            return f"its {name} is not whole, so it is being written or damaged"
    weights = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"its {index.name} is not whole, so it is being written or damaged"
        if missing := sorted(listed - weights):
            return f"it lacks {missing[0]}, so it is being written or damaged"
    if not weights:
        return "it has no safetensors weights, so it is being written, or they are pickles, which are not read"
    for name in sorted(weights):
        if not is_whole(folder / name):
            return f"its {name} is not whole, so it is being written or damaged"
    if has_states and not (folder / TRAINER_STATE).is_file():
        return f"it has no {TRAINER_STATE} yet, which a trainer writes last"
    return None


def is_object(file: Path) -> bool:
    """Whether a JSON file can be read to its end and holds an object, which for a model's own configuration is not empty."""
    try:
        return bool(read_object(file)) or file.name not in ("config.json", "adapter_config.json")
    except (CheckpointError, OSError, RecursionError):
        return False


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says; the header alone is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False
