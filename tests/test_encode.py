"""Encoding: the ids are those of the whole text, and what is scored is what was said, for many kinds of tokenizers."""

import itertools
import logging
from typing import Any

import pytest
import torch

from xpo_fast.data import Collator, Conversation, DataError, encode, encode_rows, load, pad_rows, tokenize_after
from xpo_fast.data.turns import scored_spans
from xpo_fast.rewards.encoding import separators
from xpo_fast.rollout import Sampling, encode_prompts
from xpo_fast.rollout.sampling import Generated, Request, as_samples

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

MARKERS = ["<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>", "<s>", "</s>", "<think>", "</think>"]
CORPUS = [
    "Is it raining? Yes, it is raining.\n\nAnswer: Yes\nAnswer: No.\n The answer is no. ",
    "user assistant tool system Let me look. cloudy raining rain ing\n\n\nA B C D",
] * 3
SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def bpe(prefix: bool = False, words: bool = True) -> Any:
    """Byte-level BPE, as of GPT-2 and Llama 3.

    prefix: puts a space in front of whatever it is given. words: keeps merges within words; in others they cross
    punctuation and lines.
    """
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=words)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=[*MARKERS, "<unk>"],
            initial_alphabet=alphabet,
            show_progress=False,
            max_token_length=5,
        ),
    )
    return core


def metaspace(model: str, scheme: str) -> Any:
    """Pieces of SentencePiece, whose first or every section begins with a space."""
    unigram = model == "unigram"
    core = tokenizers.Tokenizer(tokenizers.models.Unigram() if unigram else tokenizers.models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted({*"".join(CORPUS), *"▁Ünot spokenZ+"})
    common = {"vocab_size": 260, "special_tokens": [*MARKERS, "<unk>"], "show_progress": False}
    trainers = tokenizers.trainers
    if unigram:
        trainer = trainers.UnigramTrainer(unk_token="<unk>", initial_alphabet=alphabet, **common)
    else:
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **common)
    core.train_from_iterator(CORPUS, trainer)
    return core


def legacy() -> Any:
    """Llama 2's: a normaliser writes the spaces, bytes stand in for unknown characters, and no word is cut out."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    norm, dec = tokenizers.normalizers, tokenizers.decoders
    core.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    core.decoder = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=[*MARKERS, "<unk>", *bytes_], show_progress=False, max_token_length=12
        ),
    )
    return core


KINDS_OF_TOKENIZERS = {
    "byte-level": bpe,
    "byte-level across words": lambda: bpe(words=False),
    "byte-level with a space in front": lambda: bpe(prefix=True),
    "unigram, always a space": lambda: metaspace("unigram", "always"),
    "unigram, first a space": lambda: metaspace("unigram", "first"),
    "BPE, always a space": lambda: metaspace("bpe", "always"),
    "BPE, no space": lambda: metaspace("bpe", "never"),
    "legacy": legacy,
}
_MADE: dict[str, Any] = {}


def make(kind: str, template: str | None = None, opening: str = "", **special: Any) -> Any:
    """Returns a tokenizer of a kind; opening: the special tokens that it writes before a text."""
    core = tokenizers.Tokenizer.from_str(_MADE.setdefault(kind, KINDS_OF_TOKENIZERS[kind]().to_str()))
    if opening:
        known = [(t, core.token_to_id(t)) for t in opening.split()]
        core.post_processor = tokenizers.processors.TemplateProcessing(single=f"{opening} $A", special_tokens=known)
    extra = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>"]}
    how = {**SPECIAL, **extra, **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **how)


def ids_of(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


def text_of(tok, ids):
    return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.INFO, logger="xpo_fast")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "xpo_fast" and r.levelno == logging.WARNING]


def encoded(rows, tok, kind="pair", **options) -> list[Any]:
    return list(encode(load(rows, kind=kind), tok, kind=kind, **options))


def of(row, name):
    """Returns the ids and masks of each completion in a column."""
    ids = row[f"{name}_ids"]
    listed = bool(ids) and isinstance(ids[0], list)
    ids = ids if listed else [ids]
    masks = row.get(f"{name}_mask")
    masks = masks if listed and masks else [masks] if masks else [[True] * len(x) for x in ids]
    return list(zip(ids, masks, strict=True))


# --- text ---------------------------------------------------------------------------------------------------------

SEAMS = {
    "a space": ("Is it raining?", " Yes.", " No."),
    "nothing": ("Is it rain", "ing? Yes", "y? No"),
    "the prompt's space": ("Answer: ", "Yes", "No."),
    "a line": ("Answer:", "\nYes.", "\n\nNo."),
    "the prompt's line": ("Is it raining?\n", "\n\nYes.", " No"),
    "two spaces": ("Is it raining? ", "  Yes.", "no"),
    "letters that are bytes": ("Ist es für Ü", "ber? ß", "— no"),
}


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZERS)
@pytest.mark.parametrize("opening", ["", "<s>"])
def test_the_ids_are_those_of_the_whole_text(kind, seam, opening):
    prompt, one, other = SEAMS[seam]
    tok = make(kind, opening=opening)
    start = [tok.convert_tokens_to_ids(t) for t in opening.split()]
    forms = [
        ("pair", {"prompt": prompt, "chosen": one, "rejected": other}, {"chosen": [one], "rejected": [other]}),
        ("list", {"prompt": prompt, "completions": [one, other], "scores": [1, 2]}, {"completions": [one, other]}),
        ("unpaired", {"prompt": prompt, "completion": one, "reward": 1.0}, {"completion": [one]}),
        ("chosen", {"prompt": prompt, "chosen": one}, {"chosen": [one]}),
    ]
    for form, row, columns in forms:
        [got] = encoded([row], tok, form)
        for name, completions in columns.items():
            for completion, (ids, mask) in zip(completions, of(got, name), strict=True):
                text = prompt + completion
                assert got["prompt_ids"] + ids == [*start, *ids_of(tok, text), tok.eos_token_id]
                # By the tokenizer's own offsets: scored are the tokens that hold a character of the completion.
                ends = [
                    end for _, end in tok(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
                ]
                scored = [end > len(prompt) for end in ends]
                count = len(got["prompt_ids"]) - len(start)
                assert mask == [*scored[count:], True] and not any(scored[:count])
                if "<unk>" not in text_of(tok, ids):  # a space that was put in front is not the text's
                    assert text_of(tok, [*got["prompt_ids"], *ids]).removeprefix("<s>").strip() == f"{text.strip()}</s>"


def test_a_token_across_the_seam_is_scored_and_said(caplog):
    tok = make("byte-level")
    rows = [{"prompt": "Answer: ", "chosen": "Yes", "rejected": "!"}, {"prompt": "Is", "chosen": "!", "rejected": "?"}]
    got = encoded(rows, tok)
    read = text_of(tok, got[0]["prompt_ids"])
    assert "Answer: ".startswith(read) and len(read) < len("Answer: ")
    assert text_of(tok, [t for t, m in zip(got[0]["chosen_ids"], got[0]["chosen_mask"]) if m]).endswith("Yes</s>")
    # The other completion follows the same ids, and reads the rest of the prompt.
    left = [t for t, m in zip(got[0]["rejected_ids"], got[0]["rejected_mask"]) if not m]
    assert read + text_of(tok, left) == "Answer: "
    assert got[1]["chosen_mask"] == [True, True]  # a row without such a token is scored as ever
    assert any("in 1 of 2 rows a token holds the prompt's end" in line for line in said(caplog))


def test_a_prompt_of_which_no_token_is_left_is_named():
    tok = make("byte-level")
    rows = [{"prompt": "I", "chosen": "s", "rejected": "!"}]
    with pytest.raises(DataError, match=r"^rows\[0\]: the tokenizer joins the first token of the prompt"):
        encoded(rows, tok)
    assert encoded(rows, make("byte-level", opening="<s>"))


def test_what_holds_the_prompts_words_alone_is_read_and_no_part_of_a_mismatched_completion():
    # "ab" is one token, and "abc" is "a" and "bc".
    vocabulary = {t: i for i, t in enumerate(["<unk>", "</s>", "a", "b", "c", "x", "bc", "ab"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("b", "c"), ("a", "b")]))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    rows = [{"prompt": "xab", "completion": "c", "label": True}, {"prompt": "xx", "completion": "ba", "label": False}]
    one, two = encoded(rows, tok, "unpaired")
    assert one["prompt_ids"] == [5] and (one["completion_ids"], one["completion_mask"]) == (
        *([2, 6, 1], [False, True, True]),
    )
    assert two["kl_completion_ids"] == [6, 1] and two["kl_completion_mask"] == [True, True]
    assert one["kl_completion_ids"] == two["completion_ids"] == [3, 2, 1]
    batch = Collator(0, "unpaired")([one, two])
    assert batch["targets"].tolist() == [[-100, 6, 1, -100, -100], [-100, 3, 2, 1, -100]]
    assert batch["kl_targets"].tolist() == [[3, 2, 1, -100], [-100, 6, 1, -100]]


@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZERS)
def test_a_piece_tokenized_alone_is_its_text(kind):
    tok = make(kind)
    start = ids_of(tok, "Is it raining?")
    for text in ("Yes", " Yes", "\n\nAnswer: no", "  no", "\nA", "."):
        assert text_of(tok, start + tokenize_after(tok, text)) == text_of(tok, start) + text
    between, after = separators(tok)
    if "<unk>" not in text_of(tok, between + after):
        both = text_of(tok, start + between + after)
        assert both == text_of(tok, start) + "\n\nSecond answer:\n\n\nThe better answer:"


@pytest.mark.parametrize("kind", ["byte-level", "legacy"])
def test_a_completion_behind_the_prompts_own_ids_leaves_them_whole(kind):
    tok = make(kind)
    batch: Any = {"prompt": ["Answer: "], "chosen": ["Yes"], "where": ["row 0"]}
    got = encode_rows(batch, tok, "chosen", [], 100, None, own=True)
    assert got["prompt_ids"] == encode_prompts(["Answer: "], tok) and all(got["chosen_mask"][0])
    assert text_of(tok, got["prompt_ids"][0] + got["chosen_ids"][0]) == "Answer: Yes</s>"


# --- conversations ------------------------------------------------------------------------------------------------

HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "ChatML": "{% for m in messages %}" + HEADER + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATION,
    "trimmed": "<s>{% for m in messages %}"
    + HEADER
    + "{{ m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    + GENERATION,
    # As Qwen 3's: only the last turn has the thought that it did not think.
    "rewriting": "{% for m in messages %}"
    + HEADER
    + "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    + GENERATION,
    # Its own thought in the generation prompt, as with enable_thinking=False.
    "thoughtless": "{% for m in messages %}"
    + HEADER
    + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    + GENERATION.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
    "marked": "{% for m in messages %}"
    + HEADER
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    + GENERATION,
    "words": "{% for m in messages %}{{ m.role + ':\n' + m.content + ('</s>' if m.role == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}",
}
ENDS = {"marked": "<|im_end|>", "words": "</s>"}
PROMPT = [{"role": "user", "content": "Is it raining?"}]
LOOK = [{"role": "assistant", "content": "Let me look."}]
TURNS = [*LOOK, {"role": "tool", "content": "cloudy"}, {"role": "assistant", "content": "Yes."}]
YES = [{"role": "assistant", "content": "No."}]


def scored_text(tok, row, name):
    """Returns the scored runs of a completion's tokens as texts."""
    runs: list[list[int]] = [[]]
    for token, scored in zip(*of(row, name)[0]):
        runs[-1].append(token) if scored else runs.append([])
    return [text_of(tok, run) for run in runs if run]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level", "BPE, no space"])
@pytest.mark.parametrize("cut", [False, True])
def test_of_several_turns_what_the_assistant_says_is_scored(kind, template, cut):
    tok, end = make(kind, TEMPLATES[template]), ENDS.get(template, "<|im_end|>\n")
    rows = [{"prompt": PROMPT, "chosen": TURNS, "rejected": YES}, {"prompt": PROMPT, "chosen": LOOK, "rejected": YES}]
    thought = "<think>\n\n</think>\n\n" if template == "rewriting" else ""
    says = {"assistant": [f"Let me look.{end}", f"{thought}Yes.{end}"], "last": [f"{thought}Yes.{end}"]}
    whole = tok.apply_chat_template([*PROMPT, *TURNS], tokenize=False)
    size = len(ids_of(tok, whole)) - 2 if cut else 1000
    for score, expected in says.items():
        for form in ("pair", "chosen"):
            got = encoded(rows, tok, form, score=score, max_length=size)
            text = scored_text(tok, got[0], "chosen")
            if cut:
                assert len(got[0]["prompt_ids"]) + len(got[0]["chosen_ids"]) <= size
                assert len(got[0]["chosen_mask"]) == len(got[0]["chosen_ids"])
                assert "".join(expected).startswith("".join(text)) or len(text) == len(expected)
                continue
            assert got[0]["prompt_ids"] + got[0]["chosen_ids"] == ids_of(tok, whole)
            assert text == expected
            assert all(got[1]["chosen_mask"])  # a completion of one turn is scored to its end
            assert form == "chosen" or all(got[0]["rejected_mask"])
    [got] = encoded([rows[0]], tok, score="all", max_length=size)
    assert not [name for name in got if name.endswith("_mask")]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZERS)
def test_of_one_turn_everything_is_scored_whatever_score_says(kind, template):
    tok = make(kind, TEMPLATES[template])
    rows = [{"prompt": PROMPT, "chosen": LOOK, "rejected": YES}]
    [got], *others = [encoded(rows, tok, score=score) for score in ("assistant", "last", "all")]
    assert all(other == [got] for other in others) and not [name for name in got if name.endswith("_mask")]
    assert got["prompt_ids"] + got["chosen_ids"] == ids_of(
        tok, tok.apply_chat_template([*PROMPT, *LOOK], tokenize=False)
    )


def test_lists_and_unpaired_rows_have_masks_too():
    tok = make("byte-level", TEMPLATES["ChatML"])
    row = {"prompt": PROMPT, "completions": [TURNS, LOOK], "rejected": TURNS}
    [got] = encoded([row], tok, "list")
    assert [all(mask) for _, mask in of(got, "completions")] == [False, True]
    assert got["rejected_mask"] == got["completions_mask"][0]
    rows = [{"prompt": PROMPT, "completion": TURNS, "label": True}]
    rows += [{"prompt": [{"role": "user", "content": "A?"}], "completion": YES, "label": False}]
    one, two = encoded(rows, tok, "unpaired")
    assert one["completion_mask"] == got["rejected_mask"] == two["kl_completion_mask"]
    assert two["kl_completion_ids"] == one["completion_ids"]


def test_two_turns_of_the_assistant_side_by_side():
    tok = make("byte-level", TEMPLATES["ChatML"])
    [got] = encoded([{"prompt": PROMPT, "chosen": [*LOOK, *YES], "rejected": YES}], tok)
    assert scored_text(tok, got, "chosen") == ["Let me look.<|im_end|>\n", "No.<|im_end|>\n"]


def test_turns_that_call_tools_and_variables_of_the_template():
    template = (
        "{% for m in messages %}"
        + HEADER
        + "{{ (m.content or '') }}{% for c in m.tool_calls or [] %}{{ '<think>' + c.function.name + '</think>' }}"
        + "{% endfor %}{{ '<|im_end|>' + mark }}{% endfor %}"
        + GENERATION
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, *TURNS[1:]]
    tok, how = make("byte-level", template), {"chat_template_kwargs": {"mark": "\n", "unread": 1}}
    for row in (
        {"prompt": PROMPT, "chosen": turns},
        {"prompt": PROMPT, "chosen": turns, "chat_template_kwargs": {"mark": "\n"}},
    ):
        [got] = encoded([row], tok, "chosen", **({} if "chat_template_kwargs" in row else how))
        assert scored_text(tok, got, "chosen") == ["<think>look</think><|im_end|>\n", "Yes.<|im_end|>\n"]


UNCLEAR = {
    "counts its messages": "<s>{{ messages | length }}" + TEMPLATES["ChatML"],
    "hides all but the last": "{% for m in messages %}{% if loop.last or loop.first %}"
    + HEADER
    + "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + GENERATION,
}


@pytest.mark.parametrize("template", UNCLEAR)
def test_a_template_that_does_not_tell_where_turns_are_is_refused(template):
    turns = [*LOOK, {"role": "user", "content": "Do."}, *YES]
    rows = [{"prompt": PROMPT, "chosen": turns, "rejected": YES}]
    with pytest.raises(DataError, match=r"^rows\[0\]: the chat template does not tell where.*--score all"):
        encoded(rows, make("byte-level", UNCLEAR[template]))
    assert encoded(rows, make("byte-level", UNCLEAR[template]), score="all")


def test_a_completion_without_a_turn_of_the_assistant_is_refused():
    tok = make("byte-level", TEMPLATES["ChatML"])
    turns = [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match=r"^row 5: no turn of a completion is the assistant's"):
        scored_spans(tok, Conversation(PROMPT), turns, "", "row 5", "last")
    with pytest.raises(ValueError, match="score must be one of assistant, last, all; got 'first'"):
        encoded([{"prompt": PROMPT, "chosen": TURNS, "rejected": YES}], tok, score="first")


BEGUN = [*PROMPT, {"role": "assistant", "content": "Well, I think "}]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("rewriting", "thoughtless")])
@pytest.mark.parametrize("words", ["Yes.", " Yes.", "\nYes."])
@pytest.mark.parametrize("opening", ["", "<s>"])
def test_a_begun_answer_goes_on_in_training_as_in_sampling(template, words, opening):
    tok = make("byte-level", TEMPLATES[template], opening)
    said = [{"role": "assistant", "content": words}]
    end = {"marked": "<|im_end|>\n", **ENDS}.get(template, "<|im_end|>\n")
    end = "<|im_end|>\n" if template == "marked" else end
    start = tok.apply_chat_template(BEGUN, tokenize=False, continue_final_message=True)
    for kind, row, name in (
        ("pair", {"prompt": BEGUN, "chosen": said, "rejected": said}, "rejected"),
        ("list", {"prompt": BEGUN, "completions": [said, said], "scores": [1, 2]}, "completions"),
        ("chosen", {"prompt": BEGUN, "chosen": said}, "chosen"),
        ("unpaired", {"prompt": BEGUN, "completion": said, "reward": 1.0}, "completion"),
    ):
        [got] = encoded([row], tok, kind)
        ids, mask = of(got, name)[0]
        # The words follow what was begun, and nothing is written between the two.
        assert text_of(tok, got["prompt_ids"] + ids) == start.rstrip(" ") + " " + words + end
        if got["prompt_ids"] == encode_prompts([BEGUN], tok)[0]:
            assert all(mask)
        else:  # a token holds the begun answer's end and the words' beginning
            left = [t for t, m in zip(ids, mask) if not m]
            assert start.startswith(text_of(tok, got["prompt_ids"] + left))
    turns = [*said, *TURNS[1:]]
    [got] = encoded([{"prompt": BEGUN, "chosen": turns}], tok, "chosen")
    assert scored_text(tok, got, "chosen")[-1] == "Yes." + ENDS.get(template, "<|im_end|>\n")
    assert "cloudy" not in "".join(scored_text(tok, got, "chosen"))


# --- cuts ---------------------------------------------------------------------------------------------------------

LONG = [{"role": "user", "content": "Is it raining? " * 8}]
GLM = "[gMASK]<sop>{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
OPENINGS = {
    # template, the tokenizer's own opening, what stays
    "text": (None, "<s>", ["<s>"]),
    "text of two": (None, "[gMASK] <sop>", ["[gMASK]", "<sop>"]),
    "text of none": (None, "", []),
    "ChatML": (TEMPLATES["ChatML"], "", []),
    "BOS and markers": (TEMPLATES["trimmed"], "<s>", ["<s>"]),
    "BOS that the template alone writes": (TEMPLATES["trimmed"], "", ["<s>"]),
    "two before a marker": (GLM, "", ["[gMASK]", "<sop>"]),
    "two before markers": (GLM + "{% if add_generation_prompt %}<|im_start|>{% endif %}", "", ["[gMASK]", "<sop>"]),
    "BOS and one more": (
        "<s><sop>{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
        "",
        ["<s>", "<sop>"],
    ),
    "BOS before words": ("<s>{% for m in messages %}{{ m.content }}\n{% endfor %}", "", ["<s>"]),
}


@pytest.mark.parametrize("which", OPENINGS)
@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_what_opens_a_prompt_stays_when_it_is_cut(which, room):
    template, opening, stays = OPENINGS[which]
    tok = make("byte-level", template, opening)
    rows: Any = [{"prompt": LONG, "chosen": YES}] if template else [{"prompt": LONG[0]["content"], "chosen": " No."}]
    [whole], [got] = (encoded(rows, tok, "chosen", max_prompt_length=n) for n in (None, room))
    kept = tok.convert_tokens_to_ids(stays)[:room]
    tail = whole["prompt_ids"][len(whole["prompt_ids"]) - room + len(kept) :] if room > len(kept) else []
    assert got["prompt_ids"] == kept + tail and got["chosen_ids"] == whole["chosen_ids"]
    for size in (2, 3, 5):
        [small] = encoded(rows, tok, "chosen", max_length=size)
        assert len(small["prompt_ids"]) + len(small["chosen_ids"]) <= size and small["prompt_ids"]


def test_a_completion_cut_before_its_words_is_said(caplog):
    tok = make("byte-level", TEMPLATES["ChatML"])
    [got] = encoded([{"prompt": PROMPT, "chosen": TURNS, "rejected": YES}], tok, score="last", max_length=16)
    assert not any(got["chosen_mask"]) and any("1 of 2 completions were cut before" in line for line in said(caplog))
    batch = Collator(0, "pair")([got])
    assert bool((batch["targets"][0] == -100).all()) and bool((batch["targets"][1] != -100).any())


# --- batches ------------------------------------------------------------------------------------------------------


def test_only_scored_tokens_are_targets():
    rows = [([1, 2], [3, 4, 5]), ([1], [6]), ([], [])]
    batch = pad_rows(rows, 0, [[False, True, False], None, None], last=True)
    assert batch["targets"].tolist() == [[-100, -100, 4, -100, -100], [6, *[-100] * 4], [-100] * 5]
    row = {"prompt_ids": [1, 2], "completions_ids": [[3, 4], [5]], "completions_mask": [[False, True], [True]]}
    lists = [
        {**row, "rejected_ids": [6, 7], "rejected_mask": [True, False]},
        {"prompt_ids": [1], "completions_ids": [[8], [9], [3]], "rejected_ids": [4]},
    ]
    got = Collator(0, "list")(lists)["targets"].tolist()
    assert [[t for t in r if t != -100] for r in got] == [[4], [5], [], [6], [8], [9], [3], [4]]


def test_eos_is_scored_where_it_is_the_padding_and_stays_as_the_template_writes_it():
    tok = make("byte-level", pad_token="</s>")
    rows = [{"prompt": "Is it", "chosen": " raining", "rejected": " No. Yes, it is raining."}]
    batch = Collator(tok.pad_token_id, "pair")(encoded(rows, tok))
    for targets in batch["targets"]:
        assert targets[targets != -100][-1] == tok.eos_token_id
    for template, end in (("words", "</s>"), ("ChatML", "<|im_end|>\n")):
        [got] = encoded([{"prompt": PROMPT, "chosen": YES}], make("byte-level", TEMPLATES[template]), "chosen")
        assert text_of(tok, got["chosen_ids"]) == f"No.{end}"


# --- training -----------------------------------------------------------------------------------------------------


def test_log_probs_lengths_and_the_cache_of_the_reference_follow_the_mask(tmp_path):
    from xpo_fast.trainer import XPOConfig, XPOTrainer
    from xpo_fast.trainer.reference import rows_fingerprint

    tok = make("byte-level", TEMPLATES["ChatML"], pad_token="</s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    rows = [{"prompt": PROMPT, "chosen": TURNS, "rejected": YES}, {"prompt": LONG, "chosen": YES, "rejected": TURNS}]
    how: Any = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2}
    keys = set()
    for score in ("assistant", "last", "all"):
        args = XPOConfig(output_dir=str(tmp_path), score=score, ref_cache_dir=str(tmp_path / "ref"), **how)
        trainer = XPOTrainer(model, args, train_dataset=load(rows, kind="pair"), processing_class=tok)
        dataset: Any = trainer.train_dataset
        keys.add(rows_fingerprint(dataset))
        trainer.prepare()
        found = trainer.completion_logps(dataset)
        for i, row in enumerate(dataset):
            for s, name in enumerate(("chosen", "rejected")):
                [(ids, mask)] = of(row, name)
                text = torch.tensor([row["prompt_ids"] + ids])
                with torch.no_grad():
                    logp = model.double()(text).logits.log_softmax(dim=-1)[0]
                model.float()
                start = len(row["prompt_ids"])
                own = sum(float(logp[start + k - 1, t]) for k, (t, m) in enumerate(zip(ids, mask)) if m)
                assert found[i, s].tolist() == pytest.approx([own, sum(mask)], abs=1e-3)
                assert trainer.train_dataset[i][f"ref_logp_{name}"] == pytest.approx(own, abs=1e-3)
    assert len(keys) == 3


# --- what was sampled, as text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZERS)
def test_the_text_of_a_sample_is_what_stands_behind_its_prompt(kind):
    tok, looked = make(kind), 0
    for before, said in itertools.product(
        ["Is it raining?", "<s>", "user<|im_end|>", "The\n"], [" Yes, it is.", "Yes", "\nNo", "  A B", " ", ""]
    ):
        prompt, whole = ids_of(tok, before), ids_of(tok, before + said)
        if whole[: len(prompt)] != prompt:  # a token holds the end of one and the beginning of the other
            continue
        end = {tok.eos_token_id}
        sampled = Generated([*whole[len(prompt) :], tok.eos_token_id], "stop")
        [text] = as_samples([Request(before, prompt, (0, 0), 9)], [sampled], tok, Sampling(), end).completions
        assert ids_of(tok, before + text) == whole  # behind a special token " Yes" and "Yes" may have the same ids
        assert text == said or before.endswith(">") or tok.unk_token_id in whole, (before, said, text)
        looked += 1
    assert looked > 12
