"""Torch-TensorRT as the inner compiler.

Where it is installed, and no GPU is there, its dry run lowers and partitions for real and PyTorch runs what would be engines.
Where it is not, a stand-in registers the same backend and takes a graph the same way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends import registry

import dry_tensorrt
import layers
import moe_fx
import tiny
from moe_fx.evaluate import with_cache
from moe_fx.inner import TENSORRT
from moe_fx.passes.dynamo_form import writes_to_what_is_given
from moe_fx.testing import tolerance

STAND_IN = Path(__file__).parent / "support" / "stand_in"
INSTALLED = importlib.util.find_spec("torch_tensorrt") is not None
MODELS = ("qwen3_moe", "mixtral", "deepseek_v3")
#: How the experts are written, and whether our op takes their place.
FORMS = {"batched_mm": ("batched_mm", False), "grouped_mm": ("grouped_mm", False), "fused": ("grouped_mm", True)}
#: What transformers' ``grouped_mm`` experts do in float32 that stays in PyTorch without us, too.
WITHOUT_CONVERTER = {
    "aten.sort.default", "aten.histc.default", "aten.cumsum.default", "transformers.grouped_mm_fallback.default"
}  # fmt: skip


def policies(name: str) -> dict[str, tuple[Any, tiny.Rule | None]]:
    tables = tiny.random_artifact(name)
    return {
        "topk": (moe_fx.TopK(), None),
        "sere": (moe_fx.SERE(tables, primary=1, threshold=0.4), tiny.sere_rule(tables, 1, 0.4)),
        "beam": (moe_fx.BEAM(tables), tiny.beam_rule(tables, 0.5)),
    }


def compiled(model: nn.Module, policy: object, fuse: bool = False, dynamic: bool = False, **inner_options: Any) -> Any:
    options = {"policy": policy, "inner": "torch_tensorrt", "strict": True, "fuse_experts": fuse, "fuse_routing": fuse}
    options["inner_options"] = inner_options
    return torch.compile(model, backend="moe_sparse", fullgraph=True, dynamic=dynamic, options=options)


def our_ops(policy: str, fuse: bool) -> Counter[str]:
    """Which of our ops a policy brings into a model."""
    routing = {
        "topk": [],
        "sere": ["topk_sere" if fuse else "sere_reroute"],
        "beam": ["topk_beam"] if fuse else ["beam_mask", "fold_masked"],
    }[policy]
    return Counter({f"moe_fx.{op}.default": tiny.LAYERS for op in [*routing, *(["fused_experts"] if fuse else [])]})


def decode(step: Callable[..., Any], model: nn.Module, device: str, steps: int = 4) -> Tensor:
    """Logits of two sequences decoded token by token into a static cache, which every step writes to."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=8)
    tokens = tiny.tokens(batch=2, length=steps)["input_ids"].to(device)
    at = with_cache(model, cache)
    logits = [
        step(input_ids=tokens[:, t : t + 1], cache_position=torch.tensor([t], device=device), **at).logits for t in range(steps)
    ]
    return torch.cat(logits, dim=1).cpu()


def expected_decode(model: nn.Module, name: str, rule: tiny.Rule | None) -> Tensor:
    with tiny.patched(model, name, rule) if rule else contextlib.nullcontext():
        return decode(model, model, "cpu")


class ReturnsViews(nn.Module):
    """Returns its input and a view of it beside the result, as models that pass a cache through do."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = layers.SoftmaxThenTopK()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.moe(x), x.view(-1), x


class WritesToItsInput(ReturnsViews):
    """Adds its input up in another, as models do that get a cache."""

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache.view(-1).add_(x.view(-1))
        return self.moe(cache)


class HasANumber(ReturnsViews):
    """Scales by a number, of which Dynamo makes an input where shapes are dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.7

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x) * self.scale


def layer_policy() -> moe_fx.SERE:
    similarity = torch.rand(layers.E, layers.E, generator=torch.Generator().manual_seed(0))
    return moe_fx.SERE(moe_fx.Artifact({"moe": {"similarity": similarity}}), primary=1)


def by_eager(model: nn.Module, *args: Tensor, policy: object = None) -> Any:
    """The rewritten graph, run by PyTorch."""
    options = {"policy": policy or layer_policy(), "inner": "eager", "fuse_experts": False}
    result = torch.compile(model, backend="moe_sparse", options=options)(*args)
    torch._dynamo.reset()
    return result


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


# By the stand-in: what does not depend on Torch-TensorRT's own partitioner


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """``torch_tensorrt`` is what lies in a folder, if anything does, and no backend is registered by that name."""
    mappings: list[dict[str, Any]] = [registry._BACKENDS, registry._COMPILER_FNS, sys.modules]
    taken = [_take_out(mapping) for mapping in mappings]
    try:
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            yield
    finally:
        for mapping, entries in zip(mappings, taken, strict=True):
            _take_out(mapping)
            mapping.update(entries)


def _take_out(mapping: dict[str, Any]) -> dict[str, Any]:
    """Remove what belongs to Torch-TensorRT, and return it."""
    return {key: mapping.pop(key) for key in list(mapping) if key.partition(".")[0] in TENSORRT}


@pytest.fixture
def stand_in() -> Iterator[list[Any]]:
    """The graphs that the stand-in compiles."""
    torch._dynamo.list_backends()  # those of entry points, which are looked for once
    with importable(STAND_IN):
        import torch_tensorrt

        torch_tensorrt.COMPILED.clear()
        yield torch_tensorrt.COMPILED


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["sere", "beam"])
def test_our_ops_stand_between_engines(policy: str, form: str, stand_in: list[Any]) -> None:
    """They survive the trace and the decompositions that come before the partition."""
    name, (experts, fuse) = "qwen3_moe", FORMS[form]
    model, inputs = tiny.build(name, experts), tiny.tokens()
    settings, rule = policies(name)[policy]
    got = compiled(model, settings, fuse)(**inputs).logits
    torch.testing.assert_close(got, tiny.expected(model, name, rule, **inputs), **tolerance(torch.float32))
    (graph,) = stand_in
    assert Counter({op: n for op, n in graph.outside.items() if op.startswith("moe_fx.")}) == our_ops(policy, fuse)
    assert not any(op.startswith("moe_fx.") for engine in graph.engines for op in engine)
    assert len(graph.engines) > tiny.LAYERS
    if form != "grouped_mm":
        assert graph.outside == our_ops(policy, fuse)


def test_dynamic_shapes_leave_no_number_to_be_read_at_run_time(stand_in: list[Any]) -> None:
    model, different = HasANumber(), [torch.randn(4, layers.H), torch.randn(7, layers.H)]
    want = [by_eager(model, x) for x in different]
    step = compiled(model, layer_policy(), dynamic=True)
    for x, output in zip(different, want, strict=True):
        torch.testing.assert_close(step(x), output, **tolerance(torch.float32))
    (graph,) = stand_in
    assert "aten._local_scalar_dense.default" not in {op for engine in [*graph.engines, graph.outside] for op in engine}


def test_a_model_that_returns_views_of_its_input_is_compiled(stand_in: list[Any]) -> None:
    model, x = ReturnsViews(), torch.randn(4, layers.H)
    want = by_eager(model, x)
    torch.testing.assert_close(compiled(model, layer_policy())(x), want, **tolerance(torch.float32))
    assert stand_in[0].outside == {"moe_fx.sere_reroute.default": 1}


@pytest.mark.parametrize("policy", [layer_policy(), moe_fx.TopK()], ids=["rewritten", "left"])
def test_what_a_graph_writes_to_its_inputs_is_kept(policy: object, stand_in: list[Any]) -> None:
    model, x = WritesToItsInput(), torch.randn(4, layers.H)
    caches = {"eager": torch.ones_like(x), "engines": torch.ones_like(x), "copied": torch.ones_like(x)}
    want = by_eager(model, x, caches["eager"], policy=policy)
    got = compiled(model, policy)(x, caches["engines"])
    torch._dynamo.reset()
    compiled(model, policy, use_distributed_mode_trace=False)(x, caches["copied"])
    torch.testing.assert_close(got, want, **tolerance(torch.float32))
    assert torch.equal(caches["engines"], caches["eager"])
    assert torch.equal(caches["copied"], torch.ones_like(x)), "by itself the stand-in loses writes, as Torch-TensorRT does"
    assert [graph.options["use_distributed_mode_trace"] for graph in stand_in] == [True, False]
    assert stand_in[0].engines


def test_active_experts_are_counted(stand_in: list[Any]) -> None:
    """Counting writes to tensors that the graph holds."""
    model, counted = ReturnsViews(), []
    for inner in ("eager", "torch_tensorrt"):
        moe_fx.reset_stats()
        torch._dynamo.reset()
        settings = {"policy": layer_policy(), "inner": inner, "stats": True}
        step = torch.compile(model, backend="moe_sparse", options=settings)
        for seed in range(3):
            step(torch.randn(4, layers.H, generator=torch.Generator().manual_seed(seed)))
        counted.append(moe_fx.stats())
    assert counted[0] == counted[1]
    assert counted[1]["moe"].steps == 3
    assert stand_in[0].engines
    moe_fx.reset_stats()


def test_options_arrive_and_are_added_to_but_not_changed(stand_in: list[Any]) -> None:
    topk, sort = torch.ops.aten.topk.default, torch.ops.aten.sort.default
    given = {"min_block_size": 3, "torch_executed_ops": {topk, "torch.ops.aten.mm.default"}, "debug": False}
    before = {**given, "torch_executed_ops": set(given["torch_executed_ops"])}
    settings = {"policy": layer_policy(), "inner": "torch_tensorrt", "inner_options": given, "fuse_experts": False}
    torch.compile(ReturnsViews(), backend="moe_sparse", options=settings)(torch.randn(4, layers.H))
    assert stand_in[0].options == {**before, "torch_executed_ops": before["torch_executed_ops"] | {sort}}
    assert stand_in[0].outside == {"moe_fx.sere_reroute.default": 1, "aten.topk.default": 1}
    assert given == before


@pytest.mark.parametrize(("version", "kept_out"), [("2.13.0", True), ("2.14.0.dev20260801+cu130", True), ("2.14.0+cu130", False)])
def test_sorts_stay_out_of_engines_before_the_release_that_can_read_them(
    version: str, kept_out: bool, stand_in: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["torch_tensorrt"], "__version__", version)
    compiled(ReturnsViews(), layer_policy())(torch.randn(4, layers.H))
    assert stand_in[0].options == {"torch_executed_ops": {torch.ops.aten.sort.default} if kept_out else set()}


def test_a_model_without_experts_reaches_it_too(stand_in: list[Any]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    torch.testing.assert_close(compiled(model, moe_fx.TopK())(x), model(x), **tolerance(torch.float32))
    assert len(stand_in[0].engines) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": moe_fx.BEAM(train=True)}, "'torch_tensorrt' cannot train BEAM: engines have no backward"),
        ({"mode": "max-autotune"}, "mode='max-autotune' is for the inner compiler 'inductor'"),
        ({"inner_options": {"torch_executed_ops": "torch.ops.aten.mm.default"}}, "expected a set of ops or of their names"),
        ({"inner_options": {"torch_executed_ops": 3}}, "'torch_executed_ops' in inner_options is 3"),
    ],
)
def test_options_that_do_not_go_together_say_so(options: dict[str, Any], words: str, stand_in: list[Any]) -> None:
    step = torch.compile(ReturnsViews(), backend="moe_sparse", options={"inner": "torch_tensorrt", **options})
    with pytest.raises(Exception, match=words):
        step(torch.randn(4, layers.H))
    assert stand_in == []


def compile_for_an_error(name: str) -> str:
    with pytest.raises(Exception, match="torch_tensorrt") as caught:
        torch.compile(nn.ReLU(), backend="moe_sparse", options={"inner": name})(torch.randn(2))
    return str(caught.value)


@pytest.mark.parametrize("name", TENSORRT)
def test_where_it_is_not_installed_the_error_names_the_package(name: str, tmp_path: Path) -> None:
    with importable(tmp_path):
        sys.modules["torch_tensorrt"] = None  # also where it is installed
        message = compile_for_an_error(name)
    release = ".".join(torch.__version__.split(".")[:2])
    assert f"inner '{name}' needs the package torch_tensorrt, which is not installed" in message
    assert f"pip install 'torch-tensorrt=={release}.*' (or 'torch-tensorrt-rtx=={release}.*'" in message


def test_where_it_cannot_be_imported_the_error_says_why_and_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "torch_tensorrt.py").write_text("raise AssertionError('Torch not compiled with CUDA enabled')")
    with importable(tmp_path):
        message = compile_for_an_error("torch_tensorrt")
    assert "installed but cannot be imported (AssertionError: Torch not compiled with CUDA enabled)" in message
    assert f"a CUDA device (found: {torch.cuda.device_count()})" in message
    assert f"(found: {torch.__version__})" in message


def test_an_unknown_inner_compiler_is_told_of_it() -> None:
    with pytest.raises(Exception, match="unknown inner compiler 'torch_tensorr': expected one of .*torch_tensorrt"):
        torch.compile(nn.ReLU(), backend="moe_sparse", options={"inner": "torch_tensorr"})(torch.randn(2))


def _to_a_view(x: Tensor, y: Tensor) -> Tensor:
    x.view(-1)[0] = 1
    return x + y


def _to_a_slice(x: Tensor, y: Tensor) -> Tensor:
    x[:1].mul_(2)
    return x + y


def _by_operator(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x * 2


def _by_out(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(y, 1, out=x) * 2


def _in_place_argument(x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.relu(x, inplace=True) + y


def _to_a_copy(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[0] = 1
    z.index_add_(0, torch.tensor([0]), y[:1])
    return nn.functional.relu(z, inplace=True) + x


@pytest.mark.parametrize("function", [_to_a_view, _to_a_slice, _by_operator, _by_out, _in_place_argument, _to_a_copy])
@pytest.mark.parametrize("normalised", [False, True])
def test_writes_to_inputs_are_told_from_writes_to_what_the_graph_made(function: Callable[..., Tensor], normalised: bool) -> None:
    from moe_fx.passes.normalize import normalize

    found = []

    def inner(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(writes_to_what_is_given(normalize(gm) if normalised else gm))
        return gm.forward

    torch.compile(function, backend=inner, fullgraph=True)(torch.randn(2, 3), torch.randn(2, 3))
    assert found == [function is not _to_a_copy]


# By Torch-TensorRT itself, in its dry run


@pytest.fixture(scope="module")
def dry_run() -> Iterator[list[dry_tensorrt.Partition]]:
    if not INSTALLED:
        pytest.skip("Torch-TensorRT is not installed: see docs/tensorrt.md")
    with dry_tensorrt.dry_tensorrt() as partitions:
        yield partitions


@pytest.fixture
def partitions(dry_run: list[dry_tensorrt.Partition]) -> list[dry_tensorrt.Partition]:
    dry_run.clear()
    return dry_run


def by_torch_tensorrt_alone(model: nn.Module, name: str, rule: tiny.Rule | None, inputs: dict[str, Any]) -> Tensor:
    """The hand-patched model, compiled around its rule."""
    options = {**dry_tensorrt.OPTIONS, "torch_executed_ops": {torch.ops.aten.sort.default}}
    torch._dynamo.reset()
    with tiny.patched(model, name, torch._dynamo.disable(rule)) if rule else contextlib.nullcontext():
        return torch.compile(model, backend="torch_tensorrt", options=options, dynamic=False)(**inputs).logits


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


@pytest.mark.tensorrt
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["topk", "sere", "beam"])
@pytest.mark.parametrize("name", MODELS)
def test_partitions(name: str, policy: str, form: str, partitions: list[dry_tensorrt.Partition], device: str) -> None:
    """What stands outside engines, and results: those of the same graph in one piece, and of the hand-patched model."""
    experts, fuse = FORMS[form]
    model, inputs = tiny.build(name, experts), tiny.tokens()
    settings, rule = policies(name)[policy]
    want = tiny.expected(model, name, rule, **inputs)
    model, inputs = model.to(device), on(device, inputs)
    got = compiled(model, settings, fuse, **dry_tensorrt.OPTIONS)(**inputs).logits
    report = moe_fx.last_report()
    torch._dynamo.reset()
    in_one_piece = compiled(model, settings, fuse, **{**dry_tensorrt.OPTIONS, "min_block_size": 10**9})(**inputs).logits
    cut, whole = partitions

    assert [site.name for site in report.sites] == list(tiny.ARCHS[name].sites)
    assert Counter({op: n for op, n in cut.outside.items() if op.startswith("moe_fx.")}) == our_ops(policy, fuse)
    if form == "grouped_mm":
        assert set(cut.outside) == set(our_ops(policy, fuse)) | WITHOUT_CONVERTER
    else:
        assert cut.outside == our_ops(policy, fuse)
        assert len(cut.engines) == 1 + tiny.LAYERS * ((policy != "topk") + fuse)
    assert whole.engines == []
    assert torch.equal(got, in_one_piece)
    torch.testing.assert_close(got.cpu(), want, **tolerance(torch.float32))


@pytest.mark.tensorrt
@pytest.mark.parametrize("policy", ["topk", "sere", "beam"])
@pytest.mark.parametrize("name", MODELS)
def test_the_hand_patched_model_under_torch_tensorrt_gives_the_same_bits(
    name: str, policy: str, partitions: list[dry_tensorrt.Partition], device: str
) -> None:
    """With ``grouped_mm`` BEAM's picks that are off stand in other groups than in the patched model, and round differently."""
    model, inputs = tiny.build(name, "batched_mm").to(device), on(device, tiny.tokens())
    settings, rule = policies(name)[policy]
    got = compiled(model, settings, **dry_tensorrt.OPTIONS)(**inputs).logits
    assert torch.equal(got, by_torch_tensorrt_alone(model, name, rule, inputs))


@pytest.mark.tensorrt
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_partitions_with_dynamic_shapes(name: str, fuse: bool, partitions: list[dry_tensorrt.Partition], device: str) -> None:
    """Two graphs' worth of inputs through one compilation, and nothing that waits for a number on the way."""
    model = tiny.build(name)
    settings, rule = policies(name)["sere"]
    different = [tiny.tokens(), tiny.tokens(batch=3, length=5, seed=1)]
    want = [tiny.expected(model, name, rule, **inputs) for inputs in different]
    step = compiled(model.to(device), settings, fuse, dynamic=True, **dry_tensorrt.OPTIONS)
    for inputs, logits in zip(different, want, strict=True):
        torch.testing.assert_close(step(**on(device, inputs)).logits.cpu(), logits, **tolerance(torch.float32))
    (cut,) = partitions
    assert Counter({op: n for op, n in cut.outside.items() if op.startswith("moe_fx.")}) == our_ops("sere", fuse)
    assert cut.outside["aten._local_scalar_dense.default"] == 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("policy", ["topk", "sere", "beam"])
def test_decoding_into_a_static_cache(policy: str, partitions: list[dry_tensorrt.Partition], device: str) -> None:
    model = tiny.build("qwen3_moe")
    settings, rule = policies("qwen3_moe")[policy]
    want = expected_decode(model, "qwen3_moe", rule)
    model = model.to(device)
    got = decode(compiled(model, settings, **dry_tensorrt.OPTIONS), model, device)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))
    assert all(cut.engines and cut.settings.use_distributed_mode_trace for cut in partitions)


@pytest.mark.tensorrt
def test_a_view_of_an_input_does_not_stop_compilation(partitions: list[dry_tensorrt.Partition], device: str) -> None:
    model, x = ReturnsViews(), torch.randn(4, layers.H)
    want = by_eager(model, x)
    got = compiled(model.to(device), layer_policy(), **dry_tensorrt.OPTIONS)(x.to(device))
    torch.testing.assert_close([part.cpu() for part in got], list(want), **tolerance(torch.float32))
    assert partitions[0].outside == {"moe_fx.sere_reroute.default": 1}


@pytest.mark.tensorrt
def test_what_the_user_keeps_out_of_engines_stays_out(partitions: list[dry_tensorrt.Partition], device: str) -> None:
    kept = {"torch.ops.aten.topk.default"}
    compiled(ReturnsViews().to(device), layer_policy(), **dry_tensorrt.OPTIONS, torch_executed_ops=kept)(
        torch.randn(4, layers.H, device=device)
    )
    assert partitions[0].outside == {"aten.topk.default": 1, "moe_fx.sere_reroute.default": 1}
    assert partitions[0].settings.min_block_size == 1


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["topk", "sere", "beam"])
def test_engines(policy: str, form: str) -> None:
    """Real engines, with the short mantissas of TF32 off, which could change a routing decision."""
    pytest.importorskip("torch_tensorrt", reason="Torch-TensorRT is not installed: see docs/tensorrt.md")
    experts, fuse = FORMS[form]
    model, inputs = tiny.build("qwen3_moe", experts), tiny.tokens()
    settings, rule = policies("qwen3_moe")[policy]
    want = tiny.expected(model, "qwen3_moe", rule, **inputs)
    step = compiled(model.cuda(), settings, fuse, disable_tf32=True, min_block_size=1, pass_through_build_failures=True)
    got = step(**on("cuda", inputs)).logits
    torch.testing.assert_close(got.cpu(), want, **tolerance(torch.float32))
