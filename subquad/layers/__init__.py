"""Layers: projections, rotary, gates and norms around a mechanism."""
