"""A model without its weights: shapes on torch's device "meta", from the configuration alone, for plans (`bk.plan`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from bayes_klrl.errors import CheckpointError
from bayes_klrl.models.torch_lm.sources.located import gguf_file, load_tokenizer, located, precision_of, quiet

__all__ = ["without_weights"]


def without_weights(name_or_folder: str | os.PathLike[str], dtype: torch.dtype | str | None) -> tuple[Any, Any | None]:
    """Return the model of a configuration on the device "meta", and its tokenizer; see `TorchLM.from_pretrained`.

    A folder needs a config.json and no weights. Of a hub id only the configuration and the tokenizer are downloaded.

    Raises
    ------
    CheckpointError
        If there is no such configuration, or the folder holds an adapter.
    """
    precision, place = precision_of(dtype), located(name_or_folder)
    options: dict[str, Any] = {"local_files_only": True} if isinstance(place, Path) else {}
    if isinstance(place, Path):
        if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
            raise CheckpointError(
                f"{str(place)!r} holds an adapter. Plan with its base model, and with bk.SVI(adapter='lora') for a training."
            )
        file = place if place.is_file() else gguf_file(place)
        if file is not None:
            place, options["gguf_file"] = file.parent, file.name
    source = os.fspath(place)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
            factory: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            with torch.device("meta"):
                model = factory.from_config(config, dtype=precision, trust_remote_code=False)
        except Exception as error:  # OSError, KeyError, ValueError and others, caused by broken files
            raise CheckpointError(f"{source!r} has no configuration of a language model: {error}") from error
        if isinstance(place, Path) and (place / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source, **options)
        return model, load_tokenizer(source, **options)
