"""The settings of a run, group by group; `trainer.config.config` puts them together."""
