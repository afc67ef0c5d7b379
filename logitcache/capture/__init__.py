"""Making a cache: corpus → teacher → shards. Needs torch, transformers and an engine."""
