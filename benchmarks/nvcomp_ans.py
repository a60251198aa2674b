"""ANS of nvCOMP, for the benchmark of the exact code: nothing where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

CHUNKS = 64 << 10, 256 << 10, 1 << 20  # bytes that are coded by themselves

Timed = tuple[str, str, Callable[[], Any], int]


def ans_calls(x: Tensor) -> Iterator[Timed]:
    """(direction, method, call, bytes of the code) for encode and decode of `x`, flat floats on a GPU, with
    each size of chunks and each policy. Calls write into memory that is there.

    Raises RuntimeError where another tensor comes back.
    """
    try:
        from nvidia import nvcomp
    except ImportError:
        print("nvCOMP is not installed: pip install nvidia-nvcomp-cu13", flush=True)
        return
    words, kind = (x.view(torch.float16), "<f2") if x.itemsize == 2 else (x, "<f4")
    source = nvcomp.as_array(words)
    room, out = torch.empty(2 * x.nbytes, dtype=torch.uint8, device=x.device), torch.empty_like(words)
    policies = {"latency": nvcomp.ExecutionPolicy.LATENCY, "concurrency": nvcomp.ExecutionPolicy.CONCURRENCY}
    for chunk, (name, policy) in product(CHUNKS, policies.items()):
        codec = nvcomp.Codec(
            algorithm="ANS", data_type=kind, uncomp_chunk_size=chunk, execution_policy=policy
        )
        config = codec.compression_config(x.nbytes)
        coded = codec.encode(source, compression_config=config)
        decoding = codec.decompression_config(coded)
        decode = partial(codec.decode, coded, kind, out=out, decompression_config=decoding)
        decode()
        torch.cuda.synchronize()
        if not torch.equal(out.view(torch.uint8), x.view(torch.uint8)):
            raise RuntimeError(f"the gate fails: nvCOMP, chunks of {chunk} bytes")
        method = f"nvCOMP ANS, {chunk >> 10} KiB, {name}"
        encode = partial(codec.encode, source, out=room, compression_config=config)
        yield "encode, call", method, encode, coded.buffer_size
        yield "decode, call", method, decode, coded.buffer_size
