"""Which dtype `auto` is: by instructions, or a measurement where they do not tell; warnings for an explicit dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from torch.testing import assert_close

import xpo_fast as xf
from test_trainer import make_model, make_tokenizer
from xpo_fast import precision
from xpo_fast.cli import doctor
from xpo_fast.head.gemms import Gemms
from xpo_fast.head.spec import Scaling
from xpo_fast.models import load_model
from xpo_fast.rewards.model import RewardModel

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No measurement kept, nothing warned of, and no variable that holds torch to other instructions."""
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))
    for name in precision.settings():
        monkeypatch.delenv(name)
    precision._slowdown.cache_clear()
    precision._warned.clear()


@pytest.fixture(params=[True, False], ids=["native", "not native"])
def native(request, monkeypatch):
    """A device that multiplies bfloat16 natively, and one that does not; no device here has native float16."""

    def by_instructions(dtype):
        return precision.Support(dtype, request.param and dtype == BF16, "so it was decided")

    monkeypatch.setattr(precision, "_by_instructions", by_instructions)
    return request.param


def test_auto_keeps_what_the_device_multiplies_natively_and_never_narrows(native):
    assert precision.resolve("auto", BF16, CPU) == (BF16 if native else torch.float32)
    assert precision.resolve("auto", torch.float16, CPU) == torch.float32
    assert precision.resolve("auto", torch.float32, CPU) == torch.float32
    assert precision.resolve("auto", torch.float64, CPU) == torch.float64
    assert precision.resolve("auto", None, CPU) == "auto"
    assert precision.fastest(CPU) == (BF16 if native else torch.float32)


def test_an_explicit_wish_is_kept_with_one_warning_that_tells_the_factor(native, monkeypatch):
    monkeypatch.setattr(precision, "_measure", lambda dtype, device: 12.5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [precision.resolve(wish, torch.float32, CPU) for wish in ("bfloat16", BF16, "float32")]
    assert found == [BF16, BF16, torch.float32]
    assert [str(w.message) for w in said] == [] if native else len(said) == 1
    if not native:
        assert "does not multiply bfloat16 natively: its products take 12 times as long" in str(said[0].message)


@pytest.mark.parametrize(
    ("onednn", "flags", "variables", "native"),
    [
        (False, [], {}, False),  # AVX2: torch multiplies in a scalar loop
        (True, ["avx512_bf16"], {}, True),
        (True, ["amx"], {}, True),
        (True, [], {}, None),  # AVX-512 alone: oneDNN emulates
        (True, ["avx512_bf16"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, None),
    ],
)
def test_instructions_tell_where_they_can(onednn, flags, variables, native, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name in precision._CPU_FLAGS:
        monkeypatch.setitem(precision._CPU_FLAGS, name, lambda name=name: name in flags)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = precision._by_instructions(BF16)
    assert found is None if native is None else found is not None and found.native == native
    for factor in (0.5, 2.0):  # what a measurement then decides
        monkeypatch.setattr(precision, "slowdown", lambda dtype, device, factor=factor: factor)
        assert precision.native(BF16, CPU) == (factor < 1 if native is None else native)


def test_the_factor_is_measured_once_and_the_first_process_decides(tmp_path, monkeypatch):
    measured = iter([3.0, 7.0])
    monkeypatch.setattr(precision, "_measure", lambda dtype, device: next(measured))
    assert precision.slowdown(BF16, CPU) == precision.slowdown(BF16, CPU) == 3.0
    precision._slowdown.cache_clear()  # as in another process
    assert precision.slowdown(BF16, CPU) == 3.0
    (kept,) = (tmp_path / "cache" / "precision").iterdir()
    assert "bfloat16 torch" in json.loads(kept.read_text())["what"]
    kept.write_text("{")
    precision._slowdown.cache_clear()
    assert precision.slowdown(BF16, CPU) == 7.0 == json.loads(kept.read_text())["times float32"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "file"))
    assert precision.slowdown(BF16, CPU) > 0


def test_a_measurement_is_the_ratio_of_real_products():
    assert 0.9 < precision._measure(torch.float64, CPU) < 20  # twice the bytes, half the lanes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model saved in bfloat16, with its tokenizer."""
    folder = tmp_path_factory.mktemp("bf16")
    make_model().to(BF16).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    config = make_model().config.to_dict() | {"num_labels": 1, "pad_token_id": 0}
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config)).to(BF16)
    classifier.save_pretrained(folder / "classifier")
    make_tokenizer().save_pretrained(folder / "classifier")
    return folder


def test_models_and_reward_models_are_loaded_in_it(folder, native):
    expected = BF16 if native else torch.float32
    assert load_model(str(folder / "model"))[0].dtype == expected
    assert load_model(str(folder / "model"), device="cpu")[0].dtype == expected
    assert RewardModel.load(folder / "classifier").model.dtype == expected


def test_a_config_without_a_dtype_is_read_by_its_weights(folder, tmp_path, native):
    model, tokenizer = load_model(str(folder / "model"), dtype=torch.float32)
    model.to(BF16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    assert load_model(str(tmp_path))[0].dtype == (BF16 if native else torch.float32)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_head_is_right_in_halves_on_either_device(native, dtype, monkeypatch):
    """bf16 operands: as bf16 products where they are native, else widened; the same log-probs and gradients."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(37, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    used = type(Gemms(weight, None, Scaling())._products).__name__
    assert used == ("_Bf16Products" if native and dtype == BF16 else "nullcontext")
    targets = torch.tensor([1, 36, -100, 0, 7])
    found = {}
    for backend in ("torch", "dense"):
        h, w = (x.double() if backend == "dense" else x for x in (hidden, weight))
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        logp = xf.token_logps(h, w, targets, backend=backend)
        logp.sum().backward()
        found[backend] = [logp.double(), h.grad.double(), w.grad.double()]
    assert_close(found["torch"][0], found["dense"][0], rtol=0, atol=1e-5)
    for ours, exact in zip(found["torch"][1:], found["dense"][1:], strict=True):
        assert_close(ours, exact, rtol=0, atol=float(exact.abs().max()) * torch.finfo(dtype).eps)


def test_doctor_says_what_was_found_and_chosen(native):
    lines = "\n".join(doctor._dtypes())
    assert "cpu bfloat16" in lines and "so it was decided; products take" in lines
    kept = "in bfloat16 as saved, in float16 as float32" if native else "in bfloat16 and float16 as float32"
    assert kept in lines


def test_other_instructions_are_seen():
    """In a process that is held to AVX2, as a CPU without AVX-512 would be."""
    code = (
        "import torch; from xpo_fast import precision as p; c = torch.device('cpu');"
        "print(p.fastest(c), p.native(torch.bfloat16, c), p.support(torch.bfloat16, c))"
    )
    variables = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    if torch.backends.mkldnn.is_available():
        assert done.stdout.startswith("torch.float32 False") and "AVX2" in done.stdout
