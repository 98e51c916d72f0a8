"""FlashInfer's attention over a paged cache in plain PyTorch: what its documentation says, with
checks of what it is given."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class PagedAttention:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper, version 0.6."""

    made: ClassVar[list[PagedAttention]] = []

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any(), "the workspace must begin as zeros"
        assert kv_layout == "HND" and backend in ("auto", "fa2")
        self.use_cuda_graph, self.backend = use_cuda_graph, backend
        self.buffers = (
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
        )
        if use_cuda_graph:
            assert all(b.dtype == torch.int32 for b in self.buffers)
            assert len(qo_indptr_buf) == len(paged_kv_indptr_buf)
            assert len(paged_kv_last_page_len_buf) == len(qo_indptr_buf) - 1
        self.plans = self.runs = self.rows = 0
        self.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
    ) -> None:
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(t.dtype == torch.int32 and t.dim() == 1 for t in given)
        batch = len(qo_indptr) - 1
        assert len(paged_kv_indptr) == batch + 1 and len(paged_kv_last_page_len) == batch
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert (paged_kv_last_page_len >= 1).all() and (paged_kv_last_page_len <= page_size).all()
        queries, pages = qo_indptr.diff(), paged_kv_indptr.diff()
        assert (pages >= 1).all()
        seen = (pages - 1) * page_size + paged_kv_last_page_len
        assert causal and (queries >= 1).all() and (queries <= seen).all()
        assert num_qo_heads % num_kv_heads == 0
        if self.use_cuda_graph:  # the shapes of the first plan are those of the graph
            assert len(paged_kv_indices) <= len(self.buffers[2])
            assert len(paged_kv_last_page_len) == len(self.buffers[3])
            assert self.rows in (0, int(qo_indptr[-1]))
            for buffer, t in zip(self.buffers, given):
                buffer.fill_(-1)
                buffer[: len(t)].copy_(t)
        else:
            self.buffers = tuple(t.clone() for t in given)
        self.rows = int(qo_indptr[-1])
        self.heads, self.scale, self.window_left = (
            (num_qo_heads, num_kv_heads),
            sm_scale,
            window_left,
        )
        self.dim, self.page_size, self.dtype = head_dim_qk, page_size, q_data_type
        self.plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        heads, kv_heads = self.heads
        assert q.shape == (self.rows, heads, self.dim) and q.dtype == self.dtype
        assert q.stride(-1) == 1
        keys, values = paged_kv_cache
        assert keys.shape == values.shape and keys.stride() == values.stride()
        assert keys.shape[1:] == (kv_heads, self.page_size, self.dim) and keys.stride(-1) == 1
        qo, kv, indices, last = (t.tolist() for t in self.buffers)
        out = torch.full_like(q, float("nan"))
        for row in range(len(last)):
            pages = torch.tensor(indices[kv[row] : kv[row + 1]])
            assert pages.min() >= 0 and pages.max() < len(keys)
            seen = (len(pages) - 1) * self.page_size + last[row]
            k, v = (c[pages].transpose(0, 1).flatten(1, 2)[:, :seen] for c in (keys, values))
            mine = q[qo[row] : qo[row + 1]].transpose(0, 1)
            places = torch.arange(seen - mine.shape[1], seen)[:, None]  # of the queries
            slots = torch.arange(seen)
            mask = slots <= places
            if self.window_left >= 0:
                mask &= slots >= places - self.window_left
            scores = mine @ k.repeat_interleave(heads // kv_heads, 0).mT * self.scale
            p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            y = p @ v.repeat_interleave(heads // kv_heads, 0)
            out[qo[row] : qo[row + 1]] = y.transpose(0, 1)
        self.runs += 1
        return out
