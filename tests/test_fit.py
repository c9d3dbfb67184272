"""`xpo-fast fit`: what a run keeps in memory, recorded without contents, against what torch allocates for it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import pytest
import torch

from test_trainer import PEFT_WARNING, make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.cli import fit_question
from xpo_fast.fit import allocators, optimizers, predict, shapes, verify
from xpo_fast.fit.model import FROZEN, TRAINED
from xpo_fast.fit.phases import OPTIMIZER, record
from xpo_fast.fit.predict import _of_depth
from xpo_fast.fit.question import Question
from xpo_fast.fit.trace import GRADIENTS
from xpo_fast.head.gemms import release_tiles
from xpo_fast.rewards.spec import USES

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
MIB, GIB = 2**20, 2**30
PAIRS = ((30, (40, 21)), (17, (25, 60)), (44, (9, 33)))
SINGLE = ((30, (40,)), (17, (60,)), (44, (33,)))
FULL = {"full": True, "lora": None}


def config(layers=3):
    found = _of_depth(shapes.shape("smollm2-135m"), layers)
    found.update({"hidden_size": 192, "intermediate_size": 512, "vocab_size": 2000, "head_dim": 64})
    found.update({"num_attention_heads": 3, "num_key_value_heads": 1})
    return found


def question(layers=3, **fields):
    given = {"config": config(layers), "lora": predict.default_lora(), "dtype": "float32", "device": "cpu"}
    return Question(**given | {"units": PAIRS, "max_grad_norm": 0.0} | fields)


def alive(trace, phase):
    """Returns the most bytes that are alive in a phase of a trace, beyond what was when it began."""
    starts = [at for at, _ in trace.phases] + [len(trace.events)]
    k = [name for _, name in trace.phases].index(phase)
    sizes, now, before, most = {}, 0, 0, 0
    for at, (number, size) in enumerate(trace.events[: starts[k + 1]]):
        if at == starts[k]:
            before = most = now
        now += size or -sizes[number]
        sizes[number] = size
        most = max(most, now)
    return most - before


def allocated(call, path):
    """Returns the most bytes that a call has of torch's CPU allocator at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    found = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    first = found[0][1]
    return max(x["Total Allocated"] for _, x in found) - (first["Total Allocated"] - first["Bytes"])


RUNS = {
    "adapter": {},
    "adapter, checkpointing": {"gradient_checkpointing": True},
    "adapter, simpo": {"method": "simpo"},
    "adapter, eager": {"attention": "eager"},
    "adapter, packed": {"layout": "packed"},
    "adapter, shared": {"layout": "shared"},
    "full, simpo": FULL | {"method": "simpo"},
    "full, copy": FULL | {"reference": "copy"},
    "full, sft": FULL | {"method": "sft", "units": SINGLE},
    "reward model": {"command": "reward", "method": "bradley_terry"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_keeps_what_torch_allocates(name, tmp_path):
    """Forward and backward of a trainer's own loss allocate what the record says, to 3% and 100 KB."""
    asked = question(**RUNS[name])
    trainer = verify._trainer(asked, None, str(tmp_path))
    trainer.prepare() if asked.command == "train" else None
    if asked.gradient_checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        trainer.model.enable_input_require_grads()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(asked.rows))])
    trainer.model.train()

    def step():
        trainer._loss(trainer.model, batch, torch.tensor(6.0))[0].backward()

    step()
    trainer.model.zero_grad()
    release_tiles()
    measured = allocated(step, tmp_path / "trace.json")
    trace = record(dataclasses.replace(asked, optim="sgd"))
    # The first step: the tile of logits is new, and there is no state of an optimizer.
    assert alive(trace, "first step") == pytest.approx(measured, rel=0.03, abs=100_000)


def test_owners_are_told_apart():
    found = {phase.name: phase.owners for phase in predict.predict(question(**FULL, method="simpo")).phases}
    weights = sum(p.numel() for p in verify_model(config()).parameters()) * 4
    assert found["weights"][TRAINED] == pytest.approx(weights, rel=0.001)
    later = found["later steps"]
    assert later[OPTIMIZER] == pytest.approx(2 * weights, rel=0.01)
    assert {"tile of logits", "attention", "MLP", "norms"} <= set(later)
    adapted = predict.predict(question()).phases[0].owners
    assert adapted[FROZEN] == pytest.approx(weights, rel=0.001) and 0 < adapted[TRAINED] < weights / 4


def verify_model(of):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(of)


TRAINED_BY = (
    "dpo",
    "ipo",
    "orpo",
    "simpo",
    "kto",
    "bco",
    "sft",
    "beta_dpo",
    "lipo",
    "nn",
    "cringe",
    "dpo + 0.5*sft",
    "tdpo",
)
LISTS = ((20, (10, 15, 12)), (31, (22, 8, 9)))


@pytest.mark.parametrize("method", TRAINED_BY)
def test_methods_of_every_kind_of_data(method):
    from xpo_fast import Objective
    from xpo_fast.data import KINDS

    kind = KINDS[Objective(method).data_kind]
    units = LISTS if kind.listed else PAIRS if len(kind.completions) == 2 else SINGLE
    for fields in ({}, FULL):
        found = predict.predict(question(2, method=method, units=units, **fields), quick=True)
        assert found.peak > found.phases[0].peak


@pytest.mark.parametrize(
    "method",
    ["bradley_terry", "k_wise", "regression", "gated", "preference_model", "discriminator", "grm", "haf", "odin"],
)
def test_reward_models(method):

    units = {"pair": PAIRS, "list": LISTS, "unpaired": SINGLE}[USES[method][0]]
    objectives = ("a", "b") if method == "gated" else ("reward",)
    asked = question(2, command="reward", method=method, units=units, objectives=objectives)
    found = predict.predict(asked, quick=True)
    assert found.peak > found.phases[0].peak


@pytest.mark.parametrize("method", ["grpo", "ppo", "rloo", "dapo", "gspo", "reinforce"])
def test_rollouts(method):
    asked = question(2, command="rl", method=method, units=((16, (24,)),), batch_size=4, generations=4)
    found = {phase.name: phase.owners for phase in predict.predict(asked).phases}
    keys = 2 * 2 * 4 * 64 * (16 + 24 - 1 + 1) * 4  # K and V of 2 layers, 4 rows, 1 head of 64, float32
    assert found["rollout"]["cache of keys and values"] >= keys * 0.9
    assert max(sum(x.values()) for x in found.values()) > sum(found["weights"].values())


# --- allocators -------------------------------------------------------------------------------------------------------


def cuda(*sizes, limit=None):
    allocator = allocators.Cuda(limit)
    return allocator, [allocator.malloc(size) for size in sizes]


def test_segments_of_cuda():
    for size, taken in (
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB),
    ):
        assert cuda(size)[0].taken == taken
    allocator, blocks = cuda(*[512 * 1024] * 4)
    assert allocator.taken == 2 * MIB  # four blocks in a segment
    for block in blocks:
        allocator.free(block)
    allocator.malloc(MIB)
    assert allocator.taken == 2 * MIB  # the free blocks were merged


def test_cuda_gives_segments_back_before_it_is_out_of_memory():
    allocator, (first, second) = cuda(30 * MIB, 30 * MIB, limit=70 * MIB)
    allocator.free(first)
    allocator.malloc(36 * MIB)
    assert allocator.taken == 66 * MIB and not allocator.over
    allocator.malloc(36 * MIB)
    assert allocator.over
    allocator.free(second)


def test_phases_have_their_own_peaks():
    events = [(0, 64 * MIB), (1, 64 * MIB), (1, 0), (2, 40 * MIB), (2, 0), (0, 0)]
    found, room = allocators.peaks(events, [0, 3], "cuda", 200 * MIB)
    assert [(peak.alive, peak.at) for peak in found] == [(128 * MIB, 1), (104 * MIB, 3)] and room
    assert [peak.taken for peak in found] == [128 * MIB, 128 * MIB]  # CUDA's is kept
    assert not allocators.peaks(events, [0, 3], "cuda", 100 * MIB)[1]
    on_cpu, _ = allocators.peaks(events, [0, 3], "cpu")
    assert [peak.taken / MIB for peak in on_cpu] == pytest.approx([128, 104], abs=1)  # what is large is unmapped


def test_without_malloc_of_glibc_what_is_alive_stands_for_it(monkeypatch, tmp_path):
    (tmp_path / "heap.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(allocators, "_HEAP", tmp_path / "heap.py")
    found, room = allocators.peaks([(0, 100), (1, 50), (1, 0)], [0], "cpu", 120)
    assert found[0].taken == 150 and not room


# --- optimizers and levers --------------------------------------------------------------------------------------------


def state_bytes(optimizer, p):
    optimizer.step()
    values = optimizer.state[p].values()
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, torch.Tensor) and x.dim())


@pytest.mark.parametrize("shape", [(64, 96), (80,)])
@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_state_of_optimizers(name, shape):
    from transformers import Trainer, TrainingArguments

    real = torch.nn.Parameter(torch.zeros(shape))
    real.grad = torch.ones(shape)
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("x", optim=name, use_cpu=True))
    ours = torch.nn.Parameter(torch.zeros(shape, device="meta"))
    ours.grad = torch.ones(shape, device="meta")
    expected = state_bytes(kind([real], **keywords), real)
    assert state_bytes(optimizers.make(name, [ours], {}, on_cpu=True), ours) == expected


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_weights(bits):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layer = torch.nn.Linear(512, 1024, bias=False)
    if bits == "4bit":
        real = Linear4bit(512, 1024, bias=False, compress_statistics=True, quant_type="nf4")
        real.load_state_dict(layer.state_dict())
        real = real.to("cpu")
        state = real.weight.quant_state
        held = real.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    else:
        real = Linear8bitLt(512, 1024, bias=False, has_fp16_weights=False)
        real.load_state_dict(layer.state_dict())
        real = real.to("cpu")
        held = real.weight.nbytes + 4 * 1024
    with torch.device("meta"):
        from xpo_fast.fit.model import _Packed

        ours = _Packed(torch.nn.Linear(512, 1024, bias=False), bits)
    assert ours.weight.nbytes + ours.scales.nbytes == pytest.approx(held, rel=0.01)


def peak_of(**fields):
    return predict.predict(question(4, **{"dtype": "bfloat16", "device": "cuda"} | fields), quick=True).peak


def test_every_lever_takes_less():
    long = {"units": ((400, (600, 600)),), "batch_size": 4}
    plain = peak_of(**long)
    assert peak_of(**long, gradient_checkpointing=True) < plain
    assert peak_of(**long, activation_offload=True) < plain
    assert peak_of(**long | {"batch_size": 2}) < plain
    assert peak_of(**long, layout="shared") < plain
    short = {"units": ((8, (8, 8)),), "batch_size": 1}
    packed = [
        predict.predict(question(6, quantize=bits, **short)).phases[0].owners[FROZEN] for bits in ("4bit", "8bit")
    ]
    assert packed[0] < packed[1]
    full = FULL | short
    assert peak_of(**full, optim="adafactor") < peak_of(**full, optim="adamw_8bit") < peak_of(**full)
    gradients = {
        inside: max(
            phase.owners.get(GRADIENTS, 0)
            for phase in predict.predict(question(4, **full, optimizer_in_backward=inside)).phases
        )
        for inside in (False, True)
    }
    assert gradients[True] < gradients[False] / 2


def test_ranks_share_what_the_sharding_says():
    asked = question(4, **FULL, method="simpo", device="cuda", dtype="bfloat16")
    found = {
        sharding: predict.predict(dataclasses.replace(asked, ranks=4, sharding=sharding), quick=True).phases[-1].owners
        for sharding in ("ddp", "zero1", "zero3")
    }
    alone = predict.predict(asked, quick=True).phases[-1].owners
    assert found["ddp"][OPTIMIZER] == alone[OPTIMIZER] and found["ddp"]["buckets of gradients"] == alone[TRAINED]
    assert found["zero1"][OPTIMIZER] == pytest.approx(alone[OPTIMIZER] / 4, rel=0.01)
    assert found["zero3"][TRAINED] == pytest.approx(alone[TRAINED] / 4, rel=0.01)
    config = asked.config
    head = 4 * config.vocab_size * config.hidden_size
    layers = (alone[TRAINED] - head) / 4  # of one layer; the head is the embedding
    assert found["zero3"]["layers gathered"] == pytest.approx(2 * layers + 3 * head, rel=0.01)
    adapted = predict.predict(question(4, method="simpo", ranks=4, sharding="fsdp"), quick=True).phases[-1].owners
    frozen = 2 * (layers + adapted[TRAINED]) + head  # its adapter is a quarter, and there are four layers
    assert adapted["layers gathered"] == pytest.approx(frozen, rel=0.01)


# --- what fits --------------------------------------------------------------------------------------------------------


def test_estimates_of_few_layers():
    asked = question(12, units=((200, (200, 200)),), batch_size=2, device="cuda", dtype="bfloat16", memory=8 * GIB)
    estimates = predict.Estimates(predict.predict(asked))
    for fields in ({"batch_size": 4}, {"gradient_checkpointing": True}):
        other = dataclasses.replace(asked, **fields)
        assert estimates.peak(other) == pytest.approx(predict.predict(other).peak, rel=0.1)


def test_largest_batch_and_longest_rows():
    asked = question(6, units=((300, (300, 300)),), batch_size=1, device="cuda", memory=2 * GIB, layout="padded")
    whole = predict.predict(asked)
    assert whole.fits
    batch = predict.largest_batch(whole)
    count = batch.question.batch_size
    assert batch.fits and count > 1
    assert not predict.predict(dataclasses.replace(asked, batch_size=math.ceil(1.25 * count) + 1)).fits
    rows = predict.longest_rows(whole)
    assert rows.fits and rows.question.longest > asked.longest


def test_changes_that_make_a_run_fit():
    asked = question(5, **FULL, units=((300, (300, 300)),), batch_size=8, device="cuda", memory=1100 * MIB)
    whole = predict.predict(asked)
    assert not whole.fits
    proposal, alone = predict.propose(whole)
    assert proposal is not None and proposal.prediction.fits and len(alone) > 4
    names = [name for change, _ in proposal.changes for name in change.fields]
    assert len(set(names)) == len(names) or proposal.prediction.question.lora is not None
    hopeless = predict.predict(dataclasses.replace(asked, memory=620 * MIB))
    assert predict.propose(hopeless)[0] is None


def test_wrong_questions():
    for fields, named in (
        ({"units": ()}, "at least one unit"),
        ({"batch_size": 0}, "batch_size"),
        ({"sharding": "tp"}, "sharding"),
        ({"command": "tune"}, "command"),
        (FULL | {"quantize": "4bit"}, "quantize"),
        ({"memory": 0}, "memory"),
        ({"command": "rl", "method": "grpo", "tokens_per_batch": 100}, "tokens_per_batch"),
    ):
        with pytest.raises(ValueError, match=named):
            question(**fields)
    with pytest.raises(ValueError, match="does not know what it keeps"):
        optimizers.make("stable_adamw", [], {}, on_cpu=True)


def test_rows_of_a_budget_of_tokens():
    asked = question(units=((10, (90, 50)),), batch_size=8, tokens_per_batch=650)
    assert len(asked.rows) == 3  # of 2 rows of 100 tokens each
    assert len(dataclasses.replace(asked, tokens_per_batch=1).rows) == 1


def test_shapes():
    for name, billions in (
        ("llama-3.1-8b", 8.03),
        ("qwen2.5-7b", 7.62),
        ("mistral-7b", 7.25),
        ("smollm2-135m", 0.1345),
    ):
        count = sum(p.numel() for p in verify_model(shapes.shape(name)).parameters())
        assert count / 1e9 == pytest.approx(billions, rel=0.01), name
    for text in ("7B", "1.5b", "300M"):
        count = sum(p.numel() for p in verify_model(shapes.of_size(shapes.number(text))).parameters())
        assert count == pytest.approx(shapes.number(text), rel=0.1)
    with pytest.raises(ValueError, match=r"no shape 'llama-3.1-9b'; did you mean"):
        shapes.shape("llama-3.1-9b")
    with pytest.raises(ValueError, match="7B or 135M"):
        shapes.number("seven")


def test_questions_travel_as_json():
    asked = question(optim="sgd", settings={"beta": 0.2})
    back = verify.from_json(json.loads(json.dumps(verify.as_json(asked))))
    assert back.units == asked.units and back.settings == asked.settings
    assert predict.predict(back).phases[0] == predict.predict(asked).phases[0]


def test_a_run_is_measured():
    """In a process of its own; how far predictions are off is measured on larger runs by bench/fit.py."""
    asked = question(units=((8, (8, 8)),), batch_size=1, eval_batch_size=1)
    measured = verify.measure(asked, timeout_s=300)
    owners = predict.predict(asked).phases[0].owners
    assert measured["what"] == "resident memory of the process"
    assert measured["peak"] > 100 * MIB + sum(owners[name] for name in (TRAINED, FROZEN))
    with pytest.raises(RuntimeError, match=r"the run failed.*no_such_method"):
        verify.measure(dataclasses.replace(asked, method="no_such_method"))


# --- the command ------------------------------------------------------------------------------------------------------


def run(*words, model=("--shape", "smollm2-135m")):
    return cli.main(["fit", *model, *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three layers, of which there is a configuration alone."""
    where = tmp_path_factory.mktemp("model")
    config().save_pretrained(where)
    return str(where)


def test_the_command(folder, tmp_path, capsys):
    file, picture = tmp_path / "fit.json", tmp_path / "fit.png"
    words = ["--memory", "1GiB", "--batch-size", "1", "--lengths", "64,128"]
    assert run(*words, "--json", str(file), "--plot", str(picture), model=[folder]) == 0
    said = capsys.readouterr().out
    for part in (
        "later steps",
        "of 1.0 GiB: fits",
        "largest micro-batch",
        "longest rows",
        "xpo-fast train",
        "mean length",
    ):
        assert part in said
    found = json.loads(file.read_text())
    assert found["prediction"]["fits"] and found["largest"]["batch_size"] > 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_to_change(folder, capsys):
    words = ["--memory", "900MiB", "--device", "cuda", "--full", "--lengths", "512", "--batch-size", "8"]
    assert run(*words, model=[folder]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "the cheapest first" in said and "fits with" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--memory", "much"], "a size such as 24GiB"),
        (["--memory", "0"], "a size such as 24GiB"),
        (["--lengths", "900,100"], "MEAN,MAX"),
        (["--params", "7B"], "give one of them"),
        (["--optim", "stable_adamw", "--memory", "8GiB"], "does not know what it keeps"),
        (["--data", "x.jsonl", "--memory", "8GiB"], "measured by the model's tokenizer"),
        (["--method", "no_such"], "no_such"),
        (["--plot", f"{__file__}/x.png"], "--plot"),
    ],
)
def test_mistakes(words, named, capsys):
    try:
        code = run(*words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and named in capsys.readouterr().err


COMMANDS = {
    "train": "--batch-size 2",
    "reward": "--batch-size 2 --max-length 64",
    "rl": "--batch-size 4 --num-generations 4 --max-new-tokens 4",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_is_refused_where_it_will_not_fit(command, tmp_path, monkeypatch, capsys):
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    (tmp_path / "score.py").write_text(
        "def score(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    words = [command, "--model", str(tmp_path / "model"), "--data", str(rows), "--output-dir", str(tmp_path / "out")]
    words += ["--fit", "--cpu", "--max-steps", "1", "--eval-split", "0", *COMMANDS[command].split()]
    words += ["--lora-targets", "q_proj,v_proj"]
    if command == "rl":
        words += ["--reward", f"{tmp_path / 'score.py'}:score"]
    monkeypatch.setattr(fit_question, "device_of", lambda args: ("cpu", 100 * MIB))
    assert cli.main(words) == 2
    assert "does not fit" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(fit_question, "device_of", lambda args: ("cpu", 64 * GIB))
    assert cli.main(words) == 0
    assert "of 64.0 GiB: fits" in capsys.readouterr().out
