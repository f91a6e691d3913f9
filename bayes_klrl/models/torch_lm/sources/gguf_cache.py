"""GGUF files, dequantised once: the cache of their weights in float32.

Reading a GGUF file through transformers takes 20 seconds for 135 million parameters, nearly all of it for dequantising. So
the model is written into a cache, as a Hugging Face folder with safetensors, and is read from there the next time. The cache
is the folder that the environment variable BAYES_KLRL_CACHE names, else `bayes_klrl` in XDG_CACHE_HOME, else
`~/.cache/bayes_klrl`; it may be deleted at any time.

An entry belongs to one file: to its name, its size, its time of change, the checksum of its first and last mebibyte, and the
version of transformers that read it. It is written whole or not at all, and beside its files stand their checksums: an entry
that was damaged since is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from bayes_klrl.errors import OutputError
from bayes_klrl.whole_files import whole_folder

__all__ = ["CACHE_VARIABLE", "cache_folder", "dequantised_folder"]

CACHE_VARIABLE = "BAYES_KLRL_CACHE"
"""The environment variable that names the folder of the cache."""

_CHECKSUMS = "checksums.json"
_PART = 2**20


def cache_folder() -> Path:
    """Return the folder of the cache; it need not exist."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    above = os.environ.get("XDG_CACHE_HOME")
    return (Path(above).expanduser() if above else Path.home() / ".cache") / "bayes_klrl"


def dequantised_folder(file: Path, load: Callable[[], tuple[Any, Any | None]]) -> Path | None:
    """Return the folder in the cache with the model of a GGUF file, which is written there if it is not there yet.

    Parameters
    ----------
    file
        The GGUF file.
    load
        A function that reads the file and returns the model in float32 and its tokenizer.

    Returns
    -------
    The folder; None, with a warning, if the cache cannot be written.
    """
    place = cache_folder() / "gguf" / f"{file.stem}-{fingerprint(file)}"
    if is_whole(place):
        return place
    try:
        shutil.rmtree(place, ignore_errors=True)  # damaged, or of a process that was killed
        model, tokenizer = load()
        with whole_folder(place) as unfinished:
            model.save_pretrained(unfinished, max_shard_size="5GB")
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
            (unfinished / _CHECKSUMS).write_text(json.dumps(checksums(unfinished), indent=2, sort_keys=True) + "\n")
    except OutputError as error:
        if is_whole(place):  # another process was faster
            return place
        warnings.warn(
            f"The model in {file.name!r} is dequantised each time it is loaded, since the cache cannot be written: {error} "
            f"Name another folder in the environment variable {CACHE_VARIABLE}.",
            stacklevel=2,
        )
        return None
    return place


def fingerprint(file: Path) -> str:
    """Return a short name for the content of a large file, without reading all of it."""
    stat = file.stat()
    content = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {transformers.__version__}".encode())
    with file.open("rb") as opened:
        content.update(opened.read(_PART))
        opened.seek(max(0, stat.st_size - _PART))
        content.update(opened.read(_PART))
    return content.hexdigest()[:16]


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder but the one with the checksums, by its name."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != _CHECKSUMS:
            with file.open("rb") as opened:
                found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def is_whole(folder: Path) -> bool:
    """Return whether an entry is there, and its files have the content that they were written with."""
    try:
        written = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        return bool(written) and written == checksums(folder)
    except (OSError, ValueError):
        return False
