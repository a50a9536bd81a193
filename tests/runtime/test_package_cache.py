"""Packages built before: taken from disk when nothing that matters has changed, built anew when anything has."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._inductor.cpp_builder import CppBuilder

import compiled_attn as ca
from compiled_attn.ops.templates import registry
from compiled_attn.ops.templates.base import Template
from compiled_attn.runtime import lower, measure, package_cache
from compiled_attn.runtime.capture import capture


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return measure.cache_folder() / "packages"


class Net(nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.scale = scale

    def forward(self, x):
        return torch.relu(self.linear(x)) * self.scale


def net(scale=2.0):
    torch.manual_seed(0)
    return Net(scale).eval()


def key(model, rows=3, options=None, **kwargs):
    return package_cache.key_of(capture(model, (torch.ones(rows, 6),), **kwargs), options or {})


def test_a_model_built_before_is_fetched_and_gives_the_same_numbers():
    x = torch.randn(3, 6)
    first, second = (ca.compile(net(), example_inputs=(x,)) for _ in range(2))
    assert "inductor" in first.builds[0].seconds
    assert "fetched" in second.builds[0].seconds
    assert "inductor" not in second.builds[0].seconds
    assert second.builds[0].templates == first.builds[0].templates == {"cpp_gemm"}
    assert "cpp_gemm  found in the generated source" in str(second.explain())
    assert torch.equal(first(x), second(x))
    torch.testing.assert_close(second(x), net()(x))


def test_an_artifact_of_a_model_built_before_is_checked_as_any_other(folder, tmp_path):
    x = torch.randn(3, 6)
    ca.compile(net(), example_inputs=(x,))
    ca.export(net(), (x,), path=tmp_path / "net.pt2")
    assert len(list(folder.glob("*.pt2"))) == 1
    torch.testing.assert_close(ca.load(tmp_path / "net.pt2")(x), net()(x))


@pytest.mark.parametrize("harm", ["flip", "cut", "no digest", "no file"])
def test_a_damaged_package_is_built_again(folder, harm):
    x = torch.randn(3, 6)
    ca.compile(net(), example_inputs=(x,))
    (kept,) = folder.glob("*.pt2")
    data = bytearray(kept.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        kept.write_bytes(data)
    elif harm == "cut":
        kept.write_bytes(data[:-1])
    else:
        (kept if harm == "no file" else kept.with_suffix(".json")).unlink()
    again = ca.compile(net(), example_inputs=(x,))
    assert "inductor" in again.builds[0].seconds
    torch.testing.assert_close(again(x), net()(x))


def test_the_key_depends_on_all_that_the_code_depends_on():
    base = key(net())
    assert base == key(net())
    changed = net()
    with torch.no_grad():
        changed.linear.weight[0, 0] += 1e-7
    batch = ({0: "batch"},)
    with torch._inductor.config.patch(max_autotune=True):
        other_config = key(net())
    keys = [
        base,
        key(changed),
        key(net(scale=2.0000001)),
        key(net(), rows=4),
        key(net(), dynamic_shapes=batch),
        key(net(), rows=4, dynamic_shapes=batch),  # heuristics read the size at capture
        key(net(), options={"freezing": True}),
        key(net().bfloat16().float()),  # rounded weights
        other_config,
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_what_the_graph_does_not_tell_has_no_key(monkeypatch):
    @torch.library.custom_op("package_cache_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Foreign(nn.Module):
        def forward(self, x):
            return twice(x)

    assert key(Foreign()) is None
    template = Template("mine", "attention", "cpu", lambda *_: None)
    monkeypatch.setattr(registry, "TEMPLATES", [*registry.TEMPLATES, template])
    assert key(net()) is None


def test_the_oldest_packages_go_when_there_are_too_many(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(package_cache, "LIMIT_BYTES", 25)
    package = tmp_path / "p.pt2"
    package.write_bytes(b"0123456789")
    for at, name in enumerate(("a", "b", "c")):
        package_cache.keep(name, package)
        os.utime(folder / f"{name}.pt2", (at, at))
    assert sorted(f.name for f in folder.glob("*.pt2")) == ["b.pt2", "c.pt2"]
    assert not package_cache.fetch("a", tmp_path / "out.pt2")
    assert package_cache.fetch("b", tmp_path / "out.pt2")
    package_cache.clear()
    assert not package_cache.fetch("b", tmp_path / "out.pt2")


def test_models_compiled_by_two_threads_at_once_leave_torch_as_it_was():
    build, pick = CppBuilder.build, torch._C._select_conv_backend
    nets = [net(scale) for scale in (2.0, 3.0)]
    x = torch.randn(3, 6)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda m: ca.compile(m, example_inputs=(x,)), nets))
    for fast, model in zip(compiled, nets, strict=True):
        torch.testing.assert_close(fast(x), model(x))
    assert (CppBuilder.build, torch._C._select_conv_backend) == (build, pick)


def test_the_cache_that_torch_keeps_of_a_graph_is_told_of_this_librarys_source(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model, x, hits = net(), torch.randn(3, 6), []
    for source in ("one", "one", "another"):
        monkeypatch.setattr(lower, "source_digest", lambda text=source: text)
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="compiled_attn")(x), model(x))
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 1, 0]
