"""The backend as a user meets it: by its name, with options right and wrong, and what it reports."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layers
import moe_fx
from layers import E, H
from moe_fx.backend import moe_sparse


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def artifact(num_experts: int = E, hidden: int = H, *sites: str) -> moe_fx.Artifact:
    site = {"similarity": torch.rand(num_experts, num_experts), "mask_router": torch.randn(num_experts, hidden)}
    return moe_fx.Artifact(dict.fromkeys(sites or ("moe",), site))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = layers.SoftmaxThenTopK()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


def compile_and_run(options: dict[str, Any], model: nn.Module | None = None, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        compiled = torch.compile(model or Model(), backend="moe_sparse", options={"inner": "eager", **options})
        return compiled(torch.randn(4, H) if x is None else x)


def test_found_by_name_alone_in_a_fresh_process() -> None:
    program = """
        import sys, torch
        class Router(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.router = torch.nn.Linear(8, 4, bias=False)
                self.up = torch.nn.Parameter(torch.randn(4, 8, 8))
            def forward(self, x):
                weights, ids = self.router(x).softmax(-1).topk(2)
                return torch.einsum("th,tkhi,tk->ti", x, self.up[ids], weights)
        model, x = Router(), torch.randn(3, 8)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="moe_sparse", options={"inner": "aot_eager"})(x), model(x))
        print(len(sys.modules["moe_fx"].last_report().sites), "triton" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "1"


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "cudagraphs", "inductor"])
def test_inner_compilers(inner: str) -> None:
    model, x = Model(), torch.randn(4, H)
    rerouted = compile_and_run({"policy": moe_fx.SERE(artifact(), primary=1)}, model)
    assert rerouted.shape == (4, H)
    torch._dynamo.reset()
    policy = moe_fx.SERE(artifact(), primary=1)
    with torch.no_grad():
        want = torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": "eager"})(x)
        torch._dynamo.reset()
        got = torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": inner})(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_callable_inner_compiler_gets_plain_aten_and_its_options() -> None:
    seen: dict[str, Any] = {}

    def inner(gm: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any] | None = None) -> Any:
        seen.update(targets={type(n.target) for n in gm.graph.nodes if n.op == "call_function"}, options=options)
        return gm.forward

    compile_and_run({"policy": moe_fx.SERE(artifact()), "inner": inner, "inner_options": {"level": 3}})
    assert seen["options"] == {"level": 3}
    assert torch._ops.OpOverload in seen["targets"]


def test_a_plain_dict_does_what_the_object_does(tmp_path: Path) -> None:
    saved = artifact()
    saved.save(tmp_path / "m.safetensors")
    model, x = Model(), torch.randn(4, H)
    results = []
    for policy in (
        moe_fx.SERE(saved, primary=1, threshold=0.2),
        {"name": "sere", "artifact": str(tmp_path / "m.safetensors"), "primary": 1, "threshold": 0.2},
    ):
        torch._dynamo.reset()
        with torch.no_grad():
            results.append(torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": "eager"})(x))
    assert torch.equal(*results)


def test_mode_reaches_inductor_and_nothing_else() -> None:
    with torch.no_grad():
        compiled = torch.compile(Model(), backend="moe_sparse", mode="max-autotune-no-cudagraphs")
        assert compiled(torch.randn(4, H)).shape == (4, H)
    with pytest.raises(Exception, match="unknown mode|Unrecognized mode|nonsense"):
        compile_and_run({"inner": "inductor", "mode": "nonsense"})
    with pytest.raises(Exception, match="mode='reduce-overhead' is for the inner compiler 'inductor'"):
        compile_and_run({"mode": "reduce-overhead"})


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"polcy": None}, "unknown option 'polcy' .*did you mean 'policy'"),
        ({"inner": "inducter"}, "unknown inner compiler 'inducter': expected one of .*inductor"),
        ({"inner": "moe_sparse"}, "unknown inner compiler 'moe_sparse'"),
        ({"inner": 3}, "option 'inner' is 3"),
        ({"inner_options": 3}, "option 'inner_options' is 3"),
        ({"strict": "yes"}, "option 'strict' is 'yes'"),
        ({"policy": "seer"}, "unknown policy 'seer'"),
        ({"policy": {"name": "sere", "artifact": "/nowhere.safetensors"}}, "/nowhere.safetensors"),
        ({"policy": {"name": "sere"}}, "SERE needs an artifact"),
        ({"policy": {"name": "sere", "primary": 0}}, "primary"),
        ({"policy": {"name": "sere", "threshold": 1.5}}, "threshold"),
        ({"policy": {"name": "beam", "tau": 1.0}}, "tau"),
        ({"policy": {"name": "beam", "train": True}}, "must be an object"),
        ({"policy": moe_fx.SERE(artifact(E + 2))}, r"'moe' is \[8, 8\] but the router has 6 experts: recalibrate"),
        ({"policy": moe_fx.BEAM(artifact(E, H + 1))}, "site 'moe'"),
        ({"policy": moe_fx.SERE(artifact(E, H, "elsewhere"))}, "'moe'.*elsewhere"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=f"(?s){words}"):
        compile_and_run(options)


def test_a_site_missing_from_the_artifact_rewrites_no_site_at_all() -> None:
    model = nn.Sequential(Model(), Model())
    reached = []
    options = {"policy": moe_fx.SERE(artifact(E, H, "0.moe")), "inner": lambda gm, _: reached.append(gm) or gm.forward}
    with pytest.raises(Exception, match=r"1\.moe"):
        compile_and_run(options, model)
    assert reached == []


def test_strict_tells_a_reason_once_for_all_its_sites() -> None:
    options = {"policy": moe_fx.BEAM(), "strict": True}
    with pytest.raises(Exception, match=r"strict: '0' and 2 more left alone: .*capacity") as caught:
        compile_and_run(options, nn.Sequential(*(layers.Capacity() for _ in range(3))))
    assert str(caught.value).count("left alone") == 1


def test_a_model_without_experts_goes_through_untouched_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(H, H), nn.ReLU())
    policy = moe_fx.SERE(artifact())
    assert compile_and_run({"policy": policy, "strict": True}, model).shape == (4, H)
    assert moe_fx.last_report().sites == []
    assert "No expert routing was found" in str(moe_fx.last_report())


# ------------------------------------------------------------------------------------------------------ reports


def test_a_report_reads_well() -> None:
    compile_and_run({"policy": moe_fx.SERE(artifact(), primary=1)})
    text = str(moe_fx.last_report())
    for part in ("1 site", "moe", "softmax -> topk", "SERE(primary=1", "moe_fx.sere_reroute +1", "normalize"):
        assert part in text, text


def test_each_model_has_its_own_report_and_recompiles_add_to_it() -> None:
    first, second = Model(), nn.Sequential(Model())
    with torch.no_grad():
        a = torch.compile(first, backend="moe_sparse", options={"inner": "eager"}, dynamic=False)
        a(torch.randn(4, H))
        a(torch.randn(5, H))
        assert moe_fx.last_report().graphs == 2
        assert [s.name for s in moe_fx.last_report().sites] == ["moe"]
        torch.compile(second, backend="moe_sparse", options={"inner": "eager"})(torch.randn(6, H))
    assert [s.name for s in moe_fx.last_report().sites] == ["0.moe"]


def test_explain_a_compiled_model_uses_its_own_policy() -> None:
    policy = moe_fx.SERE(artifact(), primary=1)
    compiled = torch.compile(Model(), backend="moe_sparse", options={"policy": policy})
    with torch.no_grad():
        assert moe_fx.explain(compiled, torch.randn(4, H)).sites[0].policy == policy.describe()
        assert moe_fx.explain(Model(), torch.randn(4, H)).sites[0].policy == "TopK"


def compiled_by(how: str, model: nn.Module, backend: object, **settings: Any) -> Callable[..., Any]:
    """The ways to compile a model."""
    if how == "in place":
        model.compile(backend=backend, **settings)
        return model
    if how == "replaced forward":
        model.forward = torch.compile(model.forward, backend=backend, **settings)
        return model
    return torch.compile(model if how == "module" else model.forward, backend=backend, **settings)


WAYS = ("module", "bound forward", "replaced forward", "in place")


@pytest.mark.parametrize("how", WAYS)
def test_explain_finds_the_policy_of_a_model_that_has_run(how: str) -> None:
    policy = moe_fx.SERE(artifact(), primary=1)
    compiled = compiled_by(how, Model(), "moe_sparse", options={"policy": policy, "mode": "max-autotune", "inner": "inductor"})
    with torch.no_grad():
        assert [s.policy for s in moe_fx.explain(compiled, torch.randn(4, H)).sites] == [policy.describe()]
    eager = compiled_by(how, Model(), "moe_sparse", options={"policy": policy, "inner": "eager"})
    with torch.no_grad():
        eager(torch.randn(4, H))
        assert [(s.name, s.policy) for s in moe_fx.explain(eager, torch.randn(4, H)).sites] == [("moe", policy.describe())]


@pytest.mark.parametrize("how", WAYS)
def test_explain_always_reports_and_leaves_what_was_compiled(how: str) -> None:
    """More often than Dynamo compiles one function, of one model and of equal ones, before and after the user compiles."""
    x, graphs = torch.randn(4, H), []

    def count(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    def found(model: Callable[..., Any]) -> list[str]:
        return [s.name for s in moe_fx.explain(model, x).sites]

    with torch.no_grad():
        assert all(found(Model()) == ["moe"] for _ in range(10))
        compiled = compiled_by(how, Model(), count)
        compiled(x)
        assert all(found(compiled) == ["moe"] for _ in range(10))
        compiled(x)
        assert len(graphs) == 1


def test_explain_always_reports_where_the_graph_breaks() -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    with torch.no_grad():
        for _ in range(10):
            assert [s.name for s in moe_fx.explain(Broken(), torch.randn(4, H)).sites] == ["moe"]


def test_explain_in_a_module_reports_the_model_that_it_was_asked_about() -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: Tensor) -> object:
            return moe_fx.explain(self.model, x)

    with torch.no_grad():
        assert [s.name for s in Trainer()(torch.randn(4, H)).sites] == ["moe"]


def test_explain_says_when_nothing_was_captured() -> None:
    @torch._dynamo.disable
    def hidden(x: Tensor) -> Tensor:
        return x

    report = moe_fx.explain(hidden, torch.ones(1))
    assert (report.graphs, report.sites) == (0, [])
    assert "captured no graph" in report.skips[0].reason


def test_explain_says_what_dynamo_gave_up_where_nothing_else_was_found() -> None:
    class Loops(nn.Module):
        """The experts are captured one by one; the function that routes is not."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(H, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.Tanh()) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.gate(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for e in range(4):
                tokens, slots = torch.where(ids == e)
                out.index_add_(0, tokens, self.one(e, x[tokens]) * weights[tokens, slots, None])
            return out

        def one(self, e: int, rows: Tensor) -> Tensor:
            return self.experts[e](rows)

    with torch.no_grad():
        report = moe_fx.explain(Loops(), torch.randn(4, H))
    assert report.graphs
    (skip,) = report.skips
    assert "Dynamo gave up" in skip.reason
    assert "fullgraph=True" in skip.reason


def test_explain_passes_the_models_own_errors_on() -> None:
    with pytest.raises(Exception, match="shape|size"):
        moe_fx.explain(Model(), torch.randn(4, H + 1))


def test_stats_count_active_experts() -> None:
    moe_fx.reset_stats()
    model, x = Model(), torch.randn(4, H)
    compiled = torch.compile(
        model, backend="moe_sparse", options={"policy": moe_fx.SERE(artifact(), primary=1), "inner": "aot_eager", "stats": True}
    )
    with torch.no_grad():
        ids, _ = model.moe.route(x)
        for _ in range(3):
            compiled(x)
    counted = moe_fx.stats()["moe"]
    assert counted.steps == 3
    assert counted.before == len(ids.unique())
    assert counted.active == len(ids[:, :1].unique())
    moe_fx.reset_stats()
    assert moe_fx.stats() == {}


@pytest.mark.parametrize("layer", layers.ROUTES)
def test_exact_picks_are_counted_whatever_the_experts_are(layer: type[layers.Layer]) -> None:
    moe_fx.reset_stats()
    model, x = nn.Sequential(layer().eval()), torch.randn(4, H)
    with torch.no_grad():
        torch.testing.assert_close(compile_and_run({"stats": True}, model, x), model(x))
    (counted,) = moe_fx.stats().values()
    assert 0 < counted.active == counted.before


def test_a_layer_compiled_by_itself_uses_the_name_the_artifact_knows() -> None:
    """Compiling each block alone gives graphs of ``L['self']``; the artifact may still name the whole model's sites."""
    model = nn.Sequential(Model(), Model())
    similarity = torch.rand(2, E, E)
    sites = moe_fx.Artifact({f"{i}.moe": {"similarity": similarity[i]} for i in range(2)})
    x = torch.randn(4, H)
    options = {"policy": moe_fx.SERE(sites, primary=1), "inner": "eager"}
    with torch.no_grad():
        want = torch.compile(model, backend="moe_sparse", options=options)(x)
        torch._dynamo.reset()
        for i in range(2):
            model[i].moe = torch.compile(model[i].moe, backend="moe_sparse", options=options)
        got = model(x)
    torch.testing.assert_close(got, want)


def test_the_backend_is_registered_once() -> None:
    assert torch._dynamo.list_backends().count("moe_sparse") == 1
    assert torch._dynamo.lookup_backend("moe_sparse") is moe_sparse
