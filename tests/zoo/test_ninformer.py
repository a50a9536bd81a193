"""NiNformer beyond the laws: a block written out, the one norm, what the weights fix."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.zoo.ninformer import Block, Config, NiNformer

SMALL = Config(img_size=16, patch_size=4, width=8, hidden=12, depth=2)


def linear(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]


def mlp(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    return linear(state, f"{key}.net.3", F.gelu(linear(state, f"{key}.net.0", x)))


def test_a_block_is_its_equations_with_one_norm_used_twice() -> None:
    block, x = Block(SMALL), torch.randn(2, 16, 8)
    torch.nn.init.normal_(block.norm.weight)
    state = block.state_dict()
    with torch.no_grad():
        y = norm(state, "norm", x)
        mixed = y + mlp(state, "mgu.Mixer.token_mix.2", norm(state, "mgu.Mixer.token_mix.0", y).mT).mT
        mixed = mixed + mlp(state, "mgu.Mixer.channel_mix.1", norm(state, "mgu.Mixer.channel_mix.0", mixed))
        wanted = x + linear(state, "mgu.proj", y) * mixed
        wanted = wanted + mlp(state, "ffn", norm(state, "norm", wanted))
        torch.testing.assert_close(block(x), wanted, rtol=1e-5, atol=1e-5)


def test_the_gate_holds_the_normed_tokens_themselves() -> None:
    block, x = Block(SMALL), torch.randn(1, 16, 8)
    with torch.no_grad():
        for last in (block.mgu.Mixer.token_mix[2].net[3], block.mgu.Mixer.channel_mix[1].net[3]):
            last.weight.zero_()
            last.bias.zero_()
        y = block.norm(x)
        torch.testing.assert_close(block.mgu(y), block.mgu.proj(y) * y)


def test_no_norm_stands_before_the_mean() -> None:
    net, x = NiNformer(SMALL).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.classifier(net.tokens(x).mean(1)), rtol=0, atol=0)


def test_a_picture_of_as_many_patches_fits_and_another_does_not() -> None:
    net = NiNformer(SMALL).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 8, 32)).shape == (1, 10)
        with pytest.raises(RuntimeError):
            net(torch.randn(1, 3, 20, 20))


def test_patches_that_do_not_fill_the_picture_are_a_named_error() -> None:
    with pytest.raises(CompiledAttnError, match=r"do not fill[\s\S]*img_size is 30, patch_size 4"):
        Config(img_size=30)
