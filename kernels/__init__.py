"""Tensor kernels: reference.py is the specification, the other modules run it on a GPU."""
