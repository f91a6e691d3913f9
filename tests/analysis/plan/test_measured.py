"""The memory that plans predict, against measured peaks: each phase in a forked process, so that its peak is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

MEASURE = """
    import json, os, re
    from pathlib import Path
    import torch, transformers as hf, bayes_klrl as bk
    torch.set_num_threads(1)

    def resident(field):
        return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

    def growth(work):
        read, write = os.pipe()
        if os.fork() == 0:
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            work()
            os.write(write, str(resident("VmHWM") - before).encode())
            os._exit(0)
        os.wait()
        return int(os.read(read, 100))

    torch.manual_seed(0)
    sizes = dict(vocab_size=4000, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    config = hf.LlamaConfig(**sizes, hidden_size=256, intermediate_size=688)
    llama = bk.TorchLM(hf.LlamaForCausalLM(config), eos_token_id=None)
    found = {}
    for name, prior in {"austen": bk.TorchLM.from_pretrained("austen"), "llama": llama}.items():
        reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=1.0)
        posterior = bk.Posterior(prior, reward, prompts=[[1, 2, 3] * 5, [3, 4] * 7], max_new_tokens=24)
        few = bk.SVI(1, 2, optimizer="kl_sgd", twist="none", adapter="lora")
        few.fit(posterior, seed=0)  # what is loaded once is loaded before
        options = dict(optimizer="kl_sgd", twist="none")
        runs = {
            "sampling": bk.ImportanceSampling(256),
            "training": bk.SVI(1, 32, **options),
            "checkpointed": bk.SVI(1, 48, gradient_checkpointing=True, **options),
            "lora": bk.SVI(1, 32, adapter="lora", **options),
        }
        for what, algorithm in runs.items():
            planned = bk.plan(posterior, algorithm)
            expected = planned.peak_bytes - planned.kept["parameters of the prior"]
            run = algorithm.run if what == "sampling" else algorithm.fit
            found[name + ", " + what] = growth(lambda: run(posterior, seed=0)) / expected
    print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_measured_peaks_are_half_to_twice_the_plan() -> None:
    """Measured: 0.76 to 1.46 sampling, 0.83 to 1.1 training, 0.8 to 1.06 checkpointed, 1.1 to 1.46 with LoRA."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(MEASURE)], capture_output=True, text=True, check=True)
    ratios = json.loads(run.stdout.splitlines()[-1])
    assert len(ratios) == 8
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
