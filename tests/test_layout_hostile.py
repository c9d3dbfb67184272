"""Layouts under use that they were not made for: what is silent elsewhere must be right here, or be said."""

from __future__ import annotations

import pytest
import torch
import transformers

from test_trainer import PEFT_WARNING, make_model, make_trainer
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
        for a, b in zip(sum(want, []), sum(gradients(share), []), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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
