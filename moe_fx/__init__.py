"""moe_fx: find the routing of a Mixture-of-Experts model in its FX graph and rewrite it to SERE or BEAM.

    torch.compile(model, backend="moe_sparse", options={"policy": moe_fx.SERE("model.moe.safetensors", primary=2)})

Importing this package is cheap: Triton, transformers and Inductor are imported where they are first needed.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    # A source checkout: moe_fx.passes is ../passes and moe_fx.kernels is ../kernels.
    __path__.append(str(_root))

import moe_fx.ops  # noqa: E402, F401  (defines torch.ops.moe_fx)
from moe_fx.artifacts import Artifact, ArtifactError  # noqa: E402
from moe_fx.calibrate import calibrate  # noqa: E402  (bound here so that the function, not the module, has the name)
from moe_fx.policy import BEAM, SERE, Policy, PolicyError, TopK  # noqa: E402
from moe_fx.site import Site, Skip  # noqa: E402
from moe_fx.stats import SiteStats, reset_stats, stats  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BEAM",
    "SERE",
    "Artifact",
    "ArtifactError",
    "Policy",
    "PolicyError",
    "Report",
    "Site",
    "SiteStats",
    "Skip",
    "TopK",
    "calibrate",
    "explain",
    "last_report",
    "reset_stats",
    "rewrite_exported",
    "stats",
]

# Names that pull in more than torch, and the modules that define them.
_LAZY = {
    "Report": "moe_fx.report",
    "explain": "moe_fx.backend",
    "last_report": "moe_fx.backend",
    "rewrite_exported": "moe_fx.exported",
}


_SUBPACKAGES = ("beam", "vllm")


def __getattr__(name: str) -> object:
    import importlib

    if name in _SUBPACKAGES:
        return importlib.import_module(f"moe_fx.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'moe_fx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
