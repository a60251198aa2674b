"""Tensor kernels: reference.py is the specification, the other modules run it on a GPU.

Where to begin reading:

- Formats and arithmetic: `reference`. Every other module names the function there that it must equal.
- Groups of 2, 4 or 8 bits: `groups`, with device code in `_pairs` (two bfloat16 numbers at a time) and
  `_stochastic` (rounding with noise). Lossless exponents: `exact`. Codes of a width per channel: `bits`.
- Projection into a video surface: `surface` checks (`_arguments`) and calls `_project`; back through
  `_restore`, whose first pass is `_center`, with the GEMM of `_restore_hopper` where the GPU is one.
  `_surface` knows positions in a surface, `_tiles` cuts the work.
- `multiply`: products with a factor for each row or column, which `torch.mul` specifies.
- `_launch`: whether a call runs on a GPU, in the interpreter or in the reference; how results lie in memory.

What was tried and measured is in benchmarks/log.md.
"""

if __name__ == "kernels":
    # Python was started in the repository root and found this folder in place of the Hugging Face package
    # `kernels`, which `import transformers` needs: put that one, where it is installed, in our place.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from os.path import join, realpath

    here = realpath(__file__)
    spec = PathFinder.find_spec(
        "kernels", [p for p in sys.path if realpath(join(p, "kernels", "__init__.py")) != here]
    )
    if spec is not None and spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])
