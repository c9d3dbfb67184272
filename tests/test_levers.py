"""The levers of memory: activations on the host, steps in the backward, optimizers, a cached reference.

Where there is no GPU, `Elsewhere` stands in for the stream that copies: what it is asked to copy is there only when
somebody has waited for it, and full of NaN before.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import sys
import weakref
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import test_reward_model
import test_rl
from test_fit import allocated
from test_trainer import PEFT_WARNING, StopAt, first_step, lora, make_model, make_rows, make_tokenizer, make_trainer
from xpo_fast import cli
from xpo_fast.rewards.trainer import RewardConfig
from xpo_fast.rl import RLConfig
from xpo_fast.trainer import XPOConfig, XPOTrainer, offload, reference
from xpo_fast.trainer.in_backward import StepsInBackward
from xpo_fast.trainer.offload import Forward, check_offload, offloading
from xpo_fast.trainer.optimizers import STEP_ALONE

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

WINDOW = 1 << 13  # bytes: a fraction of what a forward here saves


class Elsewhere:
    """Copies in the order in which they were asked for, up to the event that is waited for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list = []
        self.done = 0
        self.left: list[int] = []  # bytes of each storage that left
        self.came: list[StorageWeakRef] = []
        self.most_coming = 0  # storages that came back and were there at one time

    def leave(self, here):
        self.left.append(here.nbytes)
        there = torch.full_like(here, 0xFF)
        return there, self._later(there, here)

    def come_back(self, there):
        here = torch.full_like(there, 0xFF)
        self.came.append(StorageWeakRef(here.untyped_storage()))
        self.most_coming = max(self.most_coming, sum(not x.expired() for x in self.came))
        return here, self._later(here, there)

    def _later(self, target, source):
        self.asked.append((weakref.ref(target), weakref.ref(source)))
        return len(self.asked)

    def wait(self, event: int) -> None:
        for target, source in self.asked[self.done : event]:
            if target() is not None and source() is not None:
                target().copy_(source())
        self.done = max(self.done, event)


@pytest.fixture
def copies(monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(offload, "WINDOW_BYTES", WINDOW)
    return Elsewhere()


def hooks(copies, stay=()):
    forward = Forward(copies, {x.untyped_storage().data_ptr() for x in stay})
    return saved_tensors_hooks(forward.pack, forward.unpack)


# --- which storages are moved, and when they are there ------------------------------------------------------------


def test_a_storage_is_moved_once_and_weights_and_small_ones_are_not(copies):
    weight, x = torch.nn.Parameter(torch.randn(64, 64)), torch.randn(32, 64, requires_grad=True)
    with hooks(copies, [weight]):
        h = x * 1
        loss = (h @ weight.t()).sum() + (h[:16] @ weight[:, :32]).sum() + (h.view(64, 32).t() @ h.view(64, 32)).sum()
        loss = loss + (h[:1, :8].clone() ** 2).sum()  # 32 bytes
    assert copies.left == [h.nbytes]
    loss.backward()
    got, x.grad = x.grad, None
    h = x * 1
    plain = (h @ weight.t()).sum() + (h[:16] @ weight[:, :32]).sum() + (h.view(64, 32).t() @ h.view(64, 32)).sum()
    (plain + (h[:1, :8].clone() ** 2).sum()).backward()
    assert torch.equal(got, x.grad)


def test_every_view_comes_back_bit_for_bit(copies):
    base = torch.randn(40, 40)
    base[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    views = [
        *(base, base.t(), base[3:, 1::2], base[5], base[:1].expand(40, 40), base.view(torch.int32)),
        *(base.bfloat16(), base > 0, base.long().as_strided((10, 3), (7, 2), 5), base.to(torch.complex64).conj()),
    ]
    for x in views[:-1]:
        forward = Forward(copies, set())
        saved = forward.pack(x)
        assert not isinstance(saved, torch.Tensor)
        back = forward.unpack(saved)
        assert back.stride() == x.stride() and back.storage_offset() == x.storage_offset() and back.dtype == x.dtype
        assert torch.equal(back.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "x",
    [
        torch.nn.Parameter(torch.zeros(1000)),
        torch.zeros(10),
        torch.zeros(1000, device="meta"),
        torch.eye(1000).to_sparse(),
        torch.zeros(1000).as_subclass(type("Own", (torch.Tensor,), {})),
        torch.zeros(0),
    ],
    ids=["parameter", "small", "elsewhere", "sparse", "subclass", "empty"],
)
def test_what_stays(copies, x):
    forward = Forward(copies, set())
    assert forward.pack(x) is x and forward.unpack(x) is x and not copies.left


def chain(x, count):
    """Saves the output of each of `count` layers, and returns these as weak references to their storages."""
    refs = []
    for _ in range(count):
        x = torch.tanh(x * 1.01)
        refs.append(StorageWeakRef(x.untyped_storage()))
    return x, refs


def test_what_has_left_is_freed_and_what_comes_back_is_no_more_than_the_window(copies):
    x = torch.randn(32, 32, requires_grad=True)  # 4 KiB: two of them in the window
    with hooks(copies):
        y, refs = chain(x, 12)
    assert sum(not ref.expired() for ref in refs) == 2 and not refs[-1].expired()
    y.backward(torch.ones_like(y))
    del y
    got, x.grad = x.grad, None
    y, _ = chain(x, 12)
    y.backward(torch.ones_like(y))
    assert torch.equal(got, x.grad)
    # The last two were still there. Of the others at most two come ahead, beside the one that is read.
    assert len(copies.came) == 10 and 2 <= copies.most_coming <= 3
    assert all(ref.expired() for ref in [*refs, *copies.came])


def test_a_tensor_that_changed_since_it_was_saved_is_saved_again(copies):
    x, t = torch.randn(32, 32, requires_grad=True), torch.rand(32, 32)
    with hooks(copies):
        unread = x * t
        del unread
        t.add_(1)
        y = x * t
        _, _ = chain(x, 4)  # lets both leave
    y.sum().backward()
    assert torch.equal(x.grad, t)


def test_a_graph_may_be_read_twice_and_two_forwards_come_before_their_backwards(copies):
    x = torch.randn(32, 32, requires_grad=True)
    with hooks(copies):
        first, _ = chain(x, 5)
    with hooks(copies):
        second, _ = chain(x + 1, 5)
    grads = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (first, second, first, second)]
    plain = [torch.autograd.grad(chain(x + k, 5)[0].sum(), x)[0] for k in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(grads, plain * 2, strict=True))


def test_memory_that_is_written_is_not_given_away_when_nobody_asked_for_it(copies):
    x = torch.randn(32, 32, requires_grad=True)
    with hooks(copies):
        middle, _ = chain(x, 6)
        y, _ = chain(middle, 3)
    torch.autograd.grad(y.sum(), middle)
    assert copies.done < len(copies.asked)  # some come ahead
    del y, middle
    assert copies.done == len(copies.asked)


# --- in training --------------------------------------------------------------------------------------------------

CHECKPOINTING = {"activation_checkpointing": True}
RUNS = {
    "plain": {},
    "checkpointing": CHECKPOINTING,
    "reentrant": {**CHECKPOINTING, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "packed": {"layout": "packed"},
    "shared, checkpointing": {"layout": "shared", **CHECKPOINTING},
    "bf16": {"bf16": True},
    "live reference": {"reference": "copy"},
    "lora": {"peft_config": lora(init_lora_weights=False), "method": "simpo"},
    "lora, checkpointing": {"peft_config": lora(init_lora_weights=False), "method": "simpo", **CHECKPOINTING},
}


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_the_same_bits(tmp_path, copies, run):
    want_log, want = first_step(make_trainer(tmp_path / "plain", **RUNS[run]), shrink=0.9)
    trainer = make_trainer(tmp_path / "moved", **RUNS[run])
    decoder = trainer.model.get_decoder()
    before = len(decoder._forward_hooks), len(decoder._forward_pre_hooks)
    with offloading(trainer.model, copies):
        assert (len(decoder._forward_hooks), len(decoder._forward_pre_hooks)) != before
        log, got = first_step(trainer, shrink=0.9)
    assert want.keys() == got.keys() and want and all(float(g.abs().max()) > 0 for g in want.values())
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert log["loss"] == want_log["loss"] and copies.left and copies.came
    assert copies.done == len(copies.asked) or all(x.expired() for x in copies.came)


def test_a_forward_that_fails_ends_it(copies):
    model = make_model()
    with offloading(model, copies):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))
        x = torch.randn(32, 32, requires_grad=True)
        chain(x, 2)
        assert not copies.left  # the hooks are no longer there


def test_without_a_gpu_it_is_refused_by_name(tmp_path, capsys):
    for kind in (XPOConfig, RewardConfig, RLConfig):
        with pytest.raises(ValueError, match="activation_offload: it moves activations from a GPU to the host"):
            kind(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, activation_offload=True)
    for command in (["train"], ["reward"], ["rl", "--reward", "statistics:mean"]):
        assert cli.main([*command, "--data", "nowhere.jsonl", "--cpu", "--activation-offload"]) == 2
        assert "activation_offload: it moves activations from a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fsdp": True}, "FSDP and DeepSpeed gather weights"),
        ({"torch_compile": True}, "torch_compile decides itself"),
        ({"activation_checkpointing_kwargs": {"offload": True}}, "moves the inputs of layers already"),
        ({}, None),
    ],
)
def test_what_does_not_go_with_it_on_a_gpu(tmp_path, given, said):
    args = XPOConfig(str(tmp_path), use_cpu=True)
    there = type("Args", (), {**vars(args), "device": torch.device("cuda"), **given})
    if said is None:
        check_offload(there)
        with pytest.raises(ValueError, match="FSDP and DeepSpeed gather weights"):
            check_offload(there, sharded=True)
    else:
        with pytest.raises(ValueError, match=said):
            check_offload(there)


# --- the optimizer in the backward --------------------------------------------------------------------------------

STEPS = {"max_steps": 5, "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-2}
INSIDE = {"optimizer_in_backward": True}
BITS = ("adamw_8bit", "lion_8bit")
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the extra [dev] has bitsandbytes on Linux alone")


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def assert_same_bits(a, b) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def logged(trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize(
    "how",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused", **CHECKPOINTING},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adagrad"},
        {"optim": "rmsprop", "bf16": True},
        {"optim": "adamw_torch", "peft_config": lora(), "method": "simpo"},
        *(pytest.param({"optim": name}, marks=ON_LINUX) for name in BITS),
    ],
    ids=lambda how: ", ".join(map(str, how.values()))[:40],
)
def test_weights_after_five_steps_are_those_of_the_plain_run(tmp_path, how):
    # Wide enough for weights that bitsandbytes keeps in 8 bits.
    model = partial(make_model, intermediate_size=160) if how["optim"] in BITS else make_model
    plain = make_trainer(tmp_path / "plain", model=model(), **STEPS, **how)
    start = weights(plain)
    plain.train()
    inside = make_trainer(tmp_path / "inside", model=model(), **STEPS, **how, **INSIDE)
    inside.train()
    assert_same_bits(weights(plain), weights(inside))
    assert any(not torch.equal(start[n], p) for n, p in weights(inside).items())
    for name in ("loss", "learning_rate"):
        assert logged(plain, name) == logged(inside, name) and len(logged(inside, name)) == 5
    assert logged(inside, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)
    assert min(logged(inside, "grad_norm")) > 0
    kept = {x.dtype for state in inside.optimizer.state.values() for x in state.values() if torch.is_tensor(x)}
    assert (torch.uint8 in kept) == (how["optim"] in BITS)


@pytest.mark.parametrize("tied", [False, True])
def test_at_no_time_is_there_more_than_one_gradient(tmp_path, tied):
    trainer = make_trainer(tmp_path, model=make_model(tie_word_embeddings=tied), max_steps=2, **INSIDE)
    seen: list[StorageWeakRef] = []
    alive: list[int] = []

    def look(p):
        held = [q for q in trainer.model.parameters() if q.grad is not None]
        assert len(held) == 1 and held[0] is p
        alive.append(sum(not x.expired() for x in seen))  # earlier ones, wherever they are kept
        seen.append(StorageWeakRef(p.grad.untyped_storage()))

    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for p in parameters:
        p.register_post_accumulate_grad_hook(look)  # before the hook that takes the step
    trainer.train()
    assert len(seen) == 2 * len(parameters) and max(alive) <= 1


def test_it_goes_on_from_a_checkpoint_of_its_own_and_of_a_plain_run(tmp_path):
    def run(name: str, **args):
        saves = {"save_strategy": "steps", "save_steps": 3}
        return make_trainer(tmp_path / name, ref_cache_dir=str(tmp_path / "ref"), **{**STEPS, **saves}, **args)

    whole = run("whole")
    whole.train()
    for name, (first, second) in {"both": (INSIDE, INSIDE), "second": ({}, INSIDE)}.items():
        part = run(name, **first)
        part.add_callback(StopAt(3))
        part.train()
        resumed = run(name, **second)
        resumed.train(resume_from_checkpoint=True)
        assert_same_bits(weights(whole), weights(resumed))


def test_a_reward_model_and_online_rl_take_it_too(tmp_path):
    head = {"value_head_learning_rate": 3e-2, "max_steps": 2}
    online = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "max_steps": 2}
    ppo = {"method": "ppo", "peft_config": lora(), "value_head_learning_rate": 2e-2}
    for make, args in ((test_reward_model.make_trainer, head), (test_rl.make_trainer, {**online, **ppo})):
        trainers = [make(tmp_path / f"{len(args)}-{inside}", **args, optimizer_in_backward=inside) for inside in (0, 1)]
        for trainer in trainers:
            trainer.train()
        plain, inside = map(weights, trainers)
        assert_same_bits(plain, inside)
        assert any("value_head" in name for name in inside)


def test_a_backward_outside_of_training_keeps_its_gradients(tmp_path):
    trainer = make_trainer(tmp_path, **INSIDE)
    trainer.train()
    before = weights(trainer)
    trainer.model(input_ids=torch.arange(9)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in trainer.model.parameters())
    assert_same_bits(before, weights(trainer))


def test_a_second_gradient_in_one_backward_is_an_error():
    p = torch.nn.Parameter(torch.ones(3))
    steps = StepsInBackward(torch.optim.SGD([p], lr=0.1))
    with steps.stepping():
        (p * 2).sum().backward()
        torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
        assert float(steps.norm()) == pytest.approx(math.sqrt(12))
        with pytest.raises(RuntimeError, match="a second gradient in one backward"):
            (p * 2).sum().backward()
    p.grad = None
    with steps.stepping():
        pass
    assert float(steps.norm()) == 0
    steps.close()
    (p * 2).sum().backward()
    assert p.grad is not None


def test_parameters_on_several_devices_are_refused():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ValueError, match="the parameters are on cpu, meta: put them on one device"):
        StepsInBackward(torch.optim.SGD(parameters, lr=0.1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1 clips .* set it to 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 would keep the gradients: set it to 1"),
        ({"tokens_per_batch": 64}, "tokens_per_batch=64 cuts a step into several backwards"),
        ({"fp16": True}, "fp16=True looks for overflows"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size would try again"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True makes gradients in several"),
        ({"optim": "schedule_free_adamw"}, "does not step one weight without the others; these do: adamw_torch,"),
        ({"optim": "lomo"}, "optim=lomo: lomo steps in the backward by itself: leave optimizer_in_backward out"),
        ({"optim": "lomo", "optimizer_in_backward": False, "max_grad_norm": 0.5}, "lomo: max_grad_norm=0.5 clips"),
        ({}, None),
    ],
)
def test_what_needs_all_gradients_is_refused(tmp_path, given, said):
    given = {"max_grad_norm": 0.0, **INSIDE, **given}
    for kind in (XPOConfig, RewardConfig, RLConfig):
        if kind is RLConfig and "auto_find_batch_size" in given:
            continue  # which it refuses for another reason
        make = partial(kind, str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **given)
        if said is None:
            make()
            continue
        with pytest.raises(ValueError, match=said):
            make()


def test_several_processes_and_an_optimizer_of_ones_own_are_refused(tmp_path, monkeypatch):
    given = {"args": XPOConfig(str(tmp_path), use_cpu=True, max_grad_norm=0.0, **INSIDE)}
    given |= {"train_dataset": make_rows(2), "processing_class": make_tokenizer()}
    model = make_model()
    with pytest.raises(ValueError, match="optimizer_in_backward makes the optimizer of optim="):
        XPOTrainer(model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), **given)
    monkeypatch.setattr(XPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="the gradients of 2 processes are averaged before a step"):
        XPOConfig(str(tmp_path), use_cpu=True, max_grad_norm=0.0, **INSIDE)


# --- optimizers of transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "package", "said"),
    [
        ("galore_adamw", "galore_torch", "You need to install `galore_torch`"),
        ("lomo", "lomo_optim", "You need to install `lomo_optim`"),
        ("apollo_adamw", "apollo_torch", "You need to install `apollo_torch`"),
        ("adamw_torch_4bit", "torchao", "You need to have `torchao>=0.4.0`"),
        ("schedule_free_adamw", "schedulefree", "You need to install `schedulefree`"),
        ("stable_adamw", "optimi", "You need to install `torch-optimi`"),
        ("grokadamw", "grokadamw", "Please install grokadamw"),
    ],
)
def test_a_package_that_is_missing_is_named_before_the_data_are_read(tmp_path, capsys, optim, package, said):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    targets = {"optim_target_modules": "all-linear"} if optim.startswith(("galore", "apollo")) else {}
    words = [word for name, value in targets.items() for word in (f"--{name}", value)]
    free = ["--max-grad-norm", "0"]
    assert cli.main(["train", "--data", "nowhere", "--cpu", "--full", "--optim", optim, *words, *free]) == 2
    assert f"optim={optim} does not work here: {said}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=f"optim={optim} does not work here: {said}"):
        make_trainer(tmp_path, optim=optim, **targets)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optim": "galore_adamw"}, "optim=galore_adamw projects the gradients of some modules: name them by"),
        ({"optim": "adamw_torch", "optim_target_modules": "all-linear"}, "and optim is adamw_torch"),
        ({"optim": "paged_adamw_8bit"}, "optim=paged_adamw_8bit moves its state between a GPU and the host"),
        ({"optim": "adalomo", "max_grad_norm": 0.0}, "optim=adalomo keeps its state outside of checkpoints"),
        ({"optim": "galore_adamw_layerwise"}, "use optim=galore_adamw with optimizer_in_backward"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"], "weight_decay": 0.1}, "set weight_decay to 0"),
    ],
)
def test_what_an_optimizer_would_not_honour_is_refused(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        XPOConfig(str(tmp_path), use_cpu=True, **given)


GALORE_WARNING = "This implementation of AdamW is deprecated"
PROJECTING = {"optim_target_modules": ["q_proj", "up_proj"], "optim_args": "rank=4, update_proj_gap=2"}


@pytest.mark.parametrize(
    "how",
    [
        {"optim": "galore_adamw", **PROJECTING, "package": "galore_torch"},
        {"optim": "galore_adafactor", **PROJECTING, "package": "galore_torch"},
        {"optim": "apollo_adamw", **PROJECTING, "package": "apollo_torch"},
        {"optim": "lomo", "package": "lomo_optim"},
    ],
    ids=lambda how: how["optim"],
)
@pytest.mark.filterwarnings(f"ignore:{GALORE_WARNING}:FutureWarning")
def test_optimizers_of_other_packages_train_and_go_on_from_their_checkpoints(tmp_path, how):
    how = dict(how)
    pytest.importorskip(how.pop("package"), reason="an optimizer of a package that no extra has")

    def run(name: str, **args):
        return make_trainer(tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2, **how, **args)

    whole = run("whole")
    start = weights(whole)
    whole.train()
    assert any(not torch.equal(start[n], p) for n, p in weights(whole).items())
    part = run("part")
    part.add_callback(StopAt(2))
    part.train()
    resumed = run("part")
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights(whole), weights(resumed))
    assert len(logged(whole, "grad_norm")) == (0 if how["optim"] == "lomo" else 4)
    if how["optim"] in STEP_ALONE:
        inside = run("inside", **INSIDE)
        inside.train()
        assert_same_bits(weights(whole), weights(inside))


class Projected(torch.optim.SGD):
    """Stands in for an optimizer that projects the gradients of one of its groups."""


@pytest.fixture
def projecting(monkeypatch):
    """Makes galore_adamw an optimizer that is here."""

    def made(args, model=None):
        wanted = dict(model.named_parameters())
        return Projected, {"lr": args.learning_rate, "params": [{"params": list(wanted.values())}]}

    monkeypatch.setattr(XPOTrainer, "get_optimizer_cls_and_kwargs", staticmethod(made))
    monkeypatch.setattr("xpo_fast.trainer.optimizers.Trainer.get_optimizer_cls_and_kwargs", staticmethod(made))


def test_the_modules_that_an_optimizer_projects_are_there_and_trained(tmp_path, projecting):
    galore = {"optim": "galore_adamw", "optim_target_modules": ["q_proj", "mlp"]}
    trainer = make_trainer(tmp_path, **galore, max_steps=1)
    assert trainer.args.optim_target_modules == ["q_proj", "mlp"]  # which the trial has left as they were
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, Projected)
    with pytest.raises(ValueError, match=r"optim_target_modules=\['qproj'\] are no linear modules .* q_proj, up_proj"):
        make_trainer(tmp_path, **{**galore, "optim_target_modules": ["qproj"]})
    with pytest.raises(ValueError, match="optim=galore_adamw projects the gradients of 4 modules, and their weights"):
        targets = {"optim_target_modules": [r"base_model\.model\..*\.(q|k)_proj(\.base_layer)?"]}
        make_trainer(tmp_path, **{**galore, **targets}, peft_config=lora(target_modules=["q_proj", "k_proj"]))


# --- the reference's log-probs, and checkpointing -------------------------------------------------------------------


def resident() -> int:
    """Bytes of all storages that a tensor of Python's has, gradients included."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    there = [x for x in gc.get_objects() if type(x) in kinds and x.device.type == "cpu" and not x.is_sparse]
    there += [x.grad for x in there if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in there}.values())


@pytest.mark.parametrize("inside", [False, True])
def test_the_reference_is_cached_before_there_is_a_gradient_or_an_optimizer(tmp_path, monkeypatch, inside):
    """And beside the model itself there is nothing that is nearly as large, then or when training begins."""
    model = make_model(hidden_size=64, intermediate_size=512)
    size, found = sum(p.nbytes for p in model.parameters()), []
    before = resident()
    inner = reference.dataset_logps

    def look(where, trainer=None):
        assert trainer.optimizer is None and trainer.lr_scheduler is None
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
        found.append((where, resident() - before))

    def dataset_logps(*args, **how):
        look("before", trainer)
        logps = inner(*args, **how)
        look("after", trainer)
        return logps

    monkeypatch.setattr(reference, "dataset_logps", dataset_logps)
    trainer = make_trainer(tmp_path, model=model, max_steps=2, optimizer_in_backward=inside)
    assert trainer.reference == "cached"
    trainer.prepare()
    look("prepared", trainer)
    trainer.train()
    assert [where for where, _ in found] == ["before", "after", "prepared"]
    assert all(extra < size / 10 for _, extra in found), (found, size)
    trainer.model.zero_grad()
    trainer.optimizer.optimizer.state.clear()
    # What is left of the run: the weights, that is, and no copy of them.
    assert resident() - before < size / 10


@pytest.mark.parametrize("given", [{"preserve_rng_state": False}, {"every_n_layers": 2}])
def test_checkpointing_is_not_reentrant_whatever_else_is_asked_of_it(tmp_path, monkeypatch, given):
    asked = []
    inner = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint", lambda *x, **how: asked.append(how) or inner(*x, **how)
    )
    make_trainer(tmp_path, **CHECKPOINTING, activation_checkpointing_kwargs=given).train()
    assert asked and all(how["use_reentrant"] is False for how in asked)


# --- weights in 16 bits under checkpointing ---------------------------------------------------------------------------


def test_a_checkpointed_forward_holds_the_weights_in_16_bits_of_one_layer(tmp_path):
    """Autocast's cache would hold those of all layers until the forward ends; trained weights are the same."""
    layers, found, bytes_of = 6, {}, {}
    for name in ("cached", "one by one"):
        model = make_model(num_hidden_layers=layers, intermediate_size=512)
        layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
        trainer = make_trainer(tmp_path / name, model=model, bf16=True, method="simpo", **STEPS, **CHECKPOINTING)
        assert trainer.accelerator.autocast_handler.cache_enabled is False
        if name == "cached":
            trainer.accelerator.autocast_handler = None
        trainer.train()
        found[name] = weights(trainer)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        losses = []

        def forward(trainer=trainer, batch=batch, losses=losses):
            with trainer.accelerator.autocast():
                losses.append(trainer._loss(trainer.model, batch, torch.tensor(2.0))[0])

        forward()
        bytes_of[name] = allocated(forward, tmp_path / "trace.json")
    assert_same_bits(found["cached"], found["one by one"])
    assert 2 * layer * (layers - 1) <= bytes_of["cached"] - bytes_of["one by one"] <= 2 * layer * layers
