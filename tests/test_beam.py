"""Masks that learn: what leaves the compiled graph, its gradients, the training loop, and the artifact at its end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import layers
import moe_fx
import moe_fx.hf
import tiny
from layers import E, H
from moe_fx import beam
from moe_fx.beam import BeamError, DivergedError, Masked, Recipe, attach, train
from moe_fx.testing import tolerance

BETA = 0.7
ROUTERS = ("qwen3_moe", "deepseek_v3", "gpt_oss")  # softmax; sigmoid, bias and groups; softmax of the picks alone


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


def batch(**shape: int) -> dict[str, Any]:
    inputs = tiny.tokens(**shape)
    return inputs | {"labels": inputs["input_ids"]}


def compiled(model: nn.Module, policy: object, inner: str = "eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="moe_sparse", options={"policy": policy, "inner": inner, "strict": True, **options})


# ----------------------------------------------------------------------------------------- the policy in training


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_fresh_masks_are_exactly_topk_bit_for_bit(name: str) -> None:
    model, inputs = tiny.build(name, "batched_mm"), batch()
    policy = moe_fx.BEAM(train=True)
    assert torch.equal(compiled(model, policy)(**inputs).logits.detach(), model(**inputs).logits)
    assert policy.picks() == dict.fromkeys(tiny.ARCHS[name].sites, float(tiny.TOP_K))
    assert float(policy.regularizer().detach()) == 0.5


class StraightThrough(torch.autograd.Function):
    """A hard step forward, the sigmoid's slope backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tau: float) -> Tensor:
        ctx.save_for_backward(logits)
        return (logits.sigmoid() >= tau).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probability = ctx.saved_tensors[0].sigmoid()
        return grad * probability * (1 - probability), None


Mask = Callable[[Tensor], Tensor]


def lm_loss(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    """In float64, where transformers' own loss is in float32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


def hand_written(model: nn.Module, name: str, masks: dict[str, Tensor], mask: Mask, inputs: dict[str, Any]) -> Tensor:
    """BEAM's loss, eagerly: ``mask`` of the mask logits multiplies the weights of every pick, at its own expert."""
    probabilities = []

    def rule(site: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = (hidden.to(masks[site].dtype) @ masks[site].T).gather(1, ids)
        probabilities.append(logits.sigmoid())
        return ids, weights * mask(logits).to(weights.dtype)

    with tiny.patched(model, name, rule):
        loss = lm_loss(model(**inputs).logits, inputs)
    return loss + BETA * torch.cat(probabilities).mean()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_are_those_of_a_hand_written_straight_through(name: str, inner: str) -> None:
    """Of the masks, and of every weight of the model; off picks learn by their own experts."""
    model, inputs = tiny.build(name, "batched_mm", torch.float64).requires_grad_(True), tiny.tokens()
    policy = moe_fx.BEAM(tiny.random_artifact(name), tau=0.55, train=True)
    (lm_loss(compiled(model, policy, inner)(**inputs).logits, inputs) + BETA * policy.regularizer()).backward()
    assert all(0 < picks < tiny.TOP_K for picks in policy.picks().values())
    got = {key: p.grad for key, p in [*model.named_parameters(), *policy.masks().items()]}
    model.zero_grad()
    masks = {site: mask.detach().clone().requires_grad_() for site, mask in policy.masks().items()}
    hand_written(model, name, masks, lambda logits: StraightThrough.apply(logits, 0.55), inputs).backward()
    want = {key: p.grad for key, p in [*model.named_parameters(), *masks.items()]}
    assert all(float(want[site].abs().sum()) > 0 for site in masks)
    for key, grad in want.items():
        if grad is None:
            assert got[key] is None, key
            continue
        torch.testing.assert_close(got[key], grad, **tolerance(torch.float32), msg=lambda text, key=key: f"{key}: {text}")


class Around(nn.Module):
    """A module around a layer, which gives it a name."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


@pytest.mark.parametrize("layer", [layers.SoftmaxThenTopK, layers.TopKThenSoftmax, layers.GatheredBiased])
def test_gradients_are_finite_differences_of_what_straight_through_stands_for(layer: type[layers.Layer]) -> None:
    """The hard mask at this point plus the change of the sigmoid, in float64: its slope is the straight-through gradient."""
    model, x, generator = layer().double(), hidden().double(), torch.Generator().manual_seed(4)
    start = torch.randn(E, H, generator=generator)
    policy = moe_fx.BEAM(moe_fx.Artifact({"moe": {"mask_router": start}}), train=True)
    (compiled(Around(model), policy)(x).square().sum() + BETA * policy.regularizer()).backward()
    ids, weights = model.route(x)

    def surrogate(mask_router: Tensor) -> Tensor:
        before, logits = ((x @ m.T).gather(1, ids) for m in (start.double(), mask_router))
        mask = (before >= 0).double() + logits.sigmoid() - before.sigmoid()
        return model.run(x, ids, weights * mask).square().sum() + BETA * logits.sigmoid().mean()

    assert 0 < policy.picks()["moe"] < layers.K
    (mask,) = policy.parameters()
    assert mask.grad is not None
    for _ in range(3):
        direction, step = torch.randn(E, H, dtype=torch.float64, generator=generator), 1e-6
        with torch.no_grad():
            want = (surrogate(start + step * direction) - surrogate(start - step * direction)) / (2 * step)
        torch.testing.assert_close((mask.grad.double() * direction).sum(), want, **tolerance(torch.float32))


class TwoLayers(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.second = layers.SoftmaxThenTopK(), layers.GatheredBiased()
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def random_masks(train: bool = True) -> moe_fx.BEAM:
    generator = torch.Generator().manual_seed(3)
    sites = {name: {"mask_router": torch.randn(E, H, generator=generator)} for name in ("first", "second")}
    return moe_fx.BEAM(moe_fx.Artifact(sites), train=train)


def hidden(seed: int = 5, rows: int = 7) -> Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(seed))


def by_hand(model: TwoLayers, policy: moe_fx.BEAM, x: Tensor) -> list[Tensor]:
    """The first site's mask logits at its picks; the second site's input depends on the first's masks."""
    ids, _ = model.first.route(x)
    return [(x @ policy.masks()["first"].T).gather(1, ids)]


@pytest.mark.parametrize(
    ("checkpointed", "inner"),
    [
        *((checkpointed, inner) for checkpointed in (False, True) for inner in ("eager", "aot_eager")),
        pytest.param(True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_what_leaves_the_graph_under_every_compiler_and_checkpointing(checkpointed: bool, inner: str) -> None:
    """Recomputed layers are not counted twice, and each site's values come under its own name."""
    plain, model, x = TwoLayers(), TwoLayers(checkpointed), hidden()
    want, policy = random_masks(), random_masks()
    compiled(plain, want)(x)
    out = compiled(model, policy, inner)(x)
    assert isinstance(out, Tensor), "the caller must not see what is meant for the policy"
    assert {site: tuple(v.shape) for site, v in policy.mask_logits().items()} == {"first": (7, layers.K), "second": (7, layers.K)}
    torch.testing.assert_close(policy.mask_logits(), want.mask_logits(), **tolerance(torch.float32))
    torch.testing.assert_close(policy.mask_logits()["first"], by_hand(model, policy, x)[0], **tolerance(torch.float32))
    gradients = []
    for each in (want, policy):
        each.regularizer().backward(retain_graph=True)
        gradients.append([m.grad for m in each.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance(torch.float32))
    before = policy.regularizer()
    out.square().sum().backward()  # recomputes where checkpointed
    assert torch.equal(policy.regularizer(), before)


def test_the_regularizer_is_the_mean_over_all_picks_and_by_site() -> None:
    model, policy, x = TwoLayers(), random_masks(), hidden()
    compiled(model, policy)(x)
    logits = policy.mask_logits()
    torch.testing.assert_close(policy.regularizer(), torch.cat([v.flatten() for v in logits.values()]).sigmoid().mean())
    assert set(policy.regularizers()) == {"first", "second"}
    assert all(torch.equal(v, logits[site].sigmoid().mean()) for site, v in policy.regularizers().items())
    assert policy.picks() == {s: float((v >= 0).sum()) / 7 for s, v in logits.items()}


def test_each_forward_has_its_own_regularizer_and_gradients_accumulate() -> None:
    model, policy = TwoLayers(), random_masks()
    program = compiled(model, policy)
    alone = []
    for seed in (1, 2):
        program(hidden(seed))
        policy.regularizer().backward()
        alone.append([m.grad.clone() for m in policy.parameters() if m.grad is not None])
        for mask in policy.parameters():
            mask.grad = None
    for seed in (1, 2):
        program(hidden(seed))
        policy.regularizer().backward()
    for mask, first, second in zip(policy.parameters(), *alone, strict=True):
        torch.testing.assert_close(mask.grad, first + second)
    with torch.no_grad():
        program(hidden(3, rows=2))
    assert policy.mask_logits()["first"].shape[0] == 2
    assert not policy.regularizer().requires_grad


def test_a_layer_that_runs_twice_counts_with_all_its_tokens() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = layers.SoftmaxThenTopK()

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(self.moe(x))

    policy = moe_fx.BEAM(train=True)
    compiled(Twice(), policy)(hidden())
    assert {site: tuple(v.shape) for site, v in policy.mask_logits().items()} == {"moe": (14, layers.K)}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_masks_stay_in_float32_under_autocast(inner: str) -> None:
    model, policy, plain, x = TwoLayers(), random_masks(), random_masks(), hidden()
    compiled(TwoLayers(), plain)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(model, policy, inner)(x)
    (out.float().square().sum() + policy.regularizer()).backward()
    logits = policy.mask_logits()
    assert {v.dtype for v in logits.values()} == {torch.float32}
    torch.testing.assert_close(logits["first"], plain.mask_logits()["first"], **tolerance(torch.float32))
    assert all(m.grad is not None and m.grad.dtype == torch.float32 and m.grad.abs().sum() > 0 for m in policy.parameters())


def test_a_pick_that_is_off_can_come_back() -> None:
    """Its mask logit learns by what its own expert would give; folded onto another expert, it could not."""
    layer, x = layers.SoftmaxThenTopK().requires_grad_(False), hidden()
    target = layer(x)
    policy = moe_fx.BEAM(train=True)
    program = compiled(layer, policy)
    program(x)
    (mask,) = policy.parameters()
    with torch.no_grad():
        mask.copy_(-0.05 * x.mean(0).expand(E, H))
    program(x)
    least = sum(policy.picks().values())
    optimizer = torch.optim.Adam([mask], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (program(x) - target).square().sum().backward()
        optimizer.step()
    assert sum(policy.picks().values()) > least + 0.3


def test_only_a_policy_that_trains_and_has_seen_a_forward_has_a_regularizer() -> None:
    for policy, words in ((moe_fx.BEAM(), "its train is False"), (moe_fx.BEAM(train=True), "there was no forward")):
        with pytest.raises(moe_fx.PolicyError, match=words):
            policy.regularizer()
    policy = random_masks(train=False)
    out = compiled(TwoLayers(), policy)(hidden())
    assert isinstance(out, Tensor)
    with pytest.raises(moe_fx.PolicyError, match="its train is False"):
        policy.picks()


def test_sere_after_masks_that_train_computes_what_it_computes_after_them() -> None:
    generator = torch.Generator().manual_seed(8)
    tables = {name: {"similarity": torch.rand(E, E, generator=generator)} for name in ("first", "second")}
    sere, x, results = moe_fx.SERE(moe_fx.Artifact(tables), primary=1), hidden(), []
    for learns in (False, True):
        torch._dynamo.reset()
        results.append(compiled(TwoLayers(), [random_masks(learns), sere])(x).detach())
    torch.testing.assert_close(*results, **tolerance(torch.float32))


# ------------------------------------------------------------------------------------------- loops of other people


def trainer(model: nn.Module, folder: Path, **changes: Any) -> Any:
    """HF's Trainer over a tiny model with masks, accumulating gradients."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(8, 9)["input_ids"]]
    module = Masked(attach(model, {"input_ids": rows[0]["input_ids"][None]}), model, beta=5.0)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, remove_unused_columns=False,
        report_to=[], use_cpu=True, disable_tqdm=True, **changes,
    )  # fmt: skip
    return Trainer(model=module, args=arguments, train_dataset=rows)


def test_hf_trainer(tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe", "moe_fx")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    training = trainer(model, tmp_path, max_steps=3, learning_rate=0.01, save_strategy="no")
    training.train()
    module = training.model
    assert all(float(m.detach().abs().sum()) > 0 for m in module.policy.parameters())
    assert set(module.state_dict()) > {"masks.model/layers/0/mlp", "masks.model/layers/1/mlp"}
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters()), "what is frozen stays"
    assert sum(module.policy.picks().values()) < tiny.LAYERS * tiny.TOP_K


def test_hf_trainer_with_everything(tmp_path: Path) -> None:
    """bf16 autocast, gradient checkpointing, a model that learns and whose embeddings are tied, checkpoints and resume."""
    settings = {"bf16": True, "gradient_checkpointing": True, "save_steps": 2, "save_strategy": "steps", "learning_rate": 1e-3}

    def fresh() -> nn.Module:
        return tiny.build("qwen3_moe", "batched_mm", tie_word_embeddings=True).requires_grad_(True)

    whole = trainer(fresh(), tmp_path / "whole", max_steps=4, **settings)
    whole.train()
    assert all(float(m.detach().abs().sum()) > 0 for m in whole.model.policy.parameters())
    torch._dynamo.reset()
    resumed = trainer(fresh(), tmp_path / "resumed", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], tensor, **tolerance(torch.float32), msg=key)


def test_masked_adds_the_regularizer_to_the_loss() -> None:
    model, inputs = tiny.build("qwen3_moe", "batched_mm"), batch()
    module = Masked(attach(model, inputs), model, beta=2.0)
    assert float(module(**inputs).loss - model(**inputs).loss) == pytest.approx(2.0 * 0.5, abs=1e-6)
    with pytest.raises(BeamError, match="beta is -1"):
        Masked(attach(model, inputs), model, beta=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_stay_in_float32_where_the_model_is_cast(dtype: torch.dtype) -> None:
    """As HF's Trainer casts a model for ``bf16_full_eval``."""
    model, inputs = tiny.build("qwen3_moe", "moe_fx"), batch()
    module = Masked(attach(model, inputs), model, beta=0.5)
    masks = list(module.masks.values())
    with torch.no_grad():
        for number, mask in enumerate(masks):
            mask.copy_(torch.randn(mask.shape, generator=torch.Generator().manual_seed(number)))
    before = [mask.detach().clone() for mask in masks]
    module(**inputs).loss.backward()
    module.to(dtype)
    assert model.lm_head.weight.dtype == dtype
    assert all(mine is theirs for mine, theirs in zip(module.masks.values(), module.policy.parameters(), strict=True))
    assert all(torch.equal(mask, old) for mask, old in zip(masks, before, strict=True))
    module(**inputs).loss.backward()
    assert {mask.grad.dtype for mask in masks} == {torch.float32}


def test_a_transformers_model_with_gradient_checkpointing() -> None:
    want: list[Tensor] = []
    for active in (False, True):
        torch._dynamo.reset()
        model, inputs = tiny.build("qwen3_moe", "batched_mm").requires_grad_(True), batch()
        attached = attach(model, inputs, moe_fx.BEAM(tiny.random_artifact("qwen3_moe"), train=True), inner="aot_eager")
        with beam.gradient_checkpointing(model, active):
            (attached.model(**inputs).loss + attached.policy.regularizer()).backward()
        assert len(attached.policy.mask_logits()) == tiny.LAYERS
        gradients = [m.grad for m in attached.policy.parameters()]
        torch.testing.assert_close(gradients, want or gradients, **tolerance(torch.float32))
        want = [g for g in gradients if g is not None]


# ------------------------------------------------------------------------------------------------------- train


SITE = tiny.ARCHS["qwen3_moe"].sites[0]


def net(name: str = "qwen3_moe") -> nn.Module:
    """One layer, so that it compiles fast."""
    return tiny.build(name, "moe_fx", num_hidden_layers=1)


def text(rows: int = 12, length: int = 8) -> Tensor:
    return tiny.tokens(rows, length, seed=3)["input_ids"]


RECIPE = Recipe(steps=6, beta=2.0, rows=2, learning_rate=5e-3, warmup=2)


def same_artifacts(one: moe_fx.Artifact, other: moe_fx.Artifact) -> bool:
    return all(torch.equal(one.sites[s]["mask_router"], other.sites[s]["mask_router"]) for s in {*one.sites, *other.sites})


def test_train_switches_picks_off_and_its_artifact_serves(tmp_path: Path) -> None:
    model, seen = net(), []
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    result = train(model, text(), RECIPE, held_out=text(4), evaluate_every=3, advance=seen.append)
    assert [p.step for p in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[0].picks == {SITE: float(tiny.TOP_K)}
    assert seen[-1].mean_picks < tiny.TOP_K
    assert [p.step for p in seen if p.held_out is not None] == [3, 6]
    assert result.full_loss == pytest.approx(float(model(input_ids=text(4), labels=text(4)).loss), abs=1e-5)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    path = result.artifact.save(tmp_path / "model.moe.safetensors")
    inputs = {"input_ids": text(4), "use_cache": False}
    with torch.no_grad():
        want = compiled(model, result.policy)(**inputs).logits
        torch._dynamo.reset()
        policy = {"name": "beam", "artifact": str(path)}
        for fuse in (True, False):
            torch._dynamo.reset()
            got = compiled(model, policy, fuse_experts=fuse)(**inputs).logits
            torch.testing.assert_close(got, want, **tolerance(torch.float32))
    moe_fx.Artifact.load(path).validate(model)


class StopError(Exception):
    pass


EVERYTHING = {"target_picks": 1.5, "accumulate": 2, "distill": 0.5}


@pytest.mark.parametrize(
    ("changes", "threads"),
    [
        ({}, 1),
        ({**EVERYTHING, "freeze": "none"}, 1),
        ({**EVERYTHING, "freeze": "router", "autocast": True}, 1),
        ({**EVERYTHING, "freeze": "none", "rows": 8}, 2),
    ],
)
def test_a_run_that_is_interrupted_ends_where_one_that_is_not_ends(
    tmp_path: Path, changes: dict[str, Any], threads: int
) -> None:
    torch.set_num_threads(threads)
    recipe, file = Recipe(**{**RECIPE.__dict__, **changes}), tmp_path / "run.checkpoint"
    tokens = text(20, 64 if threads > 1 else 8)  # enough for several threads to have work

    def stop_at_5(now: beam.Progress) -> None:
        if now.step == 5:
            raise StopError

    model = net()
    want = train(model, tokens, recipe)
    interrupted = net()
    with pytest.raises(StopError):
        train(interrupted, tokens, recipe, checkpoint=file, checkpoint_every=2, advance=stop_at_5)
    resumed_model, steps = net(), []
    got = train(resumed_model, tokens, recipe, checkpoint=file, checkpoint_every=2, advance=lambda now: steps.append(now.step))
    assert steps == [5, 6]
    assert same_artifacts(got.artifact, want.artifact)
    assert got.history == want.history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))


def test_a_weight_that_nothing_flows_back_to_is_no_obstacle_to_a_checkpoint(tmp_path: Path) -> None:
    recipe, file = Recipe(**{**RECIPE.__dict__, "freeze": "none", "steps": 3}), tmp_path / "run.checkpoint"

    def with_unused_weight() -> nn.Module:
        model = net()
        model.unused = nn.Parameter(torch.ones(3))
        return model

    half = train(with_unused_weight(), text(), dataclasses.replace(recipe, steps=2), checkpoint=file)
    whole = train(with_unused_weight(), text(), recipe, checkpoint=file)
    assert len(half.history) == 2
    assert same_artifacts(whole.artifact, train(with_unused_weight(), text(), recipe).artifact)


def test_training_with_checkpointing_and_autocast_is_training_without_but_for_rounding() -> None:
    """The three are the same losses to bfloat16's precision."""
    histories = []
    for autocast, checkpointed in ((False, False), (False, True), (True, True)):
        model = net()
        with beam.gradient_checkpointing(model, checkpointed):
            result = train(model, text(), dataclasses.replace(RECIPE, autocast=autocast))
        histories.append(torch.tensor([row["loss"] for row in result.history]))
    torch.testing.assert_close(histories[1], histories[0], **tolerance(torch.float32))
    torch.testing.assert_close(histories[2], histories[0], **tolerance(torch.bfloat16))


def test_more_steps_go_on_after_the_last() -> None:
    long = train(net(), text(), RECIPE)
    short, other = (train(net(), text(), Recipe(**{**RECIPE.__dict__, "steps": 3, "seed": seed})) for seed in (0, 1))
    assert long.history[:3] == short.history
    assert other.history != short.history, "another seed is another run"


@pytest.mark.parametrize("freeze", beam.FREEZE)
def test_what_is_frozen_stays_and_the_rest_learns(freeze: str) -> None:
    model = net()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train(model, text(), Recipe(steps=2, rows=2, freeze=freeze, model_learning_rate=1e-3))
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    routers = {key for key in before if key.endswith("mlp.gate.weight")}
    assert len(routers) == 1
    expected = {"masks-only": set(), "router": set(before) - routers, "none": set(before)}[freeze]
    assert changed == expected


def test_the_controller_comes_to_its_target() -> None:
    recipe = Recipe(steps=50, beta=0.05, target_picks=1.5, rows=4, learning_rate=5e-3)
    history = train(net(), text(), recipe).history
    late = [sum(row["picks"].values()) / len(row["picks"]) for row in history[-15:]]
    assert sum(late) / len(late) == pytest.approx(1.5, abs=0.25)


def test_distillation_pulls_towards_the_full_model() -> None:
    """With nothing but distillation to learn from, the masks leave the full model less than without it."""
    model, rows = net(), text(4)
    start = moe_fx.Artifact({SITE: {"mask_router": 0.02 * torch.randn(tiny.EXPERTS, tiny.HIDDEN)}})
    full = model(input_ids=rows).logits
    kl = {}
    for weight in (0.0, 30.0):
        recipe = Recipe(steps=15, rows=4, beta=0.0, distill=weight, learning_rate=5e-3)
        policy = train(model, text(), recipe, policy=moe_fx.BEAM(start, train=True)).policy
        with torch.no_grad():
            kl[weight] = float(beam.divergence(full, compiled(model, policy)(input_ids=rows).logits))
    assert kl[30.0] < kl[0.0]


def test_a_base_artifact_goes_along_so_that_one_file_serves_both_policies(tmp_path: Path) -> None:
    base = moe_fx.Artifact({SITE: {"similarity": tiny.random_artifact("qwen3_moe").sites[SITE]["similarity"]}})
    model = net()
    artifact = train(model, text(), Recipe(steps=3, rows=2, beta=3.0, learning_rate=0.01), base=base).artifact
    assert artifact.kinds == ("mask_router", "similarity")
    assert torch.equal(artifact.sites[SITE]["similarity"], base.sites[SITE]["similarity"])
    assert artifact.sites[SITE]["mask_router"].any()
    inputs = tiny.tokens()
    with torch.no_grad():
        got = compiled(model, [moe_fx.BEAM(artifact), moe_fx.SERE(artifact, primary=1)])(**inputs).logits
    model.set_experts_implementation("batched_mm")
    with mock.patch.dict(tiny.ARCHS, {"qwen3_moe": dataclasses.replace(tiny.ARCHS["qwen3_moe"], sites=(SITE,))}):
        want = tiny.expected(model, "qwen3_moe", tiny.beam_then_sere_rule(artifact, 0.5, 1, 0.0), **inputs)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    model, file = net(), tmp_path / "run.checkpoint"

    def poison_after_5(now: beam.Progress) -> None:
        if now.step == 5:
            with torch.no_grad():
                model.model.layers[0].mlp.gate.weight.fill_(float("nan"))

    with pytest.raises(DivergedError, match=r"step 6: the loss is not finite.*checkpoint is .*run\.checkpoint") as caught:
        train(model, text(), RECIPE, checkpoint=file, checkpoint_every=2, advance=poison_after_5)
    assert caught.value.step == 6
    steps: list[int] = []
    train(net(), text(), RECIPE, checkpoint=file, advance=lambda now: steps.append(now.step))
    assert steps == [5, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": -0.1}, r"beta is -0\.1, expected a number of at least 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"target_picks": 0.0}, "target picks is 0.0"),
        ({"target_picks": 3.5}, "target picks is 3.5, but the model picks K = 3 experts"),
        ({"freeze": "all"}, "freeze is 'all', expected one of masks-only, router, none"),
        ({"distill": -1.0}, "distill is -1.0"),
        ({"learning_rate": -1.0}, "learning rate is -1.0, expected a number of at least 0"),
        ({"rows": 0}, "rows is 0"),
        ({"rows": 13}, r"tokens are \[12, 8\], expected \[at least 13 rows"),
    ],
)
def test_bad_recipes(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BeamError, match=words):
        train(net(), text(), Recipe(**{**RECIPE.__dict__, **changes}))


def test_a_model_without_a_site_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    with pytest.raises(BeamError, match="no expert routing was found in this Plain"):
        attach(Plain(), {"x": torch.randn(2, 4)})
    with pytest.raises(BeamError, match="this BEAM has train=False"):
        attach(Plain(), {"x": torch.randn(2, 4)}, moe_fx.BEAM())


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.checkpoint"
    train(net(), text(), RECIPE, checkpoint=file)
    other = net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    cases = [
        (other, text(), RECIPE, "another model"),
        (net("mixtral"), text(), RECIPE, "another model"),
        (net(), text(10), RECIPE, "another text"),
        (net(), text(), dataclasses.replace(RECIPE, beta=1.0, seed=3), r"another beta \(2.0, now 1.0\), another seed"),
    ]
    for model, rows, recipe, words in cases:
        with pytest.raises(BeamError, match=f"is the checkpoint of a run with {words}"):
            train(model, rows, recipe, checkpoint=file)
    artifact = tiny.random_artifact("qwen3_moe").save(tmp_path / "artifact.safetensors")
    with pytest.raises(BeamError, match="is no checkpoint of train-beam"):
        train(net(), text(), RECIPE, checkpoint=artifact)


# --------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "the quick brown fox jumps over the lazy dog and runs away from it".split()
    root = tmp_path_factory.mktemp("beam")
    tiny.build("qwen3_moe").save_pretrained(root / "model")
    vocabulary = {w: i + 3 for i, w in enumerate(dict.fromkeys(words))} | {"[UNK]": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(root / "model")
    lines = [" ".join(words[i:] + words[:i]) * 4 for i in range(12)]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return root


def run(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from moe_fx.cli import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def options(folder: Path, to: Path, **changes: object) -> list[object]:
    given = {"data": folder / "data.jsonl", "out": to, "steps": 4, "rows": 2, "length": 16, "held-out": 4, "every": 2} | changes
    return ["train-beam", folder / "model", *(x for key, value in given.items() for x in (f"--{key}", value))]


def test_the_command_trains_resumes_draws_and_its_artifact_is_evaluated(folder: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "model.moe.safetensors", tmp_path / "plot.png"
    half = run(*options(folder, out, steps=2, beta=3), "--json")
    assert half.exit_code == 0, half.output
    result = run(*options(folder, out, beta=3, plot=plot))
    assert result.exit_code == 0, result.output
    assert "picks per token" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    whole = run(*options(folder, tmp_path / "whole.safetensors", beta=3), "--json")
    assert json.loads(whole.stdout)["digest"] == moe_fx.Artifact.load(out).digest
    found = run("eval", folder / "model", "--data", folder / "data.jsonl", "--artifact", out, "--policy", "beam", "--batch", 2,
                "--context", 6, "--groups", 1, "--json")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["rows"][1]["picks_off_per_layer_and_step"] >= 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": -1}, "beta is -1.0"),
        ({"target-picks": 4}, "target picks is 4, but the model picks K = 3"),
        ({"freeze": "none"}, "say with --model-out where to keep them"),
        ({"freeze": "none", "model-out": __file__}, "which is a file: name a folder"),
        ({"held-out": 1000}, "are held out: give more"),
        ({"length": 4000}, "no text in the data has 4000 tokens"),
        ({"out": "/nowhere/x.safetensors"}, "there is no directory"),
    ],
)
def test_the_command_says_what_is_wrong(folder: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    result = run(*options(folder, tmp_path / "o.safetensors", **changes), "--json")
    assert result.exit_code == 1
    assert words in json.loads(result.stdout)["error"]
    assert list(tmp_path.iterdir()) == []


def test_the_command_stops_at_a_loss_that_is_not_finite_and_goes_on_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    losses = iter([3.0, 3.0, 3.0, float("nan")])

    def poisoned(logits: Tensor, tokens: Tensor) -> Tensor:
        return beam_loss(logits, tokens) * next(losses) / 3.0

    beam_loss = beam.next_token_loss
    judged = {"full_loss": mock.Mock(return_value=1.0), "evaluate": mock.Mock(return_value=(1.0, 2.0))}
    with mock.patch.multiple(beam._Run, **judged), mock.patch.object(beam, "next_token_loss", poisoned):
        result = run(*options(folder, out))
    assert result.exit_code == 1
    kept = f"the last good checkpoint is {tmp_path / 'o.safetensors.checkpoint'}"
    assert result.stderr.startswith(f"error: step 4: the loss is not finite, so training stopped; {kept}: try a lower")
    assert not out.exists()
    good = run(*options(folder, out), "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["steps"] == 4


def test_the_command_with_all_that_saves_memory(folder: Path, tmp_path: Path) -> None:
    flags = ("--gradient-checkpointing", "--autocast", "--accumulate", 2, "--distill", 0.5, "--target-picks", 1.5)
    result = run(*options(folder, tmp_path / "o.safetensors", steps=2), *flags, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["picks"].keys() == set(tiny.ARCHS["qwen3_moe"].sites)
    moe_fx.Artifact.load(tmp_path / "o.safetensors").validate(tiny.build("qwen3_moe"))


def test_the_command_refuses_a_checkpoint_of_another_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    assert run(*options(folder, out, steps=2)).exit_code == 0
    result = run(*options(folder, out, beta=7), "--json")
    assert result.exit_code == 1
    assert "is the checkpoint of a run with another beta (0.1, now 7.0): delete it" in json.loads(result.stdout)["error"]
    assert run(*options(folder, out, beta=7), "--fresh").exit_code == 0


def test_the_command_refuses_an_artifact_of_another_model(folder: Path, tmp_path: Path) -> None:
    path = tiny.random_artifact("mixtral").save(tmp_path / "mixtral.safetensors")
    renamed = moe_fx.Artifact({"model.layers.7.mlp": dict(next(iter(moe_fx.Artifact.load(path).sites.values())))}).save(path)
    result = run(*options(folder, tmp_path / "o.safetensors", init=renamed), "--json")
    assert result.exit_code == 1
    assert "does not fit" in json.loads(result.stdout)["error"]


def test_a_model_that_cannot_be_kept_is_told_and_its_masks_are_not_lost(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    given = options(folder, out, steps=2, freeze="none", **{"model-out": tmp_path / "tuned"})
    with mock.patch("transformers.PreTrainedModel.save_pretrained", side_effect=OSError(28, "No space left on device")):
        result = run(*given, "--json")
    assert result.exit_code == 1
    assert f"cannot keep the model in {tmp_path / 'tuned'}: [Errno 28] No space left" in json.loads(result.stdout)["error"]
    assert moe_fx.Artifact.load(out).kinds == ("mask_router",)
    assert run(*given, "--json").exit_code == 0, "the checkpoint holds the model, too"
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_the_command_keeps_the_model_where_it_learns(folder: Path, tmp_path: Path) -> None:
    result = run(*options(folder, tmp_path / "o.safetensors", freeze="none", **{"model-out": tmp_path / "tuned"}), "--json")
    assert result.exit_code == 0, result.output
    from transformers import AutoModelForCausalLM

    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    moe_fx.Artifact.load(tmp_path / "o.safetensors").validate(tuned)
    assert not torch.equal(tuned.lm_head.weight, tiny.build("qwen3_moe").lm_head.weight)
