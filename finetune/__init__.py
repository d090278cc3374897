"""finetune: adapt open-weight language models to your domain, on your hardware, from one recipe."""

__version__ = "0.1.0"
