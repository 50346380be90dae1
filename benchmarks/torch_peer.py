"""The peer of gpu.py: transformers and torch with the same weights in float16, SDPA attention,
torch.compile; a decode step has a static cache and CUDA graphs. Both end with the greedy token."""

from __future__ import annotations

from collections.abc import Callable

from phi3c.config import Phi3Config
from phi3c.weights import Weights

Step = Callable[[], object]


class TorchPeer:
    """device: `cuda` or `cpu`. Raises ImportError or RuntimeError where that cannot be."""

    def __init__(self, config: Phi3Config, weights: Weights, device: str):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers import Phi3Config as HFConfig

        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        self._torch, self._device = torch, device
        fields = HFConfig(**config.to_dict() | {"pad_token_id": None})
        with torch.device(device):
            # In its dtype from the start: rotary frequencies stay float32 then.
            model = AutoModelForCausalLM.from_config(
                fields, dtype=torch.float16, attn_implementation="sdpa"
            )
        state = {
            name: torch.from_numpy(weights.tensor(name).astype("float16"))
            for name in weights.shapes
        }
        missing, left = model.load_state_dict(state, strict=False)
        if left or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"weights: found {left or missing}; accepted: the model's own")
        self._model = model.eval()

    def prefill(self, tokens: int) -> Step:
        """The token after so many of one sequence."""
        ids, forward = self._ids(1, tokens), self._compiled("default")

        def run():
            with self._torch.inference_mode():
                forward(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).cpu()

        return run

    def decode(self, batch: int, context: int) -> Step:
        """One token of each of `batch` sequences that have `context` tokens already."""
        from transformers import StaticCache

        torch, model = self._torch, self._model
        cache = StaticCache(config=model.config, max_cache_len=context + 128)
        with torch.inference_mode():
            model(self._ids(batch, context), past_key_values=cache, logits_to_keep=1)
        forward = self._compiled("reduce-overhead")
        ids = self._ids(batch, 1)
        at = torch.tensor([context], device=self._device)

        def run():
            # The cache may be a few tokens longer each time, which the time does not show.
            with torch.inference_mode():
                found = forward(ids, past_key_values=cache, cache_position=at)
                found.logits.argmax(-1).cpu()

        return run

    def _ids(self, batch: int, tokens: int):
        return self._torch.full((batch, tokens), 5, device=self._device)

    def _compiled(self, mode: str):
        cuda = self._device == "cuda"
        return self._torch.compile(self._model, mode=mode) if cuda else self._model
