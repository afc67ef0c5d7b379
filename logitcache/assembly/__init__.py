"""The one resumable way in which every command makes a cache: workspace, plan, resume, write, finalize, card."""
