"""Documents (text, prompt and completion, chat, token ids) → token sequences with a loss mask."""
