"""Conversations and their chat template: what a row says reaches the template, or is named."""

import json
import logging
import pickle

import pytest

from xpo_fast.data import Conversation, DataError, encode, load, load_prompts, prompt_of, template_columns

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from xpo_fast.cli import options  # noqa: E402
from xpo_fast.cli.main import build_parser  # noqa: E402
from xpo_fast.data import arrow  # noqa: E402
from xpo_fast.rewards.encoding import encode_rows  # noqa: E402
from xpo_fast.rewards.judges import text_of  # noqa: E402
from xpo_fast.rewards.spec import RewardSpec, load_spec, save_spec  # noqa: E402
from xpo_fast.rollout import encode_prompts  # noqa: E402
from xpo_fast.trainer import XPOConfig  # noqa: E402

# Writes everything: a variable, tools, and of messages the reasoning, the calls, a name and the words.
WHOLE = (
    "{% if thinking is defined and not thinking %}fast {% endif %}"
    "{% for tool in tools or [] %}{{ tool.function | tojson }} {% endfor %}"
    "{% for m in messages %}<{{ m.role }}{% if m.name %}={{ m.name }}{% endif %}> "
    "{% if m.reasoning_content %}( {{ m.reasoning_content }} ) {% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }} {% endfor %}"
    "{% if m.content is not none %}{{ m.content }}{% endif %} </{{ m.role }}> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
BARE = "{% for m in messages %}<{{ m.role }}> {{ m.content or '' }} </{{ m.role }}> {% endfor %}"
BARE += "{% if add_generation_prompt %}<assistant> {% endif %}"
# Drops the reasoning of every turn but the last, as Qwen3's template does.
FORGETS = (
    "{% for m in messages %}<{{ m.role }}> {% if loop.last and m.reasoning_content %}( {{ m.reasoning_content }} ) "
    "{% endif %}{{ m.content }} </{{ m.role }}> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
TOOL = {"type": "function", "function": {"name": "sea", "parameters": {"at": {"type": "number"}}}}
CALL = {"type": "function", "function": {"name": "sea", "arguments": {"at": 48.856614, "of": None}}}
CALLS = [
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "salt", "name": "sea", "tool_call_id": "c1"},
]


def user(content, **further):
    return {"role": "user", "content": content, **further}


def answer(content, **further):
    return {"role": "assistant", "content": content, **further}


def tokenizer(template=WHOLE):
    """Characters as tokens, so that ids are equal only where texts are."""
    letters = {chr(i): i for i in range(32, 127)} | {"\n": 10, "</s>": 0, "?": 63}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[], unk_token="?"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="?")
    made.chat_template = template
    return made


def written(tok, messages, **how):
    """The oracle: the ids of what the template itself writes."""
    text = tok.apply_chat_template(messages, tokenize=False, **how)
    return tok(text, add_special_tokens=False)["input_ids"]


def encoded(rows, kind, tok, **how):
    return encode(load(rows, kind=kind), tok, kind=kind, max_length=10_000, **how)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="xpo_fast")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "xpo_fast"]


GOOD, BAD = [answer("a", reasoning_content="so")], [answer(None, tool_calls=[CALL]), CALLS[2], answer("b")]
BESIDE = {"tools": [TOOL], "chat_template_kwargs": {"thinking": False}}
ROWS = {
    "pair": ({"prompt": CALLS, "chosen": GOOD, "rejected": BAD}, {"chosen": GOOD, "rejected": BAD}),
    "pair, no prompt": ({"chosen": [*CALLS, *GOOD], "rejected": [*CALLS, *BAD]}, {"chosen": GOOD, "rejected": BAD}),
    "unpaired": ({"prompt": CALLS, "completion": GOOD, "label": True}, {"completion": GOOD}),
    "list": ({"prompt": CALLS, "completions": [GOOD, BAD], "scores": [1.0, 0.0]}, {"completions": [GOOD, BAD]}),
    "chosen": ({"messages": [*CALLS, *GOOD]}, {"chosen": GOOD}),
}


@pytest.mark.parametrize("as_text", [False, True], ids=["values", "JSON text"])
@pytest.mark.parametrize("form", ROWS)
def test_tools_calls_keys_and_variables_reach_the_template(form, as_text, said):
    """A conversation is trained on as its template writes it with all that the row has (axolotl#3824, trl#6259)."""
    row, completions = ROWS[form]
    beside = {name: json.dumps(value) for name, value in BESIDE.items()} if as_text else BESIDE
    tok = tokenizer()
    other = json.loads(json.dumps(row).replace("what", "why"))  # a label wants two prompts
    [one, _] = encoded([{**row, **beside}, {**other, **beside}], form.partition(",")[0], tok)
    how = {"tools": [TOOL], "thinking": False}
    prompt = written(tok, CALLS, add_generation_prompt=True, **how)
    assert one["prompt_ids"] == prompt
    for name, given in completions.items():
        pairs = zip(given, one[f"{name}_ids"]) if name == "completions" else [(given, one[f"{name}_ids"])]
        for completion, ids in pairs:
            assert prompt + ids == written(tok, CALLS + completion, **how)
    assert not [line for line in said() if "does not write" in line and "tool_call_id" not in line]


def uneven():
    call = {"type": "function", "function": {"name": "f", "arguments": {"k": 0.1}}}
    prompt = [user("v"), answer(None, tool_calls=[call]), {"role": "tool", "content": "9"}]
    return [
        {"prompt": [user("w", name="bob")], "chosen": [answer("x")], "rejected": [answer("y")]},
        {"prompt": prompt, "chosen": GOOD, "rejected": [answer("z")], "tools": [TOOL]},
    ]


@pytest.mark.parametrize("source", ["list", "dataset", "torch", "json column", "parquet", "jsonl", "json", "reread"])
def test_rows_are_read_the_same_from_every_source(source, tmp_path):
    """No row gains a key that another has (axolotl#2909), nor a None where Arrow had to fill one in."""
    rows = uneven()
    table = datasets.Dataset.from_list([{"tools": None, **row} for row in rows])
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "filled.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    feature = datasets.List(datasets.Json())
    kept = datasets.Features(dict.fromkeys(("prompt", "chosen", "rejected", "tools"), feature))
    found = {
        "list": lambda: rows,
        "dataset": lambda: table,
        "torch": lambda: table.with_format("torch"),
        "json column": lambda: datasets.Dataset.from_list([{"tools": None, **row} for row in rows], features=kept),
        "parquet": lambda: tmp_path / "a.parquet",
        "jsonl": lambda: tmp_path / "filled.jsonl",
        "json": lambda: tmp_path / "a.json",
        "reread": lambda: load(rows, kind="pair").map(lambda row: row),
    }[source]()
    got = [{name: x for name, x in row.items() if name != "where"} for row in load(found, kind="pair")]
    assert got == [{"tools": None, **row} for row in rows]


def test_a_file_whose_later_rows_have_more_is_one_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "_AT_ONCE", 2)
    plain = {"prompt": [user("w")], "chosen": [answer("x")], "rejected": [answer("y")]}
    rows = [plain] * 5 + [{**plain, "chosen": GOOD}, {**plain, "chat_template_kwargs": {"a": 0.1}}, plain]
    for name, some in (("a", rows), ("b", rows[:3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    got = load([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")], kind="pair")
    shown = [{name: x for name, x in row.items() if name != "where"} for row in got]
    assert shown == [{"chat_template_kwargs": None, **row} for row in [*rows[:3], *rows]]
    assert "chat_template_kwargs" not in load(tmp_path / "b.jsonl", kind="pair").column_names
    assert got.select([0, 8])[1]["chosen"] == GOOD and load(got, kind="pair") is got


def test_numbers_and_nulls_of_arguments_are_kept_as_they_are(tmp_path):
    row = {"messages": [*CALLS, answer("a")], "tools": [{**TOOL, "n": [2**70, 1e-310, 0.1 + 0.2, None]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for source in ([row], tmp_path / "a.jsonl"):
        [got] = load(source, kind="chosen")
        assert got["prompt"] == CALLS and got["tools"] == row["tools"]


PLAIN = {"prompt": [user("w")], "chosen": [answer("x")], "rejected": [answer("y")]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PLAIN, "tools": [TOOL]}, "does not write tools"),
        ({**PLAIN, "prompt": [*CALLS[:2], user("w")]}, "does not write tool_calls"),
        ({**PLAIN, "chosen": [answer("", tool_calls=[CALL])]}, "does not write tool_calls"),
        ({**PLAIN, "rejected": [answer("", function_call={"name": "f"})]}, "does not write function_call"),
    ],
)
def test_what_a_template_leaves_unsaid_is_refused_with_the_row(row, message):
    with pytest.raises(DataError, match=rf"^rows\[1\]: the chat template {message}.*--chat-template FILE"):
        encoded([PLAIN, row], "pair", tokenizer(BARE))


def test_the_answers_of_tools_are_looked_for_one_by_one():
    """A template that leaves out one answer of a tool, or one call, is refused although it writes others."""
    forgets = WHOLE.replace("{{ m.content }}", "{{ m.content if loop.index > 3 or m.role != 'tool' }}")
    row = {"messages": [*CALLS, *BAD]}
    assert encoded([row, row], "chosen", tokenizer())
    with pytest.raises(DataError, match="does not write messages of role tool"):
        encoded([row, row], "chosen", tokenizer(forgets))
    late = WHOLE.replace("m.tool_calls or []", "(m.tool_calls if m.tool_calls and loop.index > 3 else [])")
    with pytest.raises(DataError, match="does not write tool_calls"):
        encoded([row, row], "chosen", tokenizer(late))


def test_arguments_that_a_template_would_quote_are_refused():
    """OpenAI's arguments are JSON text; a template that writes an object as JSON writes them as a quotation."""

    def row(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {**PLAIN, "chosen": [answer("", tool_calls=[call])]}

    assert encoded([row({"a": "b"})], "pair", tokenizer())
    with pytest.raises(DataError, match=r"^rows\[0\]: .*quotes the arguments.*as an object"):
        encoded([row('{"a": "b"}')], "pair", tokenizer())


def test_keys_that_a_template_leaves_out_are_counted(said):
    odd = {**PLAIN, "prompt": [user("w", name="bob", id=3)], "chosen": GOOD}
    keys = ("name", "id", "reasoning_content")
    encoded([PLAIN] * 1000 + [odd], "pair", tokenizer(BARE))  # behind the first batch
    assert said() == [f"the chat template does not write {key}, which 1 of 1001 rows have" for key in keys]


def test_a_template_may_drop_the_reasoning_of_earlier_turns(said):
    tok = tokenizer(FORGETS)
    earlier = [user("w"), answer("x", reasoning_content="so"), user("y")]
    [one, other] = encoded([{"messages": [*earlier, *GOOD]}, {"messages": [*earlier, answer("z")]}], "chosen", tok)
    assert one["prompt_ids"] + one["chosen_ids"] == written(tok, [*earlier, *GOOD])
    assert other["prompt_ids"] + other["chosen_ids"] == written(tok, [*earlier, answer("z")])
    assert said() == ["the chat template does not write reasoning_content, which 1 of 2 rows have"]


def test_reasoning_that_a_template_drops_from_an_answer_to_learn_is_counted(said):
    turns = [answer("x", reasoning_content="so"), user("y"), answer("z", reasoning_content="thus")]
    encoded([{"prompt": [user("w")], "completion": turns}] * 2, "chosen", tokenizer(FORGETS))
    assert "the chat template does not write reasoning_content of some answers, which 2 of 2 rows have" in said()


@pytest.mark.parametrize(
    "begun, first, words",
    [
        (answer("a ", tool_calls=[CALL]), answer("b"), "the prompt ends with tool_calls of the assistant"),
        (
            answer("a ", reasoning_content="so"),
            answer("b", reasoning_content="thus"),
            "reasoning_content of the answer",
        ),
    ],
)
def test_an_answer_that_cannot_go_on_as_it_was_begun_is_refused(begun, first, words):
    row = {"prompt": [user("w"), begun], "chosen": [first], "rejected": [answer("c")]}
    with pytest.raises(DataError, match=rf"rows\[0\]: .*{words}"):
        encoded([row], "pair", tokenizer())
    same = [{**m, **{k: x for k, x in begun.items() if k == "reasoning_content"}} for m in row["chosen"]]
    if "tool_calls" not in begun:  # the same on both sides is no contradiction
        assert encoded([{**row, "chosen": same}], "pair", tokenizer())


def test_variables_of_a_row_come_before_those_of_the_run(said):
    tok, own = tokenizer(), {**PLAIN, "chat_template_kwargs": '{"thinking": true}'}
    [one, other] = encoded([own, PLAIN], "pair", tok, chat_template_kwargs={"thinking": False})
    prompts = [written(tok, PLAIN["prompt"], add_generation_prompt=True, thinking=x) for x in (True, False)]
    assert [one["prompt_ids"], other["prompt_ids"]] == prompts and prompts[0] != prompts[1]
    rows = load_prompts([own, {"prompt": PLAIN["prompt"]}])
    assert encode_prompts([row["prompt"] for row in rows], tok, {"thinking": False}) == prompts
    # A reward model is asked with the variables that it was trained with.
    spec = RewardSpec(chat_template_kwargs={"thinking": False})
    asked = encode_rows(tok, spec, [row["prompt"] for row in rows], {"chosen": ["x", "x"]})
    assert [row["prompt_ids"] for row in asked] == prompts
    assert not said()
    encoded([PLAIN, PLAIN], "pair", tok, chat_template_kwargs={"thinkin": False})
    assert said() == ["the chat template does not read thinkin of chat_template_kwargs; it reads thinking"]


def test_the_variables_are_settings_and_a_reward_model_keeps_them(tmp_path):
    config = XPOConfig(output_dir=str(tmp_path), chat_template_kwargs='{"thinking": false}', use_cpu=True)
    assert config.chat_template_kwargs == {"thinking": False}
    with pytest.raises(DataError, match=r"the settings: chat_template_kwargs has tools.*column of their own"):
        XPOConfig(output_dir=str(tmp_path), chat_template_kwargs={"tools": []}, use_cpu=True)
    save_spec(RewardSpec(chat_template_kwargs={"thinking": False}), tmp_path)
    assert load_spec(tmp_path).chat_template_kwargs == {"thinking": False}
    for command in ("train --data a", "reward --data a", "rl --data a", "recipe raft --data a"):
        given = [*command.split(), "--chat-template-kwargs", "a=false", "--chat-template-kwargs", '{"b": "c", "d": 1}']
        assert options.kwargs_of(build_parser().parse_args(given)) == {"a": False, "b": "c", "d": 1}


def test_prompts_alone_carry_their_tools_and_variables(said):
    """`encode_prompts` writes what `load_prompts` read, and functions get the columns as they are."""
    tok = tokenizer()
    rows = load_prompts([{"prompt": CALLS, "tools": json.dumps([TOOL]), "answer": "4"}])
    [row] = load_prompts(rows)
    assert row["prompt"] == CALLS and isinstance(row["prompt"], Conversation)
    assert row["tools"] == json.dumps([TOOL]) and row["answer"] == "4"
    want = written(tok, CALLS, add_generation_prompt=True, tools=[TOOL])
    sent = pickle.loads(pickle.dumps(row["prompt"]))  # to another process
    assert encode_prompts([row["prompt"], sent], tok) == [want, want]
    # Through a file, as recipes keep them.
    line = json.loads(json.dumps({"prompt": row["prompt"], **template_columns(row["prompt"])}))
    assert encode_prompts([prompt_of(line)], tok) == [want]
    [some, none] = load_prompts([{"prompt": CALLS, "tools": [TOOL]}, {"prompt": CALLS}], alike=True)
    assert none["tools"] is None and some["prompt"].tools == [TOOL]


def test_a_judge_reads_tools_and_calls():
    text = text_of(Conversation(CALLS, tools=[TOOL]))
    assert json.dumps([TOOL]) in text and json.dumps([CALL]) in text and "Tool: salt" in text
    assert text_of([answer(None, tool_calls=[CALL])]) == json.dumps([CALL])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PLAIN, "tools": "[{"}, "tools is text that is not valid JSON"),
        ({**PLAIN, "tools": {"a": 1}}, "tools must be a list of JSON schemas"),
        ({**PLAIN, "tools": [{}]}, "tools must be a list of JSON schemas"),
        ({**PLAIN, "tools": [print]}, "tools must be a list of JSON schemas"),
        ({**PLAIN, "tools": [{"a": {1, 2}}]}, "tools cannot be kept as JSON"),
        ({**PLAIN, "tools": [{"a": float("nan")}]}, "tools cannot be kept as JSON"),
        ({**PLAIN, "chat_template_kwargs": [1]}, "chat_template_kwargs must be a dict"),
        ({**PLAIN, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs has tokenize"),
        ({**PLAIN, "prompt": [user("a", x="\ud83d")]}, "a message of prompt cannot be kept as JSON"),
        ({**PLAIN, "chosen": [answer(None)]}, "chosen must hold messages"),
        ({**PLAIN, "chosen": [answer(None, tool_calls=[])]}, "chosen must hold messages"),
        ({**PLAIN, "chosen": [answer("", tool_calls="f()")]}, "tool_calls of chosen is text that is not valid JSON"),
        ({**PLAIN, "chosen": [answer("", tool_calls=[3])]}, "tool_calls of chosen must be a list of calls"),
        ({"prompt": "a", "chosen": " b", "rejected": " c", "tools": [TOOL]}, "tools are given beside text"),
    ],
)
def test_malformed_tools_and_variables_name_their_row(row, message):
    with pytest.raises(DataError, match=rf"^rows\[0\]: {message}"):
        load([row], kind="pair")
    given = {name: row[name] for name in row if name not in ("chosen", "rejected")}
    if given["prompt"] != PLAIN["prompt"] or len(given) > 1:
        with pytest.raises(DataError, match=rf"^rows\[0\]: {message}"):
            load_prompts([given])


def test_messages_that_differ_by_a_key_alone_name_it():
    row = {"chosen": [user("w", id=1), answer("x")], "rejected": [user("w", id=2), answer("y")]}
    with pytest.raises(DataError, match=r"^rows\[0\]: message 0 of chosen and rejected is the same but for id; .*take"):
        load([row], kind="pair")


@pytest.mark.parametrize("empty", [None, "", "[]", []])
def test_empty_tools_are_none(empty):
    assert "tools" not in load([{**PLAIN, "tools": empty, "images": None, "videos": []}], kind="pair").column_names


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio", "audios"])
@pytest.mark.parametrize("form", [*ROWS, "text", "rejected", "rl"])
def test_media_beside_text_are_refused_in_every_form(form, column):
    """Never trained on without what they show (trl#5285)."""
    row = ROWS[form][0] if form in ROWS else {**PLAIN, **({"text": "a"} if form == "text" else {})}
    row = {"text": "a"} if form == "text" else row
    kinds = {"text": "chosen", "rl": "pair"}
    for value in ([[[0]]], "a.png", b"x", {"bytes": b"x"}):
        with pytest.raises(DataError, match=rf"^rows\[0\]: {column} is given, and models here read text alone"):
            load([{**row, column: value}], kind=kinds.get(form, form.partition(",")[0]))
        with pytest.raises(DataError, match=rf"^rows\[0\]: {column} is given"):
            load_prompts([{"prompt": "a", column: value}])


@pytest.mark.parametrize(
    "asked", [{"text": "w"}, {"Prompt": "w"}, {"context": "w"}, {"User Input": "w"}, {"turns": [user("w")]}]
)
def test_a_prompt_of_another_name_is_not_lost_where_answers_share_words(asked):
    row = {**asked, "chosen": "the answer is a", "rejected": "the answer is b"}
    [name] = asked
    with pytest.raises(DataError, match=rf"^rows\[0\]: .*{name} could be the prompt, too: --columns prompt={name}"):
        load([row], kind="pair")
    [read] = load([{**row, name: "the answer"}], kind="pair")
    assert read["prompt"] == "the answer is"  # which repeats the column
    answers = {"chosen": "a", "rejected": "b"} if isinstance(asked[name], str) else {}
    [read] = load([{**row, **answers}], kind="pair", columns={"prompt": name})
    assert read["prompt"] == asked[name]


def test_columns_that_nothing_is_read_from_are_named_in_one_line(said):
    row = {**PLAIN, "messages": [*PLAIN["prompt"], *PLAIN["chosen"]], "score_chosen": 1.0, "score_rejected": 0.0}
    load([row], kind="pair")
    assert not said()
    load([{**row, "id": 3, "where": "w", "note": None, "meta": {"a": 1}}, {**row, "source": "s"}], kind="pair")
    assert said() == ["rows: columns that nothing is read from: id, meta, source"]
    load([{**row, "best": {"a": [answer("x")]}}], kind="pair", columns={"chosen": "best.a"})
    load_prompts([{"prompt": "a", "id": 3}])
    assert len(said()) == 1
