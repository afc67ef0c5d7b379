"""logitcache: language-model distillation from cached teacher log-probabilities.

`logitcache.open` reads a cache and needs neither torch, nor transformers, nor vLLM. `logitcache.build` makes one.
"""

from typing import TYPE_CHECKING, Any

from logitcache.cache import LogitCache, open_cache
from logitcache.errors import UserError
from logitcache.format.sequences import CachedSequence
from logitcache.format.targets import SparseTargets
from logitcache.version import __version__

if TYPE_CHECKING:
    from logitcache.capture.build import build

open = open_cache

__all__ = ["CachedSequence", "LogitCache", "SparseTargets", "UserError", "__version__", "build", "open"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from logitcache.capture.build import build

        return build
    raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
