"""Attentive CNN beyond the laws: its rules token by token, sparsemax, the ablations, lengths and empty sentences."""

import math

import pytest
import torch
from torch import Tensor

from compiled_attn.zoo.attentive_cnn import ARTICLES, AttentiveCNN, Config, build
from compiled_attn.zoo.layers.sparsemax import sparsemax


def by_bisection(scores: Tensor) -> Tensor:
    """Sparsemax of one row: the threshold at which what lies above it sums to one."""
    low, high = float(scores.min()) - 1, float(scores.max())
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float((scores - middle).clamp(min=0).sum()) > 1 else (low, middle)
    return (scores - low).clamp(min=0)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 10.0])
def test_sparsemax_is_the_threshold_that_leaves_one(spread: float) -> None:
    scores = spread * torch.randn(3, 4, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = sparsemax(scores)
    for row, score in zip(found.flatten(0, 1), scores.flatten(0, 1), strict=True):
        torch.testing.assert_close(row, by_bisection(score), rtol=0, atol=1e-12)


def test_sparsemax_shares_equally_among_equals_and_takes_one_entry() -> None:
    found = sparsemax(torch.tensor([[2.0, 2.0, 2.0, 0.5], [3.0, 2.0, 2.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    assert sparsemax(torch.tensor([[-7.0]])).item() == 1.0


def test_the_gradient_of_sparsemax_is_that_of_finite_differences() -> None:
    scores = torch.randn(5, 7, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(sparsemax, (scores,))


def network(article: str = "sparsemax") -> AttentiveCNN:
    torch.manual_seed(2)
    net = build(Config(40, embedding=8, width=12, hidden=6, article=article)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def texts(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    ids = torch.randint(1, 40, shape, generator=generator)
    lengths = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
    return ids * (torch.arange(shape[-1]) < lengths)


def encode(net: AttentiveCNN, ids: list[int], suffixes: tuple[str, str, str, str]) -> tuple[Tensor, list[float]]:
    """The vector of one text and what each token weighs, one token at a time."""
    conv, norm, hidden, score = (net.get_submodule(name) for name in suffixes)
    words = [net.embedding.embeddings[i] for i in ids]
    zero, rows = torch.zeros_like(words[0]), []
    for t in range(len(ids)):
        near = [words[t + o] if 0 <= t + o < len(ids) else zero for o in (-1, 0, 1)]
        x = (sum(w @ k for w, k in zip(near, conv.kernel, strict=True)) + conv.bias).clamp(min=0)
        rows.append((x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt() * norm.gamma + norm.beta)
    scores = [float(torch.tanh(x @ hidden.kernel + hidden.bias) @ score.kernel + score.bias) for x in rows]
    shares = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
    return sum(a * x for a, x in zip(shares, rows, strict=True)), shares


QUERY = ("conv1d", "layer_normalization", "dense", "dense_1")
TEXT = ("conv1d_1", "layer_normalization_1", "dense_2", "dense_3")


@pytest.mark.parametrize(("words", "sentences"), [(7, 5), (3, 9), (1, 2), (25, 1)])
def test_articles_and_products_equal_the_card_s_rule_token_by_token(words: int, sentences: int) -> None:
    net, query, articles = network(), texts(2, 6), texts(2, 3, sentences, words)
    with torch.no_grad():
        products = net(query, articles)
        vectors, weights = net.article(articles)
        for b in range(2):
            asked = encode(net, query[b].tolist(), QUERY)[0]
            for g in range(3):
                read = [encode(net, ids, TEXT) for ids in articles[b, g].tolist()]
                masses = []
                for ids, (_, shares) in zip(articles[b, g].tolist(), read, strict=True):
                    real = [share for share, i in zip(shares, ids, strict=True) if i != 0]
                    masses.append(sum(real) / len(real) if real else 0.0)
                want = by_bisection(torch.tensor(masses, dtype=torch.float64)).float()
                vector = sum(w * v for w, (v, _) in zip(want, read, strict=True))
                torch.testing.assert_close(weights[b, g], want, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(vectors[b, g], vector, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(products[b, g], asked @ vector, rtol=1e-4, atol=1e-4)


def test_empty_sentences_share_the_weight_as_the_reference_lets_them() -> None:
    articles = torch.zeros(1, 1, 4, 5, dtype=torch.int64)
    weights = network().article(articles)[1]
    torch.testing.assert_close(weights, torch.full((1, 1, 4), 0.25))


@pytest.mark.parametrize("article", ["sparsemax", "softmax"])
def test_empty_sentences_are_read_once_and_give_what_each_would(article: str) -> None:
    net, articles, read = network(article), texts(2, 3, 6, 5), []
    articles[0, 1] = 0
    articles[1, 0, 2:] = 0
    net.conv1d_1.register_forward_pre_hook(lambda _module, args: read.append(args[0].shape[0]))
    with torch.no_grad():
        vectors, _ = net.sentences(articles)
        assert read == [int((articles != 0).any(-1).sum()) + 1]
        alone, _ = net.text(articles.flatten(0, 2))
    torch.testing.assert_close(vectors.flatten(0, 2), alone, rtol=1e-5, atol=1e-6)


def test_the_ablations_weigh_sentences_by_learned_attention_or_read_one_long_text() -> None:
    net, articles = network("softmax"), texts(1, 2, 3, 5)
    with torch.no_grad():
        vectors, weights = net.article(articles)
        for g in range(2):
            read = [encode(net, ids, TEXT)[0] for ids in articles[0, g].tolist()]
            scores = torch.cat([net.dense_5(torch.tanh(net.dense_4(v))) for v in read])
            torch.testing.assert_close(weights[0, g], scores.softmax(0), rtol=1e-4, atol=1e-5)
            want = sum(w * v for w, v in zip(scores.softmax(0), read, strict=True))
            torch.testing.assert_close(vectors[0, g], want, rtol=1e-4, atol=1e-4)
        net, articles = network("flat"), texts(1, 2, 11)
        for g in range(2):
            want = encode(net, articles[0, g].tolist(), TEXT)[0]
            torch.testing.assert_close(net.article(articles)[0][0, g], want, rtol=1e-4, atol=1e-4)
        assert net(texts(1, 6), articles).shape == (1, 2)


def test_every_way_to_read_articles_is_exported_with_dynamic_batch() -> None:
    for article in ARTICLES:
        net = network(article)
        args = texts(2, 6), texts(2, 3, 7) if article == "flat" else texts(2, 3, 4, 7)
        batch = torch.export.Dim("batch", max=64)
        exported = torch.export.export(net, args, dynamic_shapes=({0: batch}, {0: batch}), strict=False).module()
        with torch.no_grad():
            torch.testing.assert_close(exported(*(x[:1] for x in args)), net(*args)[:1], rtol=1e-5, atol=1e-5)
