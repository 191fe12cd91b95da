"""Cases of a whole block of V2-Lite, decoding: norms, latent attention over 1k cached positions, the mixture.

The floor is the bytes that a step touches: the block's weights, of its experts the distinct ones that the
tokens chose, and the cache. Four blocks take turns, so none finds its weights in L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case
from benchmarks.kernels.invariance import fixed
from shoal.batch import Batch, KVView
from shoal.config.families import family
from shoal.model.rope import Angles, RotaryEmbedding
from shoal.model.transformer import Block

BLOCKS, CONTEXT, PAGE = 4, 1024, 64


@torch.inference_mode()
def _run(block: Block, x_TD: Tensor, y_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
    """The block's choices of experts, its work done."""
    routing = block(x_TD, y_TD, angles, batch, None)[2]
    assert routing is not None
    return routing.experts_TK


def cases() -> Iterator[Case]:
    config, dtype = family("deepseek-v2-lite").config, torch.bfloat16
    generator = torch.Generator("cuda").manual_seed(0)
    blocks = [Block(config, 1 + at, device=torch.device("cuda"), dtype=dtype).eval() for at in range(BLOCKS)]
    with torch.no_grad():
        for parameter in (p for block in blocks for p in block.parameters()):
            parameter.normal_(std=0.02, generator=generator)
    rotary = RotaryEmbedding(config.rope, config.attention.rope_dim, device=torch.device("cuda"))
    for tokens in (1, 8, 32, 128):
        rows = CONTEXT // PAGE
        shape = (tokens * rows, PAGE, *config.attention.cache_shape)
        pages = tuple(
            torch.randn(shape, dtype=dtype, device="cuda", generator=generator) for _ in range(1 + BLOCKS)
        )
        table_SB = torch.arange(tokens * rows, dtype=torch.int32, device="cuda").view(tokens, rows)
        batch = Batch(
            ids_T=torch.zeros(tokens, dtype=torch.int64, device="cuda"),
            positions_T=torch.full((tokens,), CONTEXT - 1, device="cuda"),
            cu_seqlens_S1=torch.arange(tokens + 1, dtype=torch.int32, device="cuda"),
            max_seqlen=1,
            kv=KVView(
                pages=pages,
                slots_T=(table_SB[:, -1].long() + 1) * PAGE - 1,
                block_table_SB=table_SB,
                context_lens_S=torch.full((tokens,), CONTEXT, dtype=torch.int32, device="cuda"),
                max_context_len=CONTEXT,
                has_prefix=True,
            ),
        )
        x_TD, y_TD = torch.randn(2, tokens, config.hidden_size, device="cuda", dtype=dtype).unbind(0)
        angles = rotary(batch.positions_T)

        moved = 0.0
        for block in blocks:
            chosen = _run(block, x_TD, y_TD, angles, batch).unique().numel()
            for name, parameter in block.named_parameters():
                stacked = ".experts." in name and "shared" not in name
                moved += parameter.nbytes * (chosen / parameter.shape[0] if stacked else 1) / BLOCKS
        moved += tokens * CONTEXT * pages[0][0, 0].nbytes
        calls: dict[str, Sequence[Callable[[], object]]] = {
            "ours": [partial(_run, block, x_TD, y_TD, angles, batch) for block in blocks],
            "batch-invariant": [partial(fixed, _run, block, x_TD, y_TD, angles, batch) for block in blocks],
        }
        yield Case(
            "block",
            f"{tokens} tokens, V2-Lite, {CONTEXT} cached",
            0.0,
            moved,
            calls,
            target="1.7 x floor" if tokens == 1 else "",
        )
