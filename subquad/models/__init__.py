"""Pretrained models by name, and the text they read."""
