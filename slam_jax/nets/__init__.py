"""Stable Diffusion's networks as Flax Linen modules, NHWC."""
