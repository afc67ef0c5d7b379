"""logitcache: language-model distillation from cached teacher log-probabilities.

`logitcache.open` reads a cache and needs neither torch, nor transformers, nor vLLM. Every command is a function of the same
name and options (`import_logits` for `logitcache import`): `plan`, `build` and `finish` make a cache; `info`, `view` and
`verify` look at one; `recode`, `slice` and `merge` make one of others, without the teacher; `push` and `pull` carry one
elsewhere and back; `import_logits` and `export` know other tools' formats.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logitcache.errors import UserError
from logitcache.format.sequences import CachedSequence
from logitcache.format.targets import SparseTargets
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.version import __version__

if TYPE_CHECKING:
    from logitcache.capture.build import build
    from logitcache.capture.estimate.estimate import plan
    from logitcache.capture.finish import finish
    from logitcache.capture.verify import verify
    from logitcache.exchange.exporting import export
    from logitcache.exchange.importing import import_logits
    from logitcache.maintenance.info import info
    from logitcache.maintenance.merge import merge
    from logitcache.maintenance.recode import recode
    from logitcache.maintenance.slice import slice_cache
    from logitcache.report.page import view
    from logitcache.sharing.pull import pull
    from logitcache.sharing.push import push

    slice = slice_cache

open = open_cache

_IMPORTED_WHEN_USED = {
    "build": ("logitcache.capture.build", "build"),
    "export": ("logitcache.exchange.exporting", "export"),
    "finish": ("logitcache.capture.finish", "finish"),
    "import_logits": ("logitcache.exchange.importing", "import_logits"),
    "info": ("logitcache.maintenance.info", "info"),
    "merge": ("logitcache.maintenance.merge", "merge"),
    "plan": ("logitcache.capture.estimate.estimate", "plan"),
    "pull": ("logitcache.sharing.pull", "pull"),
    "push": ("logitcache.sharing.push", "push"),
    "recode": ("logitcache.maintenance.recode", "recode"),
    "slice": ("logitcache.maintenance.slice", "slice_cache"),
    "verify": ("logitcache.capture.verify", "verify"),
    "view": ("logitcache.report.page", "view"),
}

# Without `open` and `slice`: `from logitcache import *` leaves Python's own alone.
__all__ = [
    "CachedSequence",
    "LogitCache",
    "SparseTargets",
    "UserError",
    "__version__",
    "build",
    "export",
    "finish",
    "import_logits",
    "info",
    "merge",
    "plan",
    "pull",
    "push",
    "recode",
    "verify",
    "view",
]


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        module, attribute = _IMPORTED_WHEN_USED[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'logitcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "open", "slice"])
