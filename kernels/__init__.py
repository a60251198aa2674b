"""Tensor kernels: reference.py is the specification, the other modules run it on a GPU."""

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
