"""Every method on a causal LM of transformers in float32, held to the same model in float64 with every logit made."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from test_objective import (
    LENGTHS,
    SAMPLED,
    THROUGH_HEAD,
    VOCAB,
    T,
    given_to,
    hyper_of,
    lay_out,
    list_size,
    materialised,
    mean_of,
    of_tokens,
    targets_of,
)  # fmt: skip

PROMPT = 2


@pytest.fixture(scope="module")
def models():
    """Policy and reference: two layers, an untied head with what transformers does to logits (none here)."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.3,
        )  # fmt: skip
        made.append(transformers.LlamaForCausalLM(config))
    return made


def batch():
    """Tokens (R, T), right-padded, and their aligned targets; rows of LENGTHS scored tokens behind a prompt."""
    inputs, targets = oracle.tokens((len(LENGTHS), T + PROMPT), VOCAB, 0.0, seed=3), targets_of()
    padded = torch.nn.functional.pad(targets, (PROMPT, 0), value=oracle.IGNORE)
    return inputs, padded


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", [n for n in THROUGH_HEAD if n not in SAMPLED])
def test_loss_and_gradients_of_a_real_model(models, name, trainable, packed):
    method, hyper = xf.METHODS[name], hyper_of(xf.METHODS[name])
    columns, ref = given_to(method, len(LENGTHS))
    inputs, targets = batch()
    found = {}
    for dtype in (torch.float32, torch.float64):
        policy, reference = (copy.deepcopy(m).to(dtype) for m in models)
        policy.lm_head.requires_grad_(trainable)
        hidden = policy.model(inputs).last_hidden_state[:, PROMPT:]
        given = dict(columns)
        if ref:
            with torch.no_grad():
                given["ref_hidden"] = reference.model(inputs).last_hidden_state[:, PROMPT:]
        y, weight = targets[:, PROMPT:], policy.lm_head.weight
        if dtype == torch.float32:
            given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()}
            given = of_tokens(method, y, packed, given)
            h, y, cu = lay_out(hidden, y, packed)
            fixed = {"fixed_length": T} if method.denominator == "fixed_length" else {}
            objective = xf.Objective(name, tile_bytes=9 * VOCAB * 4, **fixed, **hyper)
            loss = objective(h, weight, y, list_size=list_size(method), **cu, **given).loss
        else:
            reference_states = {n: given.pop(n) for n in list(given) if n == "ref_hidden"}
            losses, _, _, items = materialised(method, hidden, weight, None, y, given, reference_states)
            loss = mean_of(method, losses, items, y)
        loss.backward()
        gradients = {n: p.grad.double() for n, p in policy.named_parameters() if p.grad is not None}
        found[dtype] = loss.detach().double(), gradients
    (loss, gradients), (truth, expected) = found.values()
    assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys() and ("lm_head.weight" in gradients) == trainable
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).norm() <= 1e-5 * norm, key
