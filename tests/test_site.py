"""The normal form of a site's name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_fx.site import normal_name

SEGMENTS = st.sampled_from(
    ["model", "layers", "3", "mlp", "gate", "a/b", "c d", "it's", "modules", "module_list", "_orig_mod", "module"]
)


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("", ""),
        ("model.layers.3.mlp", "model.layers.3.mlp"),
        # How Dynamo spells module paths and the sources of parameters.
        ("L['self']", ""),
        ("L['self'].model.layers.3.mlp", "model.layers.3.mlp"),
        ("L['self']._modules['model']._modules['layers']._modules['3'].mlp", "model.layers.3.mlp"),
        ("L['self']._modules['layers']._modules['0']._modules['gate']._parameters['weight']", "layers.0.gate.weight"),
        ("L['self']._modules['gate']._buffers['bias']", "gate.bias"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ("L['self'].experts['first'].gate", "experts.first.gate"),
        ("getattr(L['self'].layers, '1').gate", "layers.1.gate"),
        ("getattr(getattr(L['self'].layers, '1'), 'mlp').gate", "layers.1.mlp.gate"),
        ("L['self'].blocks._modules[\"it's\"].gate", "blocks.it's.gate"),
        ("L['fn'].__closure__[0].cell_contents.layers.3", "layers.3"),
        ("L['fn'].__closure__[1].cell_contents.__closure__[0].cell_contents.layers.3", "layers.3"),
        ("L['forward'].__self__.layers.3", "layers.3"),
        ("L['args'][0].layers.3", "layers.3"),
        ("L['args'][0]._modules['layers']._modules['3'].mlp", "layers.3.mlp"),
        ("L['args'][1].mlp", "1.mlp"),
        ("G['model'].layers.3", "layers.3"),
        # Wrapper modules.
        ("_orig_mod", ""),
        ("module", ""),
        ("_orig_mod.model.layers.3.mlp", "model.layers.3.mlp"),
        ("module.layers.3.mlp", "layers.3.mlp"),
        ("_orig_mod.module.layers.3.mlp", "layers.3.mlp"),
        ("layers.3._checkpoint_wrapped_module.mlp", "layers.3.mlp"),
        ("layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.mlp", "layers.3.mlp"),
        ("layers.3.mlp._orig_mod", "layers.3.mlp"),
        # Names that only resemble a wrapper.
        ("modules.submodule.3", "modules.submodule.3"),
    ],
)
def test_normal_name(path, normal):
    assert normal_name(path) == normal


@given(st.lists(SEGMENTS))
def test_normal_form_is_its_own_normal_form(segments):
    normal = normal_name(".".join(segments))
    assert normal_name(normal) == normal


@given(st.lists(SEGMENTS), SEGMENTS)
def test_the_parent_of_a_normal_form_is_the_normal_form_of_the_parent(parent, child):
    normal_parent, normal = normal_name(".".join(parent)), normal_name(".".join([*parent, child]))
    assert normal in (normal_parent, f"{normal_parent}.{child}".strip("."))


@given(st.lists(SEGMENTS, min_size=1))
def test_every_spelling_of_a_path_has_one_normal_form(segments):
    def quoted(segment):
        return f'"{segment}"' if "'" in segment else f"'{segment}'"

    guard = "L['self']" + "".join(f"._modules[{quoted(s)}]" for s in segments)
    nested = "L['self']"
    for segment in segments:
        nested = f"getattr({nested}, {quoted(segment)})"
    assert normal_name(guard) == normal_name(nested) == normal_name(".".join(segments))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return x + self.gate(x).topk(2).values.sum(-1, keepdim=True)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Block()

    def forward(self, x):
        return x + self.module(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), torch.compile(Block(), backend="eager"), Residual()])
        self.named = nn.ModuleDict({"a/b": Block(), "it's": Block()})

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        for block in self.named.values():
            x = block(x)
        return getattr(self.layers, "0")(x)


@pytest.mark.parametrize("root", ["module", "method", "closure", "argument", "decorated"])
def test_the_paths_that_dynamo_writes_have_the_names_of_named_modules(root):
    """Whatever the compiled function calls the model, its sites have the names that ``named_modules`` gives."""
    found = []

    def record(graph_module, example_inputs):
        for node in graph_module.graph.nodes:
            if "topk" in str(node.target):
                path, _ = list(node.meta["nn_module_stack"].values())[-1]
                found.append(normal_name(path))
        return graph_module

    model, x = Model(), torch.randn(3, 8)
    torch._dynamo.reset()
    if root == "module":
        torch.compile(model, backend=record)(x)
    elif root == "method":
        torch.compile(model.forward, backend=record)(x)
    elif root == "decorated":

        def wrapped(*args):
            return Model.forward(*args)

        torch.compile(wrapped, backend=record)(model, x)
    elif root == "closure":
        torch.compile(lambda x: model(x), backend=record)(x)
    else:
        torch.compile(lambda net, x: net(x), backend=record)(model, x)
    assert found == ["layers.0", "layers.1", "layers.2", "named.a/b", "named.it's", "layers.0"]
    assert set(found) <= {normal_name(name) for name, _ in model.named_modules()}
