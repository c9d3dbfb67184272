"""Packed and shared rows against each row alone, without padding: log-probs and every gradient, family by family."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import zoo
from xpo_fast import Head
from xpo_fast.layouts import Layout, install_layouts, laid_out, lay_out
from xpo_fast.models import hidden_states

FAMILIES = (
    *("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Mistral", "Phi", "Phi3", "Olmo2", "Granite", "GptOss"),
    *("Mixtral", "Qwen3Moe", "Llama4"),
)
CLASSES = (*(f"{name}ForCausalLM" for name in FAMILIES), "GPT2LMHeadModel")
# transformers renames gradient checkpointing, and peft and older versions know it by the name it had.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
Row = tuple[list[int], list[int]]  # prompt, completion


def tokens(count: int, of: int) -> list[int]:
    return torch.randint(10, 90, (count,), generator=torch.Generator().manual_seed(of)).tolist()


def completions(prompt: list[int], *sizes: int) -> list[Row]:
    return [(prompt, tokens(n, 100 * len(prompt) + i)) for i, n in enumerate(sizes)]


SYSTEM, LONG = tokens(9, 1), tokens(14, 2)
CASES: dict[str, list[Row]] = {
    "ragged": [*completions(LONG, 5, 9, 2), *completions(tokens(11, 3), 3, 4)],
    "one token": completions(tokens(12, 4), 1, 1, 4),
    "empty prompt": completions([], 6, 1, 9),
    "prefix": [(LONG, tokens(11, 5)[:n]) for n in (4, 11, 9)],
    "equal": [(LONG, tokens(6, 6))] * 3,
    "one row": completions(LONG, 7),
    "tree": [row for i in (7, 8, 9) for row in completions(SYSTEM + tokens(8 + i - 7, i), 3, 6)],
}
ALL = [row for rows in CASES.values() for row in rows]


def padded(rows: Sequence[Row], side: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and the positions that predict a completion's tokens, (R, T)."""
    width = max(len(p) + len(c) for p, c in rows)
    ids, mask, read = (torch.zeros(len(rows), width, dtype=x) for x in (torch.int64, torch.int64, torch.bool))
    for r, (prompt, completion) in enumerate(rows):
        size = len(prompt) + len(completion)
        start = width - size if side == "left" else 0
        ids[r, start : start + size] = torch.tensor(prompt + completion)
        mask[r, start : start + size] = 1
        read[r, start + max(len(prompt) - 1, 0) : start + size - 1] = True
    return ids, mask, read


def log_probs(model: Any, ids: Tensor, mask: Tensor, read: Tensor, layout: Layout | None = None) -> Tensor:
    """Of the tokens behind the read positions, in the model's own dtype."""
    with laid_out(layout):
        hidden = hidden_states(model, {"input_ids": ids, "attention_mask": mask})
    logps = (hidden[read] @ Head.from_model(model).weight.T.to(hidden.dtype)).log_softmax(-1)
    return logps.gather(-1, ids.roll(-1, 1)[read][:, None])[:, 0]


def loss_of(logps: Tensor) -> Tensor:
    """A loss with another weight for each token, and not linear."""
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    return (weights * logps).sum() + 0.1 * logps.square().sum()


Result = tuple[Tensor, dict[str, Tensor]]


def result(model: Any, logps: Tensor) -> Result:
    model.zero_grad(set_to_none=True)
    loss_of(logps).backward()
    return logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(model: Any, rows: Sequence[Row]) -> Result:
    """Each row by itself."""
    return result(model, torch.cat([log_probs(model, *padded([row])) for row in rows]))


def in_layout(model: Any, rows: Sequence[Row], share: bool, *, side: str = "right", change: Any = None) -> Result:
    install_layouts(model)
    batch = padded(rows, side)
    layout = lay_out(*batch, share=share)
    return result(model, log_probs(model, *batch, change(layout) if change else layout))


def distance(got: Result, want: Result) -> float:
    """The largest difference, of log-probs as a part of the largest one, and of each parameter's gradient likewise."""
    assert got[1].keys() == want[1].keys()
    pairs = [(got[0], want[0]), *((got[1][n], g) for n, g in want[1].items())]
    # A bias of all scores has the gradient 0, but for rounding: it is measured by the largest gradient there is.
    most = max(float(g.abs().max()) for g in want[1].values())
    return max(float((x - y).abs().max()) / max(float(y.abs().max()), 1e-6 * most) for x, y in pairs)


class Double(TorchFunctionMode):
    """Has what is asked for in float32 (norms, softmaxes, rotary embeddings) computed in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{n: wide(x) for n, x in (kwargs or {}).items()})


def of_dtype(dtype: torch.dtype) -> Any:
    return Double() if dtype == torch.float64 else contextlib.nullcontext()


def make(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random tiny model in which everything matters, with windows of 6 tokens where the class has windows."""
    if name == "Llama4ForCausalLM":
        config["attn_temperature_tuning"] = False  # what it scales by is the place in the sequence: unsupported()
    model = zoo.loud(zoo.build(name, **config)).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the other ones have no float64
    return model


LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_each_family_gives_what_rows_alone_give(name, dtype):
    model = make(name, dtype)
    with of_dtype(dtype):
        want = alone(model, ALL)
        for share in (False, True):
            assert distance(in_layout(model, ALL, share), want) < LIMITS[dtype]
    assert not hasattr(model.config, "sliding_window") or (model.config.sliding_window or 6) < len(LONG)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_row_gives_what_it_gives_alone(case, side, implementation):
    model = make("MistralForCausalLM", attn_implementation=implementation)
    want = alone(model, CASES[case])
    for share in (False, True):
        assert distance(in_layout(model, CASES[case], share, side=side), want) < 1e-5


def test_learned_positions_of_left_padded_rows_are_those_in_the_row():
    model = make("GPT2LMHeadModel")
    assert distance(in_layout(model, ALL, True, side="left"), alone(model, ALL)) < 1e-5


def test_a_tree_has_three_levels_and_what_is_common_stands_once():
    ids, mask, read = padded(CASES["tree"])
    layout = lay_out(ids, mask, read, share=True)
    assert {len(s.before) for s in layout.segments} == {0, 1, 2}
    assert len(layout) < len(lay_out(ids, mask, read, share=False)) < int(mask.sum())  # last tokens are not read


def leaking(layout: Layout) -> Layout:
    """The second completion sees the first one in place of the prompt."""
    prompt, first, second, *others = layout.segments
    second = replace(second, at=len(first), before=((first.start, first.stop),))
    return replace(layout, segments=(prompt, first, second, *others))


def not_restarted(layout: Layout) -> Layout:
    return replace(layout, positions=torch.arange(len(layout)))


@pytest.mark.parametrize("fault", [leaking, not_restarted])
def test_planted_faults_are_seen(fault):
    model, rows = make("LlamaForCausalLM"), CASES["ragged"]
    want = alone(model, rows)
    assert distance(in_layout(model, rows, True), want) < 1e-5
    assert distance(in_layout(model, rows, True, change=fault), want) > 1e-2


@pytest.mark.parametrize("between", ["nothing", "padded", "evaluation"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_checkpointed_layers_compute_again_what_they_computed(name, reentrant, between):
    model = make(name)
    want = alone(model, ALL)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    install_layouts(model)
    half = len(ALL) // 2
    parts = []
    for rows, share in ((ALL[:half], True), (ALL[half:], between != "padded")):
        batch = padded(rows)
        parts.append(log_probs(model, *batch, lay_out(*batch, share=True) if share else None))
    if between == "evaluation":
        ids, mask, read = padded(ALL)
        with torch.no_grad():
            log_probs(model.eval(), ids, mask, read)
            model.generate(ids[:, :9], attention_mask=mask[:, :9], max_new_tokens=2, do_sample=False)
        model.train()
    assert distance(result(model, torch.cat(parts)), want) < 1e-5


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("Qwen2ForCausalLM"), config)
    want = alone(model, ALL)
    assert want[1] and all("lora" in n for n in want[1])
    assert distance(in_layout(model, ALL, True), want) < 1e-5


def test_autocast_to_bfloat16_rounds_no_more_than_for_rows_alone():
    model = make("LlamaForCausalLM")
    want = alone(model, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        by_itself, laid = alone(model, ALL), in_layout(model, ALL, True)
    assert 1e-3 < distance(laid, want) < 2 * distance(by_itself, want) < 0.5


def test_attention_dropout_falls_on_the_weights_of_attention(monkeypatch):
    model = make("LlamaForCausalLM", attention_dropout=0.5, attn_implementation="eager").train()
    plain = alone(model.eval(), ALL)
    model.train()
    monkeypatch.setattr(
        torch.nn.functional, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 - p * training)
    )
    want = alone(model, ALL)
    assert distance(in_layout(model, ALL, True), want) < 1e-5 < 1e-2 < distance(want, plain)


@torch.no_grad()
def test_dropout_of_attention_and_of_hidden_states_has_the_same_mean_and_spread():
    model = make("GPT2LMHeadModel", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1).train()
    install_layouts(model)
    batch = padded(CASES["ragged"])
    draws = []
    for layout in (None, lay_out(*batch, share=True)):
        torch.manual_seed(0)
        draws.append(torch.stack([log_probs(model, *batch, layout) for _ in range(100)]))
    (mean, spread), (other, others) = ((x.mean(0), x.std(0)) for x in draws)
    assert float(spread.min()) > 0.1
    scores = (mean - other) / ((spread.square() + others.square()) / 100).sqrt()
    assert float(scores.square().mean()) < 2
    assert 0.8 < float((others / spread).mean()) < 1.25


def test_a_copy_reads_its_own_weights():
    model = make("LlamaForCausalLM")
    want = in_layout(model, ALL, True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert distance(in_layout(twin, ALL, True), want) == 0


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_nothing_of_a_layout_is_left_behind(name, tmp_path):
    model = make(name)
    ids, mask, _ = padded(CASES["equal"])

    def generated(model: Any) -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False).tolist()

    want = generated(model)
    in_layout(model, ALL, True)
    second = type(model)(model.config).eval()
    second.load_state_dict(model.state_dict())
    assert generated(second) == want
    model.save_pretrained(tmp_path)
    assert "xpo_fast" not in "".join(x.read_text() for x in tmp_path.glob("*.json"))
    assert generated(type(model).from_pretrained(tmp_path)) == want
    assert generated(model) == want
    assert model.config._attn_implementation == "sdpa"
