"""What scores: reward models in any batch, whole rows, and what a model can be given.

The oracle of a score is the model's own forward in float64 on one row without padding.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
import transformers

from test_trainer import WORDS, make_model, make_rows, make_tokenizer, make_trainer, words
from xpo_fast.models import install_fused_loss, padding_id, table_of_positions
from xpo_fast.models.value_head import attach_value_head
from xpo_fast.rewards.ensemble import RewardEnsemble
from xpo_fast.rewards.judges import RewardJudge
from xpo_fast.rewards.model import ImplicitReward, RewardModel
from xpo_fast.rewards.spec import RewardSpec
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer
from xpo_fast.rl import RLConfig, RLTrainer
from xpo_fast.rollout import GenerateRollout, Sampling
from xpo_fast.trainer import XPOConfig, XPOTrainer, check_head, check_rows

VOCAB, EOS, PAD = 97, 1, 2
# Ragged, the shortest first, so that it stands beside longer rows in every batch of more than one.
PROMPTS = ["w7", "w1 w2 w3 w4 w5", "w9 w3 w2", "w8 w8", "w5 w6 w7 w8 w9 w10 w11"]
COMPLETIONS = [" w2", " w3 w4 w5 w6 w7 w8", " w4 w4", " w1", " w12 w13 w14 w15 w16"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def ids_of(prompt: str, completion: str) -> list[int]:
    return [*make_tokenizer()(prompt + completion, add_special_tokens=False)["input_ids"], EOS]


def classifier(kind: str, **config):
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": VOCAB, "num_labels": 1, "initializer_range": 0.3, "pad_token_id": PAD}
    if kind == "llama":
        sizes |= {"num_key_value_heads": 2}
    if kind == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "num_labels": 1, "eos_token_id": EOS}
    if kind in ("xlnet", "bart"):
        sizes |= {"n_layer": 2, "d_model": 32, "n_head": 4, "d_inner": 48} if kind == "xlnet" else {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "eos_token_id": EOS,
            "bos_token_id": 0, "decoder_start_token_id": EOS, "forced_eos_token_id": EOS, "init_std": 0.3,
        }  # fmt: skip
    if kind == "modernbert":
        sizes |= {"bos_token_id": 0, "eos_token_id": EOS, "cls_token_id": 0, "sep_token_id": EOS}
    if kind == "gemma3":
        text = {**SIZES, "vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
        vision = {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
        sizes = {"text_config": {**text, "pad_token_id": config.pop("pad_token_id")}, "vision_config": vision}
        sizes |= {"num_labels": 1, "mm_tokens_per_image": 4, "image_token_id": 8}
        sizes |= {"boi_token_index": 7, "eoi_token_index": 6}
    made = transformers.AutoConfig.for_model(kind, **{**sizes, **config})
    if "pad_token_id" in config and config["pad_token_id"] is None:
        made.pad_token_id = None  # which some configs take for no argument
    return transformers.AutoModelForSequenceClassification.from_config(made).eval()


def alone(model, rows: list[list[int]]) -> list[float]:
    """The logit of each row by the model's own forward, float64."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        return [float(exact(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]


def check_in_any_batch(score, want: list[float], prompts=PROMPTS, completions=COMPLETIONS, tolerance=1e-4) -> None:
    """score(batch_size) → f(prompts, completions) → (R,): the same for each row, whatever stands beside it."""
    expected = torch.tensor(want, dtype=torch.float64)
    assert float(expected.std()) > 100 * tolerance  # rows that another one's score would not pass for
    orders = [list(range(len(want))), [3, 0, 4, 2, 1]]
    for size in (1, 2, 5):
        for order in orders:
            got = score(size)([prompts[i] for i in order], [completions[i] for i in order])
            torch.testing.assert_close(got.double(), expected[order], rtol=0, atol=tolerance)


# --- classifiers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, config_pad, tokenizer_pad",
    [
        ("llama", PAD, "<pad>"),
        ("llama", None, "<pad>"),
        ("llama", 0, "<pad>"),  # another id than the tokenizer's
        ("llama", -1, "<pad>"),
        ("llama", 500, "<pad>"),
        ("llama", EOS, "<pad>"),  # rows are read before their EOS, as they were in training
        ("llama", PAD, None),  # the tokenizer pads with EOS
        ("llama", None, None),
        ("gpt2", None, "<pad>"),
        ("gpt2", PAD, None),
        ("gemma3", None, "<pad>"),
        ("gemma3", 0, "<pad>"),
        ("bert", PAD, "<pad>"),
        ("deberta-v2", 0, "<pad>"),
        ("modernbert", PAD, None),
        ("xlnet", 5, "<pad>"),  # reads the last position, where padding stands
        ("bart", PAD, "<pad>"),  # reads the EOS
        ("bart", EOS, None),
    ],
)
def test_a_classifiers_reward_is_its_own_for_the_row_alone(kind, config_pad, tokenizer_pad):
    """transformers finds a row's last token by the config's pad id (trl#937, transformers#35352, trl#7318)."""
    model = classifier(kind, pad_token_id=config_pad if config_pad != 500 else PAD)
    model.config.get_text_config().pad_token_id = config_pad
    want = alone(model, [ids_of(p, c) for p, c in zip(PROMPTS, COMPLETIONS)])
    tokenizer = make_tokenizer(pad=tokenizer_pad)
    rows: list[int] = []  # of each forward
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    check_in_any_batch(lambda size: RewardModel(model, tokenizer, batch_size=size).score, want)
    assert max(rows) == (1 if kind == "bart" else 2 if kind == "xlnet" else 5)  # xlnet is asked with two rows
    assert model.config.get_text_config().pad_token_id == config_pad


def test_a_classifier_in_bfloat16_reads_the_row_not_its_padding():
    model = classifier("llama", pad_token_id=None)
    want = alone(model, [ids_of(p, c) for p, c in zip(PROMPTS, COMPLETIONS)])
    scorer = RewardModel(copy.deepcopy(model).bfloat16(), make_tokenizer())
    torch.testing.assert_close(scorer.score(PROMPTS, COMPLETIONS), torch.tensor(want), rtol=0, atol=0.15)
    assert scorer._padded, "rounding is not to be taken for padding that is read"


def test_a_classifier_of_several_labels_is_no_reward_model():
    with pytest.raises(ValueError, match="has 2 labels; expected one output, the reward"):
        RewardModel(classifier("llama", num_labels=2), make_tokenizer())


# --- every scorer -------------------------------------------------------------------------------------------------


def valued(seed: int, **config) -> Any:
    model = make_model(seed, **config)
    attach_value_head(model, std=1.0)
    return model.eval()


def value_alone(model, rows: list[list[int]]) -> list[float]:
    with torch.no_grad():
        last = [copy.deepcopy(model).double().model(input_ids=torch.tensor([r])).last_hidden_state[0, -1] for r in rows]
        weight, bias = model.value_head.weight[0].double(), model.value_head.bias.double()
        return [float(h @ weight + bias) for h in last]


def logp_alone(model, prompt: str, row: list[int]) -> float:
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=torch.tensor([row])).logits[0]
    each = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(row)[1:, None])[:, 0]
    return float(each[len(prompt.split()) - 1 :].sum())


@pytest.mark.parametrize("scorer", ["value head", "implicit", "ensemble", "judge"])
def test_a_reward_is_the_same_in_any_batch(scorer):
    rows, tokenizer = [ids_of(p, c) for p, c in zip(PROMPTS, COMPLETIONS)], make_tokenizer(pad=None)
    models = [valued(0), valued(1)]
    if scorer == "implicit":
        logps = [[logp_alone(m, p, row) for p, row in zip(PROMPTS, rows)] for m in models]
        want = [0.5 * (a - b) for a, b in zip(*logps)]
        policy, reference = models
        made = lambda size: ImplicitReward(policy, reference, tokenizer, beta=0.5, batch_size=size).score  # noqa: E731
        return check_in_any_batch(made, want, tolerance=1e-3)
    each = [value_alone(m, rows) for m in models]
    if scorer == "ensemble":

        def made(size):
            return RewardEnsemble([RewardModel(m, tokenizer, batch_size=size) for m in models], "worst").score

        return check_in_any_batch(made, [min(pair) for pair in zip(*each)])
    wrap = RewardJudge if scorer == "judge" else (lambda model: model)
    check_in_any_batch(lambda size: wrap(RewardModel(models[0], tokenizer, batch_size=size)).score, each[0])


def test_a_rows_ids_do_not_follow_from_the_first_prompt():
    """The BOS of a text, beside a conversation or an empty prompt."""
    from tokenizers import processors

    tokenizer: Any = make_tokenizer(vocabulary=["<bos>", *WORDS])
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    reward = RewardModel(valued(0, vocab_size=128), tokenizer)
    text, talk = ("w1 w2", " w3"), ([{"role": "user", "content": "w4"}], "w5 w6")
    want = reward.score([text[0]], [text[1]])
    for first in (talk, ("", "w7 w8")):
        got = reward.score([first[0], text[0]], [first[1], text[1]])
        torch.testing.assert_close(got[1:], want)


# --- lengths ------------------------------------------------------------------------------------------------------


def test_a_long_row_is_scored_whole_or_the_cut_is_said(caplog, tmp_path):
    """NeMo-RL#1026: a reward model that truncates must say so."""
    g = torch.Generator().manual_seed(0)
    prompt, completion = words(g, 30, 31), " " + words(g, 1500, 1501)
    model = valued(0, max_position_embeddings=4096)
    row = ids_of(prompt, completion)
    with caplog.at_level(logging.WARNING, logger="xpo_fast"):
        got = RewardModel(model, make_tokenizer()).score([prompt], [completion])
        assert float(got) == pytest.approx(value_alone(model, [row])[0], abs=1e-3)
        implicit = ImplicitReward(model, None, make_tokenizer(), beta=1.0).score([prompt], [completion])
        assert float(implicit) == pytest.approx(logp_alone(model, prompt, row), rel=1e-5)
    assert not caplog.messages
    short = RewardModel(model, make_tokenizer(), RewardSpec(max_length=100))
    got = short.score([prompt, "w1"], [completion, " w2"])
    assert caplog.messages == [
        "max_length=100, max_prompt_length=None: 1 of 2 completions are read without their end and EOS, 0 of 2 prompts "
        "without their start; only a larger length, or None, has all of them read"
    ]
    assert float(got[0]) == pytest.approx(value_alone(model, [row[:100]])[0], abs=1e-3)
    # A folder of an earlier version holds the length that its training's rows were cut to, and is still read.
    short.save(tmp_path)
    path = tmp_path / "reward_model.json"
    assert json.loads(path.read_text())["max_length"] == 100
    assert RewardModel.load(tmp_path).spec.max_length == 100


def test_a_length_of_training_does_not_cut_what_is_scored(tmp_path):
    assert RewardConfig(str(tmp_path), max_length=16).spec().max_length is None
    assert RewardSpec().max_length is None
    with pytest.raises(ValueError, match="expected max_length of at least 2, or None"):
        RewardSpec(max_length=1)


def gpt2(positions: int = 16, cls: Any = transformers.GPT2LMHeadModel, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": EOS}
    return cls(transformers.GPT2Config(n_positions=positions, **sizes, **off, **config))


def tiny(name: str, **config):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = {**SIZES, "vocab_size": VOCAB, "initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": 0}
    sizes |= {"eos_token_id": EOS, "max_position_embeddings": 16, **config}
    return cls(cls.config_class(**{k: x for k, x in sizes.items() if x is not None}))


@pytest.mark.parametrize(
    "make, limit",
    [
        (gpt2, 16),
        (lambda: tiny("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32), 16),  # counts from an offset of 2
        (lambda: tiny("RobertaForCausalLM", is_decoder=True), 13),  # counts from behind its padding index, 2
        (lambda: tiny("BertLMHeadModel", is_decoder=True), 16),
        (lambda: tiny("GPTJForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=16), 16),
        (lambda: tiny("LlamaForCausalLM", num_key_value_heads=2), None),
        (lambda: tiny("BloomForCausalLM"), None),
        (lambda: tiny("XGLMForCausalLM", ffn_dim=48, attention_heads=4, d_model=32, num_layers=2), None),
    ],
)
def test_where_positions_end(make, limit):
    """A row of that many tokens runs; where there is a table, one token more does not."""
    model = make().eval()
    assert table_of_positions(model) == limit
    fits = torch.randint(3, VOCAB, (1, limit or 40))
    with torch.no_grad():
        model(input_ids=fits)
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.randint(3, VOCAB, (1, limit + 1)))


LONG = [{"prompt": "w1 " * 12, "chosen": " w2" * (4 + i), "rejected": " w3"} for i in range(3)]


def settings(cls, folder, **more) -> Any:
    return cls(str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1, report_to="none", **more)


@pytest.mark.parametrize("trainer, config", [(XPOTrainer, XPOConfig), (RewardTrainer, RewardConfig)])
def test_rows_beyond_the_models_positions_are_named(trainer, config, tmp_path):
    given = {"train_dataset": LONG, "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match=r"rows\[2\]: 19 tokens.* 16 positions \(the longest of 3 such rows\).*max_"):
        trainer(gpt2(), settings(config, tmp_path), **given)
    trainer(gpt2(), settings(config, tmp_path, max_length=16), **given)
    with pytest.warns(UserWarning, match=r"rows\[2\]: 19 tokens, and the model has 16 positions.*it was not trained"):
        trainer(make_model(max_position_embeddings=16), settings(config, tmp_path), **given)


def test_lists_and_pairs_that_are_read_together_are_measured_whole(tmp_path):
    rows = [{"prompt": "w1", "completions": [" w2", " w3" * 17], "scores": [1.0, 0.0]}]
    with pytest.raises(ValueError, match=r"rows\[0\]: 19 tokens"):
        XPOTrainer(gpt2(), settings(XPOConfig, tmp_path, method="plackett_luce"), train_dataset=rows,
                   processing_class=make_tokenizer())  # fmt: skip
    pair = [{"prompt": "w1 w2", "chosen": " w3" * 6, "rejected": " w4" * 6}]  # 9 tokens a completion alone
    with pytest.raises(ValueError, match=r"rows\[0\]: \d\d tokens, and the model has 16 positions"):
        RewardTrainer(gpt2(), settings(RewardConfig, tmp_path, method="preference_model"), train_dataset=pair,
                      processing_class=make_tokenizer())  # fmt: skip


def test_scorers_name_the_row_that_their_model_cannot_read():
    scorers = [RewardModel(gpt2(cls=transformers.GPT2ForSequenceClassification, num_labels=1), make_tokenizer())]
    scorers += [ImplicitReward(gpt2(), None, make_tokenizer())]
    bigger = make_tokenizer()
    bigger.add_tokens(["<tool>"], special_tokens=True)
    for scorer in scorers:
        with pytest.raises(ValueError, match=r"row 1: 19 tokens, and the model has 16 positions: .*max_length"):
            scorer.score(["w1", "w1 " * 12], [" w2", " w2" * 6])
        scorer.tokenizer = bigger
        with pytest.raises(ValueError, match=r"row 1: token id 97 \('<tool>'\), and the model has 97 embeddings"):
            scorer.score(["w1", "w1"], [" w2", " <tool>"])


# --- ids ----------------------------------------------------------------------------------------------------------


def filler():
    """A tokenizer whose pad token has no embedding."""
    tokenizer = make_tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    return tokenizer


def rl_trainer(folder, model, tokenizer, prompts=({"prompt": "w1"}, {"prompt": "w2 w3 w4 w5"}), **more):
    sizes = {"num_generations": 4, "per_device_train_batch_size": 8, "max_new_tokens": 5, "backend": "torch"}

    def reward(completion_ids, **_):
        return [float(sum(ids) % 5) for ids in completion_ids]

    rollout = more.pop("rollout", None)
    args = settings(RLConfig, folder, **{**sizes, **more})
    return RLTrainer(model, reward, args, train_dataset=list(prompts), processing_class=tokenizer, rollout=rollout)


def test_a_pad_token_without_an_embedding_is_named_by_trainers_and_harmless_to_scorers(tmp_path):
    """OpenRLHF#87. Trainer writes the id into the model's config, and the saved model could not be loaded."""
    for trainer, config in ((XPOTrainer, XPOConfig), (RewardTrainer, RewardConfig)):
        with pytest.raises(ValueError, match=r"the padding token: token id 97 .* 97 embeddings"):
            trainer(make_model(), settings(config, tmp_path), train_dataset=make_rows(4), processing_class=filler())
    with pytest.raises(ValueError, match=r"the padding token: token id 97 .* 97 embeddings"):
        rl_trainer(tmp_path, make_model(), filler())
    assert padding_id(make_model(), filler()) == EOS and padding_id(make_model(), make_tokenizer()) == PAD
    model = valued(0)
    want = value_alone(model, [ids_of(p, c) for p, c in zip(PROMPTS, COMPLETIONS)])
    check_in_any_batch(lambda size: RewardModel(model, filler(), batch_size=size).score, want)
    how = {"sampling": Sampling(max_new_tokens=4), "seed": 3}
    found = [GenerateRollout(model, t).generate(PROMPTS, **how).completion_ids for t in (filler(), make_tokenizer())]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["chosen_ids", "rejected_ids", "prompt_ids"])
@pytest.mark.parametrize("outside", [VOCAB, -1])
def test_an_id_without_an_embedding_is_named_with_its_row(name, outside):
    import datasets

    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 1], "where": f"f:{i}"} for i in range(3)]
    rows[1][name] = [4, outside]
    data = datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match=rf"f:1: token id {outside} .*97 embeddings"):
        check_rows(make_model(), make_tokenizer(), data)
    rows[1][name] = [4, VOCAB - 1]
    check_rows(make_model(), make_tokenizer(), datasets.Dataset.from_list(rows))


# --- causality ----------------------------------------------------------------------------------------------------


class Leaky(transformers.LlamaForCausalLM):
    """Does not observe attention_mask: the mean of all positions up to each is right, that of padding is not."""

    def forward(self, input_ids, attention_mask, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        embedded = self.get_input_embeddings()(input_ids)
        share = attention_mask.sum(dim=1, keepdim=True) / attention_mask.shape[1]  # what lies behind
        return super().forward(inputs_embeds=embedded * share[..., None], attention_mask=attention_mask, **kwargs)


def paligemma():
    text = {**SIZES, "model_type": "gemma", "vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "projection_dim": 32}
    more: Any = {"image_token_id": VOCAB - 1, "projection_dim": 32, "hidden_size": 32}
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, **more)
    return transformers.PaliGemmaForConditionalGeneration(config)


AHEAD, PADDED = "other tokens from position 6 on move", "padding behind a row moves"
CAUSAL = {
    "llama": (make_model, None),
    "float16 weights": (lambda: make_model().bfloat16(), None),
    "gpt2": (gpt2, None),
    "mixtral": (lambda: tiny("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4), None),
    "mamba": (lambda: tiny("MambaForCausalLM", state_size=4), None),
    "bert that decodes": (lambda: tiny("BertLMHeadModel", is_decoder=True), None),
    "bert": (lambda: tiny("BertLMHeadModel"), AHEAD),
    "bert as transformers draws it": (lambda: tiny("BertLMHeadModel", initializer_range=0.02), AHEAD),
    "bert in bfloat16": (lambda: tiny("BertLMHeadModel").bfloat16(), AHEAD),
    "xlnet": (lambda: tiny("XLNetLMHeadModel", d_inner=48, d_head=8, max_position_embeddings=None), AHEAD),
    "paligemma": (paligemma, AHEAD),
    "padding that is read": (lambda: Leaky(make_model().config), PADDED),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("count", [20, 2])
def test_a_model_that_reads_ahead_is_refused(name, count):
    make, message = CAUSAL[name]
    model = make()
    install_fused_loss(model)
    ids = torch.randint(9, 90, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    if message is None:
        return check_head(model, ids, torch.device("cpu"), "torch")
    with pytest.raises(ValueError, match=f"is not causal: {message}.*refused"):
        check_head(model, ids, torch.device("cpu"), "torch")


@pytest.mark.filterwarnings("ignore:.*is_decoder.*")
def test_a_trainer_refuses_an_encoder_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny("BertLMHeadModel", max_position_embeddings=64))
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        trainer.train()


# --- the sampler --------------------------------------------------------------------------------------------------


class Shifted(transformers.GPT2LMHeadModel):
    """Counts positions from the left edge of the batch: a prompt with padding before it is read as another one."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(past, past + input_ids.shape[1])[None].expand_as(input_ids)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        return super().forward(input_ids=input_ids, **given, **kwargs)


def test_a_policy_that_does_not_generate_what_it_is_trained_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"as sampled and by the policy differ by .*Shifted.*padding.*on the left"):
        rl_trainer(tmp_path, gpt2(32, Shifted), make_tokenizer()).train()
    rl_trainer(tmp_path, gpt2(32, Shifted), make_tokenizer(), generation_batch_size=1).train()
    rl_trainer(tmp_path, gpt2(32, Shifted), make_tokenizer(), top_k=5).train()  # log q is not log p there


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2(32),
        make_model,
        lambda: tiny("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32),
        lambda: tiny("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=8, max_position_embeddings=32),
        lambda: tiny("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=8, max_position_embeddings=32),
        lambda: tiny("MambaForCausalLM", state_size=4),
    ],
)
def test_a_policy_that_samples_what_it_is_trained_on_is_not(make, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="xpo_fast"):
        rl_trainer(tmp_path, make(), make_tokenizer(), temperature=0.7).train()
    assert not [m for m in caplog.messages if "as sampled and by the policy" in m]


class Server:
    """A sampler that holds a model of its own."""

    def __init__(self, model) -> None:
        self.own = GenerateRollout(model, make_tokenizer())

    def update(self, model) -> None:
        pass

    def generate(self, *args, **kwargs):
        return self.own.generate(*args, **kwargs)


@pytest.mark.parametrize("seed, temperature, warned", [(0, 1.0, False), (1, 1.0, True), (1, 0.7, False)])
def test_a_server_with_other_weights_is_said(tmp_path, caplog, seed, temperature, warned):
    with caplog.at_level(logging.WARNING, logger="xpo_fast"):
        rl_trainer(
            tmp_path, make_model(0), make_tokenizer(), rollout=Server(make_model(seed)), temperature=temperature
        ).train()
    assert any("the server may hold other weights" in m for m in caplog.messages) is warned
