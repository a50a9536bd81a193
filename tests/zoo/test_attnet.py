"""AttNet beyond the laws: the reference's order of steps, its grouped convolution, the GLU, other sizes and kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.zoo.attnet import GLU, PAPER, ATConv, AttNet, Config, convolve_each

SMALL = Config((16, 24), (1, 1), (2, 2), (3, 3), (True, True), (True, True), img_size=32, classes=5)


def as_the_reference_orders_it(net: ATConv, x: Tensor) -> Tensor:
    """Projection at full resolution, then bands one by one, and a convolution with batch x channels groups."""
    batch, channels, height, width = x.shape
    taps, pixels = net.kernel**2, height * width
    projected = net.kernel_proj(x).reshape(batch, channels, pixels)
    bands = [projected[..., i * pixels // taps : -(-(i + 1) * pixels // taps)].mean(2) for i in range(taps)]
    kernels = net.kernel_gen(F.gelu(torch.stack(bands, dim=2))).reshape(batch, channels, net.kernel, net.kernel)
    factor = torch.sigmoid(net.difference_control).reshape(1, -1, 1, 1)
    kernels = kernels - factor * kernels.mean((2, 3), keepdim=True)
    values = net.x_proj(x).reshape(1, batch * channels, height, width)
    groups = batch * channels
    out = F.conv2d(values, kernels.reshape(groups, 1, net.kernel, net.kernel), padding=net.kernel // 2, groups=groups)
    return net.proj(out.reshape(batch, channels, height, width))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(9, 9), (7, 10), (2, 2), (1, 1)])
def test_averaging_first_and_shifting_equal_the_reference_s_order(kernel: int, size: tuple[int, int]) -> None:
    net, x = ATConv(6, kernel, bias=True), torch.randn(3, 6, *size)
    torch.nn.init.normal_(net.difference_control)
    with torch.no_grad():
        torch.testing.assert_close(net(x), as_the_reference_orders_it(net, x), rtol=1e-4, atol=1e-5)


def test_the_kernel_comes_from_bands_of_rows_and_not_from_squares() -> None:
    net, x = ATConv(1, 3, bias=False), torch.zeros(1, 1, 9, 9)
    x[:, :, 0] = 1  # the first of nine bands
    with torch.no_grad():
        net.kernel_proj.weight.fill_(1)
        net.kernel_gen.weight.copy_(torch.eye(9))
        net.difference_control.fill_(-100)
        kernel = net.kernels_of(x)[0, 0]
    wanted = torch.zeros(3, 3)
    wanted[0, 0] = F.gelu(torch.tensor(1.0))
    torch.testing.assert_close(kernel, wanted, rtol=0, atol=1e-6)


def test_half_the_kernel_s_mean_is_inhibited_at_first() -> None:
    net, x = ATConv(4, 3, bias=True), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        free = ATConv(4, 3, bias=True)
        free.load_state_dict(net.state_dict() | {"difference_control": torch.full((4,), -100.0)})
        mean = free.kernels_of(x).mean((2, 3))
        torch.testing.assert_close(net.kernels_of(x).mean((2, 3)), mean / 2)


def test_shifted_multiply_adds_are_a_correlation_with_zeros_outside() -> None:
    x, kernels = torch.randn(1, 3, 5, 4), torch.randn(1, 3, 3, 3)
    wanted = F.conv2d(x, kernels[0].unsqueeze(1), padding=1, groups=3)
    torch.testing.assert_close(convolve_each(x, kernels, 3), wanted)


def test_the_glu_activates_its_first_half_and_norms_behind_the_product() -> None:
    glu, x = GLU(4, 6, conv=True, norm=True), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        first, second = glu.fc1(x)[:, :6], glu.fc1(x)[:, 6:]
        product = F.gelu(glu.dwconv(first)) * second
        normed = product / (product.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(glu(x), glu.fc2(normed))


def test_the_hidden_width_is_cut_twice_and_the_last_norm_s_epsilon_is_the_usual_one() -> None:
    with torch.device("meta"):
        net = AttNet(PAPER.variants["attnet_t2"])
    assert net.stages[0][0].channel_mixer.fc2.weight.shape == (64, 341, 1, 1)
    assert (net.norm.eps, net.stages[0][0].norm_1.eps) == (1e-5, 1e-6)


@pytest.mark.parametrize("size", [(32, 48), (40, 36), (33, 47)])
def test_any_size_gives_logits(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert AttNet(SMALL).eval()(torch.randn(2, 3, *size)).isfinite().all()
