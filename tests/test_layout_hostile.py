"""Layouts under use that they were not made for: what is silent elsewhere must be right here, or be said."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

import xpo_fast as xf
from test_trainer import PEFT_WARNING, first_step, make_model, make_trainer
from xpo_fast.layouts import install_layouts, laid_out, lay_out

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

PROMPT = list(range(3, 23))


def alike() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows with a prompt in common, the second one padded: their ids and mask."""
    ids = torch.tensor([[*PROMPT, 30, 31, 32], [*PROMPT, 33, 2, 2]])
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return ids, mask


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_model_has_its_own_attention_outside_of_its_forward(checkpointing):
    """It is looked at by what saves and by what samples; what is computed again in a backward still finds the layout's.

    checkpointing: whether it is reentrant, None for none. The second loss goes back when the first has.
    """
    model, (ids, mask) = make_model().train(), alike()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    install_layouts(model)
    weights = list(model.parameters())

    def gradients(share: bool | None) -> list[list[torch.Tensor]]:
        layout = None if share is None else lay_out(ids, mask, share=share)
        losses, found = [], []
        with laid_out(layout):
            for _ in range(2):
                logits = model(input_ids=ids, attention_mask=mask).logits
                losses.append((logits * mask[..., None]).square().mean())
                assert model.config._attn_implementation == "sdpa"
        for loss in losses:
            model.zero_grad()
            model(input_ids=ids)  # padded, in between
            loss.backward()
            found.append([p.grad.clone() for p in weights])
            assert model.config._attn_implementation == "sdpa"
        return found

    want = gradients(None)
    for share in (False, True):
        torch.testing.assert_close(gradients(share), want, rtol=1e-4, atol=1e-6)


def test_a_forward_that_fails_leaves_nothing():
    model, (ids, mask) = make_model(), alike()
    install_layouts(model)
    model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with laid_out(lay_out(ids, mask, share=True)), pytest.raises(ZeroDivisionError):
        model(input_ids=ids, attention_mask=mask)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_returns_attentions_is_saved(tmp_path):
    """transformers saves such a config only if its attention is eager."""
    model = make_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    trainer = make_trainer(tmp_path, model=model, layout="shared", save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.layout.layout == "shared"
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "checkpoint-1", attn_implementation="eager")
    assert saved.output_attentions


def test_the_noise_of_neftune_is_that_of_padded_rows(tmp_path):
    """It is scaled by the length of what the embedding is given, of which a layout makes another one."""
    found = [
        first_step(make_trainer(tmp_path / layout, layout=layout, neftune_noise_alpha=5.0))
        for layout in ("padded", "auto")
    ]
    assert found[0][0]["loss"] == found[1][0]["loss"]
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        make_trainer(tmp_path, layout="shared", neftune_noise_alpha=5.0).prepare()


class Changed:
    """A collator of the user's own, whose batches have other masks."""

    def __init__(self, zero) -> None:
        self.zero, self.collate = zero, xf.data.Collator(2, "pair")

    def __call__(self, features):
        batch = self.collate(features)
        batch["attention_mask"][self.zero(batch)] = 0
        return batch


def hole(batch):
    """The second token of every row."""
    return (torch.arange(batch["input_ids"].shape[1]) == 1).expand_as(batch["input_ids"])


def last_scored(batch):
    """The position of every row whose hidden state predicts its last token, and that token's own."""
    positions, lengths = torch.arange(batch["input_ids"].shape[1]), batch["attention_mask"].sum(dim=1)
    return positions >= lengths[:, None] - 2


@pytest.mark.parametrize(("zero", "said"), [(hole, "between its tokens"), (last_scored, "a target at a position")])
def test_masks_that_no_layout_has_are_read_padded(tmp_path, zero, said):
    def first(layout: str):
        trainer = make_trainer(tmp_path / layout, layout=layout, reference="copy")
        trainer.data_collator.collate = Changed(zero)
        log, gradients = first_step(trainer, shrink=0.9)
        return log["loss"], gradients, trainer.layout

    want, found = first("padded"), first("auto")
    assert found[0] == want[0] and found[2].layout == "padded" and said in found[2].why
    torch.testing.assert_close(found[1], want[1])
    with pytest.raises(ValueError, match=said):
        first("shared")


def test_a_target_in_the_padding_is_refused():
    """Its hidden state would be 0, without a word."""
    ids, mask = alike()
    wanted = mask.bool()
    lay_out(ids, mask, wanted, share=True)
    wanted[1, -1] = True
    with pytest.raises(ValueError, match="expected 1 wherever a hidden state is read"):
        lay_out(ids, mask, wanted, share=True)


def test_a_model_of_float64_is_read_in_a_layout(tmp_path):
    """transformers computes norms in float32 whatever the model's dtype, and rounds their gradients so."""
    trainer = make_trainer(tmp_path, model=make_model().double(), layout="shared")
    trainer.prepare()
    assert trainer.layout.layout == "shared"


@pytest.mark.parametrize("budget", [2.5, "100", True])
def test_a_budget_is_a_number_of_tokens(tmp_path, budget):
    with pytest.raises(ValueError, match="tokens_per_batch must be an integer of at least 1"):
        make_trainer(tmp_path, tokens_per_batch=budget)


@pytest.mark.parametrize("layout", ["auto", "shared"])
def test_an_error_in_the_proof_pads_unless_the_layout_was_asked_for(tmp_path, monkeypatch, caplog, layout):
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel for this")

    # By its module: the package has a function of the same name.
    monkeypatch.setattr(sys.modules["xpo_fast.trainer.layout"], "prove", fails)
    trainer = make_trainer(tmp_path, layout=layout, preflight="off")
    if layout == "shared":
        with pytest.raises(RuntimeError, match="no kernel"):
            trainer.prepare()
        return
    trainer.prepare()
    assert trainer.layout.layout == trainer.data_collator.layout == "padded"
    assert "RuntimeError: no kernel for this" in caplog.text
