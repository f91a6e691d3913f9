"""Train the adapter that ships with the gallery's `dialogue`: LoRA over the frozen SmolLM2-135M-Instruct, by SVI.

    make smollm2
    OMP_NUM_THREADS=1 python examples/train_dialogue.py run adapter

It takes 10 CPU minutes: 36 steps of 4 conversations x 8 replies, the steps as long as the first 36 of 60 would be. It goes on
from the checkpoints in the folder `run` if there are any, and writes the folder `adapter`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import bayes_klrl as bk
from bayes_klrl.gallery.data.conversations import TRAINING
from bayes_klrl.gallery.language.dialogue import posterior_of

LORA = LoraConfig(  # the upper half of the 30 blocks, and the head, which says which words the reward likes
    r=4,
    lora_alpha=8,
    lora_dropout=0.0,
    target_modules=[
        *(
            f"model.layers.{layer}.{part}"
            for layer in range(15, 30)
            for part in ("self_attn.v_proj", "self_attn.o_proj")
        ),
        *(f"model.layers.{layer}.mlp.down_proj" for layer in range(15, 30)),
        "lm_head",
    ],
    task_type="CAUSAL_LM",
)


def training_posterior() -> bk.Posterior:
    """Return the posterior of the training conversations, with the constraint relaxed to 8 nats: SVI refuses likelihood 0."""
    return posterior_of(bk.TorchLM.from_pretrained("smollm2"), TRAINING, hard=False)


def make_portable(adapter: Path) -> None:
    """Leave the two files that the gallery ships: weights in float16, and a configuration without this machine's paths."""
    weights = {name: tensor.half() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None  # the gallery puts it on the prior that it has loaded
    config["target_modules"] = sorted(config["target_modules"])
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for file in adapter.iterdir():
        if file.name not in ("adapter_model.safetensors", "adapter_config.json"):
            file.unlink()


def main() -> None:
    """Train, print every step, and write the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("adapter", type=Path)
    for name, default in (("steps", 60), ("stop", 36), ("prompts", 4), ("particles", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--relative", type=float, default=0.03)
    args = parser.parse_args()
    torch.set_num_threads(1)

    def told(record: Any, _guide: bk.LanguageModel) -> bool:
        """Print a step, and end the training after `--stop` of them."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in record.values.items())
        print(f"step {record.step}, {time.process_time():.0f} CPU s: {shown}", flush=True)
        return bool(record.step + 1 >= args.stop)

    recipe = bk.SVI(
        args.steps,
        args.particles,
        adapter=LORA,
        prompts_per_step=args.prompts,
        optimizer=bk.KLSGD(relative=args.relative),
        twist=bk.PartialRewardTwist(),
    )
    resume = args.run if args.run.is_dir() and any(args.run.iterdir()) else None
    fit = recipe.fit(
        training_posterior(), seed=0, callbacks=[told], checkpoint=bk.Checkpoint(args.run, every=3), resume=resume
    )
    fit.save(args.adapter, merged=False)
    make_portable(args.adapter)


if __name__ == "__main__":
    main()
