"""TRL's trainers, a bare policy-gradient loop and `bk.SVI` on one posterior whose truth is enumerated.

    python benchmarks/bench_trainers.py                            all five; needs TRL: pip install 'trl==1.16.*'
    python benchmarks/bench_trainers.py --only bare svi            the two that need no TRL
    python benchmarks/bench_trainers.py --task gpt2-8x4 --seeds 3 --steps 600

Every trainer gets the same model, reward, alpha (TRL: beta), number of completions per step and linear decay of Adam's
learning rate. TRL's are configured as a posterior needs it: no dropout, no clipping of rewards or gradients, advantages as
they are, no completion masked. GRPO keeps its groups of 8 and their standardised rewards. Each trained policy is certified
twice, by enumeration and by sampling alone. CPU seconds are those of the training (`time.process_time`), one thread.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import bayes_klrl as bk
from bayes_klrl.problems import GPT2_TASKS, gpt2_task

EXAMPLE = Path(__file__).parents[1] / "examples" / "certify_other_trainer.py"
BATCH = 256
LEARNING_RATE = 2e-3
NAMES = ("trl-rloo", "trl-grpo", "trl-rloo-lora", "bare", "svi")


def text_posterior(base: bk.Posterior) -> bk.Posterior:
    """Return the task with its token ids written out as words, and its reward as a function that TRL would call."""
    prior, eos, num_tokens = base.prior, base.pad_token, base.max_new_tokens
    assert isinstance(prior, bk.TorchLM)
    assert isinstance(base.likelihood, bk.TokenReward)
    of_tokens = base.likelihood.fn

    def reward(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:  # noqa: ARG001
        rows = bk.Sequences.from_lists(completion_ids, max_new_tokens=num_tokens, pad_token=eos)
        values: list[float] = of_tokens(rows.tokens[0], rows.lengths[0]).tolist()
        return values

    return bk.Posterior(
        bk.TorchLM(prior.module, word_tokenizer(prior.vocab_size, eos), eos_token_id=eos),
        bk.Reward(reward, alpha=base.alpha, bounds=base.likelihood.bounds),
        prompts=" ".join(map(str, base.prompt_ids[0])),
        max_new_tokens=num_tokens,
    )


def word_tokenizer(vocab_size: int, eos: int) -> Any:
    """Return a tokenizer whose words are the token ids. Its pieces are those of SentencePiece, from which peers get bytes."""
    import tokenizers
    import transformers

    words = {f"▁{token}": token for token in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, f"▁{eos}"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=f"▁{eos}", eos_token=f"▁{eos}")


def import_trl() -> tuple[Any, Any]:
    """Return the packages datasets and trl, or end with a message that says how to install them."""
    try:
        return importlib.import_module("datasets"), importlib.import_module("trl")
    except ImportError as error:
        raise SystemExit("TRL's rows need TRL: pip install 'trl==1.16.*', or run with --only bare svi.") from error


def trl_train(
    name: str,
    posterior: bk.Posterior,
    folder: Path,
    *,
    seed: int,
    num_steps: int,
    lora: bool,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    clock: AbstractContextManager[Any] | None = None,
) -> float:
    """Train with one of TRL's trainers from the prior's folder, inside `clock` if given, and return CPU seconds."""
    datasets, trl = import_trl()
    prior_folder = folder.parent / "prior"
    posterior.prior.save_pretrained(prior_folder)  # type: ignore[attr-defined]
    own = (
        {"num_generations": 8}
        if name == "GRPO"
        else {"num_generations": batch, "normalize_advantages": False, "reward_clip_range": None}
    )
    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        beta=posterior.alpha,
        max_steps=num_steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_completion_length=posterior.max_new_tokens,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=1e9,
        mask_truncated_completions=False,
        disable_dropout=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bf16=False,
        use_cpu=True,
        seed=seed,
        save_steps=max(1, num_steps // 2),
        logging_steps=num_steps,
        report_to="none",
        disable_tqdm=True,
        **own,
    )
    adapter = None
    if lora:
        import peft

        adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = getattr(trl, f"{name}Trainer")(
        str(prior_folder),
        posterior.likelihood.factors[0].fn,
        config,
        datasets.Dataset.from_dict({"prompt": [posterior.prompts[0]] * batch}),
        peft_config=adapter,
    )
    start = time.process_time()
    with clock or nullcontext():
        trainer.train()
    return time.process_time() - start


def bare_train(loss: str, posterior: bk.Posterior, folder: Path, *, seed: int, num_steps: int) -> float:
    """Train with the loop of the example, and return CPU seconds."""
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(seed)
    start = time.process_time()
    example["tune"](example[loss], posterior, folder, num_steps)
    return time.process_time() - start


def svi_train(posterior: bk.Posterior, folder: Path, *, seed: int, num_steps: int) -> float:
    """Train with `bk.SVI`, and return CPU seconds."""
    start = time.process_time()
    fit = bk.SVI(num_steps, BATCH).fit(posterior, seed=seed)
    seconds = time.process_time() - start
    fit.save(folder)
    return seconds


def rows(base: bk.Posterior) -> dict[str, Callable[..., float]]:
    """Return every row of the table: train into a folder, return CPU seconds. `base` is the task in token ids."""
    return {
        "trl-rloo": lambda posterior, folder, **o: trl_train("RLOO", posterior, folder, lora=False, **o),
        "trl-grpo": lambda posterior, folder, **o: trl_train("GRPO", posterior, folder, lora=False, **o),
        "trl-rloo-lora": lambda posterior, folder, **o: trl_train("RLOO", posterior, folder, lora=True, **o),
        "bare": lambda _, folder, **o: bare_train("leave_one_out", base, folder, **o),
        "svi": svi_train,
    }


def bench(task: str, only: Sequence[str], num_seeds: int, num_steps: int, root: Path) -> None:
    """Print a row for each trainer and seed."""
    base = gpt2_task(task)
    posterior = text_posterior(base)
    print(f"{task}, alpha {posterior.alpha}, {num_steps} steps x {BATCH} completions; KL in nats")
    print(
        f"{'trainer':<16}{'seed':>5}{'KL(q||p*)':>11}{'by sampling':>18}{'KL(p*||q)':>11}{'E[r]':>8}{'KL(q||p0)':>11}"
        f"{'implied alpha':>15}{'gap':>8}{'CPU s':>8}   folder"
    )
    for name in only:
        for seed in range(num_seeds):
            folder = root / task / str(seed) / name
            seconds = rows(base)[name](posterior, folder, seed=seed, num_steps=num_steps)
            exact = bk.certify(posterior, folder, seed=seed, num_draws=8192)
            sampled = bk.certify(posterior, folder, seed=seed, sampling_only=True)
            low, high = sampled.pooled.reverse_kl
            print(
                f"{name:<16}{seed:>5}{exact.pooled.reverse_kl.mean():>11.4f}{f'[{low:.3f}, {high:.3f}]':>18}"
                f"{exact.pooled.forward_kl.mean():>11.4f}{exact.reward:>8.3f}{exact.kl_prior:>11.3f}"
                f"{exact.implied_alpha:>15.3f}{exact.frontier_gap:>8.3f}{seconds:>8.1f}   "
                f"{', '.join(sorted(path.name for path in folder.iterdir()))}",
                flush=True,
            )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(GPT2_TASKS), default="gpt2-8x4")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, help="keep the trainers' folders here")
    arguments = parser.parse_args()
    if any(name.startswith("trl-") for name in arguments.only):
        import_trl()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # TRL's and PEFT's own
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.out or Path(temporary)
        bench(arguments.task, arguments.only, arguments.seeds, arguments.steps, root)


if __name__ == "__main__":
    main()
