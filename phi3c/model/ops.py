"""Emits kernel calls into the Relax function under construction.

Shapes: n = tokens, b = sequences; every activation is `[n, features]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.relax.frontend import nn

from ..config import Phi3Config
from ..kernels.family import Kernels
from ..kernels.layout import GROUP
from ..kernels.low_rank import LowRank
from ..kernels.weight_format import GroupFormat, WeightFormat
from ..logit_blocks import logit_blocks
from ..quantization.group import GroupQuantization
from ..quantization.layers import GroupWeight, Weight, make_weight
from ..quantization.scheme import Kind, Scheme
from .adapter_inputs import LinearAdapters
from .attention_inputs import DecodeInputs, PrefillInputs

Tensor = nn.Tensor


@dataclass(frozen=True)
class Int8Rows:
    """Activations `[n, features]` in int8, as int8 linears read them (kernels/cpu/quantize.py)."""

    words: Tensor
    features: int

    @property
    def shape(self) -> tuple:
        return self.words.shape[0], self.features


@dataclass(frozen=True)
class NormedRows:
    """Rows `[n, features]` before their norm, for linears that normalise what they read."""

    rows: Tensor
    weight: Tensor

    @property
    def shape(self) -> tuple:
        return tuple(self.rows.shape)


Activation = Tensor | Int8Rows | NormedRows


@dataclass(frozen=True)
class Ops:
    """The kernels of one target, bound to a config and a scheme; low_rank: to room for adapters."""

    config: Phi3Config
    scheme: Scheme
    kernels: Kernels
    low_rank: LowRank | None = None

    def _out(self, *shape, dtype: str | None = None) -> Tensor:
        return Tensor.placeholder(list(shape), dtype or self.kernels.activation_dtype)

    def weight(self, kind: Kind, out_features: int, in_features: int) -> Weight:
        """The parameters of a linear or embedding `[out, in]`, in the layout its kernels read."""
        return make_weight(self.kernels, kind, out_features, in_features)

    def embedding(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids `[n]` → `[n, hidden]`."""
        c = self.config
        kind, arrays = _parts(weight)
        kernel = self.kernels.embedding(c.vocab_size, c.hidden_size, kind)
        out = self._out(ids.shape[0], c.hidden_size)
        return nn.op.tensor_ir_op(kernel, "embedding", [ids, *arrays], out)

    def take_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        """x `[n, features]`, positions `[b]` → `[b, features]`."""
        kernel = self.kernels.take_rows(x.shape[1], x.dtype)
        out = Tensor.placeholder([positions.shape[0], x.shape[1]], x.dtype)
        return nn.op.tensor_ir_op(kernel, "take_rows", [x, positions], out)

    def last_row(self, x: Tensor) -> Tensor:
        """x `[n, features]` → its last row `[1, features]`."""
        kernel = self.kernels.last_row(x.shape[1], x.dtype)
        out = Tensor.placeholder([1, x.shape[1]], x.dtype)
        return nn.op.tensor_ir_op(kernel, "last_row", [x], out)

    def linear(
        self,
        x: Activation,
        weight: Weight,
        out_features: int,
        residual: Tensor | None = None,
        adapters: LinearAdapters | None = None,
        dtype: str | None = None,
    ) -> Tensor:
        """x `[n, in]`, plain or as `quantize` or `norm_for` give it → x Wᵀ (+ residual) `[n, out]`,
        and what the rows' adapters add. dtype: of the output, if it is not that of other
        activations.
        """
        x = self._shared_rows(x, adapters)
        if isinstance(weight, GroupWeight) and isinstance(x, Tensor):
            x = self.quantize(x, weight.quantization)
        kind, arrays = _parts(weight)
        out = self._out(x.shape[0], out_features, dtype=dtype)
        added = [] if residual is None else [residual]
        shrunk = self._shrink(x, adapters) if adapters else []
        if isinstance(x, Int8Rows):
            form = (out_features, x.features, kind, bool(added), self.low_rank if shrunk else None)
            args = [x.words, *arrays, *added, *shrunk]
            return nn.op.tensor_ir_op(self.kernels.int8_linear(*form), "int8_linear", args, out)
        read, norm = self._read(x)
        form = (out_features, x.shape[1], kind, bool(added), out.dtype, *norm)
        args = [*read, *arrays, *added]
        y = nn.op.tensor_ir_op(self.kernels.linear(*form), "linear", args, out)
        return self._expand(shrunk, y) if shrunk else y

    def _shared_rows(self, x: Activation, adapters: LinearAdapters | None) -> Activation:
        """Normalised, if adapters read them too."""
        if adapters and isinstance(x, NormedRows):
            return self.rms_norm(x.rows, x.weight)
        return x

    def _read(self, x: Tensor | NormedRows) -> tuple[list[Tensor], list[float]]:
        """What a linear reads x from, and the eps of the norm that it does itself, if any."""
        if isinstance(x, NormedRows):
            return [x.rows, x.weight], [self.config.rms_norm_eps]
        return [x], []

    def _shrink(self, x: Activation, adapters: LinearAdapters) -> list[Tensor]:
        """The products of the rows' A with x, and what the other half needs: h, b, slot, rank."""
        a, slot, rank = adapters.a, adapters.slot, adapters.rank
        out = self._out(x.shape[0], self.low_rank.max_rank, dtype="float32")
        if isinstance(x, Int8Rows):
            kernel, name, rows = self.kernels.int8_shrink, "int8_shrink", x.words
        else:
            kernel, name, rows = self.kernels.shrink, "shrink", x
        made = kernel(x.shape[1], self.low_rank)
        return [nn.op.tensor_ir_op(made, name, [rows, a, slot, rank], out), adapters.b, slot, rank]

    def _expand(self, shrunk: list[Tensor], y: Tensor) -> Tensor:
        """Adds what `_shrink` gave, times B, to y `[n, out]`, in place."""
        return nn.op.tensor_ir_inplace_op(
            self.kernels.expand(y.shape[1], self.low_rank),
            "expand",
            [*shrunk, y],
            inplace_indices=len(shrunk),
            out=Tensor.placeholder(y.shape, y.dtype),
        )

    def quantize(self, x: Tensor, kind: Kind) -> Activation:
        """x `[n, features]` as a linear of `kind` reads it: in int8 where the scheme says so."""
        if not self._int8(kind):
            return x
        kernel = self.kernels.quantize_rows(x.shape[1], kind.zero)
        return self._int8_rows(kernel, "quantize_rows", [x], x.shape[1])

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """`[n, hidden]` → `[n, hidden]`."""
        kernel = self.kernels.rms_norm(x.shape[1], self.config.rms_norm_eps)
        return nn.op.tensor_ir_op(kernel, "rms_norm", [x, weight], self._out(*x.shape))

    def norm_for(self, x: Tensor, weight: Tensor, kind: Kind) -> Activation:
        """`rms_norm(x)` as a linear of `kind` reads it."""
        if self.kernels.norms_in_linears:
            return NormedRows(x, weight)
        if not self._int8(kind):
            return self.rms_norm(x, weight)
        kernel = self.kernels.rms_norm_quantize(x.shape[1], self.config.rms_norm_eps, kind.zero)
        return self._int8_rows(kernel, "rms_norm_quantize", [x, weight], x.shape[1])

    def gated_linear(
        self,
        x: Activation,
        weight: Weight,
        features: int,
        kind: Kind,
        adapters: LinearAdapters | None = None,
    ) -> Activation:
        """x `[n, in]`, weight of gate and up → up · silu(gate) `[n, features]`, as a linear of
        `kind` reads it.
        """
        x = self._shared_rows(x, adapters)
        if self.kernels.gates_in_linears and not adapters:
            form, arrays = _parts(weight)
            read, norm = self._read(x)
            kernel = self.kernels.gated_linear(features, x.shape[1], form, *norm)
            out = self._out(x.shape[0], features)
            return nn.op.tensor_ir_op(kernel, "gated_linear", [*read, *arrays], out)
        if not (isinstance(x, Int8Rows) and self._int8(kind)):
            gate_up = self.linear(x, weight, 2 * features, adapters=adapters)
            kernel = self.kernels.silu_mul(features)
            out = self._out(gate_up.shape[0], features)
            return self.quantize(nn.op.tensor_ir_op(kernel, "silu_mul", [gate_up], out), kind)
        form, arrays = _parts(weight)
        shrunk = self._shrink(x, adapters) if adapters else []
        low_rank = self.low_rank if shrunk else None
        kernel = self.kernels.int8_gated(features, x.features, form, kind.zero, low_rank)
        return self._int8_rows(kernel, "int8_gated_linear", [x.words, *arrays, *shrunk], features)

    def _int8(self, kind: Kind) -> bool:
        return isinstance(kind, GroupQuantization) and self.scheme.int8_activations

    def _int8_rows(self, kernel, name: str, args: list[Tensor], features: int) -> Int8Rows:
        shape = [args[0].shape[0], features // GROUP, self.kernels.int8_words]
        out = Tensor.placeholder(shape, "int32")
        return Int8Rows(nn.op.tensor_ir_op(kernel, name, args, out), features)

    def rope_table(self, inv_freq: Tensor, inputs: DecodeInputs) -> Tensor:
        """Cosines and sines of this forward's positions, `[n, rotary_dim]`."""
        c = self.config
        kernel = self.kernels.rope_table(c.rotary_dim, c.attention_factor)
        out = self._out(inputs.positions.shape[0], c.rotary_dim, dtype="float32")
        args = [inputs.positions, inputs.factor_set, inv_freq]
        return nn.op.tensor_ir_op(kernel, "rope_table", args, out)

    def rope_append(
        self, qkv: Tensor, rope: Tensor, slots: Tensor, pages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotates q and k, writes k and v into `pages` in place → (q `[n, heads·dim]`, pages)."""
        c = self.config
        kernel = self.kernels.rope_append(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.rotary_dim,
            self.scheme.kv_dtype,
        )
        q = self._out(qkv.shape[0], c.num_attention_heads * c.head_dim)
        pages, q = nn.op.tensor_ir_inplace_op(
            kernel,
            "rope_append",
            [qkv, rope, slots, pages],
            inplace_indices=[3, -1],
            out=[Tensor.placeholder(pages.shape, pages.dtype), q],
        )
        return q, pages

    def attention(self, q: Tensor, pages: Tensor, inputs: DecodeInputs) -> Tensor:
        """q `[n, heads·dim]` over the pages → `[n, heads·dim]`."""
        c = self.config
        shape = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            self.scheme.kv_dtype,
            c.sliding_window,
        )
        i = inputs
        out = self._out(*q.shape)
        if isinstance(i, PrefillInputs):
            args = [q, pages, i.query_indptr, i.block_indptr, i.block_ids, i.kv_start, i.kv_length]
            args += [i.positions, i.enter, i.leave]
            kernel = self.kernels.prefill_attention(*shape)
            return nn.op.tensor_ir_op(kernel, "prefill_attention", args, out)
        args = [q, pages, i.block_indptr, i.block_ids, i.kv_start, i.positions]
        return nn.op.tensor_ir_op(
            self.kernels.decode_attention(*shape), "decode_attention", args, out
        )

    def copy_slots(self, pages: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Copies tokens between slots of `pages`, in place."""
        c = self.config
        kernel = self.kernels.copy_slots(c.num_key_value_heads, c.head_dim, self.scheme.kv_dtype)
        return nn.op.tensor_ir_inplace_op(
            kernel,
            "copy_slots",
            [pages, source, target],
            inplace_indices=0,
            out=Tensor.placeholder(pages.shape, pages.dtype),
        )

    def block_maxima(self, logits: Tensor) -> Tensor:
        """logits `[1, n, vocab]` → `[n, 2, blocks]` int32: bits of the largest, and its id."""
        vocab_size, blocks = logits.shape[2], logit_blocks(logits.shape[2])
        kernel = self.kernels.block_maxima(vocab_size, blocks)
        out = Tensor.placeholder([logits.shape[1], 2, blocks], "int32")
        return nn.op.tensor_ir_op(kernel, "block_maxima", [logits], out)


def _parts(weight: Weight) -> tuple[WeightFormat, list[Tensor]]:
    """What the kernels need to know of a weight, and its tensors."""
    if isinstance(weight, GroupWeight):
        q = weight.quantization
        return GroupFormat(q.bits, q.zero, q.scale_dtype), [weight.q, weight.scale]
    return weight.dtype, [weight]
