"""Backbones that bitsandbytes quantises, with a head in 16 bits: log-probs and gradients against its own logits."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import transformers
from torch.testing import assert_close

import xpo_fast as xf
from xpo_fast.models import hidden_states, install_fused_loss

peft = pytest.importorskip("peft", reason="an optional extra: pip install xpo_fast[train]")
if sys.platform != "linux":
    pytest.skip("the extra [dev] has bitsandbytes on Linux alone", allow_module_level=True)

WIDTH, VOCAB = 64, 97
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    8: {"load_in_8bit": True},
}
IDS = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("whole")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def quantised(folder, bits, **options):
    config = transformers.BitsAndBytesConfig(**BITS[bits], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )


def of_logits(model):
    return model(input_ids=IDS).logits.float().log_softmax(-1).gather(-1, IDS[..., None])[..., 0]


def of_hidden_states(model):
    head = xf.Head.from_model(model)
    return xf.token_logps(hidden_states(model, {"input_ids": IDS}), head, IDS)


@pytest.mark.parametrize("bits", BITS)
def test_backbone(bits, folder):
    model = quantised(folder, bits).eval()
    assert "bitsandbytes" in type(model.model.layers[0].mlp.up_proj).__module__
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert_close(of_hidden_states(model), of_logits(model), rtol=0, atol=2e-2)  # its logits are rounded


@pytest.mark.parametrize("bits", BITS)
def test_adapter_on_backbone_and_head(bits, folder):
    """QLoRA with the head among its targets: every adapter's gradient is that of the logits."""
    model = quantised(folder, bits)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), config).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [torch.autograd.grad(f(model).sum(), trained) for f in (of_hidden_states, of_logits)]
    assert len(trained) == 4 and all(g.abs().max() > 0 for g in found[0])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("bits", BITS)
def test_quantised_head_is_refused(bits, folder):
    model = quantised(folder, bits, llm_int8_skip_modules=["none"])
    for read in (xf.Head.from_model, install_fused_loss):
        with pytest.raises(ValueError, match=r"quantised weight \(bitsandbytes.*keep it in 16 or 32 bits"):
            read(model)
