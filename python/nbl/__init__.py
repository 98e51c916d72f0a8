"""Neural Block Linearization: attention layers of a pretrained model replaced by linear maps.

    cal = nbl.calibrate(model, batches)
    nbl.linearize(model, cal, layers=12)
    model.save_pretrained(folder)

Importing nbl registers its model types with transformers, so that afterwards
``AutoModelForCausalLM.from_pretrained(folder)`` reads such a checkpoint.
"""

from __future__ import annotations

from nbl_kernels import __version__

from . import models, tasks
from .calibration import Calibration, LayerScore, calibrate
from .heal import Healed, heal
from .layers.cache import CacheBytes, cache_bytes
from .layers.spec import linearized_layers, windowed_layers
from .linearize import drop, linearize, restore
from .memory import Memory
from .optimize import optimize, weight_bytes
from .perplexity import Perplexity, perplexity
from .pipeline import Compressed, compress
from .plan import Plan, plan
from .runner import DraftReport, Runner, draft_model
from .upstream import warn_untested
from .window import Window

__all__ = [
    "CacheBytes",
    "Calibration",
    "Compressed",
    "DraftReport",
    "Healed",
    "LayerScore",
    "Memory",
    "Perplexity",
    "Plan",
    "Runner",
    "Window",
    "__version__",
    "cache_bytes",
    "calibrate",
    "compress",
    "draft_model",
    "drop",
    "heal",
    "linearize",
    "linearized_layers",
    "models",
    "optimize",
    "perplexity",
    "plan",
    "restore",
    "tasks",
    "weight_bytes",
    "windowed_layers",
]

warn_untested()
