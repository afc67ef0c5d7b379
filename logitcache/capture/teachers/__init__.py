"""Token sequences → SparseTargets: one file per engine."""
