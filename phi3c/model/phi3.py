"""Phi-3, top-down, with Hugging Face's parameter names (as transformers' Phi3ForCausalLM).

Shapes at each line: n = new tokens of all sequences, b = sequences, h = hidden_size. Sequences lie
one after another in n; what belongs to which, and where its keys and values are, is data
(attention_inputs.py). `pages` is a list with one KV tensor per layer, updated in place.

With room for LoRA adapters (`layout`) every forward function is there twice: as without, and as
`<name>_with_adapters`, whose rows each may have an adapter (adapter_inputs.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm.relax.frontend import nn

from ..adapters.layout import AdapterLayout
from ..config import Phi3Config
from ..kernels.family import Kernels
from ..kernels.low_rank import LowRank
from ..quantization.scheme import Kind, Scheme
from .adapter_inputs import AdapterInputs, LayerAdapters, LinearAdapters, pools_spec, row_specs
from .attention_inputs import DecodeInputs, PrefillInputs, input_specs
from .ops import Activation, Ops

Tensor = nn.Tensor
Rows = Callable[[Tensor], Tensor]  # [n, features] → the rows that are asked for


class Phi3ForCausalLM(nn.Module):
    """The functions of an artifact; `get_default_spec` gives their inputs."""

    def __init__(
        self,
        config: Phi3Config,
        scheme: Scheme,
        kernels: Kernels,
        layout: AdapterLayout | None = None,
    ):
        super().__init__()
        self.config = config
        self.layout = layout
        self.ops = Ops(config, scheme, kernels, _low_rank(layout))
        self.model = Phi3Model(self.ops)
        if not config.tie_word_embeddings:
            kind = scheme.vocabulary
            self.lm_head = Phi3Linear(self.ops, config.hidden_size, config.vocab_size, kind)

    def embed(self, input_ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(input_ids)  # [n, h]
        return nn.op.reshape(x, (1, *x.shape))  # [1, n, h]

    def prefill(
        self,
        input_embed: Tensor,
        inputs: PrefillInputs,
        pages: list[Tensor],
        adapters: AdapterInputs | None = None,
    ) -> Tensor:
        last = self.ops.last_row
        x = self.model(_rows(input_embed), inputs, pages, adapters, last)  # [1, h]
        logits = self._head(x)  # [1, vocab]
        return nn.op.reshape(logits, (1, *logits.shape))  # [1, 1, vocab]

    def batch_prefill(
        self,
        input_embed: Tensor,
        logit_positions: Tensor,
        inputs: PrefillInputs,
        pages: list[Tensor],
        adapters: AdapterInputs | None = None,
    ) -> Tensor:
        def asked(x: Tensor) -> Tensor:
            return self.ops.take_rows(x, logit_positions)

        x = self.model(_rows(input_embed), inputs, pages, adapters, asked)  # [b, h]
        logits = self._head(x)  # [b, vocab]
        return nn.op.reshape(logits, (1, *logits.shape))  # [1, b, vocab]

    def batch_decode(
        self,
        input_embed: Tensor,
        inputs: DecodeInputs,
        pages: list[Tensor],
        adapters: AdapterInputs | None = None,
    ) -> Tensor:
        logits = self._head(self.model(_rows(input_embed), inputs, pages, adapters))  # [b, vocab]
        return nn.op.reshape(logits, (logits.shape[0], 1, logits.shape[1]))  # [b, 1, vocab]

    def batch_verify(
        self,
        input_embed: Tensor,
        inputs: PrefillInputs,
        pages: list[Tensor],
        adapters: AdapterInputs | None = None,
    ) -> Tensor:
        logits = self._head(self.model(_rows(input_embed), inputs, pages, adapters))  # [n, vocab]
        return nn.op.reshape(logits, (1, *logits.shape))  # [1, n, vocab]

    def to_last_hidden_states(
        self,
        input_embed: Tensor,
        inputs: DecodeInputs,
        pages: list[Tensor],
        adapters: AdapterInputs | None = None,
    ) -> Tensor:
        """The final norm's output, in the shape of `input_embed`."""
        x = self.model(_rows(input_embed), inputs, pages, adapters)  # [n, h]
        return nn.op.reshape(self.model.norm(x), input_embed.shape)

    def get_logits(self, hidden_states: Tensor) -> Tensor:
        logits = self._vocabulary(_rows(hidden_states))  # [n, vocab]
        return nn.op.reshape(logits, (1, *logits.shape))  # [1, n, vocab]

    def block_maxima(self, logits: Tensor) -> Tensor:
        """Of each block of each row of logits the largest, as its bits, and its token id."""
        return self.ops.block_maxima(logits)  # [n, 2, blocks]

    def copy_slots(self, source: Tensor, target: Tensor, pages: list[Tensor]) -> list[Tensor]:
        """Copies tokens between KV slots in every layer (block·16 + offset, in order)."""
        return [self.ops.copy_slots(layer, source, target) for layer in pages]

    def _head(self, x: Tensor) -> Tensor:
        """The last layer's output `[n, h]` → logits `[n, vocab]`."""
        return self._vocabulary(self.model.norm(x, self.ops.scheme.vocabulary))

    def _vocabulary(self, x: Activation) -> Tensor:
        """The final norm's output → logits, float32."""
        owner = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.ops.linear(x, owner.weight, self.config.vocab_size, dtype="float32")

    def page_spec(self) -> list[nn.spec.Tensor]:
        """One KV tensor per layer: `[blocks, 2, kv_heads, head_dim·16]`, keys then values."""
        c = self.config
        shape = ["blocks", 2, c.num_key_value_heads, c.head_dim * self.ops.kernels.kv_block]
        layer = nn.spec.Tensor(shape, self.ops.scheme.kv_dtype)
        return [layer] * c.num_hidden_layers

    def create_paged_kv_cache(self, blocks: int) -> list[np.ndarray]:
        """Zeroed pages for `blocks` KV blocks, one array per layer (what `page_spec` describes)."""
        return [np.zeros([blocks, *spec.shape[1:]], spec.dtype) for spec in self.page_spec()]

    def get_default_spec(self) -> nn.spec.ModuleSpec:
        """Inputs of every function. n = tokens, b = sequences, m = listed KV blocks."""
        hidden = self.config.hidden_size
        activation = self.ops.kernels.activation_dtype
        chunk = nn.spec.Tensor([1, "n", hidden], activation)
        one = nn.spec.Tensor([1, 1, hidden], activation)
        batch = nn.spec.Tensor(["b", 1, hidden], activation)
        ids = nn.spec.Tensor(["n"], "int32")
        positions = ("logit_positions", nn.spec.Tensor(["logit_rows"], "int32"))
        single = (chunk, PrefillInputs, "n", 1)
        many = (chunk, PrefillInputs, "n", "b")
        hidden_states = self.to_last_hidden_states
        forwards = {  # name → method, input, what else it needs to know, n, b, more inputs
            "prefill": (self.prefill, *single),
            "decode": (self.batch_decode, one, DecodeInputs, 1, 1),
            "batch_prefill": (self.batch_prefill, *many, positions),
            "batch_decode": (self.batch_decode, batch, DecodeInputs, "b", "b"),
            "batch_verify": (self.batch_verify, *many),
            "prefill_to_last_hidden_states": (hidden_states, *single),
            "decode_to_last_hidden_states": (hidden_states, one, DecodeInputs, 1, 1),
            "batch_prefill_to_last_hidden_states": (hidden_states, *many),
            "batch_decode_to_last_hidden_states": (hidden_states, batch, DecodeInputs, "b", "b"),
            "batch_verify_to_last_hidden_states": (hidden_states, *many),
        }
        methods = {"embed": self._plain(self.embed, [("input_ids", ids)])}
        methods |= {name: self._forward(*parts) for name, parts in forwards.items()}
        if self.layout:
            methods |= {
                with_adapters(name): self._forward(*parts, layout=self.layout)
                for name, parts in forwards.items()
            }
        methods |= {
            "get_logits": self._plain(self.get_logits, [("hidden_states", chunk)]),
            "copy_slots": nn.spec.MethodSpec(
                self.copy_slots,
                ["source", "target", "pages"],
                [ids, ids, nn.spec.Tuple("pages", self.page_spec())],
                param_mode="none",
                effect_mode="none",
            ),
        }
        if not self.ops.kernels.in_host_memory:
            logits = nn.spec.Tensor([1, "n", self.config.vocab_size], "float32")
            methods["block_maxima"] = nn.spec.MethodSpec(
                self.block_maxima, ["logits"], [logits], param_mode="none", effect_mode="none"
            )
        return nn.spec.ModuleSpec(self, list(methods), list(methods.values()))

    @staticmethod
    def _plain(method, args) -> nn.spec.MethodSpec:
        names, specs = zip(*args, strict=True)
        return nn.spec.MethodSpec(method, list(names), list(specs), "packed", "none")

    def _forward(
        self, method, embed, kind, n, b, *extra, layout: AdapterLayout | None = None
    ) -> nn.spec.MethodSpec:
        """Spec of a forward: (input_embed, *extra, the fields of `kind`, pages), and with adapters
        (…, adapter_slot, adapter_rank, pages, adapters).
        """
        described = input_specs(kind, n, b)
        args = [("input_embed", embed), *extra, *described]
        lead, tail = 1 + len(extra), 1 + len(extra) + len(described)
        pages = ("pages", nn.spec.Tuple("pages", self.page_spec()))
        if layout is None:

            def grouped(*values):
                return method(*values[:lead], kind(*values[lead:tail]), values[tail])

            return self._plain(grouped, [*args, pages])

        def grouped_with_adapters(*values):
            slot, rank, pages, pools = values[tail:]
            adapters = AdapterInputs(slot, rank, pools)
            return method(*values[:lead], kind(*values[lead:tail]), pages, adapters)

        pools = ("adapters", pools_spec(layout, self.config))
        return self._plain(grouped_with_adapters, [*args, *row_specs(n), pages, pools])


class Phi3Model(nn.Module):
    def __init__(self, ops: Ops):
        super().__init__()
        c = ops.config
        self.ops = ops
        self.embed_tokens = Phi3Embedding(ops)
        self.layers = nn.ModuleList([Phi3DecoderLayer(ops) for _ in range(c.num_hidden_layers)])
        self.norm = Phi3RMSNorm(ops)

    def forward(
        self,
        x: Tensor,
        inputs: DecodeInputs,
        pages: list[Tensor],
        adapters: AdapterInputs | None = None,
        asked: Rows | None = None,
    ) -> Tensor:
        """The last layer's output, before the final norm; asked: takes the rows that are wanted."""
        c = self.ops.config
        inv_freq = np.stack([c.inv_freq(long=False), c.inv_freq(long=True)])  # [2, rotary_dim/2]
        rope = self.ops.rope_table(Tensor.from_const(inv_freq), inputs)  # [n, rotary_dim]
        for i, (layer, layer_pages) in enumerate(zip(self.layers, pages, strict=True)):
            last = i == len(self.layers) - 1
            own = adapters.layer(i) if adapters else None
            x = layer(x, rope, layer_pages, inputs, own, asked if last else None)  # [n, h]
        return x


class Phi3DecoderLayer(nn.Module):
    """Pre-norm, sequential: attention, then MLP, each added to its input."""

    def __init__(self, ops: Ops):
        super().__init__()
        self.input_layernorm = Phi3RMSNorm(ops)
        self.self_attn = Phi3Attention(ops)
        self.post_attention_layernorm = Phi3RMSNorm(ops)
        self.mlp = Phi3MLP(ops)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        pages: Tensor,
        inputs: DecodeInputs,
        adapters: LayerAdapters | None,
        asked: Rows | None,
    ) -> Tensor:
        y = self.input_layernorm(x, self.self_attn.qkv_proj.kind)
        attended = self.self_attn(y, rope, pages, inputs, adapters)  # [n, heads·head_dim]
        if asked:  # past the keys and values every row stands alone
            x, attended = asked(x), asked(attended)
            adapters = adapters.rows(asked) if adapters else None
        x = self.self_attn.project(attended, x, adapters)
        y = self.post_attention_layernorm(x, self.mlp.gate_up_proj.kind)
        return self.mlp(y, x, adapters)  # [n, h]


class Phi3Attention(nn.Module):
    """Grouped-query attention over the paged cache; qkv rows: q heads, k heads, v heads."""

    def __init__(self, ops: Ops):
        super().__init__()
        c = ops.config
        self.ops = ops
        qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        self.qkv_proj = Phi3Linear(ops, c.hidden_size, qkv)
        self.o_proj = Phi3Linear(ops, c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(
        self,
        x: Activation,
        rope: Tensor,
        pages: Tensor,
        inputs: DecodeInputs,
        adapters: LayerAdapters | None,
    ) -> Tensor:
        own = adapters.of("qkv_proj") if adapters else None
        qkv = self.qkv_proj(x, adapters=own)  # [n, (heads + 2·kv_heads)·head_dim]
        q, pages = self.ops.rope_append(qkv, rope, inputs.slots, pages)  # [n, heads·head_dim]
        return self.ops.attention(q, pages, inputs)

    def project(self, attended: Tensor, residual: Tensor, adapters: LayerAdapters | None) -> Tensor:
        """`[n, heads·head_dim]` → `[n, h]`."""
        return self.o_proj(attended, residual, adapters.of("o_proj") if adapters else None)


class Phi3MLP(nn.Module):
    """down(up · silu(gate)); gate_up rows: gate, up."""

    def __init__(self, ops: Ops):
        super().__init__()
        c = ops.config
        self.ops = ops
        self.gate_up_proj = Phi3Linear(ops, c.hidden_size, 2 * c.intermediate_size)
        self.down_proj = Phi3Linear(ops, c.intermediate_size, c.hidden_size)

    def forward(self, x: Activation, residual: Tensor, adapters: LayerAdapters | None) -> Tensor:
        weight, size = self.gate_up_proj.weight, self.ops.config.intermediate_size
        own = adapters.of("gate_up_proj") if adapters else None
        kind = self.down_proj.kind
        gated = self.ops.gated_linear(x, weight, size, kind, own)  # [n, intermediate]
        return self.down_proj(gated, residual, adapters.of("down_proj") if adapters else None)


class Phi3Embedding(nn.Module):
    """Token embedding; its weight serves as the LM head when `tie_word_embeddings` is set."""

    def __init__(self, ops: Ops):
        super().__init__()
        self.ops = ops
        c = ops.config
        self.weight = ops.weight(ops.scheme.vocabulary, c.vocab_size, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.ops.embedding(input_ids, self.weight)


class Phi3RMSNorm(nn.Module):
    def __init__(self, ops: Ops):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter((ops.config.hidden_size,), "float32")

    def forward(self, x: Tensor, kind: Kind | None = None) -> Activation:
        """kind: of the linears that read it; None gives the plain rows."""
        if kind is None:
            return self.ops.rms_norm(x, self.weight)
        return self.ops.norm_for(x, self.weight, kind)


class Phi3Linear(nn.Module):
    """kind: how the weight is stored; by default as the scheme says for linears."""

    def __init__(self, ops: Ops, in_features: int, out_features: int, kind: Kind | None = None):
        super().__init__()
        self.ops = ops
        self.out_features = out_features
        self.kind = kind or ops.scheme.linear
        self.weight = ops.weight(self.kind, out_features, in_features)

    def forward(
        self,
        x: Activation,
        residual: Tensor | None = None,
        adapters: LinearAdapters | None = None,
    ) -> Tensor:
        return self.ops.linear(x, self.weight, self.out_features, residual, adapters)


def _low_rank(layout: AdapterLayout | None) -> LowRank | None:
    return layout and LowRank(layout.max_loras, layout.max_rank, layout.dtype)


def with_adapters(name: str) -> str:
    """The forward function's variant whose rows may have adapters."""
    return f"{name}_with_adapters"


def _rows(x: Tensor) -> Tensor:
    """`[1, n, h]` or `[b, 1, h]` → `[n, h]`, without a copy."""
    first, second, features = x.shape
    return nn.op.reshape(x, (second if first == 1 else first, features))
