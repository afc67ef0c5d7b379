"""Other tools' formats: their datasets → a cache, a cache → theirs. One file a format."""
