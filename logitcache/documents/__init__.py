"""Documents as they lie in files: rows of columns, and the chats in them. Needs neither torch nor transformers."""
