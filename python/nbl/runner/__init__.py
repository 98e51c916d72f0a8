"""Generation without transformers' overhead.

runner      Runner: prefill, decode, sampling, on a cache of its own
requests    prompts and what is asked of them, checked
step        what one forward pass knows: its layers, where its tokens are, what memories keep
graphs      the decode step as CUDA graphs
attention   PyTorch's or FlashInfer's, over the cache
drafting    a linearized model that drafts tokens for its own original
"""

from .drafting import DraftReport, draft_model
from .runner import Runner

__all__ = ["DraftReport", "Runner", "draft_model"]
