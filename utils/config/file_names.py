"""File names in the folder of a saved pipeline."""

SCHEDULER_CONFIG = "scheduler_config.json"
