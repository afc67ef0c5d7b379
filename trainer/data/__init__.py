"""What a run learns from: caches → batches."""
