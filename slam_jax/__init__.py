"""slam_jax: SPLAM (arXiv 2404.13903) in JAX: distils Stable Diffusion into a 2-4 step student."""
