"""xpo_fast inside TRL: the same numbers as TRL's own runs, in fewer products, and refusals at the start.

Runs are of bench/trl_trainers.py's cases on its tiny random model in float32, where both differ by rounding only.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import math
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from torch.testing import assert_close

import oracle
import xpo_fast as xf
from ranks import found_by
from test_model_zoo import build
from xpo_fast import METHODS

pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever TRL and what it imports have to say on import
    import accelerate
    import peft
    import trl
    from transformers.integrations import HfDeepSpeedConfig
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import utils

    import trl_trainers as runs
    from xpo_fast.integrations import trl as engine
    from xpo_fast.integrations.trl import experimental as trl_experimental
    from xpo_fast.integrations.trl import fuse, seams

pytestmark = [
    # peft asks transformers under a name that transformers has deprecated.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # TRL sets what transformers has renamed.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning"),
]
TOLERANCE = 1e-4
STEPS, PAIRS = 2, 8


@pytest.fixture(autouse=True)
def undone():
    assert not engine.installed()
    yield
    engine.uninstall()


@pytest.fixture(scope="module", autouse=True)
def quiet():
    runs.datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # every run collects garbage, most of its time, among what imports made
    with pytest.MonkeyPatch.context() as patch:
        # Asked a dozen times a run, and read from the package's metadata each time.
        asked = accelerate.utils.imports._is_package_available
        patch.setattr(accelerate.utils.imports, "_is_package_available", functools.cache(asked))
        yield
    gc.unfreeze()


def make(case, ours, folder, *, model=None, peft_config=None, **arguments):
    """A trainer of a case's, named as in runs.CASES, on the tiny model; a reference beside it where one is taken."""
    case = runs.CASES[case] if isinstance(case, str) else case
    model = runs.tiny_model() if model is None else model
    adapted = peft_config is not None or hasattr(model, "peft_config")
    ref_model = None if adapted or arguments.get("precompute_ref_log_probs") else runs.tiny_model(1)
    with pytest.MonkeyPatch.context() as patch:
        if peft_config is not None:
            made = runs.classes(case, ours)[0]
            patch.setattr(runs, "classes", _with_peft(made, runs.classes(case, ours)[1], peft_config))
        options = {"max_steps": STEPS, **arguments}
        return runs.make_trainer(
            case, ours, model, runs.tiny_tokenizer(), runs.tiny_pairs(PAIRS), folder, ref_model=ref_model, **options
        )


def _with_peft(trainer, config, peft_config):
    return lambda case, ours: (lambda **options: trainer(peft_config=peft_config, **options), config)


def check_equal(case, tmp_path, tolerance=TOLERANCE, **arguments):
    logs = [runs.train(make(case, ours, tmp_path / str(ours), **arguments), ours) for ours in (False, True)]
    worst, where, count = runs.difference(*logs)
    assert worst < tolerance, where
    assert count >= STEPS * 4
    assert all(entry["grad_norm"] > 1e-3 for entry in logs[0] if "grad_norm" in entry)
    return logs[1]


# --- the runs are TRL's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", runs.CASES)
def test_runs_are_the_same(case, tmp_path):
    check_equal(case, tmp_path)


def test_dpo_loss_types_are_trls():
    source = Path(seams.dpo_trainer.__file__).read_text()
    for name in engine.DPO_LOSS_TYPES:
        assert f'loss_type == "{name}"' in source
    assert source.count('loss_type == "') == len(engine.DPO_LOSS_TYPES)


# Same losses under this project's names, through the objective: TRL's metrics that both have, and gradients.
SAME = {
    "dpo": {"loss_type": "sigmoid"},
    "bco_pair": {"loss_type": "bco_pair"},
    "exo": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "nca": {"loss_type": "nca_pair"},
    "robust_dpo": {"loss_type": "robust", "label_smoothing": 0.1},
    "aot": {"loss_type": "aot"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop"},
}


@pytest.mark.parametrize("name", SAME)
def test_own_methods_against_trls(name, tmp_path):
    theirs, ours = own_and_trls(name, SAME[name], tmp_path)
    assert ours.keys() >= {"loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen", "num_tokens"}
    for metric in ours.keys() - {"epoch"}:
        assert ours[metric] == pytest.approx(theirs[metric], rel=TOLERANCE, abs=TOLERANCE), metric


def own_and_trls(name, theirs, tmp_path, **both):
    label = {"label_smoothing": theirs["label_smoothing"]} if "label_smoothing" in theirs else {}
    logs = []
    for loss in (theirs, {"loss_type": f"xpo:{name}", **label}):
        case = runs.Case("DPO", name, {**loss, **both})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "classes", lambda *_: (engine.DPOTrainer, engine.DPOConfig))
            logs.append(runs.train(make(case, False, tmp_path, max_grad_norm=1e-2), False)[-1])
    return logs


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [
        ("dpo", "sigmoid", {"ld_alpha": 0.5}),
        ("dpo", "sigmoid", {"use_weighting": True}),
        ("discopop", "discopop", {"discopop_tau": 0.5}),
        ("dpo", "sigmoid", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_options_of_trls_act_on_own_methods(name, loss, options, tmp_path):
    theirs, ours = own_and_trls(name, {"loss_type": loss}, tmp_path, **options)
    for metric in ("loss", "grad_norm"):
        assert ours[metric] == pytest.approx(theirs[metric], rel=TOLERANCE)


# --- any pairwise method as a loss type -------------------------------------------------------------------------------

PAIRWISE = [name for name, method in METHODS.items() if method.layout == "pairwise" and name != "topk_kl"]
COLUMNS = {c: 0.9 for name in PAIRWISE for c in METHODS[name].columns if METHODS[name].axes(c) == ("U",)}
COLUMNS |= {"score_w": 2.0, "score_l": 0.5, "reward_w": 1.5, "reward_l": -0.5, "logp_sft": -7.0}


def own(loss, folder, *, pairs=None, eval_pairs=None, model=None, ref_model=True, peft_config=None, **arguments):
    """The DPOTrainer of this project, on the tiny model."""
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "report_to": [],
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "seed": 3,
        "lr_scheduler_type": "constant",
    }
    made = engine.DPOTrainer(
        runs.tiny_model() if model is None else model,
        runs.tiny_model(1) if ref_model else None,
        engine.DPOConfig(**{**options, **arguments}, loss_type=loss),
        train_dataset=runs.datasets.Dataset.from_list(runs.tiny_pairs(PAIRS) if pairs is None else pairs),
        eval_dataset=None if eval_pairs is None else runs.datasets.Dataset.from_list(eval_pairs),
        processing_class=runs.tiny_tokenizer(),
        peft_config=peft_config,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def logged(trainer, **options):
    trainer.train(**options)
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


def test_what_no_data_set_can_teach_is_refused(tmp_path):
    with pytest.raises(ValueError, match="topk_kl reads a teacher's likeliest tokens"):
        own("xpo:topk_kl", tmp_path, pairs=runs.tiny_pairs(PAIRS))


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_pairwise_method(name, tmp_path):
    """The loss of the first step is that of materialised logits, with the columns and the reference in their places."""
    pairs = [{**row, **COLUMNS, "score_w": 2.0 + k} for k, row in enumerate(runs.tiny_pairs(PAIRS))]
    options = {"top_k": 1} if name == "cringe" else {}  # nothing to draw
    trainer = own(
        f"xpo:{name}",
        tmp_path,
        pairs=pairs,
        ref_model=METHODS[name].needs_reference,
        max_steps=1,
        hyperparameters=options,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    targets = xf.shift_labels(inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100))
    assert trainer._columns == tuple(c for c in METHODS[name].columns if c in COLUMNS)

    def hidden(model):
        with torch.no_grad():
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]

    known = {c: inputs[c] for c in trainer._columns}
    if METHODS[name].needs_reference:
        model = trainer.ref_model
        known |= {"ref_hidden": hidden(model), "ref_weight": model.lm_head.weight}
    objective = xf.Objective(name, backend="dense", **options)
    with torch.no_grad():
        expected = objective(hidden(trainer.model), trainer.model.lm_head.weight, targets, **known)
    (found,) = logged(trainer)
    assert found["loss"] == pytest.approx(float(expected.loss), rel=1e-4)
    assert found["grad_norm"] > 0
    for metric, x in expected.metrics.items():
        assert float(x) != float(x) or found[metric] == pytest.approx(float(x), rel=1e-4, abs=1e-5)


def test_own_method_without_reference_loads_none(tmp_path):
    """The tiny model has no name that one could be loaded by; and `simpo` is a plain name."""
    trainer = own("simpo", tmp_path, ref_model=False, hyperparameters={"gamma": 0.5}, beta=1.5)
    assert trainer.ref_model is None
    assert not trainer.accelerator._models  # nor is a stand-in prepared, in which DeepSpeed would find no parameter
    assert str(trainer.objective) == "simpo(beta=1.5, gamma=0.5, gamma_beta_ratio=None, label_smoothing=0.0)"
    assert len(logged(trainer)) == STEPS


@pytest.mark.parametrize(
    ("name", "adapted"), [("simpo", False), ("orpo", False), ("cpo", False), ("slic", False), ("simpo", True)]
)
def test_own_method_without_reference_under_install(name, adapted, tmp_path):
    logs = []
    for ours in (False, True):
        with engine.install() if ours else warnings.catch_warnings():
            torch.manual_seed(1)
            options = {"ref_model": False, "max_steps": 1, "peft_config": lora() if adapted else None}
            logs.append(logged(own(name, tmp_path, **options)))
    assert runs.difference(*logs)[0] == 0 and logs[0][0]["grad_norm"] > 0


def test_own_methods_may_be_summed(tmp_path):
    trainer = own(["dpo", "xpo:sft"], tmp_path, loss_weights=[1.0, 0.25])
    assert [str(term).split("(")[0] for term in trainer.objective.terms] == ["dpo", "0.25*sft"]
    assert logged(trainer)[0]["loss"] > 0


def test_own_methods_take_three_passes(tmp_path):
    """3F of the scored tokens: no position of a prompt, no padding, nothing twice."""
    trainer = own("simpo", tmp_path, ref_model=False)
    inputs = next(iter(trainer.get_train_dataloader()))
    scored = int(inputs["completion_mask"][:, 1:].sum())
    run = lambda: trainer.compute_loss(trainer.model, inputs).backward()  # noqa: E731
    assert passes(run, tmp_path, scored, runs.VOCAB, 32) == 3


def passes(run, tmp_path, tokens, vocab, width):
    """The products with the head, in F."""
    products = [p for p in oracle.Meter(run, tmp_path).products if vocab in p]
    return sum(a * b * c for a, b, c in products) / (tokens * vocab * width)


# --- under what TRL's trainers are run --------------------------------------------------------------------------------


def lora(**options):
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options})


ALL = ["SFT nll", "DPO sigmoid", "KTO kto", "GRPO dapo", "RLOO rloo", "CPO simpo", "ORPO orpo", "TPO sigmoid"]


@pytest.mark.parametrize("case", ALL)
def test_adapter(case, tmp_path):
    """PEFT: the head is frozen, and the reference is the model without the adapter."""
    check_equal(case, tmp_path, peft_config=lora())


def test_trained_adapter_as_reference(tmp_path):
    """A PeftModel with a trained adapter, of which TRL keeps a copy as the reference: no margin at the first step."""

    def adapted():
        torch.manual_seed(5)
        return peft.get_peft_model(runs.tiny_model(), lora(init_lora_weights=False))

    logs = []
    for loss, trainer in (("sigmoid", trl.DPOTrainer), ("xpo:dpo", engine.DPOTrainer)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "classes", lambda *_, t=trainer: (t, engine.DPOConfig))
            case = runs.Case("DPO", loss, {"loss_type": loss})
            logs.append(runs.train(make(case, False, tmp_path, model=adapted()), False))
    assert logs[1][0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for theirs, ours in zip(*logs, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("case", [*ALL, "GRPO beta"])
def test_checkpointed_and_accumulated(case, tmp_path):
    """Gradient checkpointing, and two micro-batches a step."""
    check_equal(case, tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},  # rows cut out of a stream of tokens
        {"packing": True, "packing_strategy": "bfd", "max_length": 16},
        {"padding_free": True, "max_length": None},
    ],
    ids=lambda options: options.get("packing_strategy", "padding_free"),
)
@pytest.mark.filterwarnings("ignore:Padding-free:UserWarning")
def test_packing(options, tmp_path):
    check_equal("SFT nll", tmp_path, **options)


@pytest.mark.parametrize("loss", ["sigmoid", "xpo:dpo"])
def test_precomputed_reference(loss, tmp_path):
    """Of the policy itself, as TRL has it without a ref_model, with an evaluation that reads it, too."""
    arguments = {
        "precompute_ref_log_probs": True,
        "ref_model": False,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_pairs": runs.tiny_pairs(6),
    }
    logs = []
    for ours in (False, True):
        with engine.install() if ours else warnings.catch_warnings():
            logs.append(logged(own(loss, tmp_path / str(ours), **arguments)))
    worst, where, _ = runs.difference(*[[without_times(e) for e in log] for log in logs])
    assert worst < TOLERANCE, where
    first = logs[1][0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert any("eval_rewards/margins" in entry for entry in logs[1])


def test_precomputed_reference_of_kto(tmp_path):
    check_equal("KTO kto", tmp_path, precompute_ref_log_probs=True)


def without_times(entry):
    """Nor accuracies: whether a reward that is 0 but for rounding is above another."""
    return {k: x for k, x in entry.items() if not k.endswith(("_runtime", "_per_second", "accuracies", "_time"))}


@pytest.mark.parametrize("case", ALL)
def test_evaluation(case, tmp_path):
    logs = []
    for ours in (False, True):
        trainer = make(case, ours, tmp_path, per_device_eval_batch_size=6)
        trainer.eval_dataset = trainer.train_dataset.select(range(6))
        torch.manual_seed(0)
        with engine.install() if ours else warnings.catch_warnings():
            logs.append([without_times(trainer.evaluate())])
    worst, where, count = runs.difference(*logs)
    assert worst < TOLERANCE, where
    assert count >= 4


@pytest.mark.parametrize("loss", ["sigmoid", "xpo:dpo"])
@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_predictions_and_their_metrics(loss, tmp_path):
    """The model's own logits, by a forward of their own, as TRL makes them."""
    trainer = own(loss, tmp_path, eval_pairs=runs.tiny_pairs(3), per_device_eval_batch_size=3)
    trainer.compute_metrics = lambda found: {"largest": float(found.predictions.max())}
    (inputs,) = trainer.get_eval_dataloader()
    with engine.install(), torch.no_grad():
        found = trainer.predict(trainer.eval_dataset)
        logits = trainer.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert_close(torch.from_numpy(found.predictions), logits)
    assert found.metrics["test_largest"] == pytest.approx(float(logits.max()))
    assert found.metrics["test_loss"] > 0


@pytest.mark.parametrize("loss", ["sigmoid", "beta_dpo"])
def test_resume(loss, tmp_path):
    """A run that goes on from its checkpoint ends where the one in a piece did, `beta_dpo`'s running means included."""
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "save_total_limit": 3}
    with engine.install():
        whole = logged(own(loss, tmp_path / "whole", **arguments))
        checkpoint = str(tmp_path / "whole" / "checkpoint-2")
        resumed = logged(own(loss, tmp_path / "resumed", **arguments), resume_from_checkpoint=checkpoint)
    assert resumed[-1]["step"] == 3
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert resumed[-1][name] == pytest.approx(whole[-1][name], rel=1e-5)


@pytest.mark.parametrize("loss", ["beta_dpo", "cringe"])
def test_evaluation_leaves_training_alone(loss, tmp_path):
    """To the bit: its draws, and what a method remembers."""
    arguments = {"hyperparameters": {"seed": 5}, "ref_model": False} if loss == "cringe" else {}
    found = []
    for strategy in ("no", "steps"):
        evaluates = {"eval_strategy": strategy, "eval_steps": 1, "eval_pairs": runs.tiny_pairs(3)}
        trainer = own(loss, tmp_path / strategy, **arguments, **evaluates)
        trainer.train()
        found.append(({**trainer.model.state_dict()}, trainer.objective.state_dict()))
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_resume_with_an_adapter_on_the_head(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "save_total_limit": 3}
    with engine.install():
        logs = [logged(make("SFT nll", True, tmp_path, model=untied(), peft_config=on_head(), **arguments))]
        again = make("SFT nll", True, tmp_path / "again", model=untied(), peft_config=on_head(), **arguments)
        logs.append(logged(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    for name in ("loss", "grad_norm"):
        assert logs[1][-1][name] == pytest.approx(logs[0][-1][name], rel=1e-5)


@pytest.mark.parametrize(("case", "dtype"), [("DPO sigmoid", "bf16"), ("CPO simpo", "bf16"), ("DPO sigmoid", "fp16")])
def test_half_precision(case, dtype, tmp_path):
    """Under autocast logits stay float32 here, and TRL rounds them: losses agree to bfloat16's 2⁻⁸, float16's 2⁻¹¹."""
    check_equal(case, tmp_path, tolerance={"bf16": 0.05, "fp16": 0.006}[dtype], **{"bf16": False, dtype: True})


@pytest.mark.parametrize("case", ["SFT nll", "DPO ipo", "KTO kto", "TPO ipo"])
def test_completions_without_a_token(case, tmp_path, monkeypatch):
    """Prompts that fill the rows: TRL's numbers, all of them finite."""
    pairs = runs.tiny_pairs(PAIRS)
    for k in (0, 3, 5):
        pairs[k]["prompt"] = " ".join(["w1"] * 12)
    monkeypatch.setattr(runs, "tiny_pairs", lambda count: pairs)
    logs = check_equal(case, tmp_path, max_length=12)
    assert all(math.isfinite(x) for entry in logs for x in entry.values())


def test_own_method_on_completions_without_a_token(tmp_path):
    pairs = runs.tiny_pairs(PAIRS)
    pairs[0]["prompt"] = pairs[3]["prompt"] = " ".join(["w1"] * 12)
    for entry in logged(own("simpo", tmp_path, pairs=pairs, ref_model=False, max_length=12)):
        assert all(math.isfinite(x) for x in entry.values())


# --- the function -----------------------------------------------------------------------------------------------------

VOCAB, WIDTH = 211, 16
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SCALINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"final_logit_softcapping": 3.0, "logit_scale": 0.5},
}


def operands(learn=(True, True, True), tokens=37, dtype=torch.float32):
    shapes = ((tokens, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    xs = [oracle.normal(*shape, seed=k, dtype=dtype) for k, shape in enumerate(shapes)]
    return [x.requires_grad_(wanted) for x, wanted in zip(xs, learn, strict=True)]


def call(function, xs, targets, outputs=OUTPUTS, temperature=1.0, **scaling):
    hidden, weight, bias = xs
    # One tile of TRL's is narrower than the vocabulary.
    options = {"final_logit_softcapping": None, "logit_scale": 1.0} | scaling
    return function.apply(hidden, weight, bias, targets, temperature, 128, *options.values(), outputs)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("learn", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("upstream", ["logp", "entropy", "both"])
def test_function_is_trls(learn, scaling, upstream):
    """Outputs and gradients: as TRL's, and no further from float64 than those are."""
    targets = torch.randint(VOCAB, (37,), generator=torch.Generator().manual_seed(0))
    found = []
    for function, dtype in (
        (engine.HeadFunction(), torch.float64),
        (ChunkedLogProbFunction, torch.float32),
        (engine.HeadFunction(), torch.float32),
    ):
        xs = operands(learn, dtype=dtype)
        out = call(function, xs, targets, **SCALINGS[scaling])
        u = oracle.normal(2, 37, seed=9).to(dtype)
        terms = {"logp": [(out[0], u[0])], "entropy": [(out[1], u[1])]}
        terms["both"] = terms["logp"] + terms["entropy"]
        sum((x * w).sum() for x, w in terms[upstream]).backward()
        found.append([*out, *(x.grad for x in xs)])
    assert [x.requires_grad for x in found[2][:5]] == [True, True, False, False, False]
    for truth, theirs, ours in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and ours.dtype == torch.bool:
            assert ours.equal(theirs)
        elif ours is not None:
            errors = [(x.double() - truth).abs().max() for x in (theirs, ours)]
            assert errors[1] <= 2 * errors[0] + 1e-6
            assert errors[0] < 1e-4  # the truth is of the same function


def test_function_against_the_textbook():
    targets = torch.randint(VOCAB, (37,), generator=torch.Generator().manual_seed(0))
    xs = operands(dtype=torch.float64)
    logp, entropy, squares, mean, top1 = call(engine.HeadFunction(), xs, targets, **SCALINGS["softcap"])
    z, logprobs = oracle.logprobs(*xs, softcap=3.0, logit_scale=0.5)
    assert_close(logp, logprobs.gather(1, targets[:, None])[:, 0])
    assert_close(entropy, -oracle.expectation(logprobs.exp(), logprobs))
    assert_close(squares, (2 * logprobs).logsumexp(1))
    assert_close(mean, z.mean(1))
    assert top1.equal(z.argmax(1) == targets)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "is_top1"), ("mean_logits", "entropy")], ids=str)
def test_only_what_is_asked_for(outputs):
    found = call(engine.HeadFunction(), operands(), torch.zeros(37, dtype=torch.long), outputs)
    assert [name for name, x in zip(OUTPUTS, found[1:], strict=True) if x is not None] == [
        name for name in OUTPUTS if name in outputs
    ]


@pytest.mark.parametrize(
    ("learn", "uses", "expected"),
    [
        ((True, False, False), "logp", 2),  # entropy is only logged: TRL takes 3
        ((True, True, True), "logp", 4),
        ((True, False, False), "nothing", 1),
        ((True, True, True), "nothing", 1),
    ],
)
def test_passes(learn, uses, expected, tmp_path):
    targets = torch.zeros(37, dtype=torch.long)

    def run():
        with torch.set_grad_enabled(uses == "logp"):
            found = call(engine.HeadFunction(), operands(learn), targets)
        if uses == "logp":
            found[0].sum().backward()

    assert passes(run, tmp_path, 37, VOCAB, WIDTH) == expected


def test_entropy_bonus_takes_three_passes_from_the_second_call_on(tmp_path):
    function, targets = engine.HeadFunction(), torch.zeros(37, dtype=torch.long)

    def run():
        logp, entropy, *_ = call(function, operands((True, False, False)), targets)
        (logp.sum() + entropy.sum()).backward()

    run()
    assert passes(run, tmp_path, 37, VOCAB, WIDTH) == 3
    call(function, operands((True, False, False)), targets)[0].sum().backward()  # another trainer, without the bonus
    assert not function.entropy_learns


def test_backward_twice():
    targets = torch.zeros(37, dtype=torch.long)
    xs = operands((True, False, False))
    out = call(engine.HeadFunction(), xs, targets)[0].sum()
    first = torch.autograd.grad(out, xs[0], retain_graph=True)[0].clone()
    assert_close(torch.autograd.grad(out, xs[0])[0], first)


def test_float32_weight_under_autocast_gets_an_unrounded_gradient():
    targets = torch.randint(VOCAB, (37,), generator=torch.Generator().manual_seed(0))
    xs, wide = operands(), operands(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(engine.HeadFunction(tile_bytes=VOCAB * 4 * 8), xs, targets)[0]
    out.sum().backward()
    call(engine.HeadFunction(), wide, targets)[0].sum().backward()
    assert out.dtype == torch.float32 and [x.grad.dtype for x in xs] == [torch.float32] * 3
    assert (xs[1].grad != xs[1].grad.bfloat16()).float().mean() > 0.5
    for x, w in zip(xs, wide, strict=True):
        assert (x.grad - w.grad).norm() < 0.01 * w.grad.norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_no_label(frozen):
    """A micro-batch without a token to learn from: zero, with a graph and zero gradients."""
    model = runs.tiny_model().requires_grad_(not frozen)
    model.model.layers.requires_grad_(True)
    utils.add_fused_lm_head(model, outputs=("log_probs", *OUTPUTS))
    ids = torch.arange(12).view(2, 6)
    with engine.install():
        out = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        out.loss.backward()
    assert float(out.loss.detach()) == 0
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in grads)


def test_unlabelled_positions_are_not_scored(tmp_path):
    """On a CPU TRL multiplies them by the head, too; with this engine not."""
    model = runs.tiny_model().requires_grad_(False)
    model.model.layers.requires_grad_(True)
    utils.add_fused_lm_head(model)
    ids = torch.arange(24).view(2, 12)
    labels = ids.masked_fill(torch.arange(12) < 9, -100)

    def run():
        model(ids, labels=labels, fused_lm_head=True).loss.backward()

    # Of TRL's 3F the meter does not see the last, an addmm in place.
    assert passes(run, tmp_path, 6, runs.VOCAB, 32) == pytest.approx(2 * 22 / 6)
    with engine.install():
        assert passes(run, tmp_path, 6, runs.VOCAB, 32) == 2


# Of dynamo's, about any autograd function and what it looks at there.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    found = []
    for compiled in (False, True):
        model = runs.tiny_model()
        ids = torch.arange(24).view(2, 12)
        with engine.install() if compiled else warnings.catch_warnings():
            utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            run = torch.compile(model, backend="eager") if compiled else model
            out = run(ids, labels=ids.masked_fill(ids < 3, -100), fused_lm_head=True)
            out.loss.backward()
        found.append([out.loss.detach(), out.entropy.detach(), model.lm_head.weight.grad])
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- which heads ------------------------------------------------------------------------------------------------------


class Squashed(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.tanh())


class Packed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(runs.VOCAB, 32, dtype=torch.int8), requires_grad=False)
        self.bias = None

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (lambda: Squashed(32, runs.VOCAB, bias=False), "not a plain linear layer .*Squashed.*take its logits"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(32, runs.VOCAB)), "not a plain linear layer .*Sequential"),
        (Packed, "quantised weight .*keep it in 16 or 32 bits"),
    ],
)
@pytest.mark.parametrize("case", ["SFT nll", "CPO simpo"])
def test_refused_heads(case, head, reason, tmp_path):
    """By TRL's trainers after `install()`, and by those of this project: TRL multiplies by whatever its `weight` is."""
    model = untied()
    model.lm_head = head()
    with engine.install(), pytest.raises(ValueError, match=reason):
        make(case, True, tmp_path, model=model)


def test_refused_head_of_a_reference(tmp_path):
    reference = untied()
    reference.lm_head = Squashed(32, runs.VOCAB, bias=False)
    with engine.install(), pytest.raises(ValueError, match="Squashed"):
        utils.add_fused_lm_head(reference)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RecurrentGemmaForCausalLM", "softcap None and logit scale 1, its forward has 2.5 and 1"),
        ("MptForCausalLM", "logit scale 0.6, its forward has None and 1"),
        ("ModernBertDecoderForCausalLM", "more to its hidden states before lm_head"),
        ("RobertaForCausalLM", "more to its hidden states before lm_head"),
        ("RemBertForCausalLM", "does not come by the hidden states"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refused_logits(name, reason):
    """Of models of which TRL's log-probs are not those of their logits, with an adapter on the head, too."""
    model = build(name).train()
    state = torch.get_rng_state()
    with engine.install():
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{reason}.*take xpo_fast.trainer"):
                utils.add_fused_lm_head(model)
            assert "forward" not in vars(model) and model.training and torch.get_rng_state().equal(state)
            if name != "RecurrentGemmaForCausalLM":
                break
            peft.get_peft_model(model, on_head())
            state = torch.get_rng_state()


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Cohere", "MiniCPM3", "FalconH1", "Bloom"])
@pytest.mark.filterwarnings("ignore")
def test_logits_that_are_trls(name):
    model = build(f"{name}ForCausalLM")
    ids = torch.randint(3, 97, (2, 7))
    with engine.install(), torch.no_grad():
        model.get_output_embeddings().weight.normal_()
        utils.add_fused_lm_head(model)
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        own_logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    assert_close(found, own_logprobs.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_logits_of_weights_that_are_not_there():
    """What the config says is compared all the same; the forward is not run."""
    with engine.install():
        utils.add_fused_lm_head(build("RobertaForCausalLM").to("meta"))
        with pytest.raises(ValueError, match="softcap None"):
            utils.add_fused_lm_head(build("RecurrentGemmaForCausalLM").to("meta"))


@pytest.mark.filterwarnings("ignore")
def test_own_methods_on_logits_that_are_not_trls(tmp_path):
    """They go by the model's forward."""
    with engine.install():
        model = build("RobertaForCausalLM")
        trainer = own("simpo", tmp_path, model=model, ref_model=False, max_steps=1)
        inputs = next(iter(trainer.get_train_dataloader()))
        targets = xf.shift_labels(inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100))
        with torch.no_grad():
            z = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        (found,) = logged(trainer)
    logp = z.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    total = (logp * (targets != -100)).sum(1)
    assert found["logps/chosen"] == pytest.approx(float(total.chunk(2)[0].mean()), rel=1e-4)


def test_trained_copy_of_the_head(tmp_path):
    """modules_to_save: no adapter, and the reference has the original."""
    config = lora(modules_to_save=["lm_head"])
    logs = []
    for ours in (False, True):
        with engine.install() if ours else warnings.catch_warnings():
            torch.manual_seed(1)
            trainer = make("DPO sigmoid", ours, tmp_path, model=untied(), peft_config=config)
            logs.append(runs.train(trainer, ours))
    assert runs.difference(*logs)[0] < TOLERANCE


# --- LoRA on the head -------------------------------------------------------------------------------------------------


def on_head(**options):
    """Not TRL's usual start from B = 0: policy and reference then differ, and A has a gradient."""
    return lora(target_modules=["lm_head", "q_proj"], init_lora_weights=False, **options)


def untied():
    return runs.tiny_model(tie_word_embeddings=False)


class Materialised(engine.HeadFunction):
    """The statistics from the logits that the layer makes itself, adapter and all."""

    layer = None

    def apply(self, hidden, weight, bias, targets, temperature, *_):
        z = self.layer(hidden) / temperature
        logprobs = z.log_softmax(-1)
        logp = logprobs.gather(1, targets[:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(1)
        return logp, entropy, (2 * logprobs).logsumexp(1).detach(), z.mean(1).detach(), z.argmax(1) == targets


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "LoRA") for case in ("SFT nll", "DPO sigmoid", "KTO kto", "GRPO dapo", "RLOO rloo")),
        *((case, "DoRA") for case in ("SFT nll", "DPO sigmoid")),
    ],
)
def test_adapter_on_the_head(case, kind, tmp_path):
    """What TRL refuses. The reference is the model without it, its head included."""
    logs = []
    for function in (Materialised(), None):
        with engine.install(), pytest.MonkeyPatch.context() as patch:
            torch.manual_seed(1)
            trainer = make(case, True, tmp_path, model=untied(), peft_config=on_head(use_dora=kind == "DoRA"))
            before = {n: p.clone() for n, p in trainer.model.named_parameters() if "lm_head.lora" in n}
            if function is not None:
                function.layer = trainer.model.get_output_embeddings()
                patch.setattr(utils, "_ChunkedLogProbFunction", function)
            torch.manual_seed(0)
            logs.append(logged(trainer))
            assert len(before) >= 2
            assert all(not p.equal(before[n]) for n, p in trainer.model.named_parameters() if n in before)
    worst, where, count = runs.difference(*logs)
    assert worst < TOLERANCE, where
    assert count > 4


def test_adapter_on_the_head_with_own_methods(tmp_path):
    """As TRL's loss through the same head."""
    logs = []
    for loss in ("sigmoid", "xpo:dpo"):
        torch.manual_seed(1)
        with engine.install():
            logs.append(logged(own(loss, tmp_path, model=untied(), ref_model=False, peft_config=on_head())))
    for theirs, ours in zip(*logs, strict=True):
        for name in ours.keys() - set(runs.NOT_COMPARED):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=TOLERANCE), name


@pytest.mark.parametrize("case", ["CPO simpo", "ORPO orpo", "TPO sigmoid"])
def test_adapter_on_the_head_of_the_experimental(case, tmp_path):
    """Which TRL does not refuse: it makes all logits there."""
    logs = []
    for ours in (False, True):
        torch.manual_seed(1)
        logs.append(runs.train(make(case, ours, tmp_path, model=untied(), peft_config=on_head()), ours))
    worst, where, _ = runs.difference(*logs)
    assert worst < TOLERANCE, where


def test_adapter_on_the_head_needs_install(tmp_path):
    """Before: TRL's own refusal. After `uninstall`: TRL's function would leave the adapter out."""
    options = {"model": untied(), "peft_config": on_head()}
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        make("DPO sigmoid", True, tmp_path, **options)
    options["model"] = untied()
    with engine.install():
        trainer = make("SFT nll", True, tmp_path, **options)
    with pytest.raises(ValueError, match="leaves an adapter on lm_head out"):
        trainer.train()


def test_adapter_on_a_head_cast_to_float32(tmp_path):
    options = {"model": untied(), "peft_config": on_head(), "cast_lm_head_to_fp32": True}
    with engine.install(), pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
        make("GRPO dapo", True, tmp_path, **options)


def loha():
    return peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])


def new_tokens():
    """Of a tied head: rows of the embedding, and of the head with them."""
    return lora(trainable_token_indices=[5, 6])


@pytest.mark.parametrize("case", ["DPO sigmoid", "CPO simpo"])
@pytest.mark.parametrize(("config", "tied"), [(loha, False), (new_tokens, True)])
def test_adapter_that_cannot_be_fused(case, config, tied, tmp_path):
    model = runs.tiny_model(tie_word_embeddings=tied)
    with engine.install(), pytest.raises(ValueError, match=r"not low-rank as LoRA is .*merge the adapter"):
        make(case, True, tmp_path, model=model, peft_config=config())


def test_two_trainers_of_one_adapted_model(tmp_path):
    """One after the other: the second samples by the first's forward, and scores by its own."""
    with engine.install():
        first = make("SFT nll", True, tmp_path, model=untied(), peft_config=on_head())
        assert len(logged(first)) == STEPS
        second = logged(make("GRPO dapo", True, tmp_path, model=first.model))
        assert len(second) == STEPS and all(entry["grad_norm"] > 0 for entry in second)


def test_copy_of_an_adapted_model_runs_its_own_weights():
    model = peft.get_peft_model(untied(), on_head())
    ids = torch.arange(12).view(1, 12)
    with engine.install(), torch.no_grad():
        utils.add_fused_lm_head(model.get_base_model())
        other = copy.deepcopy(model)
        for p in other.parameters():
            p.mul_(0.5)
        found = [m(input_ids=ids, labels=ids, fused_lm_head=True).loss for m in (model, other)]
        expected = [m(input_ids=ids).logits for m in (model, other)]
        truth = torch.nn.functional.cross_entropy(expected[0][0, :-1], ids[0, 1:])
    assert_close(found[0], truth)
    assert abs(found[0] - found[1]) > 0.1


# --- install ----------------------------------------------------------------------------------------------------------


def replaced():
    return {place: getattr(*place, None) for place in seams.THEIRS}


def test_install_and_uninstall():
    before = replaced()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    engine.uninstall()  # nothing to undo
    engine.install()
    engine.install(tile_bytes=2**20)  # again, with other options
    assert utils._ChunkedLogProbFunction == engine.HeadFunction(tile_bytes=2**20)
    engine.uninstall()
    assert replaced() == before and not engine.installed()


def test_install_as_context():
    before = replaced()
    with engine.install(), pytest.raises(ZeroDivisionError):
        assert engine.installed()
        with engine.install(tile_bytes=1):
            assert utils._ChunkedLogProbFunction.tile_bytes == 1
            1 / 0  # noqa: B018
    assert replaced() == before
    with engine.install():
        with engine.install(tile_bytes=1):
            pass
        assert utils._ChunkedLogProbFunction == engine.HeadFunction()


@pytest.mark.parametrize("leave", ["uninstall", "with"])
def test_what_others_have_taken_over_by_name(leave, monkeypatch):
    """Before `install`, or as AsyncGRPO's module when it is imported while installed."""
    before, after = types.ModuleType("trl.before"), types.ModuleType("trl.after")
    monkeypatch.setitem(sys.modules, "trl.before", before)
    before.add_fused_lm_head = utils.add_fused_lm_head
    theirs = utils.add_fused_lm_head
    with engine.install():
        assert before.add_fused_lm_head is fuse.add_fused_lm_head
        monkeypatch.setitem(sys.modules, "trl.after", after)
        after.add_fused_lm_head = utils.add_fused_lm_head
        if leave == "uninstall":
            engine.uninstall()
            assert after.add_fused_lm_head is theirs
        else:
            with engine.install(tile_bytes=1):
                pass
            assert after.add_fused_lm_head is fuse.add_fused_lm_head
    assert after.add_fused_lm_head is before.add_fused_lm_head is theirs


def test_install_after_the_trainer(tmp_path):
    """And `uninstall` before it has run: whose function it is, is looked up at each step."""
    logs = []
    for made, trained in ((False, False), (False, True), (True, False)):
        with engine.install() if made else warnings.catch_warnings():
            trainer = make("DPO sigmoid", False, tmp_path)
        with engine.install() if trained else warnings.catch_warnings():
            logs.append(logged(trainer))
    assert 0 < runs.difference(logs[0], logs[1])[0] < TOLERANCE
    assert runs.difference(logs[0], logs[2])[0] == 0


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0"])
def test_another_version(version, monkeypatch, tmp_path):
    monkeypatch.setattr(trl, "__version__", version)
    for start in (engine.install, lambda: own("simpo", tmp_path), lambda: trl_experimental.CPOTrainer()):
        with pytest.raises(ValueError, match=rf"expected TRL 1.16, got {version}.*pip install 'trl==1.16.\*'"):
            start()


def test_another_signature(monkeypatch):
    def apply(ctx, hidden, weight, targets):
        pass

    monkeypatch.setattr(seams, "SIGNATURES", ((apply, seams.SIGNATURES[0][1]),))
    with pytest.raises(ValueError, match=r"takes \(ctx hidden weight targets\), expected \(ctx hidden weight bias"):
        engine.install()


@pytest.mark.parametrize("place", seams.THEIRS, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_somebody_else_was_there(place, monkeypatch):
    before = replaced()
    monkeypatch.setattr(*place, object())
    with pytest.raises(ValueError, match=f"{place[1]} has been replaced by <object"):
        engine.install()
    assert {k: x for k, x in replaced().items() if k != place} == {k: x for k, x in before.items() if k != place}


@pytest.mark.parametrize("backend", ["dense", "tpu"])
def test_backends(backend):
    with pytest.raises(ValueError, match="backend"):
        engine.install(backend=backend)
    assert not engine.installed()


def test_names_of_the_module():
    for name in ("CPOTrainer", "ORPOTrainer", "TPOTrainer", "OnlineDPOTrainer"):
        cls = getattr(engine, name)
        assert issubclass(cls, getattr(importlib.import_module(cls.__mro__[2].__module__), name))
    with pytest.raises(AttributeError, match="PPOTrainer"):
        engine.PPOTrainer  # noqa: B018


# --- refused at the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        ("sipmo", {}, "no loss type named 'sipmo'.*sigmoid.*simpo"),
        ("kto", {}, "no loss type named 'kto'"),  # not of pairs
        (["sigmoid", "simpo"], {}, "sigmoid of TRL's and simpo of xpo_fast's"),
        (["ipo", "simpo"], {}, "xpo:ipo is xpo_fast's ipo"),
        ("simpo", {"hyperparameters": {"gama": 1.0}}, "gama"),
        ("dpo", {"label_smoothing": 0.7}, "label_smoothing"),
        ("npo", {"label_smoothing": 0.1}, "label_smoothing"),
        ("odpo", {}, "odpo needs the column 'score_w'"),
        ("tdpo", {"precompute_ref_log_probs": True, "ref_model": False}, "precompute_ref_log_probs"),
        ("sigmoid", {"hyperparameters": {"beta": 0.2}}, "hyperparameters are those of .*, and sigmoid is TRL's"),
        ("simpo", {}, "simpo.* compares with no reference: leave out ref_model="),
        ("simpo", {"ref_model": False, "precompute_ref_log_probs": True}, "leave out precompute_ref_log_probs"),
        ("dpo", {"hyperparameters": "beta=0.2"}, "expected hyperparameters as a dict"),
        ("simpo", {"sync_ref_model": True, "ref_model": False}, "sync_ref_model"),
        ("dpo", {"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ("dpo", {"discopop_tau": 0.1}, "tau"),
        ([], {}, "expected at least one loss type"),
        (
            "dpo",
            {"torch_compile": True, "torch_compile_backend": "eager"},
            r"compile the decoder, model.get_decoder\(\)",
        ),
        (
            "odpo",
            {"pairs": [{**row, **COLUMNS} for row in runs.tiny_pairs(PAIRS)], "eval_pairs": runs.tiny_pairs(2)},
            "the evaluation's data has no column score_w, score_l",
        ),
    ],
)
def test_refused_losses(loss, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        own(loss, tmp_path, **arguments)


def test_refused_adapter_on_the_head_of_a_reference(tmp_path):
    """Where whole distributions are compared: of a reference model, and of the trained adapter that is kept as one."""

    def adapted():
        return peft.get_peft_model(untied(), on_head())

    def kept():
        made = own("tdpo", tmp_path, model=adapted(), ref_model=False)
        assert "ref" in made.model.peft_config

    with engine.install():
        with pytest.raises(ValueError, match=r"tdpo.* whole distributions.*carries an adapter: merge"):
            kept()
        assert logged(own("tdpo", tmp_path, model=untied(), ref_model=False, peft_config=on_head()))
        own("dpo", tmp_path, model=adapted(), ref_model=False)
        reference = adapted()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "tiny_model", lambda *_, **__: reference)
            with pytest.raises(ValueError, match="carries an adapter"):
                own("tdpo", tmp_path, model=transformers.LlamaForCausalLM(reference.config))


@pytest.mark.parametrize("trainer", ["CPO", "TPO", "OnlineDPO"])
def test_refused_losses_of_the_experimental(trainer, tmp_path):
    case = runs.Case(trainer, "a typo", {"loss_type": "sigmiod"})
    with pytest.raises(ValueError, match="no loss type named 'sigmiod'; there are sigmoid, "):
        make(case, True, tmp_path)
    with pytest.raises(ValueError, match=f"{trainer}Trainer takes its hidden states out of the model's forward"):
        make(f"{trainer} sigmoid", True, tmp_path, torch_compile=True, torch_compile_backend="eager")


def test_refused_models(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=runs.VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
    )
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="output_router_logits"):
        make("ORPO orpo", True, tmp_path, model=model)


# --- heads in parts ---------------------------------------------------------------------------------------------------

PARTS = ("a group of FSDP2", "a group of its own", "LoRA in a group of its own", "ZeRO-3", "ZeRO-3, tied")


def parts_model(made):
    torch.manual_seed(0)
    model = runs.tiny_model(tie_word_embeddings="tied" in made)
    if "LoRA" in made:
        model = peft.get_peft_model(model, on_head())
    utils.add_fused_lm_head(model.get_base_model() if "LoRA" in made else model, outputs=("log_probs", "entropy"))
    return model


def parts_loss(model, rows):
    ids = torch.randint(3, runs.VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))[rows]
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    return -(out.log_probs + 0.5 * out.entropy).sum() / 20


def parts_gradients(rank):
    """Of two ranks with two rows each; both average over ranks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from torch.distributed.fsdp import fully_shard

    found, rows = {}, slice(2 * rank, 2 * rank + 2)
    with engine.install(), patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        for made in PARTS:
            if "ZeRO" in made:
                zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
                config = {
                    "train_micro_batch_size_per_gpu": 1,
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": zero,
                }
                seen = HfDeepSpeedConfig(config)  # by which TRL knows, for as long as it lives
                model = parts_model(made)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
                run = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
                run.backward(2 * parts_loss(run, rows))
                grads = {n: safe_get_full_grad(p).clone() for n, p in run.module.named_parameters()}
                run.step()
                run.destroy()
                del seen
            else:
                model = parts_model(made)
                if "own" in made:
                    lm = model.get_base_model() if "LoRA" in made else model
                    fully_shard(lm.lm_head)
                fully_shard(model)
                (2 * parts_loss(model, rows)).backward()
                grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
            found[made] = grads
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("the extra [dev] has DeepSpeed on Linux alone")
    return found_by(tmp_path_factory, 2, parts_gradients)


@pytest.mark.parametrize("made", PARTS)
def test_head_in_parts(made, parts):
    with engine.install():
        model = parts_model(made)
        parts_loss(model, slice(0, 4)).backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for found in parts:
        assert found[made].keys() == want.keys()
        for n, g in want.items():
            assert_close(found[made][n], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()))
