"""Attention of layouts in each way it is computed: segment by segment, FlexAttention, FlashAttention varlen.

Each is called through transformers' own interfaces and held to plain attention over every row alone, in float64. There
is no GPU here: FlexAttention runs unfused, its check that refuses gradients on a CPU taken away, and FlashAttention is
a function of its contract in plain torch. Attention sinks of FlexAttention are not covered: on a CPU transformers
refuses them.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import flex_attention as torch_flex
from torch.testing import assert_close
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.integrations import flex_attention as transformers_flex

from xpo_fast.layouts import attention_of, install_layouts, laid_out, lay_out, varlen, ways
from xpo_fast.layouts.attention import Plan, implementation_of, name_of

OPTIONS = {"segments": "sdpa", "flex": "flex_attention", "varlen": "flash_attention_2"}  # way: implementation
HEADS, GROUPS, WIDTH = 4, 2, 8
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def rows_of(*texts):
    """Rows padded at their ends, every second one in front: their ids and mask."""
    width = max(map(len, texts)) + 1
    ids, mask = torch.zeros(2, len(texts), width, dtype=torch.int64)
    for r, text in enumerate(texts):
        at = slice(width - len(text), width) if r % 2 else slice(len(text))
        ids[r, at], mask[r, at] = torch.tensor(text), 1
    return ids, mask


def text(size, seed):
    return torch.randint(1, 90, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


SYSTEM, FIRST, SECOND = text(40, 1), text(90, 2), text(30, 3)
ROWS = {
    # Three levels; segments of one token, a row that is another's beginning, one that shares nothing, one of a token.
    "tree": [
        *([*SYSTEM, *FIRST, *text(60, 4)], [*SYSTEM, *FIRST, *text(9, 5)], [*SYSTEM, *FIRST, 7], [*SYSTEM, *FIRST]),
        *([*SYSTEM, *SECOND, 1], [*SYSTEM, *SECOND, 2], text(50, 6), [3]),
    ],
    "one": [text(13, 7)],
    "one token": [[5]],
    "whole blocks": [[*text(128, 8), *text(64, 9)], [*text(128, 8), *text(64, 10)]],  # 256 tokens
    "many blocks": [[*text(200, 11), *text(n, n)] for n in (20, 100, 57)],
}
WINDOWS = [None, 20, 189]  # the longest row of the tree has 190 tokens
CASES = [(name, share) for name in ROWS for share in (False, True)]


def made(name, share):
    return lay_out(*rows_of(*ROWS[name]), share=share)


def tokens_of(layout):
    """Of each row, its tokens in the sequence."""
    return [layout.index[layout.at_row == r] for r in range(layout.shape[0])]


def plainly(q, k, v, *, window=None, chunk=None, softcap=None, sinks=None, scale=None):
    """Attention of the last n of m tokens: q (H, n, d), k and v (G, m, d)."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    m = k.shape[1]
    at, to = torch.arange(m - q.shape[1], m)[:, None], torch.arange(m)
    sees = to <= at
    sees = sees if window is None else sees & (to > at - window)
    sees = sees if chunk is None else sees & (to // chunk == at // chunk)
    scores = scores.masked_fill(~sees, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:2], 1)], -1)
    return scores.softmax(-1)[..., :m] @ v


def flash_attn_varlen_func(
    q,  # (queries, H, d)
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    s_aux=None,
):
    """FlashAttention's function: the last query of a sequence is at its last key."""
    assert causal and not dropout_p and len(q.shape) == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    sizes, key_sizes = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert (max_seqlen_q, max_seqlen_k) == (sizes.max(), key_sizes.max())
    assert (sizes <= key_sizes).all() and (sizes > 0).all()
    window = None if window_size[0] < 0 else window_size[0] + 1
    out = []
    split = (x.split(n.tolist()) for x, n in ((q, sizes), (k, key_sizes), (v, key_sizes)))
    for parts in zip(*split, strict=True):
        how = {"window": window, "softcap": softcap or None, "sinks": s_aux, "scale": softmax_scale}
        out.append(plainly(*(x.transpose(0, 1) for x in parts), **how).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    """Makes FlexAttention run here, and FlashAttention be the function above."""

    def unfused(query, key, value, training=False, **kwargs):
        return torch_flex.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", unfused)

    def load(implementation, *args, **kwargs):
        assert implementation == "flash_attention_2"
        return None, flash_attn_varlen_func, None, None, None

    flash = modeling_flash_attention_utils
    monkeypatch.setattr(flash, "_lazy_imports", load)
    made_on_loading = "_loaded_implementation _flash_fn _flash_varlen_fn _flash_with_kvcache_fn _pad_fn _unpad_fn"
    for name in f"{made_on_loading} _process_flash_kwargs_fn _process_with_kvcache_kwargs_fn".split():
        monkeypatch.setattr(flash, name, None)


def operands(layout):
    """Queries, keys and values (1, ·, N, WIDTH), and by what their results are weighted."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, heads, len(layout), WIDTH) for heads in (HEADS, GROUPS, GROUPS)] + [(1, len(layout), HEADS, WIDTH)]
    *leaves, weight = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [x.requires_grad_() for x in leaves], weight


def mask_of(way, layout, window=None, chunk=None):
    """What transformers hands to a layer in place of its mask, and the config."""
    about = {"sliding_window": window} | ({"attention_chunk_size": chunk} if chunk else {})
    config = transformers.MistralConfig(num_attention_heads=HEADS, num_key_value_heads=GROUPS, **about)
    config._attn_implementation = name_of(OPTIONS[way], way)
    make = masking_utils.create_causal_mask
    make = make if window is None else masking_utils.create_sliding_window_causal_mask
    make = make if chunk is None else masking_utils.create_chunked_causal_mask
    one = torch.ones(1, len(layout), dtype=torch.int64)
    with laid_out(layout):
        return make(config, one[..., None].double(), one, None, layout.positions[None]), config


def attended(way, layout, window=None, chunk=None, values_only=False, **kwargs):
    """Values and gradients of a layer's attention over the sequence, by transformers' interface."""
    mask, config = mask_of(way, layout, window, chunk)
    kind = {"segments": Plan, "flex": torch_flex.BlockMask, "varlen": varlen.Lengths}
    assert isinstance(mask, kind[way])
    module = nn.Module()
    module.config, module.is_causal, module.num_key_value_groups = config, True, HEADS // GROUPS
    leaves, weight = operands(layout)
    run = transformers.AttentionInterface._global_mapping[config._attn_implementation]
    # As a model of transformers calls it: with its window and with positions, from which nothing is to be concluded.
    about = {"sliding_window": window, "position_ids": layout.positions[None], "scaling": 0.3, "dropout": 0.0}
    out, _ = run(module, *leaves, mask, **about, **kwargs)
    assert config._attn_implementation == name_of(OPTIONS[way], way)
    return [out] if values_only else [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def alone(layout, **kwargs):
    """The same by plain attention over each row alone."""
    leaves, weight = operands(layout)
    q, k, v = (x[0] for x in leaves)
    out = torch.full((len(layout), HEADS, WIDTH), math.nan, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for r, tokens in enumerate(tokens_of(layout)):
        found = plainly(q[:, tokens], k[:, tokens], v[:, tokens], scale=0.3, **kwargs).transpose(0, 1)
        first = layout.row[tokens] == r  # of the rows that have a token, the first one counts it
        out[tokens[first]] = found[first].detach()
        total = total + (found * weight[0, tokens])[first].sum()
    return [out[None], *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("window", WINDOWS, ids="window {}".format)
@pytest.mark.parametrize(("name", "share"), CASES)
def test_every_way_is_the_attention_of_rows_alone(name, share, window):
    layout = made(name, share)
    want = alone(layout, window=window)
    for way in OPTIONS:
        assert_close(attended(way, layout, window=window), want, **EXACT, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.parametrize("way", ["segments", "flex"])
@pytest.mark.parametrize("chunk", [16, 500])
def test_chunks(way, chunk):
    """They are counted in rows, also in those of the second segment. FlashAttention has none; transformers says so."""
    layout = made("tree", True)
    assert_close(attended(way, layout, chunk=chunk), alone(layout, chunk=chunk), **EXACT)


def test_chunks_of_flash_attention_are_refused():
    with pytest.raises(ValueError, match="Flash attention cannot handle chunked attention"):
        mask_of("varlen", made("tree", True), chunk=16)


@pytest.mark.parametrize("way", ["flex", "varlen"])
def test_softcap(way):
    layout = made("tree", True)
    assert_close(attended(way, layout, window=20, softcap=2.5), alone(layout, window=20, softcap=2.5), **EXACT)


def test_sinks_of_flash_attention():
    layout = made("tree", True)
    sinks = torch.linspace(-1, 2, HEADS, dtype=torch.float64)
    assert_close(attended("varlen", layout, s_aux=sinks), alone(layout, sinks=sinks), **EXACT)


FAULTS = {
    "a row sees what stands in front of it": {"ends": lambda x: torch.full_like(x, len(x))},
    "nobody sees what is shared": {"ends": lambda x: torch.arange(1, len(x) + 1)},
    "positions go on": {"positions": lambda x: torch.arange(len(x))},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_is_seen(fault):
    right = made("tree", True)
    wrong = dataclasses.replace(right, **{n: change(getattr(right, n)) for n, change in FAULTS[fault].items()})
    with pytest.raises(AssertionError):
        assert_close(attended("flex", wrong, window=20), alone(right, window=20), **EXACT)


@pytest.mark.parametrize("fault", ["order", "window"])
def test_wrong_lengths_are_seen(fault, monkeypatch):
    layout = made("tree", True)
    found = varlen.lengths(layout)
    if fault == "order":  # a segment's own keys are not the last ones
        found = dataclasses.replace(found, index=found.index.flip(0))
    monkeypatch.setattr(varlen, "lengths", lambda layout, **kwargs: found)
    with pytest.raises(AssertionError):
        assert_close(attended("varlen", layout, window=20), alone(layout, window=None if fault == "window" else 20))


# --- what is made of a layout -----------------------------------------------------------------------------------------


def visible(layout, window=None):
    """(N, N) whether a token sees another, by the rows that have both."""
    sees = torch.zeros(len(layout), len(layout), dtype=torch.bool)
    for tokens in tokens_of(layout):
        at = torch.arange(len(tokens))
        back = at[:, None] - at
        sees[tokens[:, None], tokens] = (back >= 0) & (back < (window or len(layout)))
    return sees


@pytest.mark.parametrize("window", WINDOWS, ids="window {}".format)
@pytest.mark.parametrize(("name", "share"), CASES)
def test_blocks(name, share, window):
    """None is left out in which a token is seen; where no window cuts, all are those that torch finds pair by pair."""
    layout = made(name, share)
    size = len(layout)
    found, _ = mask_of("flex", layout, window)
    sees = visible(layout, window)
    assert torch.equal(torch_flex.create_mask(found.mask_mod, 1, 1, size, size, "cpu")[0, 0], sees)
    want = torch_flex.create_block_mask(found.mask_mod, 1, 1, size, size, "cpu")
    assert found.shape == want.shape and found.BLOCK_SIZE == want.BLOCK_SIZE
    missed = want.to_dense() > found.to_dense()
    assert not missed.any()
    if window is None or window >= max(map(len, ROWS[name])):
        for parts in ("", "full_"):
            for what in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
                numbers = getattr(found, parts + what), getattr(want, parts + what)
                assert torch.equal(*numbers) and numbers[0].dtype == torch.int32, parts + what


def test_blocks_out_of_a_window_are_left_out():
    """Those with tokens of two rows count as near, so one more of every row is kept, and all behind it of one more."""
    layout = lay_out(*rows_of(text(1000, 1), text(700, 2)), share=False)
    found, _ = mask_of("flex", layout, window=100)
    assert found.to_dense()[0, 0].sum(-1).tolist() == [1, 2, 2, 2, 2, 2, 2, 8, 2, 3, 3, 3, 3, 3]


def test_lengths():
    """Of segments (0, 8), (8, 11) and (11, 12) behind it, and (12, 14)."""
    start = text(8, 1)
    layout = lay_out(*rows_of([*start, 1, 2, 3], [*start, 4], [5, 6]), share=True)
    found = varlen.lengths(layout)
    assert found.queries.tolist() == [0, 8, 11, 12, 14]
    assert found.keys.tolist() == [0, 8, 19, 28, 30]
    assert (found.most_queries, found.most_keys) == (8, 11)
    assert found.index.tolist() == [*range(8), *range(11), *range(8), 11, 12, 13]
    near = varlen.lengths(layout, local_size=3)
    assert near.keys.tolist() == [0, 8, 13, 16, 18]
    assert near.index.tolist() == [*range(8), *range(6, 11), *(6, 7, 11), 12, 13]
    packed = varlen.lengths(lay_out(*rows_of([1], [2, 3]), share=False))
    assert packed.index is None and packed.keys is packed.queries and packed.queries.tolist() == [0, 1, 3]


# --- which way --------------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


def backbone(**about):
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, **about
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("implementation", "device", "about", "way", "said"),
    [
        ("sdpa", "cpu", {}, "segments", "sdpa per segment (on cpu)"),
        ("eager", "mps", {}, "segments", "eager per segment (on mps)"),
        ("sdpa", "cuda", {}, "flex", "FlexAttention with a block mask"),
        ("eager", "cuda", {}, "flex", "FlexAttention with a block mask"),
        ("flex_attention", "cpu", {}, "flex", "FlexAttention with a block mask"),
        ("flash_attention_3", "cuda", {}, "varlen", "FlashAttention varlen (flash_attention_3)"),
        (
            "kernels-community/flash-attn2",
            "cuda",
            {},
            "varlen",
            "FlashAttention varlen (kernels-community/flash-attn2)",
        ),
        ("sdpa", "cuda", {"attention_dropout": 0.1}, "segments", "has no dropout, and attention_dropout is 0.1"),
        ("sdpa", "cuda", {"head_dim": 8}, "segments", "needs heads of 16 at least, not 8"),
        ("my_own", "cuda", {}, "segments", "my_own per segment (FlexAttention need not be the same)"),
    ],
)
def test_choice(implementation, device, about, way, said):
    model = backbone(**about)
    model.config._attn_implementation = implementation
    for _ in range(2):  # and again when a forward has put its own name there
        found = attention_of(model, torch.device(device))
        assert found.way == way and said in found.said
        model.config._attn_implementation = name_of(implementation, found.way)
        assert implementation_of(model.config._attn_implementation) == implementation


def test_choice_by_the_model_and_what_is_installed(monkeypatch):
    assert "no float64" in attention_of(backbone().double(), CUDA).said
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=90, attn_pdrop=0.0)
    assert "GPT2Model does not take FlexAttention" in attention_of(transformers.GPT2LMHeadModel(config), CUDA).said
    monkeypatch.setattr(ways, "has_triton", lambda: False)
    assert "needs Triton" in attention_of(backbone(), CUDA).said


# --- models -----------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "pad_token_id": 0, "use_cache": False}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 20},
    "Gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 8},  # softcap; a layer with a window, one without
    "GptOss": {
        "sliding_window": 20,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
    },
}
RUNS = [(name, way, False) for name in MODELS for way in ("flex", "varlen") if (name, way) != ("GptOss", "flex")]
RUNS += [("Mistral", "flex", True), ("Mistral", "varlen", True)]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "way", "checkpointed"), RUNS)
def test_models(name, way, checkpointed):
    """Two forwards in different layouts, then both gradients: as of rows alone, by the model's eager attention."""
    torch.manual_seed(0)
    config, kind = (getattr(transformers, name + what) for what in ("Config", "ForCausalLM"))
    model = kind(config(**SMALL, **MODELS[name], attn_implementation="eager")).double()
    ids, mask = rows_of(*ROWS["tree"])
    weight = torch.randn(*ids.shape, 90, dtype=torch.float64) * mask[..., None]

    def run(share):
        with laid_out(lay_out(ids, mask, share=share)):
            return (model(input_ids=ids, attention_mask=mask).logits * weight).sum()

    rows = zip(ids, mask.bool(), weight, strict=True)
    loss = sum((model(input_ids=x[at][None]).logits * by[at]).sum() for x, at, by in rows)
    want = torch.autograd.grad(loss, list(model.parameters()))
    install_layouts(model)
    model.config._attn_implementation = OPTIONS[way]
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(share=True), run(share=False)
    assert model.config._attn_implementation == OPTIONS[way]
    assert_close(found, (loss, loss), rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad((found[0] + 2 * found[1]) / 3, list(model.parameters()))
    for a, b in zip(grads, want, strict=True):
        # Norms and rotations are float32 in transformers.
        assert (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("window", [None, 20], ids="window {}".format)
def test_traces_once_for_all_sizes(window, monkeypatch):
    """torch.compile makes a graph for the first sizes and one for all others, with masks as values of it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(torch_flex.flex_attention, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    monkeypatch.setattr(
        transformers_flex, "compile_friendly_flex_attention", lambda *x, training, **how: compiled(*x, **how)
    )
    torch.compiler.reset()
    for name in ("tree", "many blocks", "whole blocks"):  # of 3, 3 and 2 blocks
        layout = made(name, share=True)
        with torch.no_grad():
            found = attended("flex", layout, window=window, values_only=True)
        assert_close(found, alone(layout, window=window)[:1], **EXACT)
    torch.compiler.reset()
    assert len(graphs) <= 2


def test_keys_that_several_heads_share_are_not_repeated(monkeypatch):
    model = backbone(num_key_value_heads=GROUPS, max_position_embeddings=256)
    read, plain = [], nn.functional.scaled_dot_product_attention

    def attend(query, key, *args, **kwargs):
        read.append((query.shape[1], key.shape[1]))
        return plain(query, key, *args, **kwargs)

    ids, mask = rows_of(*ROWS["tree"])
    install_layouts(model)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    with torch.no_grad(), laid_out(lay_out(ids, mask, share=True)):
        model(input_ids=ids, attention_mask=mask)
    assert read and {groups for _, groups in read} == {GROUPS}
