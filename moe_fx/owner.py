"""The modules behind a graph's inputs, which tell what the graph cannot: full names, and whose experts follow."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor, nn
from torch.fx.node import Node

from moe_fx.passes.graph import source_name
from moe_fx.site import Layers, Site, normal_name
from moe_fx.tables import modules_on_stack, parameter_name, roots_on_stack, tensors


class SiteOwner(Protocol):
    """What the pipeline asks of the modules behind a graph."""

    roots: list[nn.Module]

    def layers(self, weight: Node, site: Site) -> Layers:
        """Which layers run the graph that ``weight`` (a router's) is an input of."""
        ...

    def expert_block(self, weight: Node, num_experts: int) -> str | None:
        """The smallest module around a router's weight that holds ``num_experts`` experts, as the graph names it."""
        ...

    def may_overwrite(self, weight: Node, num_experts: int) -> bool:
        """Whether the code of that module may lose one of two picks of one token on one expert."""
        ...


class GraphOwner:
    """No modules: the graph is of a whole model and tells everything itself, as an exported program does."""

    def __init__(self) -> None:
        self.roots: list[nn.Module] = []

    def layers(self, weight: Node, site: Site) -> Layers:
        """One layer: the graph is nobody else's."""
        return Layers()

    def expert_block(self, weight: Node, num_experts: int) -> str | None:
        """None: what the graph does not show cannot be known."""
        return None

    def may_overwrite(self, weight: Node, num_experts: int) -> bool:
        """True: the code is not known."""
        return True


class ModuleOwner:
    """The modules behind one Dynamo graph's inputs."""

    def __init__(self, roots: list[nn.Module] | None = None, known_sites: frozenset[str] = frozenset()) -> None:
        self.roots = roots_on_stack() if roots is None else roots
        self._known_sites = known_sites

    def layers(self, weight: Node, site: Site) -> Layers:
        """Which layers of which root run the graph that ``weight`` (a router's) is an input of."""
        tensor, relative = _real_tensor(weight), normal_name(source_name(weight) or "")
        candidates = [c for root in self.roots if (c := _layers_in(root, tensor, relative)) is not None]
        # an artifact's site names tell which of several nested modules the user calls the model
        named = [c for c in candidates if self._known_sites.intersection(c.names(site.name))]
        return next(iter([*named, *candidates]), Layers())

    def expert_block(self, weight: Node, num_experts: int) -> str | None:
        """The smallest module around a router's weight that holds ``num_experts`` experts, as the graph names it.

        Where Dynamo compiles the router's own forward, that is the module that owns the router: the graph's root.
        """
        found = self._expert_block(weight, num_experts)
        return found[0] if found is not None else None

    def may_overwrite(self, weight: Node, num_experts: int) -> bool:
        """Whether that module's code writes rows to places (``out[rows] += expert(x[rows])``), or cannot be read.

        Where a token has one expert twice, only one of the two would be written.
        """
        found = self._expert_block(weight, num_experts)
        kinds: set[type] = {type(module) for module in found[1].modules()} if found is not None else set()
        return found is None or any(map(_writes_to_places, kinds))

    def _expert_block(self, weight: Node, num_experts: int) -> tuple[str, nn.Module] | None:
        tensor, relative = _real_tensor(weight), normal_name(source_name(weight) or "")
        for root in self.roots:
            full = parameter_name(root, tensor) if tensor is not None else None
            if full is None or not (full == relative or full.endswith("." + relative)):
                continue
            prefix = full[: len(full) - len(relative)].strip(".")
            path = relative
            while path:
                path = path.rpartition(".")[0]
                block = _submodule(root, ".".join(p for p in (prefix, path) if p))
                if block is not None and _holds_experts(block, tensor, num_experts):
                    return path, block
            block = _submodule(root, prefix.rpartition(".")[0]) if prefix else None
            if block is not None and _holds_experts(block, tensor, num_experts):
                return "", block
        return None


def _real_tensor(placeholder: Node) -> Tensor | None:
    """The tensor that was passed for a Dynamo graph input while it was traced."""
    graph_argument = placeholder.meta.get("grapharg")
    example = getattr(graph_argument, "example", None)
    return example if isinstance(example, Tensor) else None


def _layers_in(root: nn.Module, tensor: Tensor | None, relative: str) -> Layers | None:
    full = parameter_name(root, tensor) if tensor is not None else None
    if full is None or tensor is None:
        return None
    if full == relative:
        return Layers()
    if not full.endswith("." + relative):
        return None
    prefix = full.removesuffix("." + relative)
    kind = _kinds(root, prefix, relative)
    twins = [
        normal_name(name) for name, p in tensors(root)
        if normal_name(name).endswith("." + relative) and p.shape == tensor.shape
    ]  # fmt: skip
    prefixes = [t.removesuffix("." + relative) for t in twins]
    return Layers(tuple(p for p in prefixes if _kinds(root, p, relative) == kind), shared=True)


def _kinds(root: nn.Module, prefix: str, relative: str) -> list[type]:
    """The classes of a layer and of what owns its router's weight: layers may route in another way with equal names."""
    return [type(_submodule(root, path)) for path in (prefix, f"{prefix}.{relative}".rpartition(".")[0])]


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    """A submodule by its normal-form path, through wrapper modules that the normal form leaves out."""
    return {normal_name(name): module for name, module in root.named_modules(remove_duplicate=False)}.get(path)


def _holds_experts(block: nn.Module, router_weight: Tensor | None, num_experts: int) -> bool:
    """Whether a module holds ``num_experts`` experts: stacked weights, or a list of as many modules.

    Weights stacked along their rows, [E * I, H], count where their module also says the number of its experts.
    """
    for name, module in block.named_modules():
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) == num_experts
        if listed and "expert" in name.lower():  # a list of layers may be as long
            return True
        own = [] if isinstance(module, nn.modules.conv._ConvNd) else [*module.parameters(recurse=False)]
        if any(p.dim() == 3 and p.shape[0] == num_experts for p in own if p is not router_weight):
            return True
        says = any("num_experts" in key and number == num_experts for key, number in vars(module).items())
        in_rows = [p.dim() == 2 and p.shape[0] > num_experts and p.shape[0] % num_experts == 0 for p in own]
        if says and len(own) >= 2 and all(in_rows):
            return True
    return False


def uncompiled_routers() -> list[str]:
    """Paths of modules with a list of experts whose forward selects, and is running as it was written.

    While a graph of one of their experts is compiled, that means that Dynamo gave up their own code.
    """
    root = next(iter(roots_on_stack()), nn.Module())
    running = {id(m) for m, code in modules_on_stack() if getattr(type(m).forward, "__code__", None) is code}
    return [name for name, module in routers_with_lists(root) if id(module) in running]


def routers_with_lists(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules below ``root`` whose code selects and which hold a list of experts, and their paths."""
    for name, module in root.named_modules():
        kind: type = type(module)
        if _lists_experts(module) and _selects(kind):
            yield normal_name(name), module


def _lists_experts(block: nn.Module) -> bool:
    lists = [child for child in block.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1]
    return any(len({type(module) for module in children.children()}) == 1 for children in lists)


@functools.cache
def _selects(kind: type) -> bool:
    """Whether the class that a module's ``forward`` is from calls ``topk`` or the like."""
    base = next(base for base in kind.__mro__ if "forward" in vars(base))
    methods = (function for function in vars(base).values() if inspect.isfunction(function))
    calls = (word.func for function in methods for word in _said(function) if isinstance(word, ast.Call))
    return any(isinstance(f, ast.Attribute) and f.attr in ("topk", "argsort", "argmax", "sort") for f in calls)


@functools.cache
def _writes_to_places(kind: type) -> bool:
    """Whether a method of a module's class writes rows to computed places without adding them up, or cannot be read."""
    return any(map(_is_write_to_places, _statements(kind)))


def _statements(kind: type) -> Iterator[ast.AST | None]:
    """Everything that the methods of a class say, but for torch's own; None for a method whose source is not known."""
    hidden: set[str] = set()  # methods that a class before this one in the order of inheritance has in their place
    for base in kind.__mro__:
        methods = {} if base.__module__.startswith("torch.") else {k: f for k, f in vars(base).items() if inspect.isfunction(f)}
        for function in (f for name, f in methods.items() if name not in hidden):
            said = _said(function)
            yield from said
            for helper in _helpers(function, said):
                yield from _said(helper)
            calls_hidden = any(isinstance(word, ast.Name) and word.id == "super" for word in said)
            hidden |= set() if calls_hidden else {function.__name__}


def _said(function: Callable[..., object]) -> list[ast.AST | None]:
    """Everything that a function says; one None where its source is not known."""
    try:
        return [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))]
    except (OSError, TypeError, SyntaxError):
        return [None]


def _helpers(function: Callable[..., object], said: list[ast.AST | None]) -> list[Callable[..., object]]:
    """The plain functions that a method calls by name, but for torch's own."""
    names = {word.func.id for word in said if isinstance(word, ast.Call) and isinstance(word.func, ast.Name)}
    known = getattr(function, "__globals__", {})
    found = [known[name] for name in sorted(names) if inspect.isfunction(known.get(name))]
    return [helper for helper in found if not helper.__module__.startswith("torch.")]


def _is_write_to_places(statement: ast.AST | None) -> bool:
    if statement is None:
        return True
    if isinstance(statement, ast.Call) and isinstance(statement.func, ast.Attribute):
        if statement.func.attr == "argmax":  # of who picked an expert: the first pick alone
            return any(isinstance(part, ast.Compare) for part in ast.walk(statement.func.value))
        adds = any(k.arg == "accumulate" for k in statement.keywords)
        return statement.func.attr in ("index_copy_", "index_put_", "index_put", "index_copy") and not adds
    # not a plain assignment, which is how buffers are filled, unless it reads the same places
    target: ast.expr | None = statement.target if isinstance(statement, ast.AugAssign) else None
    if isinstance(statement, ast.Assign) and _reads(statement.value, statement.targets[0]):
        target = statement.targets[0]
    places = ast.walk(target.slice) if isinstance(target, ast.Subscript) else ()
    return any(isinstance(place, (ast.Name, ast.Call, ast.Attribute)) for place in places)


def _reads(value: ast.AST, target: ast.expr) -> bool:
    """Whether an expression reads what is assigned: ``out[rows]`` in ``out[rows] = out[rows] + y``."""
    return isinstance(target, ast.Subscript) and ast.unparse(target) in {
        ast.unparse(part) for part in ast.walk(value) if isinstance(part, ast.Subscript)
    }
