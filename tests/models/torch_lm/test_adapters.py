"""Every kind of adapter that peft has does what its row of docs/adapters.md says: trained, saved, read again; or refused.

All rows are on one Llama of one layer, whose head and embedding are one matrix, and all its 133 completions are compared.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from peft.tuners.lora.config import CordaConfig

import bayes_klrl as bk
from bayes_klrl.inference.policies import as_policy
from bayes_klrl.models.torch_lm.adapter_kinds import known, trial
from bayes_klrl.models.torch_lm.adapters import quiet_peft
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama
from tests.models.torch_lm.test_self_check import by_prefixes, scored

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"
VOCAB, PROMPTS = 12, [[3, 4, 5]]
TEXT: dict[str, Any] = {"task_type": "CAUSAL_LM"}
BOTH: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **TEXT}
SAME: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"], **TEXT}  # layers of one shape
VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 2, **TEXT}


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 2, **BOTH, **options})


QUICK: dict[str, Callable[[], Any]] = {
    '`adapter="lora"`': lambda: "lora",
    "LoRA with DoRA": lora(use_dora=True),
    'LoRA with `modules_to_save=["lm_head"]`': lora(modules_to_save=["lm_head"]),
    "LoRA with a bias of its own": lora(lora_bias=True),
    "prompt tuning": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "activated LoRA": lora(alora_invocation_tokens=[1]),
}
RARE: dict[str, Callable[[], Any]] = {
    "LoRA": lora(),
    "LoRA with rsLoRA": lora(use_rslora=True),
    "LoRA with rank and alpha patterns": lora(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}),
    "LoRA with PiSSA": lora(init_lora_weights="pissa"),
    "LoRA with OLoRA": lora(init_lora_weights="olora"),
    "LoRA with Gaussian weights": lora(init_lora_weights="gaussian"),
    "LoRA with orthogonal weights": lora(init_lora_weights="orthogonal"),
    "LoRA with EVA": lora(init_lora_weights="eva"),
    'LoRA with `bias="all"`': lora(bias="all"),
    'LoRA with `bias="lora_only"`': lora(bias="lora_only"),
    'LoRA with `modules_to_save=["embed_tokens"]`': lora(modules_to_save=["embed_tokens"]),
    "LoRA with `trainable_token_indices`": lora(trainable_token_indices=[1, 2]),
    "LoRA with `target_parameters`": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "LoRA on the embedding": lora(target_modules=["embed_tokens"]),
    "LoRA with QALoRA": lora(use_qalora=True, qalora_group_size=2),
    "LoRA with BD-LoRA": lora(
        use_bdlora=peft.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"])
    ),
    "LoRA with MonteCLoRA": lora(monteclora_config=peft.MontecloraConfig()),
    "LoRA with VeLoRA": lora(velora_config=peft.VeloraConfig()),
    "LoRA with random weights": lora(init_lora_weights=False),
    "LoRA with KaSA": lora(kasa_config=peft.KasaConfig()),
    "LoRA with `layer_replication`": lora(layer_replication=[[0, 1], [0, 1]]),
    "LoRA with fast PiSSA": lora(init_lora_weights="pissa_niter_4"),
    "LoRA with CorDA": lora(init_lora_weights="corda", corda_config=CordaConfig()),
    "LoRA with LoRA-GA": lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
    "LoRA with LoftQ": lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
    "LoRA with Arrow": lora(arrow_config=peft.ArrowConfig(top_k=1)),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **BOTH),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=2, **TEXT),
    "BEFT": lambda: peft.BeftConfig(**BOTH),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=2, **BOTH),
    "C3A": lambda: peft.C3AConfig(block_size=2, **BOTH),
    "C3A with `init_weights=True`": lambda: peft.C3AConfig(block_size=2, init_weights=True, **BOTH),
    "cartridge": lambda: peft.CartridgeConfig(**VIRTUAL),
    "CPT": lambda: peft.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **TEXT),
    "DEFT": lambda: peft.DeftConfig(**BOTH),
    "DeLoRA": lambda: peft.DeloraConfig(r=2, **BOTH),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=4, **BOTH),
    "FourierFT with `init_weights=True`": lambda: peft.FourierFTConfig(n_frequency=4, init_weights=True, **BOTH),
    "FRoD": lambda: peft.FrodConfig(**BOTH),
    "GLoRA": lambda: peft.GloraConfig(r=2, **BOTH),
    "GraLoRA": lambda: peft.GraloraConfig(r=2, gralora_k=2, **BOTH),
    "HiRA": lambda: peft.HiraConfig(r=2, **BOTH),
    "HRA": lambda: peft.HRAConfig(r=2, **BOTH),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TEXT),
    "Lily": lambda: peft.LilyConfig(r=2, **BOTH),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"], **TEXT),
    "LoHa": lambda: peft.LoHaConfig(r=2, **BOTH),
    "LoKr": lambda: peft.LoKrConfig(r=2, **BOTH),
    "MiSS": lambda: peft.MissConfig(r=2, **BOTH),
    "multitask prompt tuning": lambda: peft.MultitaskPromptTuningConfig(num_tasks=2, **VIRTUAL),
    "OFT": lambda: peft.OFTConfig(oft_block_size=2, **BOTH),
    "OSF": lambda: peft.OSFConfig(**BOTH),
    "P-tuning": lambda: peft.PromptEncoderConfig(**VIRTUAL),
    "PEANuT": lambda: peft.PeanutConfig(r=2, **BOTH),
    "Poly": lambda: peft.PolyConfig(r=2, n_tasks=2, **BOTH),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "PSOFT": lambda: peft.PsoftConfig(r=2, **BOTH),
    "PVeRA": lambda: peft.PveraConfig(r=2, **SAME),
    "RandLoRA": lambda: peft.RandLoraConfig(r=2, **BOTH),
    "RoAd": lambda: peft.RoadConfig(group_size=2, **BOTH),
    "Shadow": lambda: peft.ShadowConfig(**TEXT),
    "SHiRA": lambda: peft.ShiraConfig(r=2, **BOTH),
    "super tuning": lambda: peft.SupertuningConfig(sparsity=0.5, **BOTH),
    "TinyLoRA": lambda: peft.TinyLoraConfig(**BOTH),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], **TEXT),
    "UniLoRA": lambda: peft.UniLoraConfig(r=2, **BOTH),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=2, num_vectors=4, vector_length=4, topk=2, **SAME),
    "VeRA": lambda: peft.VeraConfig(r=2, **SAME),
    "VeRA without its projection": lambda: peft.VeraConfig(r=2, save_projection=False, **SAME),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=4, **BOTH),
    "X-LoRA": lambda: peft.XLoraConfig(hidden_size=8, adapters={}, **TEXT),
}
KINDS = QUICK | RARE
UNTRIED = {"AdaMSS"}  # needs scikit-learn, which is not installed with this package
PARAMETERS = [pytest.param(kind, marks=[pytest.mark.slow] if kind in RARE else []) for kind in KINDS]


@dataclass(frozen=True)
class Problem:
    """A posterior whose completions are all of length 1 (EOS) or 2, and its prior's folder."""

    folder: Path
    posterior: bk.Posterior

    def log_probs(self, lm: Any) -> np.ndarray:
        """Return the log-probs of all completions, (133,)."""
        pairs = [pair for pair in itertools.product(range(VOCAB), repeat=2) if pair[0] != 0]
        tokens, lengths = np.array([*pairs, (0, 0)])[None], np.array([2] * len(pairs) + [1])[None]
        with torch.no_grad():
            return np.asarray(lm.token_log_probs(PROMPTS, bk.Sequences(tokens, lengths)).double()).sum(axis=2)[0]

    def base(self) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(self.folder)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers on tied weights and names that change
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tiny_llama(VOCAB, tie_word_embeddings=True, **sizes, **heads).save_pretrained(folder)
    odd = bk.TokenReward(lambda tokens, lengths: (tokens % 2).mean(axis=1), alpha=0.3)
    return Problem(folder, bk.Posterior(bk.TorchLM.from_pretrained(folder), odd, prompts=PROMPTS, max_new_tokens=2))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """The cells of each row of the table, by kind."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def moved(module: Any) -> None:
    """Move the trainable parameters, as a long training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def started(prior: Any, config: Any) -> tuple[Any, bk.BayesKLRLError | None]:
    """Return the guide that a training starts from, and why there is none."""
    try:
        return prior.with_adapter(config), None
    except bk.BayesKLRLError as error:
        return None, error


def test_every_kind_of_peft_has_a_row(rows: dict[str, list[str]]) -> None:
    assert set(rows) == set(KINDS) | UNTRIED
    if peft.__version__.startswith("0.21."):
        made = {known.kind_of(peft.LoraConfig() if kind == '`adapter="lora"`' else KINDS[kind]()) for kind in KINDS}
        assert {kind.value for kind in peft.PeftType} == made | {"ADAMSS"}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_kind_of_adapter_does_what_its_row_says(
    kind: str, problem: Problem, rows: dict[str, list[str]], tmp_path: Path
) -> None:
    prior = problem.posterior.prior
    before = problem.log_probs(prior)
    svi = bk.SVI(2, 4, learning_rate=0.05, adapter=KINDS[kind]())
    start, refused = started(prior, svi.adapter)
    if refused is not None:
        *cells, _, reason = rows[kind]
        assert cells == ["no", "-", "-", "-"]
        assert reason in re.sub(r" by \S+ nats", "", str(refused))
        with pytest.raises(type(refused)):
            svi.fit(problem.posterior, seed=0)
        return
    np.testing.assert_allclose(problem.log_probs(start), before, atol=1e-5, rtol=0)
    fit = svi.fit(problem.posterior, seed=0)
    moved(fit.guide.module)
    own = problem.log_probs(fit.guide)
    assert np.abs(own - before).max() > 0.05
    fit.save(tmp_path / "merged")
    fit.save(tmp_path / "adapter", merged=False)
    with quiet_peft():
        plain = bk.TorchLM(peft.PeftModel.from_pretrained(problem.base(), tmp_path / "adapter"), check=False)
    whole = bk.TorchLM.from_pretrained(tmp_path / "merged", check=False)
    for policy in (as_policy(tmp_path / "adapter", problem.posterior), whole, plain):
        np.testing.assert_allclose(problem.log_probs(policy), own, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(problem.log_probs(prior), before)
    merged = "as an adapter" if hasattr(whole.module, "peft_config") else "yes"
    assert rows[kind][:5] == ["yes", merged, "yes", "yes", "yes"]


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_policy_of_others_of_a_kind_that_is_no_guide(
    kind: str, problem: Problem, rows: dict[str, list[str]], tmp_path: Path
) -> None:
    """Such a folder is read as it was trained, or refused."""
    *cells, policy_of_others, _ = rows[kind]
    if cells[0] == "yes" or kind in ("LoRA with CorDA", "LoRA with LoftQ", "LoRA with Arrow", "X-LoRA"):
        return  # read above, or below; these need a preparation, a package, or other adapters
    with quiet_peft():
        wrapped = peft.get_peft_model(problem.base(), KINDS[kind]()).eval()
    moved(wrapped)
    wrapped.save_pretrained(tmp_path)
    if policy_of_others == "no":
        with pytest.raises(bk.CheckpointError):
            bk.certify(problem.posterior, tmp_path, seed=0)
        return
    own, read = problem.log_probs(bk.TorchLM(wrapped)), problem.log_probs(as_policy(tmp_path, problem.posterior))
    np.testing.assert_allclose(read, own, atol=1e-5, rtol=0)


def test_a_certificate_of_an_adapter_that_cannot_be_merged(problem: Problem, tmp_path: Path) -> None:
    """What is saved as an adapter has the certificate of the guide, which is that of the enumeration."""
    fit = bk.SVI(2, 4, learning_rate=0.05, adapter=KINDS["LoRA with a bias of its own"]()).fit(
        problem.posterior, seed=0
    )
    fit.save(tmp_path / "guide")
    of_guide, of_folder = (bk.certify(problem.posterior, each, seed=0) for each in (fit, tmp_path / "guide"))
    exact = bk.Exact().run(problem.posterior, seed=0)
    with torch.no_grad():
        completions = bk.Sequences(exact.tokens, exact.lengths)
        log_q = np.asarray(fit.guide.token_log_probs(PROMPTS, completions).double()).sum(axis=2)[0]
    log_p = exact.log_weights[0] - np.logaddexp.reduce(exact.log_weights[0])
    low, high = of_guide.reverse_kl[0]
    assert low - 1e-5 <= float(np.exp(log_q) @ (log_q - log_p)) <= high + 1e-5
    np.testing.assert_allclose(of_folder.reverse_kl, of_guide.reverse_kl, atol=1e-5)


def test_where_a_layer_has_a_bias_that_of_an_adapter_is_merged(tmp_path: Path) -> None:
    """GPT-2's layers have one. On others peft's RuntimeError came after the training."""
    tiny_gpt2(VOCAB).save_pretrained(tmp_path / "base")
    prior = bk.TorchLM.from_pretrained(tmp_path / "base")
    guide = prior.with_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True))
    moved(guide.module)
    guide.save_pretrained(tmp_path / "merged")
    saved = bk.TorchLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(saved.module, "peft_config")
    np.testing.assert_allclose(scored(saved, [1, 2], [3, 4]), scored(guide, [1, 2], [3, 4]), atol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"init_lora_weights": "pissa_niter_4"}, "another one at each loading.*path_initial_model"),
        ({"init_lora_weights": "lora_ga"}, "takes away from the base's weights what it computes from data"),
        ({"init_lora_weights": "corda"}, "takes away from the base's weights what it computes from data"),
        ({"init_lora_weights": "loftq"}, "replaces the base's weights by rounded ones"),
        ({"peft_type": "XLORA"}, "of the kind XLORA.*Give the model itself"),
        ({"peft_type": "LILY"}, "a later token changes earlier log-probs"),
        ({"peft_type": "POLY"}, "the number of a task"),
    ],
)
def test_a_folder_that_does_not_hold_the_policy_is_refused(
    change: dict[str, str], message: str, problem: Problem, tmp_path: Path
) -> None:
    """A LoRA that began with LoRA-GA was read as another policy, by 1 nat, and certified."""
    guide = problem.posterior.prior.with_adapter(KINDS["LoRA"]())  # type: ignore[attr-defined]
    guide.save_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(bk.CheckpointError, match=message):
        bk.certify(problem.posterior, tmp_path, seed=0)


def test_what_starts_elsewhere_may_be_given_to_start_from(problem: Problem, tmp_path: Path) -> None:
    """The base used to be trained with it, and the folder, which holds the adapter alone, was another model."""
    with quiet_peft():
        start = bk.TorchLM(peft.get_peft_model(problem.base(), KINDS["prompt tuning"]()))
    fit = bk.SVI(2, 4, learning_rate=0.05, initial_guide=start).fit(problem.posterior, seed=0)
    assert [parameter.shape for parameter in fit.guide.parameters()] == [(2, 8)]
    assert np.abs(problem.log_probs(fit.guide) - problem.log_probs(start)).max() > 1e-3
    for merged in (True, False):
        fit.save(tmp_path / str(merged), merged=merged)
        saved = bk.TorchLM.from_pretrained(tmp_path / str(merged))
        np.testing.assert_allclose(problem.log_probs(saved), problem.log_probs(fit.guide), atol=1e-5, rtol=0)


# --- kinds that peft has had only since ---------------------------------------------------------------------------


def test_a_kind_that_is_not_known_is_tried(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "TRIED", known.TRIED - {"MISS"})
    prior: Any = problem.posterior.prior
    guide = prior.with_adapter(KINDS["MiSS"]())
    np.testing.assert_allclose(problem.log_probs(guide), problem.log_probs(prior), atol=1e-5)
    monkeypatch.setattr(trial, "merged", lambda trained: problem.base())
    with pytest.raises(bk.BayesKLRLError, match=r"MissConfig.*another model by .* nats once it is merged"):
        prior.with_adapter(KINDS["MiSS"]())


def test_a_new_kind_that_reads_later_tokens_is_refused(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "UNREADABLE", {})
    with pytest.raises(bk.BayesKLRLError, match=r"LilyConfig.*cannot be scored once it is trained.*later"):
        problem.posterior.prior.with_adapter(KINDS["Lily"]())  # type: ignore[attr-defined]


def test_a_new_kind_whose_folder_lacks_a_part_is_refused(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "changes_base", lambda init: None)
    monkeypatch.setattr(known, "TRIED", frozenset())
    monkeypatch.setattr(known, "LORA_OPTIONS", frozenset())
    with pytest.raises(bk.BayesKLRLError, match=r"another model by .* nats once it is saved apart and loaded by peft"):
        problem.posterior.prior.with_adapter(KINDS["LoRA with fast PiSSA"]())  # type: ignore[attr-defined]


def test_a_new_option_of_lora_makes_a_new_kind() -> None:
    @dataclass
    class Newer(peft.LoraConfig):
        use_magic: bool = False

    assert known.is_tried(Newer(r=2))
    assert not known.is_tried(Newer(r=2, use_magic=True))
    assert known.is_tried(peft.LoraConfig(r=2, use_dora=True))


# --- two adapters -------------------------------------------------------------------------------------------------


def test_a_policy_with_two_adapters_is_what_is_active() -> None:
    """The sum of both where both are active, one where one is."""
    wrapped = peft.get_peft_model(tiny_llama(VOCAB), lora(init_lora_weights=False)(), adapter_name="a")
    wrapped.add_adapter("b", lora(init_lora_weights=False, target_modules=["q_proj"])())
    found = {}
    for active in ("a", "b", ["a", "b"]):
        wrapped.base_model.set_adapter(active)
        found[str(active)] = scored(bk.TorchLM(wrapped), [1, 2, 3], [4, 5, 6, 0, 7])
        np.testing.assert_allclose(found[str(active)], by_prefixes(wrapped, [1, 2, 3], [4, 5, 6, 0, 7]), atol=2e-5)
    assert len({tuple(each.round(3)) for each in found.values()}) == 3
