"""LoRA on the LM head as a low-rank operand: against the weight W + s B A in float64, and PEFT's own layer."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import nn
from torch.testing import assert_close

import oracle
import test_trainer
import xpo_fast as xf
from interpreter import DEVICE, INTERPRETED, needs_triton, numpy_warnings, run_checks
from xpo_fast.head import head_plan
from xpo_fast.head.operands import Operands
from xpo_fast.head.sharded import is_sharded
from xpo_fast.head.units import pack, unit_loss
from xpo_fast.models import hidden_states, install_fused_loss, remove_fused_loss
from xpo_fast.models.lm_head import causal_lm

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
    *(numpy_warnings if INTERPRETED else []),
]
VOCAB, WIDTH = 61, 32
SCALE = 0.7  # of the adapter
BACKENDS = pytest.mark.parametrize("backend", ["torch", "dense"])
HEADS = {
    "plain": {},
    "everything": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7},
}
# Which of A, B, W, bias learn beside hidden.
LEARN = {
    "adapter": (True, True, False, False),
    "everything": (True, True, True, True),
    "nothing": (False, False, False, False),
    "B alone": (False, True, False, False),
}


def problem(learn="everything", dtype=torch.float32, rank=3, device="cpu"):
    """hidden (37, 11), A (r, 11), B (131, r), W (131, 11), bias (131,) and targets (37,): nothing divides anything."""
    operands = [
        oracle.normal(37, 11, seed=0),
        oracle.normal(rank, 11, seed=1),
        oracle.normal(131, rank, seed=2),
        oracle.normal(131, 11, seed=3),
        oracle.normal(131, seed=4),
    ]
    wants = (True, *LEARN[learn])
    operands = [x.to(device, dtype).requires_grad_(w) for x, w in zip(operands, wants, strict=True)]
    return operands, oracle.tokens((37,), 131)


def with_adapter(operands):
    """The operands as token_stats takes them."""
    hidden, a, b, weight, bias = operands
    return torch.cat([hidden, SCALE * (hidden @ a.T)], dim=-1), weight, {"adapter": b, "bias": bias}


def expected(operands, targets, options):
    """Every statistic by the effective weight in float64, and the operands there."""
    wide = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in operands]
    hidden, a, b, weight, bias = wide
    return oracle.stats(hidden, weight + SCALE * b @ a, targets, bias=bias, **options), wide


def assert_same_gradients(operands, wide, tolerance):
    for x, want in zip(operands, wide, strict=True):
        assert (x.grad is None) == (want.grad is None)
        if x.grad is not None:
            assert x.grad.dtype == x.dtype and oracle.error(x.grad.cpu(), want.grad) < tolerance


@BACKENDS
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_values_and_gradients_are_those_of_the_effective_weight(backend, head, learn, chunk_tokens):
    operands, targets = problem(learn, torch.float64)
    want, wide = expected(operands, targets, HEADS[head])
    hidden, weight, adapter = with_adapter(operands)
    options = {**HEADS[head], **adapter, "chunk_tokens": chunk_tokens, "backend": backend}
    found = xf.token_stats(hidden, weight, targets, outputs=("entropy", "mean_logit"), **options)
    for name in ("logp", "lse", "entropy", "mean_logit"):
        assert_close(getattr(found, name), want[name])
    logp, lse, entropy = (oracle.normal(37, seed=k) for k in (5, 6, 7))
    # With log-probs alone, the gradient of a frozen head is made in the forward; entropy's never is.
    for upstream in ({"logp": logp, "lse": lse}, {"logp": logp, "entropy": entropy}):
        found = xf.token_stats(hidden, weight, targets, outputs=("entropy",) * ("entropy" in upstream), **options)
        for x in (*operands, *wide):
            x.grad = None
        sum((getattr(found, n) * u).sum() for n, u in upstream.items()).backward(retain_graph=True)
        sum((want[n] * u).sum() for n, u in upstream.items()).backward(retain_graph=True)
        assert_same_gradients(operands, wide, 1e-12)


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tile_tokens", [8, 64])
def test_whole_units(learn, dtype, tile_tokens):
    run_units("torch", learn, dtype, tile_tokens)


def run_units(backend, learn, dtype, tile_tokens):
    """A loss of whole units while their tile is live; B in float32, as PEFT keeps it beside a narrow weight."""
    operands, targets = problem(learn, dtype, device=DEVICE)
    operands[1:3] = [x.detach().float().requires_grad_(x.requires_grad) for x in operands[1:3]]
    hidden, a, b, weight, bias = operands
    index = (targets != oracle.IGNORE).nonzero()[:, 0]
    lengths = [5, 3, len(index) - 8]

    def total(logp):
        return torch.stack([torch.tanh(x.sum() / 50) for x in logp[index.to(logp.device)].split(lengths)]).sum()

    def coefficients(logp, group):
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            parts = leaf.split([lengths[k] for k in group.units])
            return torch.autograd.grad(torch.stack([torch.tanh(x.sum() / 50) for x in parts]).sum(), leaf)[0]

    inputs = torch.cat([hidden, (SCALE * (hidden.float() @ a.T)).to(dtype)], dim=-1)
    plan = head_plan(inputs, weight, bias=bias, adapter=b, chunk_tokens=tile_tokens, backend=backend)
    groups = pack(index.to(DEVICE), lengths, tile_tokens)
    given = Operands(inputs, weight, targets.to(DEVICE), bias, b, ignore_index=oracle.IGNORE)
    loss, logp = unit_loss(given, groups, plan, coefficients, total)
    want, wide = expected(operands, targets, {})
    tolerance = 3e-5 if dtype == torch.float32 else 0.1  # x is rounded to the dtype of hidden
    assert_close(logp.cpu().double(), want["logp"], atol=tolerance, rtol=0)
    loss.backward()
    total(want["logp"]).backward()
    assert_same_gradients(operands, wide, 2e-5 if dtype == torch.float32 else 0.02)


def test_a_trainable_adapter_on_a_frozen_weight_makes_no_gradient_of_the_weight(tmp_path):
    """3F, the adapter's share of each, and dB; nothing of the weight's size is allocated."""
    hidden = oracle.normal(64, 48 + 2, seed=0, dtype=torch.float32).requires_grad_()
    weight = oracle.normal(4000, 48, seed=1, dtype=torch.float32)
    b = oracle.normal(4000, 2, seed=2, dtype=torch.float32).requires_grad_()
    targets = oracle.tokens((64,), 4000, ignored=0)

    def call():
        xf.token_logps(hidden, weight, targets, adapter=b, chunk_tokens=16).sum().backward()

    call()  # the tile is kept from here
    b.grad = hidden.grad = None
    meter = oracle.Meter(call, tmp_path)
    assert head_plan(hidden, weight, adapter=b).passes == 3
    assert meter.passes(64, 4000, 48) == pytest.approx(3 + 4 * 2 / 48)
    assert meter.largest_bytes < weight.numel() * 4 / 2


def test_operands_that_do_not_fit_are_refused():
    operands, targets = problem()
    hidden, weight, adapter = with_adapter(operands)
    with pytest.raises(ValueError, match=r"hidden must be \[h, x\], 14 wide.*Head.inputs"):
        xf.token_logps(hidden[:, :11], weight, targets, **adapter)
    with pytest.raises(ValueError, match=r"adapter a float tensor \(V, r\)"):
        xf.token_logps(hidden, weight, targets, adapter=adapter["adapter"][:-1])


@needs_triton
def test_with_triton_rows():
    run_checks(__file__, interpreted=True)


if INTERPRETED:

    @pytest.mark.parametrize("learn", ["adapter", "nothing"])
    def check_triton(learn):
        operands, targets = problem(learn)
        want, wide = expected(operands, targets, {})
        hidden, weight, adapter = with_adapter(operands)
        with torch.no_grad():
            logp = xf.token_logps(hidden, weight, targets, **adapter, backend="triton", chunk_tokens=16)
        assert_close(logp.double(), want["logp"], atol=2e-5, rtol=0)
        logp = xf.token_logps(hidden, weight, targets, **adapter, backend="triton", chunk_tokens=16)
        u = oracle.normal(37, seed=5)
        (logp * u).sum().backward()
        (want["logp"] * u).sum().backward()
        assert_same_gradients(operands, wide, 1e-5)

    def check_triton_units():
        run_units("triton", "adapter", torch.float32, 8)


# --- PEFT ---------------------------------------------------------------------------------------------------------


def make_model(kind=transformers.LlamaConfig, **options):
    torch.manual_seed(0)
    config = kind(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, **{"tie_word_embeddings": False, **options},
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).double()


def lora(**options):
    # Of lm_head alone unless said otherwise; B at random, so that there is something to see.
    options = {"target_modules": ["lm_head"], "r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def adapted(model=None, kind=peft.LoraConfig, **options):
    config = lora(**options) if kind is peft.LoraConfig else kind(**options)
    return peft.get_peft_model(make_model() if model is None else model, config, autocast_adapter_dtype=False).double()


BATCH = {"input_ids": torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))}
TARGETS = oracle.tokens((2, 9), VOCAB, ignored=0.2)


def ours(model):
    head = xf.Head.from_model(model)
    return xf.token_logps(hidden_states(model, BATCH), head, TARGETS, chunk_tokens=5)


def theirs(model):
    scored = TARGETS != oracle.IGNORE
    logp = model(**BATCH).logits.log_softmax(-1).gather(-1, TARGETS.clamp(min=0)[..., None])[..., 0]
    return torch.where(scored, logp, 0.0)


def gradients(model, logps):
    """Of a weighted sum of log-probs, by parameter, with the draws of dropout the same each time."""
    model.zero_grad()
    torch.manual_seed(3)
    logp = logps(model)
    (logp * oracle.normal(2, 9, seed=2)).sum().backward()
    return logp.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def two_adapters(active=("default", "other")):
    model = adapted()
    model.add_adapter("other", lora(r=2, use_rslora=True))
    model.base_model.set_adapter(list(active))
    return model.double()


def trained_too(name):
    def make():
        model = adapted()
        parameter = dict(model.named_parameters())[f"base_model.model.lm_head.base_layer.{name}"]
        parameter.requires_grad_()
        return model

    return make


def with_bias(**options):
    model = make_model()
    model.lm_head = nn.Linear(WIDTH, VOCAB).double()
    return adapted(model, **options)


def capped():
    return adapted(make_model(transformers.Gemma2Config, final_logit_softcapping=0.3, head_dim=8))


CASES = {
    "LoRA": adapted,
    "rank one": lambda: adapted(r=1),
    "rslora": lambda: adapted(use_rslora=True),
    "dropout": lambda: adapted(lora_dropout=0.4),
    "every linear layer": lambda: adapted(target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.2),
    "two adapters": two_adapters,
    "two adapters, one active": lambda: two_adapters(active=["other"]),
    "a trained weight": trained_too("weight"),
    "bias": with_bias,
    "a bias that is trained": lambda: with_bias(bias="all"),
    "a bias of the adapter": lambda: with_bias(lora_bias=True),
    "softcap": capped,
    "scale": lambda: adapted(make_model(transformers.CohereConfig, logit_scale=0.3)),
    "tied": lambda: adapted(make_model(tie_word_embeddings=True)),
    "DoRA": lambda: adapted(use_dora=True),
    "DoRA with a bias": lambda: with_bias(use_dora=True),
    "DoRA with a trained weight": lambda: adapted(use_dora=True).requires_grad_(),
    "modules_to_save": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_log_probs_and_gradients_are_those_of_peft(name):
    model = CASES[name]().train()
    found, got = gradients(model, ours)
    want, expected = gradients(model, theirs)
    assert_close(found, want)
    assert got.keys() == expected.keys()
    for parameter, x in expected.items():
        assert_close(got[parameter], x, msg=parameter)
    assert any("lora_" in x or "modules_to_save" in x for x in got)


def test_the_weight_is_not_copied_and_the_adapter_is_seen():
    model = adapted()
    head = xf.Head.from_model(model)
    assert head.weight is causal_lm(model).lm_head.base_layer.weight
    assert head.adapter.shape == (VOCAB, 4) and hidden_states(model, BATCH).shape == (2, 9, WIDTH + 4)
    with model.disable_adapter():
        assert xf.Head.from_model(model).adapter is None
        base = ours(model).detach()
        assert_close(base, theirs(model).detach())
    found = ours(model).detach()
    assert float((base - found).abs().max()) > 0.01
    model.merge_adapter()
    assert xf.Head.from_model(model).adapter is None
    assert_close(ours(model).detach(), found)
    causal_lm(model).lm_head.enable_adapters(False)
    with pytest.raises(ValueError, match="merged and disabled: unmerge it first"):
        xf.Head.from_model(model)


def test_a_fused_loss_takes_the_adapter_along():
    model = adapted(lora_dropout=0.3).train()
    install_fused_loss(model)

    def fused(model):
        def loss(hidden, head):
            return xf.token_logps(hidden, head, TARGETS)

        return model(**BATCH, fused_loss=loss)

    found, got = gradients(model, fused)
    remove_fused_loss(model)
    want, expected = gradients(model, theirs)
    assert_close(found, want)
    for name, x in expected.items():
        assert_close(got[name], x)


@pytest.mark.parametrize("use_dora", [False, True])
def test_training_takes_the_same_steps(use_dora):
    policy = adapted(target_modules=["q_proj", "lm_head"], use_dora=use_dora)
    before, other = copy.deepcopy(policy), copy.deepcopy(policy)
    for model, logps in ((policy, ours), (other, theirs)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            (-logps(model).sum()).backward()
            optimizer.step()
    for (name, p), q in zip(policy.named_parameters(), other.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), msg=name)
    assert not torch.equal(theirs(policy).detach(), theirs(before).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_in_float32_on_a_narrow_model(dtype):
    model = peft.get_peft_model(make_model().to(dtype), lora())
    assert causal_lm(model).lm_head.lora_B["default"].weight.dtype == torch.float32
    want = theirs(copy.deepcopy(model).double()).detach()
    assert_close(ours(model).double(), want, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)


# --- what is refused ----------------------------------------------------------------------------------------------


OTHERS = {
    "IA3": ("of a kind that is not low-rank", peft.IA3Config, {"feedforward_modules": []}),
    "VeRA": ("of a kind that is not low-rank", peft.VeraConfig, {}),
    "LoHa": ("of a kind that is not low-rank", peft.LoHaConfig, {}),
    "tokens": (
        "of a kind that is not low-rank",
        peft.LoraConfig,
        {"trainable_token_indices": {"lm_head": [3]}},
    ),
    "variant": ("variant of LoRA that is not supported", peft.LoraConfig, {"alora_invocation_tokens": [1]}),
    "dropout": ("DoRA adapter with dropout", peft.LoraConfig, {"use_dora": True, "lora_dropout": 0.1}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_are_refused_with_the_reason(name):
    why, kind, options = OTHERS[name]
    if name == "tokens":
        options = {**options, "target_modules": ["q_proj"]}
    elif kind is not peft.LoraConfig:
        options = {**options, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    model = adapted(kind=kind, **options)
    with pytest.raises(ValueError, match=f"the LM head of LlamaForCausalLM carries .*{why}.*merge the adapter first"):
        xf.Head.from_model(model)
    with pytest.raises(ValueError, match=why):
        install_fused_loss(model)


class Packed(nn.Linear):
    """A layer that unpacks its weight in its forward, as those of bitsandbytes do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed.flatten(), requires_grad=False)

    def forward(self, x):
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale
        return nn.functional.linear(x, weight)


def test_a_quantised_backbone_passes_and_a_quantised_head_does_not():
    model = make_model()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name)))
    assert_close(ours(model), theirs(model))
    model.lm_head = Packed(model.lm_head)
    with pytest.raises(ValueError, match=r"has a quantised weight \(.*Packed\); keep it in 16 or 32 bits"):
        xf.Head.from_model(model)


def test_heads_that_are_not_linear_are_refused():
    model = make_model()
    layer = SimpleNamespace(**vars(nn.Linear(WIDTH, VOCAB)))

    class Normalised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, nn.functional.normalize(self.weight))

    model.lm_head = Normalised(WIDTH, VOCAB)
    with pytest.raises(ValueError, match="is not a plain linear layer"):
        xf.Head.from_model(model)
    with pytest.raises(ValueError, match="has no output embeddings"):
        xf.Head.from_model(layer)


def add_accelerates(layer, *hooks):
    add_hook_to_module(layer, SequentialHook(*hooks))


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return output * 2


CHANGES = {
    "pre-hook": lambda x: x.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "hook": lambda x: x.register_forward_hook(lambda module, args, out: out * 2),
    "forward": lambda x: setattr(x, "forward", lambda h: nn.functional.linear(h, x.weight) * 2),
    "a hook of accelerate's": lambda x: add_accelerates(x, AlignDevicesHook(), Doubled()),
    "a forward below accelerate's": lambda x: (CHANGES["forward"](x), add_accelerates(x, AlignDevicesHook())),
    "spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.*spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [make_model, adapted], ids=["plain", "LoRA"])
def test_hooks_and_forwards_that_may_change_the_logits_are_refused(make, change):
    model = make()
    layer = causal_lm(model).lm_head
    CHANGES[change](getattr(layer, "base_layer", layer))
    what = "forward of its own" if "forward" in change else "forward hook"
    for read in (xf.Head.from_model, install_fused_loss):
        with pytest.raises(ValueError, match=f"the LM head of Llama.* has a {what}, which may change.*remove it"):
            read(model)


def test_hooks_that_leave_the_logits_as_they_are_stay():
    for make in (make_model, adapted):
        model = make()
        add_accelerates(causal_lm(model).lm_head, AlignDevicesHook(execution_device="cpu"))
        assert_close(ours(model), theirs(model))


# --- the reference's head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: adapted(use_dora=True), lambda: with_bias(lora_bias=True)])
def test_the_references_head_is_the_base_models_which_has_to_be_given(make):
    model = make().requires_grad_(False)
    head, hidden = xf.Head.from_model(model), hidden_states(model, BATCH)
    with model.disable_adapter():
        base, ref = xf.Head.from_model(model), {"ref_hidden": hidden_states(model, BATCH)}
        want = theirs(model)
    with pytest.raises(ValueError, match=r"DoRA scales the rows.*lora_bias adds.*pass ref_weight=, and ref_bias="):
        xf.token_stats(hidden, head, TARGETS, outputs=("kl",), **ref)
    with pytest.raises(ValueError, match="pass ref_weight=, and ref_bias="):
        xf.Objective("dpo")(hidden, head, TARGETS, **ref)
    ref |= {"ref_weight": base.weight, "ref_bias": base.bias}
    found = xf.Objective("dpo")(hidden, head, TARGETS, **ref)
    margin = (theirs(model) - want).sum(dim=1)
    assert_close(found.loss.double(), -nn.functional.logsigmoid(0.1 * (margin[0] - margin[1])))


# --- in parts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_fsdp_may_have_the_head_in_a_group_of_its_own(one_rank, options):
    from torch.distributed.fsdp import fully_shard

    model = adapted(target_modules=["q_proj", "lm_head"], **options)
    want, expected = gradients(copy.deepcopy(model), theirs)
    install_fused_loss(model)
    fully_shard(causal_lm(model).lm_head, mesh=one_rank)
    fully_shard(model, mesh=one_rank)

    def fused(model):
        def loss(hidden, head):
            assert is_sharded(causal_lm(model).lm_head.lora_A["default"].weight)
            logp = xf.token_logps(hidden, head, TARGETS)
            return logp.clone()  # FSDP2 warns of views

        return model(**BATCH, fused_loss=loss)

    found, got = gradients(model, fused)
    assert_close(found, want)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(got[name].full_tensor(), x, msg=name)


# --- the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["adapter", "copy", "cached"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_trainer_trains_an_adapter_on_the_head(tmp_path, reference, options):
    config = lora(target_modules=["q_proj", "lm_head"], init_lora_weights=True, **options)
    model = test_trainer.make_model(tie_word_embeddings=False)
    trainer = test_trainer.make_trainer(
        tmp_path, model=model, peft_config=config, reference=reference, max_steps=8, learning_rate=2e-2
    )
    head = causal_lm(trainer.model).lm_head
    before = head.base_layer.weight.clone()
    # F of the products in the tile, one more each for h and, of DoRA, for the copy of the weight.
    assert trainer.plan().passes == (3 if options else 2)
    trainer.train()
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logs[0] == pytest.approx(math.log(2), abs=1e-6) and logs[-1] < 0.5
    assert torch.equal(head.base_layer.weight, before)
    assert float(head.lora_B["default"].weight.detach().norm()) > 0


def test_the_trainer_makes_the_gradients_of_the_models_own_logits(tmp_path):
    """DPO's first step, its loss written out on what the model returns."""
    model = test_trainer.make_model(tie_word_embeddings=False)
    trainer = test_trainer.make_trainer(
        tmp_path, model=model, peft_config=lora(target_modules=["q_proj", "lm_head"], r=8), method="sft"
    )
    own = copy.deepcopy(trainer.model)
    remove_fused_loss(own)
    batch = next(iter(trainer.get_train_dataloader()))
    log, found = test_trainer.first_step(trainer)
    logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    test_trainer.assert_same_gradients(
        found, {name: p.grad for name, p in own.named_parameters() if p.grad is not None}, rtol=1e-5
    )
    assert any("lm_head.lora_A" in name for name in found)
