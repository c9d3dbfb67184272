"""A batch of completions reads each distinct prompt once; its samples are those of a batch that reads every copy.

The models are random ones in float32, with weights so large that logits depend on the whole prompt.
"""

from __future__ import annotations

import contextlib
import logging

import peft
import pytest
import torch
import transformers

from test_rollout import EOS, MANY_ENDS, generate, largest_difference, materialised, with_ends
from test_trainer import PEFT_WARNING, VOCAB, lora, make_model, make_tokenizer
from xpo_fast.recipes.mixture import MixtureRollout
from xpo_fast.rollout import Samples, Sampling, prefill

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

LONG = "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15"
PROMPTS = ["w1 w2 w3", "w4", LONG, "w3 w1", "w1 w2 w4", "w4"]  # ragged, one of a single token, twice
WINDOW = 4  # shorter than a prompt by more than itself, and longer than others
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 2, "bos_token_id": EOS, "eos_token_id": EOS,
}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# What each family adds to others: windows on some layers or on all, learned positions, experts, recurrent states.
SHARING = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": WINDOW},
    "Gemma3Text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": WINDOW},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], **LINEAR, **EXPERTS},
}
# A state without a cache of keys; states in the modules; a cache of a class of its own.
READING_ALL = {
    "Mamba": {"state_size": 4},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 32},
    "MiniMax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4, "num_local_experts": 4},
}


def make(family: str, options: dict | None = None, ends: list[int] = MANY_ENDS):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **(options or {**SHARING, **READING_ALL}[family])})
    torch.manual_seed(0)
    names = (f"{family.removesuffix('Text')}{head}" for head in ("LMHeadModel", "ForCausalLM"))
    cls = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    model = with_ends(cls(config).eval(), ends)
    return model


@contextlib.contextmanager
def reading_every_copy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xpo_fast.rollout.generate.each_prompt_once", lambda *_: contextlib.nullcontext())
        yield


@contextlib.contextmanager
def rows_read(model):
    """Yields the list of (rows, tokens of each) that the embeddings are asked for inside the block."""
    read: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    try:
        yield read
    finally:
        hook.remove()


def check(model, prompts=PROMPTS, n=3, **options) -> Samples:
    """The samples, which are those of reading every copy."""
    with reading_every_copy():
        expected = generate(model, prompts, n, **options)
    found = generate(model, prompts, n, **options)
    assert found.completion_ids == expected.completion_ids
    assert found.completions == expected.completions and found.finish == expected.finish
    if expected.logps is not None:
        assert found.logps is not None and largest_difference(found.logps, expected.logps) < 1e-5
    return found


@pytest.mark.parametrize("family", SHARING)
def test_samples_are_those_of_reading_every_copy(family):
    model = make(family)
    with rows_read(model) as read:
        samples = generate(model, n=8, prompts=PROMPTS)
    assert read[0] == (5, 11) and read[1] == (48, 1) and all(shape[1] == 1 for shape in read[1:])
    assert check(model, n=8) == samples
    assert len(set(map(tuple, samples.completion_ids))) > 30
    if family not in ("Mixtral", "Qwen3Next"):  # their rows alone are rounded otherwise
        assert largest_difference(samples.logps, materialised(model, samples)) < 1e-4
    check(model, n=2)
    check(model, n=3, temperature=0.0)
    check(model, n=3, temperature=0.7, top_k=9, top_p=0.8)


@pytest.mark.parametrize("family", READING_ALL)
def test_models_whose_cache_cannot_be_copied_read_every_copy(family, caplog):
    prefill._say_that_all_are_read.cache_clear()
    model = make(family)
    with rows_read(model) as read, caplog.at_level(logging.INFO, logger="xpo_fast"):
        for _ in range(2):
            generate(model, n=3, prompts=PROMPTS)
    assert read[0] == (18, 11)
    (said,) = (r.getMessage() for r in caplog.records if r.name == "xpo_fast")
    assert said.startswith(f"{type(model).__name__} reads a prompt anew")
    check(model)


def test_layers_of_others_are_not_copied():
    """What a layer of another package keeps beside keys and values is not known."""

    class Layer(transformers.cache_utils.DynamicLayer):
        pass

    class Mine(transformers.LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, past_key_values=None, **kwargs):
            for layer in past_key_values.layers:
                layer.__class__ = Layer
            return super().prepare_inputs_for_generation(*args, past_key_values=past_key_values, **kwargs)

    model = with_ends(make_model().eval(), EOS)
    model.__class__ = Mine
    with rows_read(model) as read:
        generate(model, n=2, prompts=PROMPTS)
    assert read[0] == (12, 11)


def test_recurrent_layers_of_unknown_models_are_not_copied():
    class Mine(transformers.Qwen3NextForCausalLM):
        pass

    model = make("Qwen3Next")
    model.__class__ = Mine
    with rows_read(model) as read:
        generate(model, n=2, prompts=PROMPTS)
    assert read[0] == (12, 11)


def test_prompts_that_all_differ_are_read_as_before(monkeypatch):
    model = make("Llama")
    monkeypatch.setattr(prefill, "_Prefill", None)
    with rows_read(model) as read:
        generate(model, PROMPTS[:5], 1, max_new_tokens=3)
    assert read[0] == (5, 11)
    with rows_read(model) as read:
        generate(model, PROMPTS[:5], 4, batch_size=1, max_new_tokens=1)
    assert len(read) == 20


def test_each_batch_reads_its_prompts_once():
    model = make("Llama", ends=[])
    with rows_read(model) as read:
        check(model, [LONG, "w9", LONG, "w1 w2 w3", LONG], 2, batch_size=4, max_new_tokens=4)
    first = [shape for at, shape in enumerate(read) if at % 4 == 0]
    assert first[:3] == [(4, 11), (4, 11), (2, 1)] and first[3:] == [(1, 11), (2, 11), (1, 1)]


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("prompts", [["w4"], [LONG]], ids=["one token", "long"])
def test_one_prompt(n, prompts):
    model = make("Gemma2")
    with rows_read(model) as read:
        check(model, prompts, n)
    assert read[0][0] == n and (1, read[0][1]) in read


def test_stop_strings():
    model = make("Llama", ends=[EOS])
    free = generate(model, n=4, prompts=PROMPTS)
    row = next(r for r, ids in enumerate(free.completion_ids) if len(ids) > 6 and min(ids) > 2)
    stop = " ".join(free.completions[row].split()[2:4])
    stopped = check(model, n=4, stop=(stop,))
    assert stopped.finish[row] == "stop" and stopped.completion_ids[row] == free.completion_ids[row][:4]


def test_in_the_middle_of_training():
    model = make("Llama", {"attention_dropout": 0.5})
    expected = generate(model, n=4, prompts=PROMPTS)
    assert check(model.train(), n=4) == expected and all(m.training for m in model.modules())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_error_leaves_no_hook(monkeypatch):
    model = make("Llama")
    monkeypatch.setattr(type(model.lm_head), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, n=2, prompts=PROMPTS)
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("config", [lora(), peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"],
    feedforward_modules=[])], ids=["lora", "ia3"])  # fmt: skip
def test_adapters(config):
    model = peft.get_peft_model(make("Llama"), config).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name or "ia3" in name:
            torch.nn.init.normal_(p, std=0.5)
    with rows_read(model) as read:
        samples = check(model, n=4)
    assert (5, 11) in read
    assert largest_difference(samples.logps, materialised(model, samples)) < 1e-4
    with model.disable_adapter():
        assert generate(model, PROMPTS, 4).completion_ids != samples.completion_ids


def test_the_references_cache_is_copied_too():
    policy, reference = make("Mistral"), make("Llama")

    def sample():
        rollout = MixtureRollout(policy, make_tokenizer(), reference=reference, share=0.5)
        return rollout.generate(PROMPTS, 4, sampling=Sampling(max_new_tokens=12), seed=0)

    with reading_every_copy():
        expected = sample()
    with rows_read(policy) as of_policy, rows_read(reference) as of_reference:
        found = sample()
    assert of_policy == of_reference and of_policy[0] == (5, 11)
    assert found.completion_ids == expected.completion_ids
    assert largest_difference(found.logps, expected.logps) < 1e-5
