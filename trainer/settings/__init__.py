"""The settings of a run, group by group; `trainer.config` puts them together."""
