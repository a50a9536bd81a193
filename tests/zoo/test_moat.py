"""MOAT beyond the laws: TensorFlow's padding and averages, relative positions pair by pair, windows, backbones."""

import pytest
import torch
import torch.nn.functional as F
from laws import near

from compiled_attn.ir import targets
from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.ir.notes import Notes
from compiled_attn.passes import pipelines
from compiled_attn.passes.base import run_passes
from compiled_attn.passes.fuse_depthwise import FuseDepthwise
from compiled_attn.passes.match.depthwise import PADS
from compiled_attn.runtime.capture import capture
from compiled_attn.zoo import moat
from compiled_attn.zoo.moat import MOAT, PAPER, Attention, Config


def model(**changes: object) -> MOAT:
    torch.manual_seed(3)
    return MOAT(Config(**(vars(PAPER.tiny) | changes))).eval()


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (4, 9), (1, 2)])
def test_a_shortcut_averages_only_what_lies_on_the_map(kernel: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    out = moat.average_pool_same(x, kernel, 2)
    assert out.shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            # SAME: a side of n pixels lacks (ceil(n / 2) - 1) * 2 + kernel - n, the smaller half of them in front
            first = [
                -(max((-(-n // 2) - 1) * 2 + kernel - n, 0) // 2) + 2 * at for n, at in zip(size, (i, j), strict=True)
            ]
            rows, columns = (slice(max(at, 0), at + kernel) for at in first)
            torch.testing.assert_close(out[:, :, i, j], x[:, :, rows, columns].mean((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "padding"), [((8, 8), (0, 1, 0, 1)), ((7, 7), (1, 1, 1, 1)), ((7, 8), (0, 1, 1, 1))])
def test_a_convolution_of_stride_two_pads_behind_even_sizes_only(
    size: tuple[int, int], padding: tuple[int, ...]
) -> None:
    convolution, x = moat.SameConv2d(3, 4, 3, stride=2), torch.randn(1, 3, *size)
    want = F.conv2d(F.pad(x, padding), convolution.weight, convolution.bias, stride=2)
    torch.testing.assert_close(convolution(x), want, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2), (6, 4)])
def test_every_pair_of_places_gets_the_entry_of_its_difference(grid: tuple[int, int]) -> None:
    attn, (height, width) = Attention(16, 8, positions=4), grid
    table = attn.relative_position_embedding
    if grid != (4, 4):
        table = F.interpolate(table[None], (2 * height - 1, 2 * width - 1), mode="bilinear", align_corners=False)[0]
    x = torch.randn(2, height * width, 16)
    q, k, v, outs = attn.q(x) * 8**-0.5, attn.k(x), attn.v(x), []
    for head in range(2):
        at = slice(8 * head, 8 * head + 8)
        logits = q[..., at] @ k[..., at].mT
        for n in range(height * width):
            for m in range(height * width):
                down, right = m // width - n // width, m % width - n % width
                logits[:, n, m] += table[head, down + height - 1, right + width - 1]
        outs.append(logits.softmax(2) @ v[..., at])
    want = attn.o(torch.cat(outs, 2))
    torch.testing.assert_close(attn(x, grid), want, rtol=1e-5, atol=1e-5)


def test_windows_attend_by_themselves_and_the_last_block_to_everything() -> None:
    net = model()
    first, last = net.block_01_00, net.block_01_01
    assert (first.window, last.window) == ((3, 2), None)
    tokens = torch.randn(2, 6, 4, 16)
    cut = moat.to_windows(tokens, (3, 2))
    assert torch.equal(cut[3 + 4].reshape(3, 2, 16), tokens[1, 3:, 2:])
    assert torch.equal(moat.from_windows(cut, (3, 2), 6, 4), tokens)


def test_windows_that_do_not_tile_the_map_are_a_named_error() -> None:
    with pytest.raises(CompiledAttnError, match=r"do not tile[\s\S]*8 x 8[\s\S]*3 x 2"):
        model()(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("size", [(48, 48), (37, 50), (33, 20)])
def test_maps_halve_rounding_up_and_a_backbone_gives_all_of_them(size: tuple[int, int]) -> None:
    net = model(windows=(None, None, None), classes=None)
    assert not any("final_layer_norm" in key or "logits_head" in key for key in net.state_dict())
    with torch.no_grad():
        maps = net(torch.randn(2, 3, *size))
    shapes = []
    for _ in range(4):
        size = (-(-size[0] // 2), -(-size[1] // 2))
        shapes.append(size)
    assert [tuple(x.shape[2:]) for x in maps] == shapes


def test_only_blocks_that_do_not_attend_squeeze_and_only_wider_ones_project_their_shortcut() -> None:
    keys = model().state_dict().keys()
    assert {key.split(".")[0] for key in keys if ".se." in key} == {"block_00_00"}
    assert {key.split(".")[0] for key in keys if "shortcut_conv" in key} == {"block_00_00", "block_01_00"}
    assert not any("relative" in key for key in model(relative=False).state_dict())


def test_an_export_of_any_even_picture_size_equals_the_network() -> None:
    net, dynamic = model(windows=(None, None, None), pool=3), torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    exported = torch.export.export(net, (torch.randn(2, 3, 96, 64),), dynamic_shapes=shapes, strict=False).module()
    x = torch.randn(3, 3, 64, 128)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), net(x), rtol=1e-5, atol=1e-5)


def test_only_the_picture_is_padded_once_depthwise_convolutions_take_their_uneven_borders() -> None:
    program, notes, target = capture(model(), (torch.randn(1, 3, 48, 48),), {}), Notes(), targets.load("cpu")
    fused, _ = run_passes(program, [*pipelines.portable(), FuseDepthwise()], target, notes)
    assert [n.args[0].meta["val"].shape[1] for n in fused.graph.nodes if n.target in PADS] == [3]
    assert not notes.of("depthwise_block").misses
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        near(fused(x), program(x), 1e-5)
