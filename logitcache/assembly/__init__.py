"""How any command makes a cache: workspace, resume, card, manifest."""
