"""File names in the folder of a saved pipeline or adapter."""

SCHEDULER_CONFIG = "scheduler_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
