"""The student: its model, head, adapters, tokenizer and objective."""
