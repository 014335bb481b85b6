"""Detection and rewrite in the graphs an engine leaves: decomposed, functionalized, weights behind handles.

The graphs are Inductor's own, of a layer written with an engine's kind of ops, so vLLM is not needed.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import moe_fx
from moe_fx.kernels import reference
from moe_fx.passes import graph as g
from moe_fx.passes.find_sites import find_sites
from moe_fx.passes.reroute import Decision, reroute

TOKENS, HIDDEN, EXPERTS, TOP_K = 6, 16, 8, 3
_HANDLES: dict[int, Tensor] = {}

_library = torch.library.Library("moe_fx_engine", "DEF")
_library.define("onednn_mm(Tensor! c, Tensor a, Tensor? bias, Tensor handler_tensor) -> ()")
_library.define("gated_norm(Tensor! c, Tensor a, Tensor? bias, Tensor handler_tensor) -> ()")
_library.define("fused_moe(Tensor! output, Tensor input, Tensor w, Tensor topk_weights, Tensor topk_id) -> ()")


def _mm(c, a, bias, handler_tensor):
    c.copy_(a @ _HANDLES[int(handler_tensor)].T)


def _fused_moe(output, input, w, topk_weights, topk_id):
    assert topk_id.dtype == torch.int32
    assert int(topk_id.min()) >= 0, "the kernel does not know id -1"
    every = torch.einsum("th,eoh->teo", input, w)
    picked = every.gather(1, topk_id.long()[..., None].expand(-1, -1, w.shape[1]))
    output.copy_((picked * topk_weights[..., None]).sum(1))


_SIMILARITY = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(2))
_library.define("route(Tensor ids) -> Tensor")
_library.impl("route", lambda ids: reference.sere_reroute(ids, _SIMILARITY, 1, 0.0), "CPU")
torch.library.register_fake("moe_fx_engine::route", torch.empty_like, lib=_library)
for _name, _kernel in (("onednn_mm", _mm), ("gated_norm", _mm), ("fused_moe", _fused_moe)):
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"moe_fx_engine::{_name}", lambda *_: None, lib=_library)


class Layer(nn.Module):
    """A router behind a handle and a kernel for all experts, as vLLM's CPU engine runs them."""

    def __init__(self, linear: str = "onednn_mm", experts: int = EXPERTS, packed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = getattr(torch.ops.moe_fx_engine, linear)
        _HANDLES[experts] = torch.randn(EXPERTS, HIDDEN, generator=generator)
        stack = torch.randn(experts, HIDDEN, HIDDEN, generator=generator)
        self.register_buffer("handle", torch.tensor(experts))
        self.register_buffer("w", (10 * stack).to(torch.int8) if packed else stack)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden * 1.5
        logits = torch.empty(hidden.shape[0], EXPERTS)
        self.linear(logits, hidden, None, self.handle)
        values, ids = torch.topk(logits, TOP_K, dim=-1, sorted=False)
        weights = torch.softmax(values, dim=-1)
        out = torch.empty_like(hidden)
        torch.ops.moe_fx_engine.fused_moe(out, hidden, self.w.float(), weights.float(), ids.to(torch.int32))
        return out


class Capture(CustomGraphPass):
    """Hands the post-grad graph to a function."""

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, graph) -> None:
        self.function(graph)

    def uuid(self) -> None:
        return None  # never cached


def compiled(layer, function, hidden):
    """The layer's output, ``function`` having had its post-grad graph."""
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(hidden, 0)
    options = {"post_grad_custom_post_pass": Capture(function), "enable_auto_functionalized_v2": False}
    with torch.no_grad():
        return torch.compile(layer, options=options, fullgraph=True)(hidden)


@pytest.fixture
def hidden():
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def found_in(layer, hidden):
    seen = []
    compiled(layer, lambda graph: seen.extend(find_sites(graph.owning_module)), hidden)
    return seen


@pytest.mark.parametrize("packed", [False, True])
def test_a_router_behind_a_handle_is_found(hidden, packed):
    ((routing,), skips) = found_in(Layer(packed=packed), hidden)
    assert (routing.site.num_experts, routing.site.top_k, routing.site.hidden_size) == (EXPERTS, TOP_K, HIDDEN)
    assert skips == []
    assert g.op(routing.router.hidden) == "mul"  # the linear map's input, not the buffer it writes to
    assert g.qualified_op(routing.experts) == "moe_fx_engine.fused_moe"


def test_another_op_that_writes_scores_is_no_router(hidden):
    routings, (skip,) = found_in(Layer("gated_norm"), hidden)
    assert routings == []
    assert "do not come, by ops that are known, from a linear map" in skip.reason


def test_a_stack_of_another_size_is_no_proof(hidden):
    routings, skips = found_in(Layer(experts=2 * EXPERTS), hidden)
    assert routings == []
    assert [skip.routing for skip in skips] == [False]


def test_an_input_of_unknown_length_is_no_weight(hidden):
    """In a graph that does not tell parameters, a batch of hidden states must not pass for a matrix of weights."""

    class Scores(nn.Module):
        def forward(self, hidden, keys):
            values, ids = (hidden @ keys.T).topk(2, dim=-1)
            return values.softmax(-1), ids

    seen = []
    torch._dynamo.reset()
    keys = torch.randn(EXPERTS, HIDDEN)
    for given in (hidden, keys):
        torch._dynamo.mark_dynamic(given, 0)
    options = {"post_grad_custom_post_pass": Capture(lambda graph: seen.append(g.Weights(graph)))}
    with torch.no_grad():
        torch.compile(Scores(), options=options)(hidden, keys)
    (weights,) = seen
    assert not any(node in weights for node in weights._of)


def test_the_rewritten_graph_computes_the_reference(hidden):
    """SERE with one op that applies it, on a selection that was not sorted."""
    layer, count = Layer(), []

    def rewrite(graph):
        ((routing,), _) = find_sites(graph.owning_module)

        def apply(graph, decision):
            count.append(routing)
            return Decision(g.call(graph, torch.ops.moe_fx_engine.route.default, decision.ids), ())

        assert reroute(graph.owning_module, routing, (moe_fx.SERE(),), None, apply=apply) is None
        graph.lint()

    result = compiled(layer, rewrite, hidden)
    scaled = hidden * 1.5
    values, ids = (scaled @ _HANDLES[EXPERTS].T).topk(TOP_K, dim=-1)
    ids = reference.sere_reroute(ids, _SIMILARITY, 1, 0.0)
    expected = torch.empty_like(scaled)
    _fused_moe(expected, scaled, layer.w, values.softmax(-1), ids.int())
    assert len(count) == 1
    torch.testing.assert_close(result, expected)

