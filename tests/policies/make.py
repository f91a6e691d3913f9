"""Train a tiny model with TRL's trainers and keep what they write: `python -m tests.policies.make` where TRL is installed.

`make trl` installs it apart. The base is a Llama of one layer, 8 dimensions and 16 words, so that every completion of three
words can be counted. Each run is a folder as its trainer leaves it, with two checkpoints, less the files that are pickles
(optimizer, random state, arguments), which nobody reads here, and the model cards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

import bayes_klrl as bk

HERE = Path(__file__).parent
WORDS = ["the", "a", "sun", "rain", "moon", "day", "night", "is", "was", "shines", "falls", "bright", "dark", "and"]
PROMPTS = ["the day is", "a night was"]
NUM_STEPS, SAVE_STEPS = 6, 3
BETA = 0.3  # of the trainers that are given one; alpha of the posterior


def sunny(completions: list[str], **kwargs: Any) -> list[float]:
    """The reward, in TRL's signature: how often a completion says "sun" or "bright"."""
    return [float(sum(word in ("sun", "bright") for word in text.split())) for text in completions]


def posterior_of(base: Path) -> bk.Posterior:
    """The posterior that RLOO with this beta is trained towards."""
    prior = bk.TorchLM.from_pretrained(base)
    return bk.Posterior(prior, bk.Reward(sunny, alpha=BETA, bounds=(0, 3)), prompts=PROMPTS, max_new_tokens=3)


def write_base(folder: Path) -> None:
    """The model that all runs start from."""
    import tokenizers
    import transformers as hf

    ids = {word: number for number, word in enumerate(["<eos>", "<pad>", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    config = hf.LlamaConfig(
        vocab_size=len(ids),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.35)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(folder: str, **options: Any) -> dict[str, Any]:
    """The options that all trainers share."""
    return {
        "output_dir": folder,
        "max_steps": NUM_STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "learning_rate": 0.03,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 0,
    } | options


def lora() -> Any:
    """An adapter of rank 1."""
    import peft

    return peft.LoraConfig(r=1, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def sft(folder: str, model: Any, **options: Any) -> Any:
    """Supervised fine-tuning on sentences."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"text": f"{prompt} {end}"} for prompt in PROMPTS for end in ("bright and dark", "dark", "sun and rain")
    ] * 32
    return SFTTrainer(model, args=SFTConfig(**settings(folder)), train_dataset=Dataset.from_list(rows), **options)


def dpo(folder: str, model: Any, **options: Any) -> Any:
    """Direct preference optimisation: bright is better than dark."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [(" bright", " dark"), (" sun and sun", " rain and rain")]
    rows = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt in PROMPTS for good, bad in pairs] * 32
    args = DPOConfig(**settings(folder, beta=BETA))
    return DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), **options)


def online(
    config: str,
    trainer: str,
    folder: str,
    model: Any,
    beta: float,
    options: dict[str, Any],
    learning_rate: float = 0.03,
) -> Any:
    """A trainer that draws its own completions, with the reward of this file."""
    import trl
    from datasets import Dataset

    sampling = {"num_generations": 16, "max_completion_length": 3, "temperature": 1.0}
    args = getattr(trl, config)(**settings(folder, beta=beta, learning_rate=learning_rate, **sampling))
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS] * 64)
    return getattr(trl, trainer)(model, reward_funcs=sunny, args=args, train_dataset=rows, **options)


def rloo(folder: str, model: Any, **options: Any) -> Any:
    """REINFORCE, leave-one-out."""
    return online("RLOOConfig", "RLOOTrainer", folder, model, BETA, options)


def grpo(folder: str, model: Any, **options: Any) -> Any:
    """GRPO with the same beta."""
    return online("GRPOConfig", "GRPOTrainer", folder, model, BETA, options)


def grpo_without_kl(folder: str, model: Any, **options: Any) -> Any:
    """GRPO as it is by default: beta = 0."""
    return online("GRPOConfig", "GRPOTrainer", folder, model, 0.0, options)


TRAINERS: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo, "rloo": rloo, "grpo": grpo}


def train(trainer: Any) -> None:
    """Train, and leave the model beside its checkpoints, as scripts of TRL do."""
    trainer.train()
    trainer.save_model()


def rloo_on_sft(folder: str, model: str) -> Any:
    """RLOO that moves little, from a model that has moved far before: the log says little, the KL to the base much."""
    return online("RLOOConfig", "RLOOTrainer", folder, model, BETA, {}, learning_rate=0.002)


def rloo_after_sft(folder: str, base: str, adapter: str) -> Any:
    """RLOO that goes on from an adapter: its reference is the base with that adapter, not the base."""
    import peft
    import transformers as hf

    model = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    return rloo(folder, model, processing_class=tokenizer)


def make(folder: Path) -> None:
    """Make the base and every run below a folder; adapters name their base by its path from there."""
    folder.mkdir(parents=True, exist_ok=True)
    with chdir(folder):
        write_base(Path("base"))
        for name, trainer in TRAINERS.items():
            train(trainer(name, "base"))
            train(trainer(f"{name}_lora", "base", peft_config=lora()))
        train(grpo_without_kl("grpo_beta0", "base"))
        train(rloo_on_sft("rloo_on_sft", "sft"))
        train(rloo_after_sft("rloo_after_sft", "base", "sft_lora"))


def strip(folder: Path) -> None:
    """Remove pickles, model cards, and tokenizers inside checkpoints, which are the base's."""
    for path in [path for path in folder.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".md"}]:
        path.unlink()
    for checkpoint in folder.rglob("checkpoint-*"):
        for path in checkpoint.glob("*token*"):
            path.unlink()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for run in [path for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__"]:
        shutil.rmtree(run)
    make(HERE)
    strip(HERE)
    total = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{total / 1000:.0f} kB")
