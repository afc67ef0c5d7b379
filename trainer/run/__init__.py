"""One run: prepared, trained, saved, resumed."""
