"""The data of a run: caches → batches."""
