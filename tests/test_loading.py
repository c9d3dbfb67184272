"""What is loaded is what was saved: no weight drawn at random, left out or rounded away without a word, at any depth.

The oracle is the float64 logits of the model as it was trained, its adapter on it, from before it was saved.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from test_trainer import PEFT_WARNING, VOCAB, lora, make_model, make_rows, make_tokenizer, make_trainer, with_images
from xpo_fast import cli, precision
from xpo_fast.models import base_of, load_model, merge, saving_embeddings
from xpo_fast.models.value_head import attach_value_head
from xpo_fast.rewards.model import RewardModel

pytestmark = pytest.mark.filterwarnings(
    f"ignore:{PEFT_WARNING}:FutureWarning",
    "ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning",  # peft, when the adapter is made
)

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 3]])


def logits(model, dtype=torch.float64) -> torch.Tensor:
    """The logits of a copy of the model, in float64."""
    with torch.no_grad():
        return (copy.deepcopy(model).double() if dtype == torch.float64 else model).eval()(IDS).logits.double()


def saved(folder: Path, model=None, **config) -> str:
    model = make_model(**config) if model is None else model
    with saving_embeddings(model):
        model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def adapted(model, seed: int = 1, std: float = 0.1, **options):
    """A PEFT model whose B is not zero."""
    torch.manual_seed(seed)
    found = peft.get_peft_model(model, lora(**options))
    for name, p in found.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name or "tokens_delta" in name:
            p.data += std * torch.randn(p.shape)
    return found


def rewrite(folder: str, edit) -> None:
    """Replaces the weights of a folder, and those of an adapter, by edit(weights)."""
    for name in ("model.safetensors", "adapter_model.safetensors", "value_head.safetensors"):
        path = Path(folder) / name
        if path.is_file():
            save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def without(*parts):
    return lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)}


def configure(folder: str | Path, file: str = "config.json", **fields) -> None:
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rebase(folder: Path, name: str | None) -> None:
    configure(folder, "adapter_config.json", base_model_name_or_path=name)


def classifier(tied: bool = False) -> transformers.PreTrainedModel:
    config = make_model().config.to_dict() | {"num_labels": 1, "pad_token_id": 2, "tie_word_embeddings": tied}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config))


# --- weights that are missing, or have no place ----------------------------------------------------------------------

UNTIED = {"tie_word_embeddings": False}
V_HEAD = {"v_head.summary.weight": torch.zeros(1, 32)}


@pytest.mark.parametrize(
    "model, edit, config, said",
    [
        (lambda: make_model(**UNTIED), without("lm_head"), {}, r"lacks weights of LlamaForCausalLM: lm_head\.weight\."),
        (make_model, without("embed_tokens"), {}, r"lacks .*model\.embed_tokens\.weight"),
        (make_model, without("layers.1.mlp"), {}, r"lacks .*layers\.1\.mlp\.down_proj\.weight, .*up_proj"),
        (classifier, None, {}, r"lacks .*lm_head\.weight.* holds LlamaForSequenceClassification"),
        (lambda: classifier(tied=True), None, {}, r"no place for: score\.weight"),
        (make_model, None, {"num_hidden_layers": 1}, r"no place for: .*layers\.1\."),
        (make_model, lambda w: w | V_HEAD, {}, r"no place for: v_head\.summary\.weight"),
        (make_model, None, {"intermediate_size": 40}, r"down_proj\.weight \(of shape \[32, 48\], not \[32, 40\]\)"),
    ],
    ids=["head", "embeddings", "layer", "classifier", "tied classifier", "layers", "value head", "shapes"],
)
def test_weights_that_a_model_would_lose_or_draw_at_random_are_named(tmp_path, model, edit, config, said):
    """trl#1379, trl#368: the head of a policy or reward model was drawn at random, with a line in a log at most."""
    folder = saved(tmp_path, model())
    if edit is not None:
        rewrite(folder, edit)
    configure(folder, **config)
    with pytest.raises(ValueError, match=said):
        load_model(folder)


def test_what_is_no_loss_loads(tmp_path):
    tied = make_model()
    plain = saved(tmp_path / "body", transformers.LlamaModel(tied.config))  # a tied model needs no head
    load_model(plain)
    folder = saved(tmp_path / "buffers")
    masks = {
        f"model.layers.{k}.self_attn.{n}": torch.zeros(4)
        for k in (0, 1)
        for n in ("rotary_emb.inv_freq", "masked_bias")
    }
    rewrite(folder, lambda w: w | masks | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    model = load_model(folder)[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(logits(model), logits(tied))
    rewrite(folder, lambda w: w | {"vision_tower.patch.weight": torch.zeros(3)})
    with pytest.warns(UserWarning, match=r"left out: vision_tower\.patch\.weight"):
        load_model(folder)


def test_a_head_that_the_config_calls_tied_and_the_file_does_not_stays_untied(tmp_path):
    folder = saved(tmp_path / "model")
    rewrite(folder, lambda w: w | {"lm_head.weight": 2 * w["model.embed_tokens.weight"]})
    model, tokenizer = load_model(folder)
    want = logits(model)
    torch.testing.assert_close(want, 2 * logits(make_model()))
    make_trainer(tmp_path, model=model, tokenizer=tokenizer, max_steps=1, learning_rate=0.0).save_model()
    found = load_model(str(tmp_path / "out"))[0]
    assert torch.equal(logits(found), want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_reward_model_without_its_head_or_parts_of_its_adapter_is_refused(tmp_path):
    folder = saved(tmp_path / "classifier", classifier())
    RewardModel.load(folder)
    rewrite(folder, lambda w: w | {"lm_head.weight": torch.zeros(VOCAB, 32)})  # no head of a classifier
    with pytest.warns(UserWarning, match=r"left out: lm_head"):
        RewardModel.load(folder)
    rewrite(folder, without("score", "lm_head"))
    with pytest.raises(ValueError, match=r"lacks .*score\.weight"):
        RewardModel.load(folder)
    model = adapted(load_model(saved(tmp_path / "base"))[0])
    attach_value_head(model, std=1.0)
    for drop, said in (("layers.1.self_attn.q_proj.lora_B", "lora_B"), ("bias", "value head of another model")):
        RewardModel(model, make_tokenizer()).save(tmp_path / drop)
        rewrite(str(tmp_path / drop), without(drop))
        with pytest.raises(ValueError, match=said):
            RewardModel.load(tmp_path / drop)


@pytest.mark.parametrize(
    "edit, options, said",
    [
        (without("layers.1.self_attn.q_proj.lora_B"), {}, r"lacks .*layers\.1\.self_attn\.q_proj\.lora_B"),
        (without("lm_head"), {"modules_to_save": ["lm_head"]}, r"lm_head"),
        (lambda w: w | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(1)}, {}, r"layers\.7"),
        (lambda w: {k.replace("model.layers", "layers"): v for k, v in w.items()}, {}, r"lacks"),
    ],
    ids=["missing", "module to save", "unexpected", "renamed"],
)
def test_an_adapter_with_other_weights_than_its_config_says_is_refused(tmp_path, edit, options, said):
    base = saved(tmp_path / "base", **UNTIED)
    folder = saved(tmp_path / "adapter", adapted(load_model(base)[0], **options))
    load_model(folder)
    rewrite(folder, edit)
    with pytest.raises(ValueError, match=said):
        load_model(folder)


@pytest.mark.parametrize("command", ["train", "reward", "rl", "recipe", "eval-reward", "rl --reward-model"])
def test_every_command_names_the_weights_that_its_model_lacks(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))
    whole, broken, scorer = saved(tmp_path / "whole", **UNTIED), str(tmp_path / "broken"), str(tmp_path / "scorer")
    shutil.copytree(whole, broken)
    rewrite(broken, without("lm_head"))
    rewrite(saved(Path(scorer), classifier()), without("score"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    given = {
        "recipe": ["self-rewarding", "--model", broken],
        "eval-reward": ["--policy", broken, "--reference", whole],
        "rl --reward-model": ["--model", whole, "--reward-model", scorer],
    }.get(command, ["--model", broken])
    given += ["--reward", f"{__file__}:no_reward"] * (command == "rl")
    out = ["--data", str(tmp_path / "rows.jsonl"), "--output-dir", str(tmp_path / "out"), "--cpu"]
    assert cli.main([command.partition(" ")[0], *given, *out]) == 2
    assert "lacks weights of Llama" in (said := capsys.readouterr().err), said
    assert ("score.weight" if "model" in command else "lm_head.weight") in said


def no_reward(completions, **columns):
    return [0.0] * len(completions)


# --- adapters on adapters ---------------------------------------------------------------------------------------------


def trained(tmp_path, model: str, out: str, steps: int = 2, **options) -> torch.Tensor:
    """Trains an adapter on a model by name, saves it, and returns the logits of what was trained."""
    trainer = make_trainer(
        tmp_path, model=load_model(model)[0], peft_config=lora(), output_dir=out, max_steps=steps, **options
    )
    trainer.train()
    trainer.save_model()
    return logits(trainer.model)


def test_adapters_trained_on_adapters_load_as_they_were_trained(tmp_path, monkeypatch):
    """LLaMA-Factory#3198, torchtune#2272: the second of two adapters named the base alone, and loaded on it."""
    monkeypatch.chdir(tmp_path)
    saved(Path("base"))
    trained(tmp_path, "base", "sft")
    trained(tmp_path, "sft", "dpo", seed=4)
    want = trained(tmp_path, "dpo", "third", seed=5)
    assert base_of("third") == str(tmp_path / "dpo" / "adapter_config.json")
    monkeypatch.chdir("/")  # the folders were named by relative paths
    model, _ = load_model(str(tmp_path / "third"))
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    unmerged, _ = load_model(str(tmp_path / "third"), merge=False)
    torch.testing.assert_close(logits(unmerged), want, rtol=0, atol=1e-6)
    for load in (peft.AutoPeftModelForCausalLM, transformers.AutoModelForCausalLM):  # never one adapter of three
        with pytest.raises((OSError, ValueError), match=r"adapter_config\.json"):
            load.from_pretrained(str(tmp_path / "third"))
    with pytest.raises(ValueError, match=r"needed to load it: name another output folder"):
        trained(tmp_path, str(tmp_path / "third"), str(tmp_path / "sft"))
    with pytest.raises(ValueError, match=r"needed to load it: name another output folder"):
        make_trainer(tmp_path, model=model, peft_config=lora()).save_model(str(tmp_path / "third"))
    (tmp_path / "sft").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"on top of the adapter in '.*sft', and there is none: put it back, or write"):
        load_model(str(tmp_path / "third"))
    configure(
        "",
        str(tmp_path / "dpo" / "adapter_config.json"),
        base_model_name_or_path=f"{tmp_path}/moved/adapter_config.json",
    )
    torch.testing.assert_close(logits(load_model(str(tmp_path / "third"))[0]), want, rtol=0, atol=1e-5)
    rebase(tmp_path / "moved", str(tmp_path / "third"))
    with pytest.raises(ValueError, match=r"each on top of the other"):
        load_model(str(tmp_path / "third"))
    rebase(tmp_path / "moved", None)
    with pytest.raises(ValueError, match=r"does not name the model that it goes on"):
        load_model(str(tmp_path / "third"))


def test_an_adapter_on_a_model_that_was_trained_names_what_was_saved(tmp_path):
    trainer = make_trainer(tmp_path, model=load_model(saved(tmp_path / "base"))[0], max_steps=1)
    trainer.train()
    adapted(copy.deepcopy(trainer.model)).save_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not name the model that it goes on"):
        load_model(str(tmp_path / "nowhere"))
    trainer.save_model()
    model = adapted(trainer.model)
    found, _ = load_model(saved(tmp_path / "adapter", model))
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_on_the_hub_is_read_with_its_base_and_tokenizer(tmp_path):
    def publish(name: str, model, template: str | None = None) -> None:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("a" * 40)
        (home / ".no_exist" / ("a" * 40)).mkdir(parents=True)
        for missing in {"config.json", "adapter_config.json"} - {
            f"{'adapter_' * hasattr(model, 'peft_config')}config.json"
        }:
            (home / ".no_exist" / ("a" * 40) / missing).touch()  # the hub has been asked
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        with saving_embeddings(model):
            model.save_pretrained(home / "snapshots" / ("a" * 40))
        tokenizer.save_pretrained(home / "snapshots" / ("a" * 40))

    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    publish("owner/base", make_model())
    publish("owner/sft", adapted(load_model("owner/base", **options)[0]), "{{ messages }}")
    model = adapted(load_model("owner/sft", **options)[0], seed=2)
    publish("owner/dpo", model)
    found, _ = load_model("owner/dpo", **options)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)
    assert load_model("owner/sft", **options)[1].chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match="is an adapter: its revision 'main' cannot be told"):
        load_model("owner/sft", revision="main", **options)


def test_a_checkpoint_that_an_adapter_was_trained_on_is_not_overwritten(tmp_path):
    base, out = saved(tmp_path / "base"), str(tmp_path / "out")
    trained(tmp_path, base, out, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"checkpoint-1, which would be overwritten"):
        trained(tmp_path, f"{out}/checkpoint-1", out)


def test_an_adapter_in_the_folder_of_its_base_goes_on_that(tmp_path):
    """And an adapter that was trained on the whole model there before stays on the whole model."""
    base = saved(tmp_path / "base")
    before = trained(tmp_path, base, str(tmp_path / "before"))
    beside = trained(tmp_path, base, base, seed=7)
    whole = logits(make_model())
    assert not torch.equal(beside, whole)
    torch.testing.assert_close(logits(load_model(base)[0]), beside, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load_model(str(tmp_path / "before"))[0]), before, rtol=0, atol=1e-5)
    for name in (base_of(base), base_of(str(tmp_path / "before"))):
        assert torch.equal(logits(load_model(name)[0]), whole)


def test_a_reward_model_on_an_adapter_scores_as_trained(tmp_path):
    base = saved(tmp_path / "base")
    trained(tmp_path, base, str(tmp_path / "sft"))
    model = adapted(load_model(str(tmp_path / "sft"))[0], seed=2)
    attach_value_head(model, std=1.0)
    reward = RewardModel(model, make_tokenizer())
    reward.save(tmp_path / "reward")
    texts = [row["prompt"] for row in make_rows(3)], [row["chosen"] for row in make_rows(3)]
    torch.testing.assert_close(RewardModel.load(tmp_path / "reward").score(*texts), reward.score(*texts))


# --- embeddings that were resized -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("on", ["base", "adapter", "base not at hand"])
def test_an_adapter_saved_with_resized_embeddings_loads(tmp_path, tied, on):
    base = saved(tmp_path / "base", tie_word_embeddings=tied)
    if on == "adapter":
        saved(tmp_path / "sft", adapted(load_model(base)[0]))
    model, tokenizer = load_model(str(tmp_path / "sft") if on == "adapter" else base)
    if on == "base not at hand":  # as with a name of the hub, offline
        model.name_or_path = model.config._name_or_path = "owner/base"
    tokenizer.add_tokens([f"new{k}" for k in range(5)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    trainer = make_trainer(tmp_path, model=model, tokenizer=tokenizer, peft_config=lora(), max_steps=2)
    attach_value_head(trainer.model, std=1.0)
    trainer.train()
    trainer.save_model()
    if on == "base not at hand":
        rebase(tmp_path / "out", base)
    found, tokenizer = load_model(str(tmp_path / "out"))
    assert len(tokenizer) == found.config.vocab_size == len(found.lm_head.weight) == VOCAB + 5
    torch.testing.assert_close(logits(found), logits(trainer.model), rtol=0, atol=1e-5)
    if on != "base not at hand":
        reward = RewardModel(trainer.model, tokenizer)
        reward.save(tmp_path / "reward")
        texts = ["w1 new3"], [" new4 w2"]
        torch.testing.assert_close(RewardModel.load(tmp_path / "reward").score(*texts), reward.score(*texts))


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 7]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=lambda options: " ".join(map(str, options.items())).replace("target_modules", ""),
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:You have requested .ensure_weight_tying.:UserWarning")
def test_an_adapter_on_tied_weights_is_merged_where_it_was_and_nowhere_else(tmp_path, options, tied):
    """peft#2777, peft#2018: merging gave the update of the head to the embeddings too, or that of both to both."""
    base = saved(tmp_path / "base", tie_word_embeddings=tied)
    model = adapted(load_model(base)[0], **options)
    want = logits(model, torch.float32)  # peft's tied adapters have no copy
    assert not torch.allclose(want, logits(make_model(tie_word_embeddings=tied)), atol=1e-2)
    merged, _ = load_model(saved(tmp_path / "adapter", model))
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(found), logits(merged))
    same = torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)
    assert same or not found.config.tie_word_embeddings


@pytest.fixture
def bf16(tmp_path, monkeypatch):
    """A folder with a base model in bfloat16, on a device that multiplies it natively."""
    monkeypatch.setattr(precision, "native", lambda dtype, device: True)
    return saved(tmp_path / "base", make_model().bfloat16())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("std, lost", [(3e-4, True), (0.5, False)])
def test_an_update_that_16_bits_would_round_away_is_kept_or_the_loss_is_told(tmp_path, bf16, dtype, std, lost):
    model = adapted(load_model(bf16)[0], std=std, target_modules="all-linear")
    want, plain = logits(model), logits(load_model(bf16)[0])
    folder = saved(tmp_path / "adapter", model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, _ = load_model(folder, dtype=dtype)
    told = [str(w.message) for w in said if "smaller than the steps of bfloat16" in str(w.message)]
    assert len(told) == (lost and dtype != "float32")
    exact = dtype == "float32" or (lost and dtype == "auto")
    assert found.dtype == (torch.float32 if exact else torch.bfloat16)
    change = want - plain
    learned = float(((logits(found) - plain) * change).sum() / (change * change).sum())
    if exact:
        torch.testing.assert_close(logits(found), want, rtol=0, atol=2e-5)
    elif lost:
        share = float(told[0].partition("keep ")[2].partition("%")[0]) / 100
        assert share < 0.6 and learned < 0.9, (share, learned)
    else:
        assert abs(learned - 1) < 0.1
    on, _ = load_model(folder, dtype=dtype, merge=False)
    torch.testing.assert_close(logits(on), want, rtol=0, atol=0)


def test_the_share_that_16_bits_keep_is_counted(tmp_path):
    """By hand: of two weights 1.0, whose steps are 2^-8 below and 2^-7 above, +2^-7 is kept and +2^-9 is lost."""
    layer = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    layer[0].weight.data.fill_(1.0)
    layer = peft.get_peft_model(layer.bfloat16(), peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    layer.base_model.model[0].lora_A.default.weight.data.fill_(1.0)
    layer.base_model.model[0].lora_B.default.weight.data = torch.tensor([[2.0**-7], [2.0**-9]])
    # kept: 2^-14 of 2^-14 + 2^-18, that is 16/17
    with pytest.warns(UserWarning, match=r"weights in bfloat16 keep 94\.1% of it, and the rest is gone"):
        merged = merge(layer, widen=False)
    assert merged[0].weight.flatten().tolist() == [1 + 2.0**-7, 1.0]


def test_an_adapter_is_not_merged_into_quantised_weights(tmp_path):
    model = adapted(load_model(saved(tmp_path))[0])
    model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="quantised weights, which would round it away"):
        merge(model)


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_nothing_of_an_earlier_model_in_the_folder_is_read_with_the_new_one(tmp_path):
    base, out = saved(tmp_path / "base"), tmp_path / "out"
    whole, tokenizer = load_model(base)
    tokenizer.chat_template = "{{ messages }}"
    make_trainer(tmp_path, model=whole, tokenizer=tokenizer).save_model()
    assert load_model(str(out))[1].chat_template == "{{ messages }}"
    want = trained(tmp_path, base, str(out))
    names = {path.name for path in out.iterdir()}
    assert not names & {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    found, tokenizer = load_model(str(out))
    assert tokenizer.chat_template is None
    torch.testing.assert_close(logits(found), want, rtol=0, atol=1e-5)
    assert os.path.isabs(json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"])


# --- checkpoints whose weights transformers saves under other names --------------------------------------------------


def experts() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, initializer_range=0.3))


@pytest.mark.parametrize("make", [experts, with_images, make_model])
def test_a_checkpoint_is_read_whole_whatever_its_names(tmp_path, make):
    """Experts are saved one by one, and Trainer went on with those of before the first step, with a line in a log."""
    single = functools.partial(logits, dtype=torch.float32)  # torch has no grouped product of float64
    args = {"method": "simpo", "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "preflight": "off"}
    args |= {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": make_rows(8), "learning_rate": 1e-2}
    best = {"load_best_model_at_end": True, "greater_is_better": True}  # the first, for the loss falls
    trainer = make_trainer(tmp_path, model=make(), **args, **best)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-1")
    steps = [single(load_model(str(tmp_path / "out" / f"checkpoint-{k}"))[0]) for k in (1, 2)]
    assert torch.equal(single(trainer.model), steps[0]) and not torch.equal(*steps)
    again = make_trainer(tmp_path, model=make(), **args)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(single(again.model), steps[1])


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    args = {"method": "simpo", "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "preflight": "off"}
    make_trainer(tmp_path, **args).train()
    folder = str(tmp_path / "out" / "checkpoint-1")
    rewrite(folder, without("layers.1.mlp"))
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM: model\.layers\.1\.mlp"):
        make_trainer(tmp_path, **args).train(resume_from_checkpoint=folder)
