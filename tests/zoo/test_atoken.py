"""AToken beyond the laws: mixed sizes equal each alone, places and angles by the card, windows, voxels, codes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.zoo.atoken import (
    FRAMES,
    PAPER,
    AToken,
    Quantizer,
    Tokens,
    Tower,
    locate,
    pack,
    patchify,
    resampling,
    unpatchify,
    voxels,
)

PATCH = (4, 4, 4)
CONFIG = replace(PAPER.tiny, patch=PATCH, channels=192)


def network(**changes: object) -> AToken:
    torch.manual_seed(4)
    net = AToken(replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def picture(*size: int) -> Tensor:
    return torch.rand(*size, 3, generator=torch.Generator().manual_seed(sum(size))) * 2 - 1


def test_a_batch_of_images_and_videos_of_any_size_equals_each_alone() -> None:
    net = network()
    given = [picture(8, 20), picture(12, 12, 8), picture(70, 4), picture(23, 9, 14)]
    with torch.no_grad():
        tokens = pack(given, PATCH)
        z, image, features = net.encode(tokens)
        pixels = net.decode(net.latent(z), tokens)
        assert tokens.place[:, 0].bincount().tolist() == [10, 18, 17, 30]
        for i, one in enumerate(given):
            alone = pack([one], PATCH)
            own = tokens.place[:, 0] == i
            assert torch.equal(tokens.place[own][:, 1:], alone.place[:, 1:])
            z_, image_, features_ = net.encode(alone)
            torch.testing.assert_close(z[own], z_, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(image[i : i + 1], image_, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(features[own], features_, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pixels[own], net.decode(net.latent(z_), alone), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(image.norm(dim=1), torch.ones(4))


def test_the_order_of_tokens_does_not_matter() -> None:
    net, tokens = network(), pack([picture(8, 12), picture(12, 4)], PATCH)
    order = torch.randperm(len(tokens.x), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, image, _ = net.encode(tokens)
        other, image_, _ = net.encode(Tokens(tokens.x[order], tokens.place[order], tokens.samples))
    torch.testing.assert_close(other, z[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image_, image, rtol=1e-4, atol=1e-5)


def test_windows_of_sixteen_frames_are_encoded_by_themselves_but_pooled_together() -> None:
    net, video = network(), picture(40, 8, 8)
    with torch.no_grad():
        tokens = pack([video], PATCH)
        z, image, features = net.encode(tokens)
        parts = [net.encode(pack([video[i : i + FRAMES]], PATCH)) for i in range(0, 40, FRAMES)]
        torch.testing.assert_close(z, torch.cat([p[0] for p in parts]), rtol=1e-4, atol=1e-5)
        whole = net.encoder.head(tokens._replace(x=features))
        torch.testing.assert_close(image, F.normalize(whole, dim=1))
        latent = net.latent(z)
        want = [
            net.decode(part, pack([video[i : i + FRAMES]], PATCH))
            for i, part in zip((0, 16, 32), latent.split(16), strict=True)
        ]
        torch.testing.assert_close(net.decode(latent, tokens), torch.cat(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 40])
def test_the_table_of_places_is_resized_as_torch_resizes_it(size: int) -> None:
    table = torch.randn(1, 5, 16, 16, generator=torch.Generator().manual_seed(size))
    want = F.interpolate(table, (size, 16), mode="bilinear", align_corners=False, antialias=True)
    weights = resampling(torch.arange(size), torch.full((size,), size))
    torch.testing.assert_close(torch.einsum("ij,bcjx->bcix", weights, table), want, rtol=1e-4, atol=1e-5)


def test_angles_are_time_in_the_window_then_rows_columns_and_depth() -> None:
    place = torch.tensor([[0, 1, 5, 6, 7], [0, 6, 2, 0, 1]])  # steps count from 1, the first one there
    found = locate(place, 16, 4)
    for row, (t, x, y, z) in enumerate([(0, 5, 6, 7), (1, 2, 0, 1)]):
        angles = [axis / 10000 ** (i / 16) for axis in (t, x, y, z) for i in range(2)]
        torch.testing.assert_close(found.cos[row], torch.tensor([math.cos(a) for a in angles]), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.sin[row], torch.tensor([math.sin(a) for a in angles]), rtol=0, atol=1e-6)
    assert found.order.tolist() == [0, 1] and found.begins.tolist() == [0, 1, 2]


def test_tokens_of_one_sample_and_window_stand_side_by_side_in_their_order() -> None:
    place = torch.tensor([[s, t, 0, 0, 0] for s, t in ((1, 5), (0, 0), (1, 0), (0, 9), (1, 7), (0, 1))])
    found = locate(place, 16, 4)
    assert found.order.tolist() == [1, 5, 3, 2, 0, 4]
    assert found.begins.tolist() == [0, 2, 3, 4, 6, 6, 6]


def test_pictures_are_cut_around_the_centre_filled_up_in_time_and_put_together_again() -> None:
    x, place, samples = patchify(picture(2, 6, 11, 18), PATCH)
    assert x.shape == (2 * 1 * 2 * 4, 192) and samples.tolist() == [0, 1]
    assert place[8:11].tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 2, 0]]
    torch.testing.assert_close(unpatchify(x, picture(2, 6, 11, 18), PATCH), picture(2, 6, 11, 18)[:, :4, 1:9, 1:17])
    image = picture(1, 1, 8, 8)
    x, _, _ = patchify(image, PATCH)
    assert not x.unflatten(1, (4, 16, 3))[:, 1:].any()
    torch.testing.assert_close(unpatchify(x, image, PATCH), image)


def test_voxels_stand_at_time_one_with_zeros_behind_their_features() -> None:
    place = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 0, 9]])
    tokens = voxels(torch.ones(3, 7), place, 192)
    assert tokens.place.tolist() == [[0, 1, 1, 2, 3], [0, 1, 4, 5, 6], [0, 1, 0, 0, 9]]
    assert tokens.x[:, :7].all() and not tokens.x[:, 7:].any()
    with torch.no_grad():
        z, image, _ = network().encode(tokens)
    assert z.shape == (3, 12) and image.shape == (1, 32) and z.isfinite().all()


@pytest.mark.parametrize(("codebook", "levels"), [(4096, (4,) * 6), (1024, (8, 5, 5, 5))])
def test_codes_are_the_nearest_levels_and_their_ids_count_them(codebook: int, levels: tuple[int, ...]) -> None:
    quantizer = Quantizer(codebook, 3)
    z = 3 * torch.randn(40, 3 * len(levels), generator=torch.Generator().manual_seed(0))
    codes, ids = quantizer(z)
    for n in range(40):
        for c in range(3):
            number, size = 0, 1
            for i, level in enumerate(levels):
                half, offset = (level - 1) * 1.001 / 2, 0.5 if level % 2 == 0 else 0.0
                value = float(z[n, c * len(levels) + i])
                step = round(math.tanh(value + math.atanh(offset / half)) * half - offset)
                assert float(codes[n, c * len(levels) + i]) == pytest.approx(step / (level // 2), abs=1e-6)
                number, size = number + (step + level // 2) * size, size * level
            assert int(ids[n, c]) == number
            assert 0 <= number < codebook


def test_codes_pass_gradients_and_replace_the_latents_of_a_discrete_tokenizer() -> None:
    net = network(codebook=4096, codebooks=1)
    out, _ = net(picture(2, 4, 8, 8))
    out.sum().backward()
    assert net.encoder.input_layer.weight.grad.any()
    mean = torch.randn(5, 12)
    assert set((net.latent(mean) * 2).unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}


def test_latents_are_the_mean_or_a_sample_with_the_noise_given() -> None:
    net, z, noise = network(), torch.randn(5, 12), torch.randn(5, 6)
    assert torch.equal(net.latent(z), z[:, :6])
    torch.testing.assert_close(net.latent(z, noise), z[:, :6] + torch.exp(z[:, 6:] / 2) * noise)


def test_towers_take_either_norm_and_queries_without_one() -> None:
    plain, normed = Tower(32, 1, 2, 40, bias=False, rms=True), Tower(32, 1, 2, 40, qk_norm=True)
    net = network(encoder=plain, decoder=normed)
    keys = set(net.state_dict())
    assert "encoder.blocks.0.norm1.bias" not in keys and "decoder.blocks.0.attn.q_rms_norm.gamma" in keys
    assert not any(key.startswith("decoder.out_norm") for key in keys)
    with torch.no_grad():
        assert net(picture(1, 4, 8, 8))[0].shape == (1, 4, 8, 8, 3)
