"""x"""


def sd(b): ...


sdxl = sdxl_lora = pixels = peers = sd


def cells(*a):
    return []
