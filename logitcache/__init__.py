"""logitcache: language-model distillation from cached teacher log-probabilities.

`logitcache.open` reads a cache and needs neither torch, nor transformers, nor vLLM. `logitcache.build` makes one;
`logitcache.recode`, `logitcache.slice` and `logitcache.merge` make one of others, without the teacher; `logitcache.push` and
`logitcache.pull` carry one elsewhere and back.
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
    from logitcache.maintenance.merge import merge
    from logitcache.maintenance.recode import recode
    from logitcache.maintenance.slice import slice_cache as slice
    from logitcache.sharing.pull import pull
    from logitcache.sharing.push import push

open = open_cache

__all__ = [
    "CachedSequence",
    "LogitCache",
    "SparseTargets",
    "UserError",
    "__version__",
    "build",
    "merge",
    "open",
    "pull",
    "push",
    "recode",
    "slice",
]

_IMPORTED_WHEN_USED = {
    "build": ("logitcache.capture.build", "build"),
    "merge": ("logitcache.maintenance.merge", "merge"),
    "pull": ("logitcache.sharing.pull", "pull"),
    "push": ("logitcache.sharing.push", "push"),
    "recode": ("logitcache.maintenance.recode", "recode"),
    "slice": ("logitcache.maintenance.slice", "slice_cache"),
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        module, attribute = _IMPORTED_WHEN_USED[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
