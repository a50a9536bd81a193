"""Paraformer beyond the laws: its encoders beside transformers', the attention alone, articles of different lengths."""

import pytest
import torch
import torchvision_shim  # noqa: F401  (before transformers' models)
from torch import Tensor

from compiled_attn.zoo.layers.text import Text, TextEncoder, bucket
from compiled_attn.zoo.paraformer_legal import Config, GeneralAttention, Paraformer

transformers = pytest.importorskip("transformers")

SIZES = {"width": 24, "depth": 2, "heads": 3, "hidden": 40, "positions": 220}


def ids(batch: int, length: int) -> Tensor:
    drawn = torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(length))
    return drawn.where(torch.arange(length) < torch.arange(length, length - batch, -1)[:, None], 1)


@pytest.mark.parametrize("relative", [True, False])
def test_the_encoder_is_that_of_transformers_key_for_key(relative: bool) -> None:
    kind, config = (
        (transformers.MPNetModel, transformers.MPNetConfig)
        if relative
        else (transformers.XLMRobertaModel, transformers.XLMRobertaConfig)
    )
    torch.manual_seed(0)
    theirs = kind(
        config(
            vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
            max_position_embeddings=220, layer_norm_eps=1e-5, type_vocab_size=1, pad_token_id=1, bos_token_id=0,
            eos_token_id=2,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    mine = TextEncoder(Text(50, **SIZES, relative=relative)).eval()
    mine.load_state_dict(theirs.state_dict())
    x = ids(3, 200)  # farther than the table's last exact row, and than its last row
    with torch.no_grad():
        want = theirs(x, attention_mask=(x != 1).long()).last_hidden_state
        torch.testing.assert_close(mine(x)[x != 1], want[x != 1], rtol=1e-4, atol=1e-4)


def test_buckets_are_exact_near_by_and_logarithmic_up_to_128() -> None:
    found = bucket(torch.tensor([0, 1, -1, 7, 8, -8, 11, 12, 90, 91, -127, 128, 5000, -5000])).tolist()
    assert found == [0, 17, 1, 23, 24, 8, 24, 25, 30, 31, 15, 31, 31, 15]


def test_attention_mixes_first_and_appends_the_mapped_query() -> None:
    torch.manual_seed(0)
    attention = GeneralAttention(8)
    query, context = torch.randn(2, 1, 8), 0.1 * torch.randn(2, 5, 8)
    with torch.no_grad():
        out, weights = attention(query, context)
        asked = query @ attention.linear_in.weight.T
        for b in range(2):
            scores = context[b] @ asked[b, 0]
            support = weights[b, 0] > 0
            assert support.sum() > 1
            # sparsemax: on its support scores minus weights are one threshold, below which all others lie
            threshold = (scores - weights[b, 0])[support]
            torch.testing.assert_close(threshold, threshold[:1].expand_as(threshold))
            assert (scores[~support] <= threshold[0]).all()
            torch.testing.assert_close(weights[b].sum(), torch.tensor(1.0))
            mix = torch.cat([weights[b, 0] @ context[b], asked[b, 0]])
            torch.testing.assert_close(out[b, 0], torch.tanh(attention.linear_out.weight @ mix), rtol=1e-5, atol=1e-6)


def test_a_batch_of_articles_of_different_lengths_equals_each_alone() -> None:
    torch.manual_seed(0)
    model = Paraformer(Config(Text(50, **SIZES))).eval()
    query, article = ids(3, 9), torch.stack([ids(3, 12).roll(n, 0) for n in range(5)], dim=1)
    counts = [1, 5, 3]
    real = torch.arange(5) < torch.tensor(counts)[:, None]
    with torch.no_grad():
        together = model(query, article, real)
        for b, count in enumerate(counts):
            alone = model(query[b : b + 1], article[b : b + 1, :count])
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_only_real_tokens_of_sentences_that_are_there_are_work_and_an_export_takes_other_counts(relative: bool) -> None:
    torch.manual_seed(0)
    model = Paraformer(Config(Text(50, **SIZES, relative=relative))).eval()
    rows: list[int] = []
    first = model.plm.get_submodule("0.auto_model.encoder.layer.0")
    first.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[0]))
    query, article = ids(4, 9), torch.stack([ids(4, 12).roll(n, 0) for n in range(5)], dim=1)
    article[2, 1] = 1  # a sentence without a word
    real = torch.arange(5) < torch.tensor([1, 5, 3, 2])[:, None]
    with torch.no_grad():
        model(query, article, real)
        assert rows == [int((query != 1).sum()), int((article[real] != 1).sum())]
        batch = {0: torch.export.Dim("batch", max=16)}
        given = (query[:2], article[:2], real[:2])
        exported = torch.export.export(model, given, dynamic_shapes=(batch,) * 3, strict=False).module()
        for part in (slice(0, 4), slice(2, 3)):
            args = query[part], article[part], real[part]
            torch.testing.assert_close(exported(*args), model(*args), rtol=1e-5, atol=1e-5)


def test_pads_behind_a_text_change_nothing() -> None:
    torch.manual_seed(0)
    model = Paraformer(Config(Text(50, **SIZES))).eval()
    query, article = ids(1, 9), ids(4, 12)[None]
    wider = torch.cat([article, torch.ones(1, 4, 7, dtype=torch.int64)], dim=2)
    with torch.no_grad():
        torch.testing.assert_close(model(query, wider), model(query, article), rtol=1e-5, atol=1e-5)


def test_xlm_r_takes_the_encoder_s_place() -> None:
    model = Paraformer(Config(Text(50, **SIZES, relative=False))).eval()
    keys = model.state_dict()
    assert "plm.0.auto_model.encoder.layer.1.attention.self.query.weight" in keys
    assert "plm.0.auto_model.embeddings.token_type_embeddings.weight" in keys
    with torch.no_grad():
        assert model(ids(2, 6), ids(2, 8)[:, None]).shape == (2, 2)
