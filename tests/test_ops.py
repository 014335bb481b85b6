"""The custom ops as the compiler sees them: schemas, fakes, autograd, dispatch, errors, and every way to compile."""

from __future__ import annotations

import contextlib
import gc
import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moe_fx import ops
from moe_fx.kernels import reference
from moe_fx.testing import random_routing, random_similarity, random_valid_tokens, tolerance

OPS = torch.ops.moe_fx


def experts_inputs(num_tokens: int, ids_dtype: torch.dtype = torch.int64, dtype: torch.dtype = torch.float32):
    """The seven tensors of fused_experts, for nine experts."""
    generator = torch.Generator().manual_seed(1)
    shapes = (num_tokens, 8), (9, 12, 8), (9, 10, 6), (9, 12), (9, 10)
    hidden, *parameters = (torch.randn(shape, generator=generator).mul(0.5).to(dtype) for shape in shapes)
    picks = random_routing(num_tokens, 4, 9, off=0.3, dtype=dtype, ids_dtype=ids_dtype)
    return (hidden, *parameters[:2], *picks, *parameters[2:])


def transposed(inputs):
    """The same experts in the other layout."""
    return (inputs[0], *(weight.mT.contiguous() for weight in inputs[1:3]), *inputs[3:])


def kept_apart(inputs):
    """The same experts, each with weights of its own, and gate apart from up."""
    hidden, w_gate_up, w_down, weights, ids, b_gate_up, b_down = inputs
    (w_gate, w_up), (b_gate, b_up) = w_gate_up.chunk(2, dim=1), b_gate_up.chunk(2, dim=1)
    each = [[*t.clone().unbind()] for t in (w_gate, w_up, w_down, b_gate, b_up, b_down)]
    return (hidden, *each[:3], weights, ids, *each[3:])


def samples(num_tokens: int = 5, ids_dtype: torch.dtype = torch.int64) -> dict[str, tuple[object, ...]]:
    weights, ids = random_routing(num_tokens, 4, 9, off=0.3, ids_dtype=ids_dtype)
    similarity = random_similarity(9)
    logits = torch.randn(num_tokens, 9, generator=torch.Generator().manual_seed(0))
    experts = experts_inputs(num_tokens, ids_dtype)
    return {
        "fused_experts": experts[:5],
        "fused_experts.grad": tuple(t.clone().requires_grad_(t.is_floating_point()) for t in experts),
        "fused_experts.settings": (*transposed(experts), "gelu", "interleaved", True, 1.0, 0.5),
        "fused_experts.one grad": (experts[0], experts[1].clone().requires_grad_(), *experts[2:5], None, experts[6]),
        "separate_experts": kept_apart(experts),
        "separate_experts.stacked": (experts[0], [experts[1]], [], [experts[2]], *experts[3:5], [], [], [experts[6]], "gelu"),
        "sere_reroute": (ids, similarity, 2, 0.1),
        "sere_reroute.mask": (ids, similarity, 1, 0.0, random_valid_tokens(num_tokens, "mask"), 100),
        "sere_reroute.count": (ids, similarity, 1, 0.0, random_valid_tokens(num_tokens, "count"), None),
        "sere_reroute.identity": (ids, similarity, 9, 0.0),
        "beam_mask": (weights, ids, logits, 0.4),
        "beam_mask.grad": (weights.clone().requires_grad_(), ids, logits.clone().requires_grad_(), 0.5),
        "topk_sere": (logits, 4, similarity, 2, 0.1),
        "topk_sere.mask": (logits, 4, similarity, 1, 0.0, random_valid_tokens(num_tokens, "mask"), 100),
        "topk_sere.grad": (logits.clone().requires_grad_(), 3, similarity, 1, 0.0, random_valid_tokens(num_tokens, "count")),
        "topk_sere.identity": (logits, 4, similarity, 9, 0.0),
        "topk_beam": (logits, 4, logits.flip(0), 0.4),
        "topk_beam.grad": (logits.clone().requires_grad_(), 9, logits, 0.5),
        "fold_masked": (weights, ids),
        "fold_masked.grad": (weights.clone().requires_grad_(), ids),
        "fold_masked.identity": (weights, ids.clamp(min=0)),
        "count_active": (ids, 9),
    }


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def equal(op: str, got: Tensor, want: Tensor) -> bool:
    """To the bit, but for the ops that add products."""
    return torch.allclose(got, want, **tolerance(want.dtype)) if op.endswith("_experts") else torch.equal(got, want)


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("num_tokens", [5, 0])
def test_opcheck(name, num_tokens):
    torch.library.opcheck(getattr(OPS, name.split(".")[0]).default, samples(num_tokens)[name])


def test_a_token_may_have_no_picks():
    weights, ids = torch.empty(3, 0), torch.empty(3, 0, dtype=torch.int64)
    assert OPS.sere_reroute(ids, random_similarity(9), 1, 0.0).shape == (3, 0)
    for result in (*OPS.beam_mask(weights, ids, torch.randn(3, 9), 0.5), *OPS.fold_masked(weights, ids)):
        assert result.shape == (3, 0)
    assert OPS.count_active(ids, 9) == 0
    hidden, *parameters = experts_inputs(3)[:3]
    assert torch.equal(OPS.fused_experts(hidden, *parameters, weights, ids), hidden.new_zeros(3, parameters[1].shape[1]))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", samples())
def test_ops_equal_the_reference(name, ids_dtype):
    args = samples(ids_dtype=ids_dtype)[name]
    op = name.split(".")[0]
    expected = as_tuple(getattr(reference, op)(*args))
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            result = as_tuple(getattr(OPS, op)(*args))
        for got, want in zip(result, expected, strict=True):
            assert got.dtype == want.dtype
            assert equal(op, got, want)
            assert not any(got is arg or got.data_ptr() == arg.data_ptr() for arg in args if isinstance(arg, Tensor))


@pytest.mark.gpu
@pytest.mark.parametrize("name", samples())
def test_ops_on_cuda_equal_the_reference(name):
    args = samples()[name]
    op = name.split(".")[0]
    on_cuda = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
    result = as_tuple(getattr(OPS, op)(*on_cuda))
    for got, want in zip(result, as_tuple(getattr(reference, op)(*args)), strict=True):
        assert equal(op, got.cpu(), want)


LAUNCHED = ("sere_reroute.mask", "beam_mask", "topk_sere.mask", "topk_beam", "fold_masked", "fused_experts")


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_cuda_implementation_calls_the_triton_launcher(name, device, monkeypatch):
    if device == "cpu":  # the interpreter: there is no device to switch to
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    args = samples()[name]
    op = name.split(".")[0]
    moved = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
    result = as_tuple(ops._triton(op)(*moved))
    for got, want in zip(result, as_tuple(getattr(reference, op)(*args)), strict=True):
        assert equal(op, got.cpu(), want)
    elsewhere = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args[1:]]
    with pytest.raises(ValueError, match=f"{op}: a tensor is on meta, another on {device}"):
        ops._triton(op)(moved[0], *elsewhere)


def rerouted_layer(hidden, router, similarity, mask_router, valid):
    """One of each op, between ordinary ones."""
    weights, ids = torch.topk((hidden @ router).softmax(-1), 4)
    ids = OPS.sere_reroute(ids, similarity, 1, 0.1, valid)
    weights, ids = OPS.beam_mask(weights, ids, hidden @ mask_router, 0.5)
    active = OPS.count_active(ids, similarity.shape[0])
    weights, ids = OPS.fold_masked(weights, ids)
    return weights * 2, ids + 0, active


def layer_inputs(num_tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    return (
        torch.randn(num_tokens, 8, generator=generator),
        torch.randn(8, 16, generator=generator),
        random_similarity(16),
        torch.randn(8, 16, generator=generator),
        random_valid_tokens(num_tokens, "mask"),
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, dynamic, mode):
    torch._dynamo.reset()
    compiled = torch.compile(rerouted_layer, backend=backend, dynamic=dynamic, fullgraph=True)
    for num_tokens in (6, 1, 0) if dynamic else (6,):
        inputs = layer_inputs(num_tokens)
        if mode is torch.enable_grad:
            inputs[0].requires_grad_()
            inputs[3].requires_grad_()
        with mode():
            expected, result = rerouted_layer(*inputs), compiled(*inputs)
        torch.testing.assert_close(result[0], expected[0], **tolerance(torch.float32))
        assert torch.equal(result[1], expected[1])
        assert torch.equal(result[2], expected[2])
        if mode is torch.enable_grad:
            learned = inputs[0], inputs[3]
            gradients = [torch.autograd.grad(weights.square().sum(), learned) for weights in (expected[0], result[0])]
            for want, got in zip(*gradients, strict=True):
                torch.testing.assert_close(got, want, **tolerance(torch.float32))


def experts_layer(hidden, router, w_gate_up, w_down, b_gate_up, b_down):
    weights, ids = torch.topk((hidden @ router).softmax(-1), 4)
    ids = ids.masked_fill(weights < 0.15, -1)
    return OPS.fused_experts(hidden * 2, w_gate_up, w_down, weights, ids, b_gate_up, b_down, "gelu").sin()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_experts_equal_eager(backend, dynamic, train):
    torch._dynamo.reset()
    compiled = torch.compile(experts_layer, backend=backend, dynamic=dynamic, fullgraph=True)
    for num_tokens in (6, 1, 0) if dynamic else (6,):
        hidden, w_gate_up, w_down, _, _, b_gate_up, b_down = experts_inputs(num_tokens)
        router = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
        inputs = [hidden, router, w_gate_up, w_down, b_gate_up, b_down]
        for value in inputs:
            value.requires_grad_(train)
        expected, result = experts_layer(*inputs), compiled(*inputs)
        torch.testing.assert_close(result, expected, **tolerance(torch.float32))
        if train:
            gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (expected, result)]
            for want, got in zip(*gradients, strict=True):
                torch.testing.assert_close(got, want, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("args", [(), ("swiglu_clamped", "interleaved", False, 1.702, 0.5), ("relu2", "none")])
def test_fused_experts_trains_as_the_reference(args, dtype):
    inputs = list(experts_inputs(7, dtype=dtype))
    if args[1:] == ("none",):
        inputs[1], inputs[5] = inputs[1][:, :6], inputs[5][:, :6]
    inputs = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
    learned = [value for value in inputs if value.requires_grad]
    outs = OPS.fused_experts(*inputs, *args), reference.fused_experts(*inputs, *args)
    upstream = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for got, want in zip(*(torch.autograd.grad(out, learned, upstream) for out in outs), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance(dtype))


def test_fused_experts_gradients_are_right():
    inputs = experts_inputs(3, dtype=torch.float64)
    inputs = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
    assert torch.autograd.gradcheck(OPS.fused_experts, inputs)


@pytest.mark.parametrize("power", [1, 2])
def test_fused_experts_gradients_can_be_differentiated(power):
    """As a penalty on the gradient does."""
    penalties = []
    for op in (OPS.fused_experts, reference.fused_experts):
        inputs = [value.clone() for value in experts_inputs(3, dtype=torch.float64)]
        learned = [value.requires_grad_() for value in inputs if value.is_floating_point()]
        loss = op(*inputs).pow(power).sum()
        gradients = torch.autograd.grad(loss, learned, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        penalties.append(torch.autograd.grad(penalty, learned, materialize_grads=True))
    assert all(bool(want.abs().sum() > 0) for want in penalties[1])
    for got, want in zip(*penalties, strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float64))


def test_fused_experts_gradients_where_all_picks_are_off():
    inputs = experts_inputs(3)
    hidden, off = inputs[0].clone().requires_grad_(), torch.full_like(inputs[4], -1)
    OPS.fused_experts(hidden, *inputs[1:4], off).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


class StraightThrough(torch.autograd.Function):
    """BEAM's mask on already gathered logits: a hard step forward, the sigmoid's slope backward."""

    @staticmethod
    def forward(ctx, logits, tau):
        probability = logits.sigmoid()
        ctx.save_for_backward(probability)
        return (probability >= tau).to(logits.dtype)

    @staticmethod
    def backward(ctx, grad):
        (probability,) = ctx.saved_tensors
        return grad * probability * (1 - probability), None


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("duplicates", [False, True])
def test_beam_mask_trains_straight_through(duplicates, ids_dtype):
    weights, ids = random_routing(7, 4, 9, dtype=torch.float64, ids_dtype=ids_dtype, duplicates=duplicates)
    logits = torch.randn(7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for by_op in (False, True):
        w, m = weights.clone().requires_grad_(), logits.clone().requires_grad_()
        if by_op:
            masked, new_ids = OPS.beam_mask(w, ids, m, 0.6)
            assert not new_ids.requires_grad
        else:
            masked = w * StraightThrough.apply(m.gather(1, ids.long()), 0.6)
        gradients.append((masked, *torch.autograd.grad((masked * upstream).sum(), (w, m))))
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float64))
    assert (gradients[1][2] != 0).sum() > (gradients[1][0] != 0).sum() // 2  # logits of off picks learn too


def test_picks_without_a_mask_logit_have_no_gradient():
    weights = torch.ones(2, 3, requires_grad=True)
    logits = torch.tensor([[0.5, -0.5], [0.5, -0.5]], requires_grad=True)
    ids = torch.tensor([[0, 1, -1], [2, 3, -1]])
    masked, new_ids = OPS.beam_mask(weights, ids, logits, 0.5)
    assert new_ids.tolist() == [[0, -1, -1], [2, 3, -1]]
    masked.sum().backward()
    assert weights.grad.tolist() == [[1, 0, 0], [1, 1, 0]]
    slope = torch.tensor(0.5).sigmoid() * torch.tensor(-0.5).sigmoid()
    torch.testing.assert_close(logits.grad, torch.stack([slope.expand(2), torch.zeros(2)]))


def test_gradients_have_the_dtype_of_their_inputs():
    weights, ids = random_routing(3, 2, 4, dtype=torch.bfloat16)
    logits = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    weights.requires_grad_()
    OPS.beam_mask(weights, ids, logits, 0.5)[0].sum().backward()
    assert weights.grad.dtype == torch.bfloat16
    assert logits.grad.dtype == torch.float16
    frozen = random_routing(3, 2, 4)[0].requires_grad_()
    OPS.beam_mask(frozen, ids, logits.detach(), 0.5)[0].sum().backward()
    assert torch.equal(frozen.grad, torch.ones(3, 2))


def test_fold_masked_passes_gradients_where_picks_are_on():
    weights = torch.ones(2, 2, requires_grad=True)
    folded, ids = OPS.fold_masked(weights, torch.tensor([[3, -1], [-1, -1]]))
    (folded * torch.tensor([[2.0, 3.0], [5.0, 7.0]])).sum().backward()
    assert ids.tolist() == [[3, 3], [3, 3]]
    assert weights.grad.tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize("op", [OPS.topk_sere, OPS.topk_beam])
def test_values_of_a_selection_pass_gradients_to_their_scores(op):
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    args = (3, random_similarity(9), 1, 0.0) if op is OPS.topk_sere else (3, scores, 0.5)
    gradients = []
    for select in (lambda s: s.topk(3)[0], lambda s: op(s, *args)[0]):
        learned = scores.clone().requires_grad_()
        select(learned).square().sum().backward()
        gradients.append(learned.grad)
    assert torch.equal(*gradients)


IDS, WEIGHTS = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
SQUARE, LOGITS = torch.zeros(4, 4), torch.zeros(3, 4)
HIDDEN, GATE_UP, DOWN = torch.zeros(3, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6)
EXPERTS = (HIDDEN, GATE_UP, DOWN, WEIGHTS, IDS)
BAD_CALLS = {
    "ids of floats": (OPS.sere_reroute, (WEIGHTS, SQUARE, 1, 0.0), TypeError, "int32 or int64.*float32"),
    "ids of one dimension": (OPS.sere_reroute, (IDS[0], SQUARE, 1, 0.0), ValueError, r"\[tokens, picks\].*\[2\]"),
    "similarity not square": (OPS.sere_reroute, (IDS, LOGITS, 1, 0.0), ValueError, r"\[experts, experts\].*\[3, 4\]"),
    "similarity of ints": (OPS.sere_reroute, (IDS, SQUARE.long(), 1, 0.0), TypeError, "floating point"),
    "no primary": (OPS.sere_reroute, (IDS, SQUARE, 0, 0.0), ValueError, "primary must be at least 1.*is 0"),
    "mask too short": (OPS.sere_reroute, (IDS, SQUARE, 1, 0.0, torch.ones(2).bool()), ValueError, r"bool \[3\].*\[2\]"),
    "count of floats": (OPS.sere_reroute, (IDS, SQUARE, 1, 0.0, torch.ones(1)), ValueError, "one element.*float32"),
    "two counts": (OPS.sere_reroute, (IDS, SQUARE, 1, 0.0, torch.ones(2).int()), ValueError, "one element"),
    "weights of another shape": (OPS.beam_mask, (WEIGHTS[:2], IDS, LOGITS, 0.5), ValueError, r"\[3, 2\].*\[2, 2\]"),
    "weights of ints": (OPS.fold_masked, (IDS, IDS), TypeError, "topk_weights must be floating point.*int64"),
    "logits of other tokens": (OPS.beam_mask, (WEIGHTS, IDS, LOGITS[:2], 0.5), ValueError, r"\[3, experts\].*\[2, 4\]"),
    "logits of ints": (OPS.beam_mask, (WEIGHTS, IDS, LOGITS.long(), 0.5), TypeError, "mask_logits"),
    "tau of 0": (OPS.beam_mask, (WEIGHTS, IDS, LOGITS, 0.0), ValueError, "tau.*is 0.0"),
    "tau of 1": (OPS.beam_mask, (WEIGHTS, IDS, LOGITS, 1.0), ValueError, "tau"),
    "unknown activation": (OPS.fused_experts, (*EXPERTS, None, None, "tanh"), ValueError, "silu, gelu.*'tanh'"),
    "unknown layout": (OPS.fused_experts, (*EXPERTS, None, None, "silu", "odd"), ValueError, "interleaved.*'odd'"),
    "clamp without a gate": (OPS.fused_experts, (*EXPERTS, None, None, "swiglu_clamped", "none"), ValueError, "gate"),
    "experts of another dtype": (OPS.fused_experts, (HIDDEN, GATE_UP.half(), *EXPERTS[2:]), TypeError, "w_gate_up.*float16"),
    "hidden of ints": (OPS.fused_experts, (HIDDEN.long(), *EXPERTS[1:]), TypeError, "hidden must be floating"),
    "hidden of three dimensions": (OPS.fused_experts, (HIDDEN[None], *EXPERTS[1:]), ValueError, "flatten the tokens"),
    "hidden of another size": (OPS.fused_experts, (HIDDEN[:, :7], *EXPERTS[1:]), ValueError, r"\[3, 8\].*\[3, 7\]"),
    "picks of other tokens": (OPS.fused_experts, (HIDDEN[:2], *EXPERTS[1:]), ValueError, r"topk_ids.*\[2, 2\].*\[3, 2\]"),
    "down of another size": (OPS.fused_experts, (HIDDEN, GATE_UP, DOWN[:3], *EXPERTS[3:]), ValueError, r"\[4, 8, 6\].*\[3"),
    "not transposed": (OPS.fused_experts, (*EXPERTS, None, None, "silu", "concatenated", True), ValueError, "hidden.*12"),
    "odd gate and up": (OPS.fused_experts, (HIDDEN, GATE_UP[:, :11], DOWN[..., :5], *EXPERTS[3:]), ValueError, "11"),
    "bias of another size": (OPS.fused_experts, (*EXPERTS, GATE_UP[0]), ValueError, r"b_gate_up.*\[4, 12\].*\[12, 8\]"),
    "scores of one dimension": (OPS.topk_sere, (LOGITS[0], 2, SQUARE, 1, 0.0), ValueError, r"\[tokens, experts\].*\[4\]"),
    "scores of ints": (OPS.topk_beam, (IDS, 2, LOGITS, 0.5), TypeError, "scores must be floating point.*int64"),
    "more picks than experts": (OPS.topk_sere, (LOGITS, 5, SQUARE, 1, 0.0), ValueError, "experts, 4, but it is 5"),
    "no picks": (OPS.topk_beam, (LOGITS, 0, LOGITS, 0.5), ValueError, "k must be from 1"),
    "logits of other scores": (OPS.topk_beam, (LOGITS, 2, LOGITS[:2], 0.5), ValueError, r"\[3, experts\].*\[2, 4\]"),
    "top-K of no primary": (OPS.topk_sere, (LOGITS, 2, SQUARE, 0, 0.0), ValueError, "primary must be at least 1"),
    "negative number of experts": (OPS.count_active, (IDS, -1), ValueError, "num_experts.*-1"),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_named(name, fake):
    op, args, error, message = BAD_CALLS[name]
    if fake:
        args = tuple(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args)
    with pytest.raises(error, match=message):
        op(*args)


def test_importing_the_ops_does_not_import_triton():
    code = "import sys, moe_fx.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_twice_keeps_the_ops():
    expected = OPS.sere_reroute(*samples()["sere_reroute"])
    held = OPS.sere_reroute
    importlib.reload(ops)
    del sys.modules["moe_fx.ops"]
    importlib.import_module("moe_fx.ops")
    gc.collect()
    assert OPS.sere_reroute is held, "whoever holds an op must not be left with one that is no more"
    assert torch.equal(held(*samples()["sere_reroute"]), expected)


@pytest.mark.parametrize("mode", ["torch._subclasses.FakeTensorMode()", "torch.device('meta')"])
def test_a_first_import_under_a_mode_leaves_the_ops_whole(mode):
    code = f"""
import torch
with {mode}:
    from moe_fx.kernels import cpu
    import moe_fx.ops
assert cpu.np is not None
ids = torch.tensor([[0, 1], [2, 3]])
assert torch.ops.moe_fx.sere_reroute(ids, torch.eye(4), 1, 0.0).tolist() == [[0, 0], [2, 0]]
weights, ids = torch.ops.moe_fx.beam_mask(torch.ones(2, 2), ids, torch.eye(4)[:2] - 0.5, 0.5)
assert torch.ops.moe_fx.fold_masked(weights, ids)[1].tolist() == [[0, 0], [0, 0]]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
