"""What runs inside vLLM's graphs, called directly: padding, expert placement, order of picks, refusals."""

import contextlib
import copy
import threading
from types import SimpleNamespace

import pytest
import torch

import moe_fx
from moe_fx.kernels import reference
from moe_fx.testing import random_routing, random_similarity, tolerance

pytest.importorskip("vllm", reason="needs vLLM (make test-vllm, or see docs/vllm.md)")
pytestmark = pytest.mark.vllm

TOKENS, TOP_K, EXPERTS, HIDDEN = 7, 4, 12, 8
NAME = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def ops():
    from moe_fx.vllm import ops

    return ops


def table(seed=0):
    return random_similarity(EXPERTS, seed=seed)


def policy_of(ops, *policies, **changed):
    tensors = {"sere": table(), "beam": 0.5 * torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(3))}
    settings = {"layer": NAME, "policies": policies, "tensors": tuple(tensors[p.name] for p in policies)}
    return ops.LayerPolicy(**settings, num_experts=EXPERTS, **{"sere": (1, 0.0), **changed})


def context(layer=None, is_padding=None):
    """vLLM's forward context, as in a forward of one layer."""
    from vllm.forward_context import ForwardContext, override_forward_context

    layers = {} if layer is None else {NAME: layer}
    return override_forward_context(
        ForwardContext(no_compile_layers=layers, attn_metadata={}, slot_mapping={}, is_padding=is_padding)
    )


@pytest.fixture
def decision():
    return random_routing(TOKENS, TOP_K, EXPERTS, seed=5)


@pytest.mark.parametrize("real", [0, 3, TOKENS])
def test_padding_does_not_vote(ops, decision, real):
    weights, ids = decision
    is_padding = torch.arange(TOKENS) >= real
    with context(is_padding=is_padding):
        new_weights, new_ids = ops.route(policy_of(ops, moe_fx.SERE(primary=1)), weights, ids, None)
    assert torch.equal(new_ids, reference.sere_reroute(ids, table(), 1, 0.0, torch.tensor(real)))
    if real == 3:
        assert not torch.equal(new_ids, reference.sere_reroute(ids, table(), 1, 0.0)), "padding would have changed the votes"
    assert new_weights is weights


def test_a_longer_mask_than_the_batch_is_cut(ops, decision):
    """The mask is a view of memory that is as long as the largest batch."""
    weights, ids = decision
    with context(is_padding=torch.tensor([False] * 3 + [True] * 20)):
        _, new_ids = ops.route(policy_of(ops, moe_fx.SERE(primary=1)), weights, ids, None)
    assert torch.equal(new_ids, reference.sere_reroute(ids, table(), 1, 0.0, torch.tensor(3)))


def test_off_picks_are_folded(ops, decision):
    """No kernel of an engine gets id -1."""
    weights, ids = decision
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    policy = policy_of(ops, moe_fx.BEAM())
    with context():
        new_weights, new_ids = ops.route(policy, weights, ids, hidden)
    off = reference.beam_mask(weights, ids, hidden @ policy.tensors[0].T, 0.5)
    assert (off[1] < 0).any()
    expected_weights, expected_ids = reference.fold_masked(*off)
    assert torch.equal(new_ids, expected_ids)
    assert torch.equal(new_weights, expected_weights)


def test_a_hidden_state_that_the_engine_padded_is_cut(ops, decision):
    weights, ids = decision
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(hidden, (0, 8), value=9.0)
    policy = policy_of(ops, moe_fx.BEAM())
    with context():
        narrow, wide = (ops.route(policy, weights, ids, h) for h in (hidden, padded))
    assert torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32])
def test_ids_keep_their_dtype(ops, decision, dtype):
    weights, ids = decision
    with context():
        _, new_ids = ops.route(policy_of(ops, moe_fx.SERE(primary=1)), weights, ids.to(dtype), None)
    assert new_ids.dtype == dtype
    assert torch.equal(new_ids.long(), reference.sere_reroute(ids, table(), 1, 0.0))


def test_the_graph_ops_return_new_tensors(ops, decision):
    weights, ids = decision
    hidden = torch.zeros(TOKENS, HIDDEN)
    for policies in ((), (moe_fx.SERE(primary=1),), (moe_fx.SERE(primary=TOP_K),)):
        layer = SimpleNamespace(moe_fx_policy=policy_of(ops, *policies))
        with context(layer):
            torch.library.opcheck(torch.ops.moe_fx.route_layer_ids.default, (ids, NAME))
            torch.library.opcheck(torch.ops.moe_fx.route_layer.default, (weights, ids, hidden, NAME))
            new_weights, new_ids = torch.ops.moe_fx.route_layer(weights, ids, hidden, NAME)
        assert new_ids.data_ptr() != ids.data_ptr()
        assert new_weights.data_ptr() != weights.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engines_cpu_kernel_sums_several_picks_of_one_expert(ops, dtype):
    """Which a token has where two of its picks moved to the same expert."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    generator = torch.Generator().manual_seed(0)
    hidden, width = 64, 32
    sizes = (TOKENS, hidden), (EXPERTS, 2 * width, hidden), (EXPERTS, hidden, width)
    x, w13, w2 = (0.3 * torch.randn(size, generator=generator).to(dtype) for size in sizes)
    ids = torch.randint(0, 3, (TOKENS, TOP_K), generator=generator, dtype=torch.int32)  # four picks of three experts
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    packed = [_custom_ops.cpu_prepack_moe_weight(w, "vec") for w in (w13, w2)]
    out = torch.full_like(x, float("nan"))
    _custom_ops.cpu_fused_moe(out, x, *packed, None, None, weights, ids, "silu", "vec")
    gate, up = (x.float() @ w13.float().mT).chunk(2, dim=-1)  # [E, T, I]
    every = ((torch.nn.functional.silu(gate) * up) @ w2.float().mT).transpose(0, 1)  # [T, E, H]
    expected = (every.gather(1, ids.long()[..., None].expand(-1, -1, hidden)) * weights[..., None]).sum(1)
    torch.testing.assert_close(out, expected.to(dtype), **tolerance(dtype))


def test_counts_leave_padding_out(ops, decision):
    weights, ids = decision
    totals = torch.zeros(4, dtype=torch.int64)
    policy = policy_of(ops, moe_fx.SERE(primary=1), totals=totals)
    for is_padding in (torch.arange(TOKENS) >= 3, torch.ones(TOKENS, dtype=torch.bool), None):
        with context(is_padding=is_padding):
            ops.route(policy, weights, ids, None)
    moved = reference.sere_reroute(ids, table(), 1, 0.0, torch.tensor(3))
    everyone = reference.sere_reroute(ids, table(), 1, 0.0)
    before = ids[:3].unique().numel() + ids.unique().numel()
    assert totals.tolist() == [2, before, moved[:3].unique().numel() + everyone.unique().numel(), 0]


# ------------------------------------------------------------------------------------------------- opaque form


def router_class():
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    class Router(BaseRouter):
        """Plain top-k whose picks come worst first, with an expert placement that is seen."""

        routing_method_type = None
        scoring_func = "softmax"

        def __init__(self):
            super().__init__(top_k=TOP_K, global_num_experts=EXPERTS)
            self.placed = []

        def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
            weights, ids = router_logits.softmax(-1).topk(TOP_K)
            return weights.flip(1), ids.flip(1).int()

        def _apply_eplb_mapping(self, topk_ids):
            self.placed.append(topk_ids)
            return topk_ids + 1000

    return Router


def opaque_layer(ops, policy, router=None):
    """A layer as vLLM's MoE op runs it, whose experts return what they were given."""
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    class Layer(moe_runner.MoERunnerInterface):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.router = router if router is not None else router_class()()
            self.moe_fx_policy = policy

        def _forward_impl(self, hidden_states, router_logits, shared_experts_input, input_ids):
            self.got = self.router.select_experts(hidden_states, router_logits, torch.int32)
            return hidden_states.clone()

    Layer.__abstractmethods__ = frozenset()
    layer = Layer()
    ops.arm(layer)
    ops.arm(layer)  # a policy that is replaced arms it again
    return layer


def call(op, layer, logits):
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    name = moe_runner.LayerName(NAME) if moe_runner._USE_LAYERNAME else NAME
    with context(layer):
        op(torch.zeros(logits.shape[0], HIDDEN), logits, None, None, name, 0)
    return layer.got


def test_expert_placement_maps_rerouted_logical_ids(ops):
    layer = opaque_layer(ops, policy_of(ops, moe_fx.SERE(primary=1)))
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))
    weights, ids = logits.softmax(-1).topk(TOP_K)
    expected = reference.sere_reroute(ids, table(), 1, 0.0)
    got_weights, got_ids = call(torch.ops.moe_fx.moe_forward, layer, logits)
    (placed,) = layer.router.placed
    assert torch.equal(placed.long(), expected)  # before the mapping, best picks first
    assert torch.equal(got_ids.long(), expected + 1000)
    assert torch.equal(got_weights, weights)


def unsorted_sigmoid(hidden_states, gating_output, topk, renormalize):
    """A model's own routing function, as Cohere2's."""
    weights, ids = torch.topk(gating_output.float().sigmoid(), topk, dim=-1, sorted=False)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


MANY, PICKS, GROUPS = 64, 8, 8  # as many experts as it takes for an unsorted topk to be out of order
BIAS = 0.3 * torch.randn(MANY, generator=torch.Generator().manual_seed(6))


def vllm_router(kind):
    """A router of vLLM's own, the score by which it selects and the weights that it makes of its picks' logits."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    grouped = {
        "num_expert_group": GROUPS, "topk_group": 3, "renormalize": True, "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5, "e_score_correction_bias": BIAS,
    }  # fmt: skip

    def in_best_groups(logits):
        score = (logits.sigmoid() + BIAS).view(-1, GROUPS, MANY // GROUPS)
        best = score.topk(2).values.sum(-1).topk(3).indices  # [T, 3]
        kept = torch.zeros(score.shape[:2], dtype=torch.bool).scatter(1, best, True)
        return score.masked_fill(~kept[..., None], float("-inf")).flatten(1)

    def sqrtsoftplus(logits):
        return torch.nn.functional.softplus(logits).sqrt()

    def shares(weights, scale=1.0):
        return scale * weights / weights.sum(-1, keepdim=True)

    def sigmoid_shares(picks):
        return shares(picks.sigmoid())

    biased = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "e_score_correction_bias": BIAS}
    return {
        "plain": (CPURouter(PICKS, MANY), lambda x: x, lambda picks: picks.softmax(-1)),
        "grouped": (CPURouter(PICKS, MANY, use_grouped_topk=True, **grouped), in_best_groups,
                    lambda picks: shares(picks.sigmoid(), 2.5)),
        "grouped, of CUDA": (GroupedTopKRouter(PICKS, MANY, **grouped), in_best_groups,
                             lambda picks: shares(picks.sigmoid(), 2.5)),
        "biased": (CPURouter(PICKS, MANY, **biased), lambda x: sqrtsoftplus(x) + BIAS,
                   lambda picks: shares(sqrtsoftplus(picks), 1.5)),
        "custom": (CPURouter(PICKS, MANY, custom_routing_function=unsorted_sigmoid), lambda x: x, sigmoid_shares),
        "custom, of CUDA": (CustomRoutingRouter(PICKS, MANY, unsorted_sigmoid), lambda x: x, sigmoid_shares),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "grouped", "grouped, of CUDA", "biased", "custom", "custom, of CUDA"])
def test_each_of_vllms_routers_is_rerouted_best_picks_first(ops, kind):
    from vllm.config import VllmConfig, set_current_vllm_config

    if kind == "biased" and not hasattr(torch.ops._C, "biased_topk_cpu"):
        pytest.skip("vLLM has that kernel for CPUs with AVX512 only")
    logits = torch.randn(33, MANY, generator=torch.Generator().manual_seed(2))
    similarity = random_similarity(MANY, seed=1)
    policy = ops.LayerPolicy(NAME, (moe_fx.SERE(primary=2),), (similarity,), MANY, (2, 0.0))
    with set_current_vllm_config(VllmConfig()):
        router, score, weigh = vllm_router(kind)
        raw = router.select_experts(torch.zeros(33, HIDDEN), logits, torch.int32)[1]
        weights, ids = call(torch.ops.moe_fx.moe_forward, opaque_layer(ops, policy, router), logits)
    order = score(logits).topk(PICKS).indices
    assert torch.equal(raw.long(), order) == (kind == "biased"), "only that kernel's own order is by score"
    assert torch.equal(ids.long(), reference.sere_reroute(order, similarity, 2, 0.0))
    torch.testing.assert_close(weights, weigh(logits.gather(1, order)))


def test_a_custom_routing_function_is_run_as_it_is_where_order_does_not_matter(ops):
    logits = torch.randn(33, MANY, generator=torch.Generator().manual_seed(2))
    router, *_ = vllm_router("custom, of CUDA")
    policy = ops.LayerPolicy(NAME, (moe_fx.BEAM(),), (torch.zeros(MANY, HIDDEN),), MANY)
    raw = router.select_experts(torch.zeros(33, HIDDEN), logits, torch.int32)
    got = call(torch.ops.moe_fx.moe_forward, opaque_layer(ops, policy, router), logits)
    assert torch.equal(got[1], raw[1])
    assert torch.equal(got[0], raw[0])


@pytest.mark.parametrize("call_topk", [
    lambda x: torch.topk(x, 3, sorted=False), lambda x: x.topk(3, -1, True, False), lambda x: torch.topk(x, k=3),
    lambda x: torch.topk(input=x, k=3, sorted=False),
])  # fmt: skip
def test_every_form_of_topk_is_sorted(ops, call_topk):
    x = torch.randn(20, MANY, generator=torch.Generator().manual_seed(2))
    with ops.SortedTopK():
        values, ids = call_topk(x)
        assert torch.equal(torch.topk(x, 3, -1, False).values, x.sort().values[:, :3]), "the smallest stay the smallest"
    assert torch.equal(values, x.sort(descending=True).values[:, :3])
    assert torch.equal(values, x.gather(1, ids))


def test_vllms_own_op_is_left_alone(ops):
    layer = opaque_layer(ops, policy_of(ops, moe_fx.SERE(primary=1)))
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))
    call(torch.ops.vllm.moe_forward, layer, logits)
    assert torch.equal(layer.router.placed[0].long(), logits.softmax(-1).topk(TOP_K).indices.flip(1))
    assert not layer.moe_fx_policy.ran


def test_the_active_layer_is_each_threads_own(ops):
    """Two micro-batches run one layer in two threads."""
    layer = opaque_layer(ops, policy_of(ops, moe_fx.SERE(primary=1)))
    seen = []
    ops._active.layer = layer
    try:
        thread = threading.Thread(target=lambda: seen.append(ops._active.layer))
        thread.start()
        thread.join()
    finally:
        ops._active.layer = None
    assert seen == [None]


@pytest.mark.parametrize("bias", [False, True])
def test_picks_are_ordered_by_the_score_that_selected_them(ops, bias):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    correction = 0.5 * torch.randn(EXPERTS, generator=generator) if bias else None
    scores = logits.sigmoid()
    chosen = (scores + correction if bias else scores).topk(TOP_K).indices
    shuffled = chosen[:, torch.randperm(TOP_K, generator=generator)]
    weights = scores.gather(1, shuffled)
    router = SimpleNamespace(e_score_correction_bias=correction, scoring_func="sigmoid")
    new_weights, new_ids = ops.best_first(router, logits, weights, shuffled)
    assert torch.equal(new_ids, chosen)
    assert torch.equal(new_weights, scores.gather(1, chosen))
    if bias:
        by_weight = scores.gather(1, chosen).argsort(1, descending=True)
        assert not torch.equal(by_weight, torch.arange(TOP_K).expand(TOKENS, -1)), "weights alone must give another order"


def test_picks_that_are_no_experts_come_last(ops):
    logits = torch.randn(2, EXPERTS, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[-1, 0, EXPERTS + 1], [1, -1, 2]])
    router = SimpleNamespace(e_score_correction_bias=None)
    _, new_ids = ops.best_first(router, logits, torch.ones(2, 3), ids)
    assert new_ids[0].tolist() == [0, -1, EXPERTS + 1]
    assert set(new_ids[1, :2].tolist()) == {1, 2}


def test_a_custom_routing_functions_order_is_kept(ops):
    ids = torch.tensor([[3, 1]])
    router = SimpleNamespace(custom_routing_function=print)
    assert ops.best_first(router, torch.zeros(1, EXPERTS), torch.ones(1, 2), ids)[1] is ids


# ---------------------------------------------------------------------------------------------------- refusals


def layer_like(**changed):
    """Only what ``obstacle`` reads of a layer."""
    parallel = SimpleNamespace(pcp_size=1)
    values = {
        "_forward_entry": torch.ops.vllm.moe_forward, "is_monolithic": False, "router": router_class()(),
        "do_naive_dispatch_combine": False, "routed_input_transform": None, "_quant_method": object(),
        "moe_config": SimpleNamespace(is_sequence_parallel=False, moe_parallel_config=parallel),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


def with_deferred_sums():
    """As Kimi-K3's layers on Blackwell: small batches go past vLLM's MoE op, and large ones, as the warm-up's, do not."""
    return SimpleNamespace(use_deferred_moe_finalize=True)


def with_zero_experts():
    router = router_class()()
    router.zero_expert_type = "identity"
    return router


@pytest.mark.parametrize(
    ("changed", "policy", "reason"),
    [
        ({}, moe_fx.SERE(), None),
        ({}, moe_fx.BEAM(), None),
        ({"is_monolithic": True}, moe_fx.SERE(), "routes inside itself"),
        ({"is_monolithic": True, "_forward_entry": len}, moe_fx.SERE(), None),  # in the open form the graph shows it
        ({"moe_config": with_deferred_sums()}, moe_fx.SERE(), "outside vLLM's MoE op in small batches"),
        ({"router": object()}, moe_fx.SERE(), "has no step between"),
        ({"router": with_zero_experts()}, moe_fx.SERE(), "has taken out the picks of zero experts"),
        ({"routed_experts": SimpleNamespace(expert_substitution=len)}, moe_fx.SERE(), "experts are constants"),
        ({"routed_experts": SimpleNamespace(expert_substitution=len)}, moe_fx.TopK(), None),
        ({"do_naive_dispatch_combine": True}, moe_fx.SERE(), "sees the tokens of other ranks"),
        ({"routed_input_transform": len}, moe_fx.BEAM(), "BEAM's mask router reads the router's own input"),
        ({"routed_input_transform": len}, moe_fx.SERE(), None),
    ],
)
def test_layers_that_cannot_be_rerouted_are_refused(ops, changed, policy, reason):
    from moe_fx.vllm import layers
    from moe_fx.vllm.config import EngineSettings

    found = layers.obstacle(layer_like(**changed), EngineSettings((policy,), stats=False))
    assert found is None if reason is None else reason in found


def test_a_layer_that_was_never_rerouted_stops_the_start(ops):
    from moe_fx.vllm import layers

    policies = [policy_of(ops, moe_fx.SERE()) for _ in range(2)]
    policies[0].ran = True
    found = {f"model.layers.{i}.mlp.experts": SimpleNamespace(moe_fx_policy=p) for i, p in enumerate(policies)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "moe_layers", lambda model: found)
        with pytest.raises(layers.VllmError, match="reached 1 of 2 MoE layers and not model.layers.0.mlp.experts"):
            layers.check_all_ran(None)
        policies[1].ran = True
        layers.check_all_ran(None)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_another_vllm_is_refused(version, monkeypatch):
    import vllm

    from moe_fx.vllm import config

    config.check_version()
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(config.VllmError, match=rf"supports vLLM 0.26 to 0.33, but vLLM {version} is installed"):
        config.check_version()


def test_another_vllm_is_touched_where_an_entry_is_refused_and_nowhere_else(monkeypatch):
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from moe_fx.vllm import plugin

    def create_engine_config(self):
        return SimpleNamespace(additional_config=self.additional_config)

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(EngineArgs, "create_engine_config", create_engine_config)
    monkeypatch.delattr(WorkerWrapperBase, "init_device")
    plugin.register()
    arguments = EngineArgs(model="nobody/nothing", additional_config={})
    assert arguments.create_engine_config().additional_config == {}
    arguments.additional_config = {"moe_fx": {"policy": "sere"}}
    with pytest.raises(moe_fx.vllm.VllmError, match=r"vLLM 0.99.0 is installed"):
        arguments.create_engine_config()


def test_a_runner_without_a_mask_is_refused_micro_batches(monkeypatch):
    """The count of real tokens is the whole batch's: padding of the second micro-batch would vote."""
    from moe_fx.vllm import config, layers

    parallel = SimpleNamespace(pipeline_parallel_size=1, use_ubatching=True)
    runner = SimpleNamespace(get_model=lambda: None, vllm_config=SimpleNamespace(parallel_config=parallel))
    settings = config.EngineSettings((moe_fx.TopK(),), stats=False)
    monkeypatch.setattr(layers, "moe_layers", lambda model: {NAME: opaque_layer_like()})
    with pytest.raises(config.VllmError, match="leave --enable-dbo out"):
        layers.install(runner, settings, torch.device("cuda"))


@pytest.mark.parametrize(("experts", "ranks", "refused"), [(8, 1, True), (8, 2, False), (0, 1, False)])
def test_experts_outside_vllms_own_layers_are_refused(experts, ranks, refused):
    """A rank of a pipeline may have none, and then does nothing."""
    from moe_fx.vllm import config, layers

    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=ranks),
        model_config=SimpleNamespace(get_num_experts=lambda: experts),
    )
    runner = SimpleNamespace(get_model=lambda: torch.nn.Linear(2, 2), vllm_config=vllm_config)
    settings = config.EngineSettings((moe_fx.TopK(),), stats=True)
    with pytest.raises(config.VllmError, match="past vLLM's own MoE layers") if refused else contextlib.nullcontext():
        layers.install(runner, settings, torch.device("cpu"))


def opaque_layer_like():
    layer = layer_like()
    layer.moe_config.num_logical_experts = EXPERTS
    return layer


# ------------------------------------------------------------------------------------------ the pass in a configuration


@pytest.fixture
def engine_config(tmp_path):
    """``engine_config(compilation, **policy)``: only what ``prepare`` reads of vLLM's configuration."""
    from vllm.config import CompilationConfig

    sites = {"model.layers.0.mlp": {"similarity": table(), "mask_router": torch.zeros(EXPERTS, HIDDEN)}}
    artifact = str(moe_fx.Artifact(sites).save(tmp_path / "a.moe.safetensors"))

    def of(compilation=None, **policy):
        return SimpleNamespace(
            additional_config={"moe_fx": {"policy": {"artifact": artifact, **policy}}},
            compilation_config=compilation or CompilationConfig(), model_config=None,
        )  # fmt: skip

    return of


def pass_of(vllm_config):
    from moe_fx.vllm import config

    config.prepare(vllm_config)
    return vllm_config.compilation_config.inductor_compile_config[config.PASS_KEY]


def test_a_configuration_that_served_another_engine_gets_the_new_policy(engine_config):
    """A caller may give one ``CompilationConfig`` to several engines; its own pass stays, once."""
    from vllm.compilation.passes.inductor_pass import CallableInductorPass
    from vllm.config import CompilationConfig

    own = CallableInductorPass(lambda graph: None, uuid="own")
    compilation = CompilationConfig(inductor_compile_config={"post_grad_custom_post_pass": own})
    first, second = engine_config(compilation, name="sere"), engine_config(compilation, name="beam")
    passes = [pass_of(config) for config in (first, first, second)]
    assert passes[0] is passes[1], "preparing it twice, as a worker does, changes nothing"
    assert [type(p.policies[0]).__name__ for p in passes] == ["SERE", "SERE", "BEAM"]
    assert [p.before for p in passes] == [own] * 3
    assert passes[0].uuid() != passes[2].uuid()
    assert first.additional_config["moe_fx"]["digest"] != second.additional_config["moe_fx"]["digest"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"decode_backend": "latency_specialized"}, "decode_backend 'latency_specialized' decodes without one"),
        ({"monokernel": True}, "--monokernel decodes without one"),
        ({"decode_backend": "auto", "monokernel": False}, None),
    ],
)
def test_decoding_past_the_compiled_graph_is_refused(engine_config, changed, words):
    from moe_fx.vllm import config

    asked = engine_config(name="sere")
    asked.additional_config |= {key: changed[key] for key in ("decode_backend",) if key in changed}
    asked.kernel_config = SimpleNamespace(monokernel=changed.get("monokernel", False))
    with contextlib.nullcontext() if words is None else pytest.raises(config.VllmError, match=words):
        config.prepare(asked)


def write_nothing(graph):
    """A user's pass as a plain function."""


class Uncached:
    """A user's pass whose results must not be kept."""

    def __call__(self, graph):
        pass

    def uuid(self):
        return None


def test_any_form_of_a_users_pass_is_chained(engine_config):
    from vllm.config import CompilationConfig

    def chained(**given):
        return pass_of(engine_config(CompilationConfig(**given), name="sere"))

    key = "post_grad_custom_post_pass"
    alone = chained()
    plain = chained(inductor_compile_config={key: write_nothing})
    named = chained(inductor_passes={key: "copy.copy"})  # the form of the command line
    uncached = chained(inductor_compile_config={key: Uncached()})
    assert alone.before is None
    assert (plain.before.callable, named.before.callable) == (write_nothing, copy.copy)
    assert len({p.uuid() for p in (alone, plain, named, uncached)}) == 4
    assert uncached.uuid() is None
    for routing_pass in (plain, named, uncached):
        routing_pass(torch.fx.symbolic_trace(torch.nn.Identity()).graph)


def moe_graph(router_input, experts_input, wrapped):
    """A graph of one layer in the opaque form; the two functions make what the router and what the experts read."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized

    aten = torch.ops.aten
    graph = torch.fx.Graph()
    x, weight, name = (graph.placeholder(n) for n in ("x", "weight", "name"))
    normed = graph.call_function(aten.mul.Tensor, (x, 2.0))
    read = router_input(graph, normed)
    logits = None
    if read is not None:
        cast = graph.call_function(aten._to_copy.default, (read,), {"dtype": torch.float32})
        scores = graph.call_function(aten.mm.default, (cast, weight))
        logits = graph.call_function(aten.tanh.default, (scores,))
    given = graph.call_function(aten.constant_pad_nd.default, (experts_input(graph, normed), [0, 8]))
    op = torch.ops.vllm.moe_forward.default
    arguments = (given, given if logits is None else logits, None, None, name, 0)
    if wrapped:
        names = [a.name for a in op._schema.arguments]
        node = graph.call_function(auto_functionalized, (op,), dict(zip(names, arguments, strict=True)))
    else:
        node = graph.call_function(op, arguments)
    graph.output(node)
    return graph, node


def same(graph, normed):
    return normed


def normed_again(graph, normed):
    return graph.call_function(torch.ops.aten.mul.Tensor, (normed, 3.0))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("router_input", "experts_input", "is_one"),
    [
        (same, same, True),
        (lambda *_: None, same, True),  # the router's linear map is inside the op
        (normed_again, same, False),
        (same, normed_again, False),
        (normed_again, normed_again, False),  # Gemma 4's: of one hidden state, each its own
    ],
)
def test_beam_in_the_opaque_form_reads_what_the_router_reads(ops, router_input, experts_input, is_one, wrapped):
    from moe_fx.passes import graph as g
    from moe_fx.vllm.graph_pass import RoutingPass

    for policy, is_rewritten in ((moe_fx.BEAM(), is_one), (moe_fx.SERE(), True)):
        graph, node = moe_graph(router_input, experts_input, wrapped)
        RoutingPass("", (policy,))(graph)
        assert (g.called(node) is torch.ops.moe_fx.moe_forward.default) == is_rewritten


def test_policies_that_are_no_json_are_refused(engine_config):
    from moe_fx.vllm import config

    vllm_config = engine_config(name="sere")
    vllm_config.additional_config["moe_fx"]["policy"] = config.parse(vllm_config.additional_config["moe_fx"]).policies[0]
    with pytest.raises(config.VllmError, match=r"must be JSON: write policies as dicts, or have moe_fx.vllm.engine_args"):
        config.prepare(vllm_config)


def test_a_runner_without_a_mask_counts_its_real_tokens():
    """vLLM 0.26's first model runner."""
    from moe_fx.vllm import padding

    seen = []
    runner = SimpleNamespace(
        execute_model=lambda output: seen.append(int(padding._counters[torch.device("cpu")])),
        _dummy_run=lambda tokens, **_: seen.append(int(padding._counters[torch.device("cpu")])),
    )
    assert not padding.makes_mask(runner)
    try:
        padding.count_real_tokens(runner, torch.device("cpu"))
        runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=5))
        runner._dummy_run(64)
        runner._dummy_run(64, is_profile=True)
    finally:
        padding._counters.clear()
    assert seen == [5, 0, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("off", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_off_picks_cost_the_cpu_kernel_no_rows(ops, off, dtype, monkeypatch):
    """Folded picks have weight 0; from a quarter of them on, vLLM's kernel is given the others alone."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    kernel, rows = torch.ops._C.cpu_fused_moe, []
    generator = torch.Generator().manual_seed(0)
    w_gate_up, w_down = (0.2 * torch.randn(EXPERTS, *shape, generator=generator).to(dtype) for shape in ((64, 64), (64, 32)))
    hidden = torch.randn(TOKENS, 64, generator=generator).to(dtype)
    weights, ids = random_routing(TOKENS, TOP_K, EXPERTS, seed=5)
    is_off = torch.rand(weights.shape, generator=generator) < off
    weights, ids = reference.fold_masked(weights.masked_fill(is_off, 0.0), ids.masked_fill(is_off, -1))
    packed = (cpu_prepack_moe_weight(w, "vec") for w in (w_gate_up, w_down))

    def counting(output, hidden, *others):
        rows.append(others[5].numel())
        kernel(output, hidden, *others)

    monkeypatch.setattr(torch.ops._C, "cpu_fused_moe", counting)
    output = torch.full((TOKENS, 64), torch.nan, dtype=dtype)
    torch.ops.moe_fx.cpu_fused_moe(output, hidden, *packed, None, None, weights, ids.int(), False, "silu", "vec")
    expected = reference.fused_experts(hidden, w_gate_up, w_down, weights, ids)
    torch.testing.assert_close(output, expected, **tolerance(dtype))
    on = int((weights != 0).sum())
    assert sum(rows) == (on if off > 0.3 else weights.numel())
