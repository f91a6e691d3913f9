"""Loading and saving of checkpoints for JAX: from safetensors to a parameter tree and back, without torch.

Every expected tensor must exist in its shape, and no other one may. A checkpoint with missing weights is an error; they are
not filled with random numbers. A checkpoint with additional weights belongs to another model, and is an error too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from bayes_klrl.errors import CheckpointError
from bayes_klrl.models.checkpoint_files import (
    TOKENIZER_FILES,
    check_has_weights,
    eos_union,
    not_finite_error,
    own_entries,
    read_object,
    shipped_folder,
    shipped_names,
    weight_files,
)
from bayes_klrl.models.jax_lm.config import architecture_of
from bayes_klrl.models.jax_lm.forward import Architecture, Parameters
from bayes_klrl.whole_files import whole_folder

__all__ = ["check_parameters", "load", "save"]

BUFFERS = re.compile(r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")
"""Names of constants that old versions saved with the weights: causal masks and rotary frequencies."""


def load(name_or_folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], Any | None]:
    """Return parameters (float32), configuration and tokenizer (None if the folder has none)."""
    if not isinstance(name_or_folder, str | os.PathLike):
        raise CheckpointError(f"A model is given as a folder or the name of a shipped model; got {name_or_folder!r}.")
    folder = found_folder(os.fspath(name_or_folder))
    check_has_weights(folder)
    config = read_object(folder / "config.json")
    architecture = architecture_of(config)
    tensors = read_tensors(folder)
    check_numbers(folder, tensors)
    generation = folder / "generation_config.json"
    if generation.is_file():  # nothing else of it is read: it says how `generate` samples
        config["eos_token_id"] = eos_union(config.get("eos_token_id"), read_object(generation).get("eos_token_id"))
    try:
        parameters = parameter_tree(architecture, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"The weights in {str(folder)!r} do not fit: {error}") from None
    return parameters, config, load_tokenizer(folder)


def check_numbers(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse NaN and infinite weights."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise not_finite_error(name, str(folder))


def found_folder(name: str) -> Path:
    """Return the folder of that name, else of the shipped model of that name. Nothing is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    if name in shipped_names():
        return shipped_folder() / name
    raise CheckpointError(
        f"No folder and no shipped model is called {name!r}. Shipped: {', '.join(shipped_names())}. JaxLM downloads "
        "nothing: for a hub id, bk.TorchLM.from_pretrained(id).save_pretrained(folder) first, and load the folder."
    )


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a folder's safetensors files as float32."""
    tensors: dict[str, np.ndarray] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="flax") as file:
                tensors |= {name: np.asarray(file.get_tensor(name), dtype=np.float32) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # SafetensorError and other errors that broken files cause
            raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    return tensors


def parameter_tree(architecture: Architecture, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return a checkpoint's tensors as a parameter tree, layers stacked.

    Raises
    ------
    CheckpointError
        If a tensor is missing, left over, or does not have the shape of the configuration.
    """
    prefix = "transformer." if architecture.rope is None else "model."
    given = {name.removeprefix(prefix): array for name, array in tensors.items() if not BUFFERS.fullmatch(name)}
    expected = expected_shapes(architecture)
    drop_tied_head(architecture, given)
    if missing := sorted(expected.keys() - given.keys()):
        raise CheckpointError(
            f"{len(missing)} of the model's weights are missing ({', '.join(missing[:3])}, ...). Is the download "
            "complete, and does config.json belong to it?"
        )
    if extra := sorted(given.keys() - expected.keys()):
        raise CheckpointError(
            f"There are {len(extra)} weights that a model of this configuration does not have ({', '.join(extra[:3])}, ...). "
            "Does config.json belong to another model, or is this the folder of an adapter?"
        )
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise CheckpointError(f"{name} has shape {given[name].shape}; by the configuration it must be {shape}.")
    outer = {name: jnp.asarray(given[stored]) for name, stored in outer_names(architecture).items()}
    layers = {
        name: jnp.asarray(np.stack([given[layer_name(architecture, i, name)] for i in range(architecture.num_layers)]))
        for name in layer_shapes(architecture)
    }
    return {"outer": outer, "layers": layers}


def drop_tied_head(architecture: Architecture, given: dict[str, np.ndarray]) -> None:
    """Remove the second copy of the embedding; refuse one that differs."""
    if architecture.tied and "lm_head.weight" in given:
        head, embedding = given.pop("lm_head.weight"), given.get(outer_names(architecture)["tokens"])
        if embedding is not None and not np.array_equal(head, embedding):
            raise CheckpointError(
                "The configuration has tie_word_embeddings = True but lm_head.weight differs from the embedding; "
                "supported: equal ones, or tie_word_embeddings = False."
            )


def check_parameters(architecture: Architecture, parameters: Parameters) -> None:
    """Refuse a parameter tree that does not fit this architecture; its arrays may be traced."""
    shapes = {"outer": outer_shapes(architecture), "layers": {}}
    shapes["layers"] = {name: (architecture.num_layers, *shape) for name, shape in layer_shapes(architecture).items()}
    if not isinstance(parameters, Mapping) or not all(isinstance(part, Mapping) for part in parameters.values()):
        raise CheckpointError(
            f"Parameters are a tree of arrays by name, like `parameters` of a loaded JaxLM; got a {type(parameters).__name__}."
        )
    given = {part: {name: tuple(array.shape) for name, array in dict(parameters[part]).items()} for part in parameters}
    if given != shapes:
        differing = [
            f"{part}: {name}"
            for part in given.keys() | shapes.keys()
            for name in given.get(part, {}).keys() | shapes.get(part, {}).keys()
            if given.get(part, {}).get(name) != shapes.get(part, {}).get(name)
        ]
        raise CheckpointError(
            f"The parameters do not fit the configuration: {', '.join(sorted(differing)[:3])} are missing, left over, "
            "or of another shape."
        )


def named_tensors(architecture: Architecture, parameters: Parameters) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor with its name in transformers."""
    prefix = "transformer." if architecture.rope is None else "model."
    for name, stored in outer_names(architecture).items():
        yield stored if stored == "lm_head.weight" else prefix + stored, np.asarray(parameters["outer"][name])
    for name in layer_shapes(architecture):
        for index, array in enumerate(np.asarray(parameters["layers"][name])):
            yield prefix + layer_name(architecture, index, name), np.ascontiguousarray(array)


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, by its name in the checkpoint without the prefix."""
    names, shapes = outer_names(architecture), outer_shapes(architecture)
    layers = layer_shapes(architecture)
    return {names[name]: shape for name, shape in shapes.items()} | {
        layer_name(architecture, index, name): shape
        for index in range(architecture.num_layers)
        for name, shape in layers.items()
    }


def outer_names(architecture: Architecture) -> dict[str, str]:
    """Return the name in the checkpoint of each tensor outside the layers, without the prefix."""
    if architecture.rope is None:
        names = {"tokens": "wte.weight", "positions": "wpe.weight"}
        names |= {"final_norm.weight": "ln_f.weight", "final_norm.bias": "ln_f.bias"}
    else:
        names = {"tokens": "embed_tokens.weight", "final_norm.weight": "norm.weight"}
    return names if architecture.tied else names | {"head.weight": "lm_head.weight"}


def outer_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors outside the layers."""
    width = architecture.hidden_size
    special: dict[str, tuple[int, ...]] = {
        "tokens": (architecture.vocab_size, width),
        "positions": (architecture.context_length, width),
        "head.weight": (architecture.vocab_size, width),
    }
    return {name: special.get(name, (width,)) for name in outer_names(architecture)}


def layer_name(architecture: Architecture, index: int, name: str) -> str:
    """Return the name in the checkpoint of one layer's tensor, without the prefix."""
    return f"{'h' if architecture.rope is None else 'layers'}.{index}.{name}"


def layer_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's tensors, by their names within the layer."""
    width, inner = architecture.hidden_size, architecture.inner_size
    if architecture.rope is None:
        matrices: dict[str, tuple[int, ...]] = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }
        biases: dict[str, tuple[int, ...]] = {f"{name}.bias": (shape[1],) for name, shape in matrices.items()}
        norms: dict[str, tuple[int, ...]] = {
            f"{name}.{part}": (width,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")
        }
        return {f"{name}.weight": shape for name, shape in matrices.items()} | biases | norms
    size = architecture.head_size
    rows = {"q": architecture.num_heads * size, "k": architecture.num_key_heads * size}
    rows["v"] = rows["k"]
    linears = {f"self_attn.{name}_proj": (rows[name], width, architecture.input_bias) for name in "qkv"}
    linears["self_attn.o_proj"] = (width, rows["q"], architecture.output_bias)
    linears |= {f"mlp.{name}_proj": (inner, width, architecture.mlp_bias) for name in ("gate", "up")}
    linears["mlp.down_proj"] = (width, inner, architecture.mlp_bias)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": linear[:2] for name, linear in linears.items()}
    shapes |= {f"{name}.bias": linear[:1] for name, linear in linears.items() if linear[2]}
    shapes |= {f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    if architecture.head_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
    return shapes


def load_tokenizer(folder: Path) -> Any | None:
    """Return the tokenizer, or None if the folder has no file of one.

    It uses the one class of transformers that reads tokenizer.json without torch; AutoTokenizer imports torch.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} has a tokenizer but no tokenizer.json, the only kind that is read without torch. Write "
            "one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raise bare Exceptions, too
        raise CheckpointError(f"The tokenizer of {str(folder)!r} cannot be loaded: {error}") from error


def save(
    parameters: Parameters,
    config: Mapping[str, Any],
    tokenizer: Any | None,
    folder: Path,
    eos_token_ids: frozenset[int],
    temperature: float,
) -> None:
    """Write a folder in Hugging Face's format; see `JaxLM.save_pretrained`."""
    entries = own_entries(eos_token_ids, temperature)
    tensors = dict(named_tensors(architecture_of(config), parameters))
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {key: config.get(key) for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    if entries["eos_token_id"] is not None:
        sampling["eos_token_id"] = entries["eos_token_id"]
    # an index of an earlier model would point to its own files
    with whole_folder(folder, replaces="model*.safetensors*") as unfinished:
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        write_json(unfinished / "config.json", kept | {"dtype": "float32"} | entries)
        write_json(unfinished / "generation_config.json", sampling)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
