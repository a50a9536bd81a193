"""What is rewritten and what is refused on the way of the tokens, on small networks written for the purpose."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.verify import verify
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.follow import Part, Tokens, quotient, same
from compiled_attn.passes.raise_attention import RaiseAttention
from compiled_attn.passes.reorganize_tokens import ReorganizeTokens
from compiled_attn.runtime.capture import capture

WIDTH, HEADS, PATCHES = 12, 2, 9
COUNT = PATCHES + 1


class Block(nn.Module):
    """A block on tokens [B, N, C]; `attend(q, k, v)` on [B, H, N, D] is what a network may change."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        batch, count, _ = x.shape
        return self.qkv(self.norm1(x)).view(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        x = x + self.attend(*self.heads(x)).transpose(1, 2).flatten(2)
        return x + torch.tanh(self.mlp(self.norm2(x)))


class Net(nn.Module):
    """Patches [B, 9, C] behind a class token, `depth` blocks, and `head`."""

    block = Block

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(self.block() for _ in range(depth))

    def tokens(self, x):
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)

    def head(self, x):
        return x[:, 0]

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def with_head(head):
    class Headed(Net):
        def head(self, x):
            return head(x)

    return Headed()


def with_attention(attend, **parameters):
    class Attending(Block):
        def __init__(self) -> None:
            super().__init__()
            for name, value in parameters.items():
                self.register_buffer(name, value.clone())

        def attend(self, q, k, v):
            return attend(self, q, k, v)

    class Attentive(Net):
        block = Attending

    return Attentive()


def reorganize(model, *, dynamic=False, **options):
    """(the program of `model` reorganized behind its first block, the notes, an input)."""
    x = torch.randn(2, PATCHES, WIDTH)
    program = capture(model.eval(), (x,), dynamic_shapes=({0: "batch"},) if dynamic else None)
    notes = Notes()
    given = {"at": (0,), "keep_rate": 0.5, **options}
    changed, _ = run_passes(program, [RaiseAttention(), ReorganizeTokens(**given)], None, notes)
    verify(changed)
    return changed, notes, x


def refused(model, because, **options):
    with pytest.raises(PassError) as error:
        reorganize(model, **options)
    assert because in error.value.facts
    assert error.value.where
    assert error.value.do


class Chosen:
    """The rule written out: the tokens behind Net's first block, and their places [B, M] among the original tokens."""

    def __init__(self, model, x, fuse=True):
        block, tokens = model.blocks[0], model.tokens(x)
        q, k, v = block.heads(tokens)
        with_probabilities = block.attend(q, k, torch.eye(COUNT).expand(*k.shape[:2], -1, -1))  # values 1: the weights
        tokens = tokens + block.attend(q, k, v).transpose(1, 2).flatten(2)
        score = with_probabilities[:, :, 0, 1:].mean(1)
        index = score.topk(-(-PATCHES // 2), 1).indices
        rest = tokens[:, 1:]
        parts = [tokens[:, :1], rest.gather(1, index[..., None].expand(-1, -1, WIDTH))]
        places = [torch.zeros(len(x), 1, dtype=torch.int64), index + 1]
        if fuse:
            dropped = torch.ones_like(score).scatter(1, index, 0)
            parts.append((score * dropped)[:, None] @ rest)
            places.append(torch.full((len(x), 1), COUNT))
        chosen = torch.cat(parts, 1)
        self.places = torch.cat(places, 1)
        self.tokens = chosen + torch.tanh(block.mlp(block.norm2(chosen)))

    def rows_of(self, tokens):
        """Tokens [B, N, C] at the places."""
        return tokens.gather(1, self.places[..., None].expand(-1, -1, WIDTH))


def close(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


HEADS_THAT_FOLLOW = {
    "the class token": (lambda x: x[:, 0], None),
    "the mean of the patches": (lambda x: x[:, 1:].mean(1), None),
    "all tokens": (lambda x: x, None),
    "flattened into the batch": (
        lambda x: x.reshape(x.shape[0] * COUNT, WIDTH).sin().view(x.shape[0], COUNT, WIDTH),
        torch.sin,
    ),
    "channels first, pooled": (lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1), None),
    "class token off and on": (
        lambda x: torch.cat([x[:, :1] * 2, x[:, 1:COUNT]], 1),
        lambda x: torch.cat([x[:, :1] * 2, x[:, 1:]], 1),
    ),
    "split by written sizes": (lambda x: x.split([1, PATCHES], 1)[1].mean(1), lambda x: x[:, 1:].mean(1)),
    "the largest of each channel": (lambda x: x.amax(1), None),
    "pooled by learned weights": (lambda x: (x.mean(2).softmax(1)[:, None] @ x)[:, 0], None),
    "einsum over tokens": (lambda x: torch.einsum("bnc,bnd->bcd", x, x), None),
    "groups of channels": (lambda x: x.view(x.shape[0], COUNT, 3, 4).permute(0, 2, 1, 3).amax(2), lambda x: groups(x)),
}


def groups(x):
    return x.view(x.shape[0], x.shape[1], 3, 4).permute(0, 2, 1, 3).amax(2)


@pytest.mark.parametrize("name", HEADS_THAT_FOLLOW)
def test_a_head_sees_the_tokens_that_are_left(name):
    head, reference = HEADS_THAT_FOLLOW[name]
    model = with_head(head)
    changed, _, x = reorganize(model)
    with torch.no_grad():
        want = (reference or head)(model.blocks[1](Chosen(model, x).tokens))
        assert close(changed(x), want)


def turned(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


def halves(x, cosine, sine):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def complexly(x, table):
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * table).flatten(3)


def sdpa(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, mask)


def merged(q, k, v, mask):
    out = sdpa(*(x.flatten(0, 1) for x in (q, k, v)), mask.expand(HEADS, -1, -1).repeat(q.shape[0], 1, 1))
    return out.view(q.shape[0], HEADS, -1, v.shape[-1])


D = WIDTH // HEADS
DRAW = torch.Generator().manual_seed(5)
ANGLES = torch.randn(COUNT, D, generator=DRAW)
# name -> (attend(self, q, k, v), tables {name: (tensor, axes of tokens, the fused token's entry)})
TABLES = {
    "a bias of heads and pairs": (
        lambda s, q, k, v: sdpa(q, k, v, s.a),
        {"a": (torch.randn(1, HEADS, COUNT, COUNT, generator=DRAW), (2, 3), 0.0)},
    ),
    "a bias of pairs": (
        lambda s, q, k, v: sdpa(q, k, v, s.a),
        {"a": (torch.randn(COUNT, COUNT, generator=DRAW), (0, 1), 0.0)},
    ),
    "a bias of keys": (
        lambda s, q, k, v: sdpa(q, k, v, s.a),
        {"a": (torch.randn(1, COUNT, generator=DRAW), (1,), 0.0)},
    ),
    "a boolean mask": (
        lambda s, q, k, v: sdpa(q, k, v, s.a),
        {"a": (torch.rand(COUNT, COUNT, generator=DRAW) + torch.eye(COUNT) > 0.4, (0, 1), True)},
    ),
    "scores written out": (
        lambda s, q, k, v: (q @ k.transpose(-2, -1) * D**-0.5 + s.a).softmax(-1) @ v,
        {"a": (torch.randn(HEADS, COUNT, COUNT, generator=DRAW), (1, 2), 0.0)},
    ),
    "a rotary table, pairs": (
        lambda s, q, k, v: sdpa(q * s.a + turned(q) * s.b, k * s.a + turned(k) * s.b, v),
        {"a": (ANGLES.cos(), (0,), 1.0), "b": (ANGLES.sin(), (0,), 0.0)},
    ),
    "a rotary table, halves": (
        lambda s, q, k, v: sdpa(halves(q, s.a, s.b), halves(k, s.a, s.b), v),
        {"a": (ANGLES[:, :3].cos(), (0,), 1.0), "b": (ANGLES[:, :3].sin(), (0,), 0.0)},
    ),
    "a rotary table, complex": (
        lambda s, q, k, v: sdpa(complexly(q, s.a), complexly(k, s.a), v),
        {"a": (torch.polar(torch.ones(COUNT, 3), ANGLES[:, :3]), (0,), 1.0)},
    ),
    "angles": (
        lambda s, q, k, v: sdpa(q * s.a.cos() + turned(q) * s.a.sin(), k, v),
        {"a": (ANGLES, (0,), 0.0)},
    ),
    "positions added": (
        lambda s, q, k, v: sdpa(q + s.a, k, v),
        {"a": (torch.randn(COUNT, D, generator=DRAW), (0,), 0.0)},
    ),
    "a factor of each token": (
        lambda s, q, k, v: sdpa(q * s.a, k, v),
        {"a": (torch.rand(COUNT, 1, generator=DRAW), (0,), 1.0)},
    ),
}


UNFUSED = ("a bias of heads and pairs", "a rotary table, pairs")


@pytest.mark.parametrize(("name", "fuse"), [*((n, True) for n in TABLES), *((n, False) for n in UNFUSED)])
def test_a_table_is_gathered_with_the_tokens(name, fuse):
    attend, tables = TABLES[name]
    model = with_attention(attend, **{n: t for n, (t, _, _) in tables.items()})
    with_values(model)
    changed, _, x = reorganize(model, fuse=fuse, dynamic=fuse)
    with torch.no_grad():
        chosen = Chosen(model, x, fuse)
        block = model.blocks[1]
        for table, (value, axes, entry) in tables.items():
            rows = gathered(chosen, value, axes, entry)
            setattr(block, table, rows)
        want = block(chosen.tokens)[:, 0]
        assert close(changed(x), want)


def with_values(model):
    """Weights that make attention uneven."""
    for block in model.blocks:
        nn.init.normal_(block.qkv.weight, std=0.6)


def gathered(chosen, table, axes, entry):
    """A table [.., N, ..] per sample, [B, H or 1, N, M or D], by a loop over samples."""
    out = []
    for places in chosen.places:
        value = table
        for axis in axes:
            last = torch.full_like(value.narrow(axis, 0, 1), entry)
            value = torch.cat([value, last], axis).index_select(axis, places)
        out.append(value.reshape((1,) * (3 - value.dim()) + value.shape) if value.dim() < 4 else value[0])
    return torch.stack(out)


def test_heads_merged_into_the_batch_are_taken_apart_for_the_class_row():
    bias = torch.randn(1, COUNT, COUNT)
    model = with_attention(lambda s, q, k, v: merged(q, k, v, s.a), a=bias)
    with_values(model)
    same_rule = with_attention(lambda s, q, k, v: sdpa(q, k, v, s.a), a=bias)
    same_rule.load_state_dict(model.state_dict())
    first, _, x = reorganize(model)
    second, _, _ = reorganize(same_rule)
    with torch.no_grad():
        assert close(first(x), second(x))


class SequenceFirst(Net):
    """The same network on [N, B, C]."""

    def forward(self, x):
        x = self.tokens(x).transpose(0, 1)
        for block in self.blocks:
            count, batch, _ = x.shape
            q, k, v = block.qkv(block.norm1(x)).view(count, batch, 3, HEADS, D).permute(2, 1, 3, 0, 4).unbind(0)
            x = x + sdpa(q, k, v).permute(2, 0, 1, 3).reshape(count, batch, WIDTH)
            x = x + torch.tanh(block.mlp(block.norm2(x)))
        return x[0]


def test_tokens_in_front_of_the_batch_are_followed():
    model = SequenceFirst()
    with_values(model)
    changed, _, x = reorganize(model)
    with torch.no_grad():
        assert close(changed(x), model.blocks[1](Chosen(model, x).tokens)[:, 0])


class PostNorm(Net):
    """norm(x + attention(x)), norm(x + mlp(x))."""

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            q, k, v = block.qkv(x).view(x.shape[0], COUNT, 3, HEADS, D).permute(2, 0, 3, 1, 4).unbind(0)
            x = block.norm1(x + sdpa(q, k, v).transpose(1, 2).flatten(2))
            x = block.norm2(x + torch.tanh(block.mlp(x)))
        return x[:, 0]


def test_behind_a_post_norm_the_normed_tokens_are_chosen():
    changed, notes, x = reorganize(PostNorm())
    text = str(changed)
    assert text.index("select_tokens") > text.index("layer_norm")
    assert [n.what for n in notes.of("reorganize-tokens").done] == ["9 -> 6 tokens"]
    assert changed(x).shape == (2, WIDTH)


class Registers(Net):
    """Two fixed tokens behind the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.randn(1, 2, WIDTH))

    def tokens(self, x):
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x, self.last.expand(x.shape[0], -1, -1)], 1)

    def head(self, x):
        return x[:, 0] + x[:, -2:].sum(1)


class RegistersInFront(Registers):
    def tokens(self, x):
        return torch.cat([self.first.expand(x.shape[0], -1, -1), self.last.expand(x.shape[0], -1, -1), x], 1)

    def head(self, x):
        return x[:, 0] + x[:, 1:3].sum(1)


def test_fixed_tokens_behind_the_patches_stay_there():
    behind, in_front = Registers(), RegistersInFront()
    with_values(behind)
    in_front.load_state_dict(behind.state_dict())
    first, _, x = reorganize(behind)
    second, _, _ = reorganize(in_front)
    with torch.no_grad():
        assert close(first(x), second(x))


def skip(model, x):
    """x in front of the blocks, once more behind them."""

    class Skipping(type(model)):
        def forward(self, x):
            first = self.tokens(x)
            x = first
            for block in self.blocks:
                x = block(x)
            return self.head(x + first)

    del x
    model.__class__ = Skipping
    return model


def test_an_earlier_state_of_the_tokens_is_gathered_where_nothing_is_fused():
    model = skip(with_head(lambda x: x[:, 1:].mean(1)), None)
    changed, _, x = reorganize(model, fuse=False)
    with torch.no_grad():
        chosen = Chosen(model, x, False)
        early = chosen.rows_of(model.tokens(x))
        assert close(changed(x), (model.blocks[1](chosen.tokens) + early)[:, 1:].mean(1))


def test_an_earlier_state_of_the_tokens_has_no_entry_for_a_fused_one():
    refused(skip(with_head(lambda x: x[:, 0]), None), "a fused token has none")


class Mixer(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2))[:, :, 0]


REFUSED = {
    "rows and columns": (lambda x: x[:, 1:].reshape(x.shape[0], 3, 3, WIDTH).mean(1), "it splits tokens of size 9"),
    "a patch by its number": (lambda x: x[:, 5], "token 5 by its place"),
    "the last patch": (lambda x: x[:, -1], "token -1 by its place"),
    "some patches": (lambda x: x[:, 1:6], "patches by their place"),
    "all but the last": (lambda x: x[:, :-1].mean(1), "patches by their place"),
    "every second token": (lambda x: x[:, ::2], "every 2th token"),
    "patches by an index": (lambda x: x[:, torch.tensor([1, 4])], "no rule says what"),
    "a running sum": (lambda x: x.cumsum(1)[:, 0], "no rule says what"),
    "a sort": (lambda x: x.sort(1).values[:, 0], "no rule says what"),
    "a norm over tokens": (lambda x: F.layer_norm(x.transpose(1, 2), (COUNT,))[:, :, 0], "it normalises over tokens"),
    "a sum over a written count": (lambda x: x.sum(1) / COUNT, "a sum over tokens by their old number, 10"),
    "a sum times its reciprocal": (lambda x: x[:, 1:].sum(1) * (1 / PATCHES), "their old number, 9"),
    "a roll": (lambda x: x.roll(1, 1)[:, 0], "moves tokens by their place"),
    "windows": (lambda x: x.view(x.shape[0], 2, 5, WIDTH).mean(2), "it splits tokens of size 10"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_followed_is_refused_in_words(name):
    head, because = REFUSED[name]
    refused(with_head(head), because)


@pytest.mark.parametrize("layer", [nn.Linear(COUNT, 4), nn.Conv1d(WIDTH, 4, 3)])
def test_weights_over_tokens_are_refused(layer):
    model = with_head(lambda x: x)
    model.mixer = Mixer(layer)
    model.__class__ = type("Mixed", (type(model),), {"head": lambda self, x: self.mixer(x)})
    refused(model, "along tokens" if isinstance(layer, nn.Linear) else "no rule says what")


def test_two_tables_that_are_no_rotation_have_no_entry_for_a_fused_token():
    a, b = torch.randn(COUNT, D), torch.randn(COUNT, D)
    model = with_attention(lambda s, q, k, v: sdpa(q * s.a + q.flip(-1).exp() * s.b, k, v), a=a, b=b)
    refused(model, "no rotation")
    assert reorganize(model, fuse=False)


def test_a_causal_attention_does_not_rank_patches():
    model = with_attention(lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    refused(model, "is_causal=True")


def test_a_refusal_is_also_a_miss_that_names_the_place():
    model = with_head(lambda x: x[:, 5])
    x = torch.randn(2, PATCHES, WIDTH)
    notes = Notes()
    with pytest.raises(PassError):
        ReorganizeTokens(at=(0,)).run(capture(model, (x,)), None, notes)
    assert [m.because for m in notes.misses] == ["it takes token 5 by its place, where 1 stand in front of the patches"]


def test_sizes_are_compared_and_divided_without_a_guess():
    import sympy

    n = sympy.Symbol("n", integer=True, positive=True)
    assert same(2 * (n + 1), 2 * n + 2)
    assert not same(n, 4)
    assert quotient(12, 5) is None
    assert quotient(3 * n + 3, n + 1) == 3
    assert quotient(n, 2) is None
    assert Tokens(1, 1, 0) != Tokens(2, 1, 0)
    assert Part(4, "batch") == Part(4, "batch")
