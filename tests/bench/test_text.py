"""The small language model that eviction is measured on knows more of held-out text than how frequent each byte is."""

import pytest
import torch

pytest.importorskip("transformers")


def test_the_trained_model_reads_held_out_text_better_than_frequencies_do():
    from bench.evict_text import LENGTH, texts
    from bench.train_text import corpus, trained

    tokens = texts(4)
    assert tokens.shape == (4, LENGTH)
    with torch.no_grad():
        loss = trained()(input_ids=tokens, labels=tokens).loss
    counts = corpus()[0].bincount(minlength=256).double() + 1
    frequencies = -(counts / counts.sum()).log()[tokens].mean()
    assert loss < 0.75 * frequencies
