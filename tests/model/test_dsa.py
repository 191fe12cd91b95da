"""Laws of sparse attention in the model: what is chosen is read and nothing else, cached or not.

Parity with transformers, cached too, is in test_parity.py; serving in tests/engine.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.config.families import tiny
from shoal.config.model import IndexerConfig, MLAConfig, ModelConfig
from shoal.model.mla import MLA
from shoal.model.transformer import Transformer
from tests.model import parts

EXACT = 1e-12  # of float64, as in test_mla.py
CLOSE = 1e-5  # where steps differ in size: gates are float32's, and round by it; 1e-5 is 170 times 2^-24


def _config(top_k: int | None) -> ModelConfig:
    config = tiny("deepseek-v3.2")
    assert isinstance(config.attention, MLAConfig)
    indexer = None if top_k is None else IndexerConfig(8, 16, top_k)
    return replace(config, attention=replace(config.attention, indexer=indexer), num_nextn_predict_layers=0)


def _model(top_k: int | None, seed: int = 0) -> Transformer:
    model = Transformer(_config(top_k), dtype=torch.float64)
    parts.fill(model, seed)
    return model.eval()


def _logits(model: Transformer, *texts: list[int]) -> Tensor:
    batch = parts.pack(*texts)
    return model.logits(model(batch).hidden_TD, batch)


TEXTS = [parts.draw_ids(512, 23, 0), parts.draw_ids(512, 11, 1)]


def test_to_read_all_is_full_attention() -> None:
    """A selection of every position takes another way, through the latents, to the same logits."""
    sparse, full = _model(22), _model(None)
    full.load_state_dict({name: x for name, x in sparse.state_dict().items() if ".indexer." not in name})
    got, wanted = _logits(sparse, TEXTS[0]), _logits(full, TEXTS[0])
    assert (got[:22] - wanted[:22]).abs().max() <= EXACT * wanted.abs().max()  # these tokens see no more
    assert (got[22] - wanted[22]).abs().max() > 1e-6 * wanted.abs().max()  # and this one leaves one out


def test_a_pack_is_its_texts_and_a_token_sees_no_later_one() -> None:
    model = _model(5)
    together = _logits(model, *TEXTS)
    alone = torch.cat([_logits(model, text) for text in TEXTS])
    assert (together - alone).abs().max() <= CLOSE * alone.abs().max()
    changed = _logits(model, [*TEXTS[0][:15], *TEXTS[1][:8]])
    assert (changed[:15] - together[:15]).abs().max() <= CLOSE * together.abs().max()


@pytest.mark.parametrize("sizes", [[[], []], [[7, 5], [3]], [[20], [9]]])
def test_cached_is_uncached(sizes: list[list[int]]) -> None:
    """Chunks that begin below the limit, where all is read, and go on above it."""
    model = _model(5)
    cache = parts.Cache(model.config, 2, page_size=4, dtype=torch.float64)
    with torch.inference_mode():
        got = parts.through_cache(
            cache, TEXTS, sizes, lambda batch, _: model.logits(model(batch).hidden_TD, batch)
        )
    for text, logits_TV in zip(TEXTS, got, strict=True):
        wanted_TV = _logits(model, text)
        assert (logits_TV - wanted_TV).abs().max() <= CLOSE * wanted_TV.abs().max()


def test_narrow_keys_are_read_as_they_were_written() -> None:
    """In FP8 a token's choice may differ from the wide one's, but not by how the text came: whole, in chunks
    or token by token. And what it reads is mostly the same."""
    model = _model(5)
    told: list[Tensor] = []
    for sizes in ([[], []], [[7, 5], [3]], [[22], [10]]):
        cache = parts.Cache(model.config, 2, page_size=4, dtype=torch.float64, narrow_index=True)
        with torch.inference_mode():
            got = parts.through_cache(
                cache, TEXTS, sizes, lambda batch, _: model.logits(model(batch).hidden_TD, batch)
            )
        told.append(torch.cat(got))
        assert (told[-1] - told[0]).abs().max() <= CLOSE * told[0].abs().max()
    wide = torch.cat([_logits(model, text) for text in TEXTS])
    off_T = (told[0] - wide).abs().amax(1) / wide.abs().max()
    assert (off_T[:5] <= CLOSE).all()  # these read all there is
    assert (off_T <= CLOSE).double().mean() > 0.5


@torch.no_grad()
def test_the_choice_is_the_formula() -> None:
    """I = sum over heads of w relu(q . k), scaled by both roots, halves rotated (arXiv 2512.02556, eq. 1)."""
    model = _model(5)
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, MLA)
    indexer = layer.indexer
    assert indexer is not None
    x_TD = torch.randn(11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    low_TX = torch.randn(11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    batch = parts.pack([0] * 11)
    angles = model.model.rotary(batch.positions_T)
    chosen = indexer(x_TD, low_TX, angles, batch)
    assert chosen.rows_TK is not None
    k_TI = indexer.k_norm(x_TD @ indexer.wk.weight.t())

    def turn(x_I: Tensor, t: int) -> Tensor:
        out_I, cos, sin = x_I.clone(), angles.cos_TR2[t].double(), angles.sin_TR2[t].double()
        out_I[:4] = x_I[:4] * cos - x_I[4:8] * sin
        out_I[4:8] = x_I[4:8] * cos + x_I[:4] * sin
        return out_I

    for t in range(11):
        q_JI = (indexer.wq_b.weight @ low_TX[t]).view(8, 16)
        w_J = indexer.weights_proj.weight @ x_TD[t]
        scores = [
            sum(
                w_J[j] * 8**-0.5 * torch.relu(turn(q_JI[j], t) @ turn(k_TI[n], n) * 16**-0.5)
                for j in range(8)
            )
            for n in range(t + 1)
        ]
        best = sorted(sorted(range(t + 1), key=lambda n: -float(scores[n]))[:5])
        assert [n for n in chosen.rows_TK[t].tolist() if n >= 0] == best


def test_an_indexer_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="q_lora_rank is null"):
        MLAConfig(4, 32, 16, 8, 16, indexer=IndexerConfig(8, 16, 24))
    with pytest.raises(ValueError, match="index_head_dim is 6"):
        MLAConfig(4, 32, 16, 8, 16, q_lora_rank=24, indexer=IndexerConfig(8, 6, 24))
    with pytest.raises(ValueError, match="index_topk is 0"):
        IndexerConfig(8, 16, 0)
