"""Imports run one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("moe_fx", "passes", "kernels")

# Who may import whom inside the project.  A file is named by its path without the suffix, those in moe_fx/ without the
# folder; ``passes/*`` stands for all files in a folder.
LOW = {"site", "artifacts", "policy", "stats", "tables", "ops", "report"}
MIDDLE = LOW | {"passes/*", "owner"}
HIGH = MIDDLE | {"pipeline", "backend", "apart", "inner"}
ALLOWED: dict[str, set[str]] = {
    "kernels/*": {"kernels/*"},
    "apart": set(),
    "site": set(),
    "stats": set(),
    "artifacts": {"site"},
    "policy": {"site", "artifacts"},
    "tables": {"site", "artifacts", "policy"},
    "ops": {"kernels/*"},
    "report": {"site", "artifacts", "policy", "stats"},
    "passes/*": {"site", "artifacts", "policy", "stats", "tables", "ops", "passes/*"},
    "owner": LOW | {"passes/*"},
    "pipeline": MIDDLE,
    "inner": MIDDLE | {"pipeline"},
    "backend": MIDDLE | {"pipeline", "apart", "inner"},
    "exported": MIDDLE | {"pipeline"},
    "similarity": {"kernels/reference"},
    "calibrate": HIGH | {"kernels/reference", "similarity"},
    "inputs": set(),
    "evaluate": HIGH,
    "bench": HIGH | {"evaluate"},
    "tune": HIGH | {"kernels/reference", "evaluate"},
    "beam": HIGH,
    "hf": HIGH,
    "vllm/*": HIGH | {"vllm/*"},
    "testing": HIGH | {"kernels/*"},
    "cli": HIGH | {"__init__", "calibrate", "inputs", "evaluate", "bench", "tune", "beam", "hf", "testing", "vllm/*"},
    "__init__": HIGH | {"exported", "calibrate", "beam", "hf"},
}

# Which files may import what is not in the standard library.
EXTERNAL = {
    "torch": {"*"},
    "triton": {"kernels/*", "testing"},
    "numpy": {"kernels/cpu", "kernels/experts_cpu", "testing"},
    "safetensors": {"artifacts", "inputs"},
    "rich": {"report", "cli", "calibrate", "beam"},
    "matplotlib": {"report", "cli"},
    "transformers": {"hf", "cli", "inputs", "evaluate", "bench"},
    "typer": {"cli"},
    "lm_eval": {"cli"},
    "vllm": {"vllm/*"},
    "torch_tensorrt": {"inner"},
    "prometheus_client": {"vllm/*"},
    "hypothesis": {"testing"},
}


def source_files():
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def unit_of(path):
    """``passes/reroute`` for passes/reroute.py, ``policy`` for moe_fx/policy.py, ``vllm/plugin`` in a subpackage."""
    return path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("moe_fx/")


def folder_of(unit):
    """``passes/reroute`` and ``passes`` itself -> ``passes/*``."""
    return f"{unit.partition('/')[0]}/*"


def matches(unit, patterns):
    return not {unit, folder_of(unit), "*"}.isdisjoint(patterns)


def rule_for(unit):
    """The units that one unit may import, or None where no rule covers it."""
    return ALLOWED.get(folder_of(unit) if "/" in unit else unit)


def unit_of_module(module):
    """``moe_fx.passes.reroute`` -> ``passes/reroute``; ``moe_fx`` itself -> ``__init__``."""
    return module.removeprefix("moe_fx").removeprefix(".").replace(".", "/") or "__init__"


def is_module(module):
    places = [ROOT / "moe_fx" / unit_of_module(module), ROOT / unit_of_module(module)]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def imports_of(source, package="moe_fx"):
    """The full names of all modules that a source imports anywhere in it, by statement or by ``import_module``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in (alias.name for alias in node.names):
                if is_ours(base) and is_module(f"{base}.{name}"):
                    found.add(f"{base}.{name}")
                elif (base, name) != ("moe_fx", "__version__"):  # a fact, not a dependency
                    found.add(base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return found


def is_ours(module):
    return module.partition(".")[0] == "moe_fx"


def wrong_imports(unit, source):
    """What a unit imports against the rules, as sentences."""
    package = ".".join(["moe_fx", *unit.split("/")[:-1]])
    allowed = rule_for(unit)
    if allowed is None:
        return [f"no rule covers {unit}: add it to ALLOWED, with what it may import"]
    wrong = []
    for module in sorted(imports_of(source, package)):
        top = module.partition(".")[0]
        if top in ("passes", "kernels"):
            wrong.append(f"{unit} imports {module}: write moe_fx.{module}")
        elif is_ours(module) and not matches(unit_of_module(module), allowed):
            wrong.append(f"{unit} must not import {module}: it may import {', '.join(sorted(allowed)) or 'nothing'}")
        elif not is_ours(module) and top not in sys.stdlib_module_names and not matches(unit, EXTERNAL.get(top, ())):
            wrong.append(f"{unit} must not import {module}: see EXTERNAL")
    return wrong


@pytest.mark.parametrize("path", source_files(), ids=unit_of)
def test_imports_run_one_way(path):
    assert wrong_imports(unit_of(path), path.read_text()) == []


def test_the_allowed_arrows_hold_no_circle():
    """If units may import each other, one by way of others or not, no order of them is left to find here."""
    rule_names = {unit: unit if unit in ALLOWED else folder_of(unit) for units in ALLOWED.values() for unit in units}
    above = {unit: {rule_names[other] for other in allowed} - {unit} for unit, allowed in ALLOWED.items()}
    done: set[str] = set()
    while above:
        free = {unit for unit, needs in above.items() if needs <= done}
        assert free, f"these may import each other: {sorted(above)}"
        done |= free
        above = {unit: needs for unit, needs in above.items() if unit not in free}


@pytest.mark.parametrize(
    ("unit", "source", "wrong"),
    [
        ("kernels/sere_reroute", "import torch, triton\nfrom moe_fx.kernels import reference\nimport math", 0),
        ("kernels/sere_reroute", "from moe_fx.policy import SERE", 1),
        ("kernels/sere_reroute", "from moe_fx import policy", 1),
        ("kernels/sere_reroute", "import moe_fx", 1),
        ("kernels/sere_reroute", "import kernels.reference", 1),
        ("kernels/sere_reroute", "import numpy", 1),
        ("kernels/sere_reroute", "def load():\n    import transformers", 1),
        ("kernels/sere_reroute", "from ..policy import SERE", 1),
        ("kernels/sere_reroute", "from . import reference", 0),
        ("passes/reroute", "from moe_fx.passes.graph import users\nfrom moe_fx import ops, site", 0),
        ("passes/reroute", "from moe_fx.kernels import reference\nimport triton\nimport moe_fx.pipeline", 3),
        ("artifacts", "from moe_fx import __version__\nfrom moe_fx.site import Site", 0),
        ("artifacts", "from moe_fx import __version__, calibrate", 1),
        ("policy", "import importlib\nimportlib.import_module('moe_fx.backend')", 1),
        ("pipeline", "import moe_fx.passes.reroute, moe_fx.backend", 1),
        ("vllm/plugin", "import vllm\nfrom moe_fx.vllm import ops\nfrom moe_fx import pipeline", 0),
        ("vllm/plugin", "import transformers", 1),
        ("newcomer", "", 1),
        ("elsewhere/newcomer", "", 1),
    ],
)
def test_the_reader_of_imports_sees_wrong_ones(unit, source, wrong):
    assert len(wrong_imports(unit, source)) == wrong


def test_every_folder_has_files():
    """An empty parametrisation would pass everything above."""
    assert {path.relative_to(ROOT).parts[0] for path in source_files()} == set(FOLDERS)


def test_no_folder_shadows_a_package_and_nothing_is_called_utils():
    """A top-level importable ``kernels`` would shadow the package of that name, which transformers imports."""
    forbidden = ["passes/__init__.py", "kernels/__init__.py", *(f"{folder}/utils.py" for folder in FOLDERS)]
    assert [name for name in forbidden if (ROOT / name).exists()] == []
    assert [path for path in source_files() if path.stem in ("utils", "util", "helpers")] == []


NEWLY_IMPORTED = """
import sys
import torch
before = set(sys.modules)
import moe_fx
print(*sorted(set(sys.modules) - before))
"""


@pytest.fixture(scope="module")
def newly_imported():
    """The modules that ``import moe_fx`` brings into a process that has torch."""
    command = [sys.executable, "-c", NEWLY_IMPORTED]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_imports_nothing_heavy(newly_imported):
    heavy = ("triton", "transformers", "vllm", "torch._inductor", "torch._dynamo", "matplotlib", "rich", "numpy")
    assert [name for name in newly_imported if name.startswith(heavy)] == []


def test_importing_the_package_costs_little_beyond_torch(newly_imported):
    assert "moe_fx" in newly_imported
    ours = {"moe_fx", "moe_fx.site", "moe_fx.artifacts", "moe_fx.policy", "moe_fx.calibrate", "moe_fx.stats", "moe_fx.ops",
            "moe_fx.apart", "moe_fx.similarity", "moe_fx.kernels", "moe_fx.kernels.baselines", "moe_fx.kernels.reference",
            "moe_fx.kernels.cpu", "moe_fx.kernels.experts_cpu"}  # fmt: skip
    others = [name for name in newly_imported if name.partition(".")[0] not in sys.stdlib_module_names]
    assert set(others) <= ours, "import these where they are first needed"


def run_from_the_checkout(program, *path):
    """Run a program with the given folders first on the path, as if the package were not installed."""
    start = f"import sys; sys.path[:0] = {[str(entry) for entry in path]}\n" + (
        "sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]\n"
    )
    command = [sys.executable, "-c", start + program]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout.split()


def test_a_checkout_works_without_being_installed():
    program = "import moe_fx, moe_fx.kernels.reference as r, moe_fx.passes.graph as g; print(r.__file__, g.__file__)"
    expected = [ROOT / "kernels" / "reference.py", ROOT / "passes" / "graph.py"]
    assert run_from_the_checkout(program, ROOT) == [str(path) for path in expected]


def test_a_package_called_kernels_is_found_although_the_checkout_is_on_the_path(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert run_from_the_checkout("import moe_fx, kernels; print(kernels.__file__)", ROOT, tmp_path) == [
        str(tmp_path / "kernels" / "__init__.py")
    ]
