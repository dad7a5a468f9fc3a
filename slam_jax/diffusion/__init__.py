"""The maths of diffusion: arrays in, arrays out."""
