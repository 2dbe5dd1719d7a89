"""Adapters that ``peft`` writes: LoRA in all its forms (``lora``) and its other methods (``methods``)."""
