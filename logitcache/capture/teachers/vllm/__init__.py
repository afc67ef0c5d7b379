"""Teachers that run on vLLM."""
