"""Do caches belong together? Their ids must mean the same, and none may count twice."""

from __future__ import annotations

from collections.abc import Sequence

from logitcache import LogitCache, UserError


def check_belong_together(caches: Sequence[LogitCache]) -> None:
    """Raises UserError for an empty cache, one that stands there twice, and other vocabularies or tokenizers than the first's.

    Caches that do not say which tokenizer their ids are of are compared by their vocabulary's size alone.
    """
    known: dict[str, str] = {}
    for cache in caches:
        if not len(cache):
            raise UserError(f"{cache.path} is an empty cache: leave it out")
        if cache.identity in known:
            raise UserError(
                f"{cache.path} is the same cache as {known[cache.identity]}: name it once; "
                "a weight (CACHE:2) makes its rows come more often"
            )
        known[cache.identity] = cache.path
        _check_same_ids(caches[0], cache)


def _check_same_ids(first: LogitCache, cache: LogitCache) -> None:
    tokenizers = [one.manifest.fingerprint.get("tokenizer") or {} for one in (first, cache)]
    for what, name in (("vocabulary", "vocabulary_sha256"), ("merges", "merges_sha256")):
        ours, theirs = (tokenizer.get(name) for tokenizer in tokenizers)
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{first.path} and {cache.path} were made with different tokenizers ({what} {str(ours)[:12]}… and "
                f"{str(theirs)[:12]}…): token ids must mean the same in all caches of a run. Train on one of them, or "
                "build the other with a teacher that has this tokenizer"
            )
    if first.vocab_size != cache.vocab_size:
        raise UserError(
            f"{first.path} is over {first.vocab_size} token ids and {cache.path} over {cache.vocab_size}: all caches "
            "of a run need teachers with the same number of logits"
        )
