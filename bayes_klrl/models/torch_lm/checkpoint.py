"""Loading and saving of torch checkpoints: folders, shipped names and hub ids.

Only safetensor(s) (and GGUF) are read, never pickles. Code that comes with a model is never run. A checkpoint with missing
weights is an error; the missing weights are not filled with random numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from bayes_klrl.errors import CheckpointError, warn_caller
from bayes_klrl.models.checkpoint_files import (
    check_has_weights,
    not_finite_error,
    own_entries,
    read_object,
)
from bayes_klrl.models.torch_lm.adapter_kinds.known import check_is_whole_in_its_folder
from bayes_klrl.models.torch_lm.adapters import (
    can_be_merged,
    frozen,
    import_peft,
    leaves_base_alone,
    merged,
    quiet_peft,
)
from bayes_klrl.models.torch_lm.network import decoder_start
from bayes_klrl.models.torch_lm.probes import random_text
from bayes_klrl.models.torch_lm.self_check import apart, tolerance
from bayes_klrl.models.torch_lm.sources.gguf_cache import dequantised_folder
from bayes_klrl.models.torch_lm.sources.located import gguf_file, load_tokenizer, located, precision_of, quiet
from bayes_klrl.whole_files import whole_folder

__all__ = ["check_written", "keep_adapter", "load", "save", "save_adapter"]

_CARD = "README.md"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load(
    name_or_folder: str | os.PathLike[str],
    dtype: torch.dtype | str | None,
    *,
    base: nn.Module | None = None,
    revision: str | None = None,
) -> tuple[Any, Any | None]:
    """Return the model and its tokenizer (None if the folder has none); see `TorchLM.from_pretrained`.

    Parameters
    ----------
    name_or_folder, dtype
        The model and its precision, as for `TorchLM.from_pretrained`.
    base
        The model of an adapter whose folder does not name one; it does not change.
    revision
        The revision of a model on the hub; None: its newest one.
    """
    precision, source = precision_of(dtype), located(name_or_folder)
    with quiet():
        if not isinstance(source, Path):
            return load_model(source, precision, **({} if revision is None else {"revision": revision}))
        return load_gguf(source, precision) if source.is_file() else load_folder(source, precision, base)


def load_folder(folder: Path, dtype: torch.dtype, base: nn.Module | None = None) -> tuple[Any, Any | None]:
    """Return the model and tokenizer of a local folder with an adapter, a GGUF file or safetensors."""
    if is_adapter(folder):
        return load_adapter(folder, dtype, base)
    if (file := gguf_file(folder)) is not None:
        return load_gguf(file, dtype)
    check_has_weights(folder)
    if (folder / "adapter_config.json").is_file():
        base = adapter_configuration(folder).get("base_model_name_or_path")
        if not (base and Path(base).is_dir() and Path(base).resolve() == folder.resolve()):
            raise CheckpointError(
                f"{str(folder)!r} holds both the weights of a model and an adapter, which transformers would add to them. If "
                "the adapter is merged already, remove adapter_config.json and adapter_model.safetensors; otherwise move them "
                "to a folder of their own."
            )
    generation = folder / "generation_config.json"
    if generation.is_file():
        read_object(generation)  # transformers passes over one that it cannot read, and with it over the EOS ids
    return load_model(str(folder), dtype, local_files_only=True)


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any | None]:
    """Return the model and tokenizer of a GGUF file, dequantised now or earlier (`gguf_cache`)."""

    def read(precision: torch.dtype = torch.float32) -> tuple[Any, Any | None]:
        model, tokenizer = load_model(str(file.parent), precision, gguf_file=file.name, local_files_only=True)
        return dequantised(model), tokenizer

    folder = dequantised_folder(file, read)
    if folder is None:
        return read(dtype)
    model, tokenizer = load_model(str(folder), dtype, local_files_only=True)
    # what is saved beside an adapter is where the model comes from, which outlives the cache
    model.config._name_or_path = model.name_or_path = str(file)
    return model, tokenizer


def dequantised(model: Any) -> Any:
    """Return a model of dequantised weights without the notes of its quantisation: transformers would refuse to save it."""
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    return model


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model; it may hold the base model's config.json too."""
    weights = (path.name for path in folder.glob("*.safetensors"))
    return (folder / "adapter_config.json").is_file() and all(name.startswith("adapter_") for name in weights)


def load_model(source: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any | None]:
    """Return a model and its tokenizer; raise `CheckpointError` if a weight is missing or not finite."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        factory: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        formats = {} if "gguf_file" in options else {"use_safetensors": True}
        model, report = factory.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **formats, **options
        )
    except Exception as error:  # OSError, SafetensorError, KeyError, RuntimeError and others, caused by broken files
        raise CheckpointError(f"{source!r} cannot be loaded as a language model: {error}") from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise CheckpointError(
            f"{source!r} lacks {len(report['missing_keys'])} of the model's weights ({names}, ...); they would "
            "have been random numbers. Is it a model without a language modelling head, or an incomplete download?"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise not_finite_error(name, source)
    return model, load_tokenizer(source, **options)


def load_adapter(folder: Path, dtype: torch.dtype, base: nn.Module | None = None) -> tuple[Any, Any | None]:
    """Return the base model that an adapter folder names (`base` if it names none) with the adapter on it."""
    peft = import_peft()
    config = adapter_configuration(folder)
    check_is_whole_in_its_folder(config, str(folder))
    if (kind := config.get("peft_type")) not in list(peft.PeftType):
        raise CheckpointError(
            f"The adapter_config.json in {str(folder)!r} has peft_type {kind!r}, which is no kind of adapter that the "
            f"installed peft {peft.__version__} knows. Install the peft that wrote it, or put the right peft_type there."
        )
    name = config.get("base_model_name_or_path")
    if name and Path(name).is_dir() and Path(name).resolve() == folder.resolve():
        raise CheckpointError(f"The adapter in {str(folder)!r} names its own folder as its base model. Name the base.")
    by_hand = "load that model as `base`, and use TorchLM(peft.PeftModel.from_pretrained(base, folder))"
    if not (folder / ADAPTER_WEIGHTS).is_file():
        cure = "save the adapter again with safe_serialization=True" if any(folder.glob("*.bin")) else "is it complete?"
        raise CheckpointError(
            f"The adapter in {str(folder)!r} has no {ADAPTER_WEIGHTS}, the only kind that is read: {cure}"
        )
    if name:
        try:
            model, tokenizer = load(base_source(name, folder), dtype, revision=config.get("revision"))
        except CheckpointError as error:
            raise CheckpointError(
                f"The adapter in {str(folder)!r} belongs to the model {name!r}, which cannot be loaded. If it has moved, "
                f"{by_hand}. ({error})"
            ) from error
    elif base is not None:
        from peft import PeftConfig

        model, tokenizer = frozen(base, shared=leaves_base_alone(PeftConfig.from_pretrained(str(folder)))), None
    else:
        raise CheckpointError(f"The adapter in {str(folder)!r} does not say which model it belongs to: {by_hand}.")
    onto = repr(name) if name else "(the prior, since the folder names no model)"
    try:
        with quiet_peft():
            wrapped = peft.PeftModel.from_pretrained(model, str(folder))
            misfits = misfitting_tensors(peft, wrapped, folder)
    except KeyError as error:  # peft's, for a whole layer that was trained
        misfits = [f"the file lacks 1 tensor(s) ({error.args[0]})"]
    except Exception as error:  # as above: peft passes on all errors of torch and safetensors
        raise CheckpointError(f"The adapter in {str(folder)!r} does not fit its base {onto}: {error}") from error
    if misfits:
        raise CheckpointError(
            f"The adapter in {str(folder)!r} does not fit its base {onto}: "
            + "; ".join(misfits)
            + ". The rest would be "
            "another policy than the one that was trained. Use the base that it was trained on, and its whole file."
        )
    for parameter_name, parameter in wrapped.named_parameters():
        if not parameter.isfinite().all():
            raise not_finite_error(parameter_name, str(folder))
    return wrapped, load_tokenizer(str(folder), local_files_only=True) or tokenizer


def base_source(name: str, folder: Path) -> str:
    """Return where the base of an adapter is: the name itself, or the folder of this relative path above the adapter's.

    Trainers write the path that they were given, relative to where they were started. A run that was moved together with its
    base still has it at that path from one of the folders above.
    """
    if Path(name).is_dir() or Path(name).is_absolute():
        return name
    above = (parent / name for parent in folder.resolve().parents)
    return str(next((path for path in above if (path / "config.json").is_file()), name))


def adapter_configuration(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The adapter_config.json in {str(folder)!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"The adapter_config.json in {str(folder)!r} holds {config!r}, no configuration.")
    return config


def misfitting_tensors(peft: Any, wrapped: Any, folder: Path) -> list[str]:
    """Return what is missing from an adapter's file, and what is in it without a place in the model, three names each."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        names = set(file.keys())
    config = wrapped.peft_config["default"]
    if config.is_prompt_learning:  # one tensor, which peft itself demands
        return []
    result = wrapped.load_adapter(str(folder), "default")  # from_pretrained has done the same, and reports nothing
    # weights that peft shares between layers, or makes anew from others, are in no file
    shared = ("vblora_vector_bank", "prompt_encoder", ".tinylora_v.", ".unilora_theta_d.")
    missing = {key for key in result.missing_keys if not any(part in key for part in shared)}
    whole = tuple(getattr(config, "modules_to_save", None) or ())
    expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False) if whole else {}
    missing |= {key for key in expected.keys() - names if any(f".{part}." in f".{key}." for part in whole)}
    found = (("the file lacks", missing), ("the model has no place for", set(result.unexpected_keys)))
    return [f"{verb} {len(keys)} tensor(s) ({', '.join(sorted(keys)[:3])})" for verb, keys in found if keys]


def save(
    module: nn.Module,
    tokenizer: Any | None,
    folder: Path,
    eos_token_ids: frozenset[int],
    temperature: float,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder in Hugging Face's format, adapters merged; see `TorchLM.save_pretrained`.

    An adapter that cannot be merged is written as an adapter, if it says which model it belongs to.
    """
    if can_be_merged(module) and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds an adapter, and would then hold a model beside it, so that one is added to the other at "
            "loading. Save into an empty folder."
        )
    if not can_be_merged(module):
        with quiet():
            save_adapter(module, folder, tokenizer)
        return
    with quiet(), whole_folder(folder, replaces="model*.safetensors*") as unfinished:
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        save_model(merged(module), unfinished, eos_token_ids, temperature, max_shard_size)


def save_model(
    model: Any, folder: Path, eos_token_ids: frozenset[int], temperature: float, max_shard_size: int | str
) -> None:
    """Write a model without adapters, with the EOS ids and the temperature in its configurations."""
    entries = own_entries(eos_token_ids, temperature)
    with weights_as_loaded(model), plain_generation_config(model):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=entries["eos_token_id"],
        bos_token_id=getattr(model.config, "bos_token_id", None),
        pad_token_id=getattr(model.config, "pad_token_id", None),
        decoder_start_token_id=decoder_start(model) if model.config.is_encoder_decoder else None,
    )
    sampling.save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) | entries
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_adapter(module: Any, folder: Path, tokenizer: Any | None) -> None:
    """Write an adapter as peft does; refuse one that does not name its base, since nothing could load it."""
    if not hasattr(module, "peft_config"):
        raise CheckpointError("This model has no adapter that could be saved apart. Save the whole model.")
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds a whole model, and would then hold an adapter of another one beside it, so that nothing "
            "could load it. Save the adapter into an empty folder."
        )
    for config in module.peft_config.values():
        if not config.base_model_name_or_path:
            raise CheckpointError(
                f"An adapter of {type(config).__name__} is to be saved without its base model, and it does not say which "
                "model it belongs to. Save it with lm.module.save_pretrained(folder), and load it with "
                "TorchLM(peft.PeftModel.from_pretrained(base, folder)); or save the prior, load it, and fit again."
            )
    with quiet_peft(), whole_folder(folder) as unfinished:
        if (folder / _CARD).is_file():  # peft adds to one that is there
            shutil.copy(folder / _CARD, unfinished)
        # an adapter of the head trains nothing of the base's embedding, which peft would write beside it
        module.save_pretrained(unfinished, save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
    model = module.get_base_model()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if hasattr(head, "base_layer") and getattr(model.config, "tie_word_embeddings", False):
        warn_caller(
            f"The adapter in {str(folder)!r} has a part for the head of a model whose head and embedding are one matrix. Use "
            "it unmerged (peft, TRL and bk.certify do), or save it with merged=True: peft's merge_and_unload would change the "
            "embedding too, and with it the policy."
        )


@contextmanager
def plain_generation_config(model: Any) -> Iterator[None]:
    """Replace the model's generation configuration, which transformers would check; ours is written afterwards."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def weights_as_loaded(model: Any) -> Iterator[None]:
    """Undo what RWKV does to its weights in evaluation mode (it divides them, layer by layer) while they are written."""
    body = next((part for part in model.modules() if hasattr(part, "layers_are_rescaled")), None)
    if body is None or not body.layers_are_rescaled:
        yield
        return
    model.train()
    body._rescale_layers()
    try:
        yield
    finally:
        model.eval()
        body._rescale_layers()


def keep_adapter(module: Any, folder: Path) -> Path | None:
    """Write the adapter of a model that was not saved right into a folder inside; return that folder, None without adapter."""
    if not hasattr(module, "peft_config"):
        return None
    with quiet(), quiet_peft(), whole_folder(folder / "adapter") as unfinished:
        module.save_pretrained(unfinished)
    return folder / "adapter"


def check_written(lm: Any, folder: str | os.PathLike[str]) -> None:
    """Load what was written of a `TorchLM`, and refuse it if it gives other log-probs than this model."""
    precision = next((each.dtype for each in lm.module.parameters()), torch.float32)
    own: dict[str, Any] = {"eos_token_id": lm.eos_token_ids, "temperature": lm.temperature, "dtype": precision}
    written = type(lm).from_pretrained(folder, device=lm.device, check=False, **own)
    written.rebuild(lm._ready_network())
    text = random_text(lm.vocab_size, lm.context_length)
    with torch.no_grad():
        scores, others = (each.token_log_probs(*text) for each in (lm, written))
    gap = float(apart(scores, others).max())
    if gap > tolerance(lm.module, scores):
        kept = keep_adapter(lm.module, Path(folder))
        where = "" if kept is None else f" The adapter itself is in {str(kept)!r}: use it with its base model."
        raise CheckpointError(
            f"The model in {str(folder)!r} is not the one that was saved: log-probs of single tokens differ by up to "
            f"{gap:.2g} nats after loading it again. Do not use this folder.{where}"
        )
