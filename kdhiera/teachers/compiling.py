"""`torch.compile`, block by block: equal blocks share one compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdhiera.errors import UsageError

Block = Callable[..., Any]


def compile_blocks(blocks: Sequence[nn.Module], how: bool | str) -> list[Block]:
    """The blocks as they are to be called.

    Args:
        blocks: Transformer blocks.
        how: False leaves them as they are, True compiles them, a text is torch's `mode`.

    Returns:
        As many callables. They raise `UsageError` if this machine cannot compile.
    """
    if how is False:
        return list(blocks)
    mode = None if how is True else str(how)
    return [_explained(torch.compile(block, mode=mode)) for block in blocks]


def _explained(block: Block) -> Block:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        try:
            result: Tensor = block(*args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith("torch._"):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(
                f"torch cannot compile the teacher here ({reason[0][:200]}): install what it asks "
                "for (a C++ compiler on CPUs), or set teachers.<name>.compile=false"
            ) from error
        return result

    return call
