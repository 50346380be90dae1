"""TIR expressions → SPIR-V values, one method for each kind of node."""

from __future__ import annotations

from dataclasses import dataclass

from .conversion import converted
from .module import BOOL, UINT32, DType, EmitError, Module
from .narrow import fitted, loaded, stored
from .opcodes import Capability, Glsl, Op, Scope, Storage

# (float, signed, unsigned)
_ARITHMETIC = {
    "Add": (Op.F_ADD, Op.I_ADD, Op.I_ADD),
    "Sub": (Op.F_SUB, Op.I_SUB, Op.I_SUB),
    "Mul": (Op.F_MUL, Op.I_MUL, Op.I_MUL),
    "Div": (Op.F_DIV, Op.S_DIV, Op.U_DIV),
    "Mod": (Op.F_REM, None, Op.U_MOD),  # for None see _remainder
    "BitwiseAnd": (None, Op.BITWISE_AND, Op.BITWISE_AND),
    "BitwiseOr": (None, Op.BITWISE_OR, Op.BITWISE_OR),
    "BitwiseXor": (None, Op.BITWISE_XOR, Op.BITWISE_XOR),
    "LShift": (None, Op.SHIFT_LEFT_LOGICAL, Op.SHIFT_LEFT_LOGICAL),
    "RShift": (None, Op.SHIFT_RIGHT_ARITHMETIC, Op.SHIFT_RIGHT_LOGICAL),
}
_EXTREMA = {
    "Min": (Glsl.F_MIN, Glsl.S_MIN, Glsl.U_MIN),
    "Max": (Glsl.F_MAX, Glsl.S_MAX, Glsl.U_MAX),
}
# The same, and for bool
_COMPARISONS = {
    "LT": (Op.F_ORD_LESS_THAN, Op.S_LESS_THAN, Op.U_LESS_THAN, None),
    "LE": (Op.F_ORD_LESS_THAN_EQUAL, Op.S_LESS_THAN_EQUAL, Op.U_LESS_THAN_EQUAL, None),
    "GT": (Op.F_ORD_GREATER_THAN, Op.S_GREATER_THAN, Op.U_GREATER_THAN, None),
    "GE": (Op.F_ORD_GREATER_THAN_EQUAL, Op.S_GREATER_THAN_EQUAL, Op.U_GREATER_THAN_EQUAL, None),
    "EQ": (Op.F_ORD_EQUAL, Op.I_EQUAL, Op.I_EQUAL, Op.LOGICAL_EQUAL),
    "NE": (Op.F_UNORD_NOT_EQUAL, Op.I_NOT_EQUAL, Op.I_NOT_EQUAL, Op.LOGICAL_NOT_EQUAL),
}
_KINDS = ("float", "int", "uint", "bool")

# Operators, and the C functions that TVM makes of them for a target without rules of its own.
_MATHS = {
    "exp": Glsl.EXP,
    "exp2": Glsl.EXP2,
    "log": Glsl.LOG,
    "log2": Glsl.LOG2,
    "sqrt": Glsl.SQRT,
    "rsqrt": Glsl.INVERSE_SQRT,
    "pow": Glsl.POW,
    "floor": Glsl.FLOOR,
    "ceil": Glsl.CEIL,
    "trunc": Glsl.TRUNC,
    "nearbyint": Glsl.ROUND_EVEN,
    "rint": Glsl.ROUND_EVEN,
    "fabs": Glsl.F_ABS,
    "tanh": Glsl.TANH,
    "sin": Glsl.SIN,
    "cos": Glsl.COS,
    "fma": Glsl.FMA,
}
_OF_32_BITS = {Glsl.EXP, Glsl.EXP2, Glsl.LOG, Glsl.LOG2, Glsl.POW, Glsl.TANH, Glsl.SIN, Glsl.COS}
_BITWISE = {
    "bitwise_and": "BitwiseAnd",
    "bitwise_or": "BitwiseOr",
    "bitwise_xor": "BitwiseXor",
    "shift_left": "LShift",
    "shift_right": "RShift",
}
# (instruction, the capability that it needs beside GroupNonUniform)
_SHUFFLES = {
    "tvm_warp_shuffle": (Op.GROUP_NON_UNIFORM_SHUFFLE, Capability.GROUP_NON_UNIFORM_SHUFFLE),
    "tvm_warp_shuffle_xor": (
        Op.GROUP_NON_UNIFORM_SHUFFLE_XOR,
        Capability.GROUP_NON_UNIFORM_SHUFFLE,
    ),
    "tvm_warp_shuffle_up": (
        Op.GROUP_NON_UNIFORM_SHUFFLE_UP,
        Capability.GROUP_NON_UNIFORM_SHUFFLE_RELATIVE,
    ),
    "tvm_warp_shuffle_down": (
        Op.GROUP_NON_UNIFORM_SHUFFLE_DOWN,
        Capability.GROUP_NON_UNIFORM_SHUFFLE_RELATIVE,
    ),
}


@dataclass(frozen=True)
class Memory:
    """A buffer: variable, storage class, and the type of an element. in_block: it is the only
    member of a block, whose elements have the dtype's own width; elsewhere they are carried."""

    variable: int
    storage: Storage
    dtype: DType
    in_block: bool


def dtype_of(node) -> DType:
    """Raises EmitError."""
    dtype = DType.parse(str(node.ty.dtype))
    if dtype.lanes > _MOST_LANES:
        raise EmitError(f"a {type(node).__name__} of {dtype.lanes} lanes, more than {_MOST_LANES}")
    return dtype


_MOST_LANES = 4


class Expressions:
    """values, buffers: what is in scope, by the hash of TVM's Var (its identity); written: the
    variables of buffers that something was stored to; subgroup_size: threads of a subgroup, if the
    code relies on it, else 0."""

    def __init__(self):
        self.module = Module()
        self.values: dict[int, int] = {}
        self.buffers: dict[int, Memory] = {}
        self.written: set[int] = set()
        self.block = 0  # the label of the block that is being written
        self.subgroup_size = 0

    def type_of(self, dtype: DType) -> int:
        """Of its carried values."""
        return self.module.type(dtype.carried)

    def expression(self, node) -> int:
        """The id of its value. Raises EmitError."""
        name = type(node).__name__
        if name in _ARITHMETIC or name in _EXTREMA or name in _COMPARISONS:
            return self._binary(name, node.a, node.b, dtype_of(node))
        emit = getattr(self, f"_emit_{name}", None)
        if emit is None:
            raise EmitError(f"the expression {name}")
        return emit(node)

    # Leaves

    def _emit_Var(self, node) -> int:
        if hash(node) not in self.values:
            raise EmitError(f"the variable {node.name}, which is not bound")
        return self.values[hash(node)]

    def _emit_IntImm(self, node) -> int:
        return self.module.constant(dtype_of(node), int(node.value))

    def _emit_FloatImm(self, node) -> int:
        return self.module.constant(dtype_of(node), float(node.value))

    def _lane(self, value: int, dtype: DType, lane: int) -> int:
        if dtype.lanes == 1:
            return value
        element = self.type_of(dtype.element)
        return self.module.value(Op.COMPOSITE_EXTRACT, element, value, lane)

    # Memory

    def _emit_TensorLoad(self, node) -> int:
        if len(node.indices) != 1:
            raise EmitError(f"a load of {len(node.indices)} indices from {node.source.name}")
        memory, dtype = self.memory(node.source), dtype_of(node)
        found_dtype = memory.dtype.of_lanes(dtype.lanes)
        values = [self._load(memory, place) for place in self._places(node.indices[0])]
        found = values[0] if len(values) == 1 else self.module.construct(found_dtype, values)
        return converted(self.module, found, found_dtype, dtype)

    def _load(self, memory: Memory, place: int) -> int:
        pointer = self._pointer(memory, place)
        if not memory.in_block:
            return self.module.value(Op.LOAD, self.type_of(memory.dtype), pointer)
        found = self.module.value(Op.LOAD, self.module.type(memory.dtype), pointer)
        return loaded(self.module, found, memory.dtype)

    def store(self, buffer, index, value) -> None:
        memory, dtype = self.memory(buffer), dtype_of(value)
        self.written.add(memory.variable)
        wanted = memory.dtype.of_lanes(dtype.lanes)
        rounded_here = memory.in_block and type(value).__name__ == "Cast" and dtype == wanted
        if rounded_here and dtype.is_a("float", 16) and dtype_of(value.value).is_a("float", 32):
            found = self.expression(value.value)
        else:
            found = converted(self.module, self.expression(value), dtype, wanted)
        for lane, place in enumerate(self._places(index)):
            pointer = self._pointer(memory, place)
            one = self._lane(found, wanted, lane)
            one = stored(self.module, one, memory.dtype) if memory.in_block else one
            self.module.do(Op.STORE, pointer, one)

    def memory(self, buffer) -> Memory:
        if hash(buffer) not in self.buffers:
            raise EmitError(f"the buffer {buffer.name}, which is not declared")
        return self.buffers[hash(buffer)]

    def _pointer(self, memory: Memory, place: int) -> int:
        pointee = memory.dtype if memory.in_block else memory.dtype.carried
        pointer = self.module.pointer(memory.storage, self.module.type(pointee))
        member = [self.module.constant(UINT32, 0)] if memory.in_block else []
        return self.module.value(Op.ACCESS_CHAIN, pointer, memory.variable, *member, place)

    def _places(self, index) -> list[int]:
        """The ids of a scalar index, or of each lane of a vector of them."""
        dtype = dtype_of(index)
        if type(index).__name__ == "Ramp":
            return self._ramp(index)
        value = self.expression(index)
        return [self._lane(value, dtype, lane) for lane in range(dtype.lanes)]

    def _ramp(self, node) -> list[int]:
        dtype = dtype_of(node)
        base, stride = self.expression(node.base), self.expression(node.stride)
        element = self.type_of(dtype.element)
        values = [base]
        for lane in range(1, dtype.lanes):
            step = self.module.constant(dtype.element, lane)
            offset = self.module.value(Op.I_MUL, element, stride, step)
            values.append(self.module.value(Op.I_ADD, element, base, offset))
        return values

    # Vectors

    def _emit_Ramp(self, node) -> int:
        return self.module.construct(dtype_of(node), self._ramp(node))

    def _emit_Broadcast(self, node) -> int:
        return self.module.splat(self.expression(node.value), dtype_of(node))

    def _emit_Shuffle(self, node) -> int:
        lanes = []
        for vector in node.vectors:
            value, dtype = self.expression(vector), dtype_of(vector)
            lanes += [self._lane(value, dtype, lane) for lane in range(dtype.lanes)]
        chosen = [lanes[int(i)] for i in node.indices]
        return chosen[0] if len(chosen) == 1 else self.module.construct(dtype_of(node), chosen)

    # Arithmetic

    def _binary(self, name: str, a, b, result: DType) -> int:
        operands, dtype = (self.expression(a), self.expression(b)), dtype_of(a)
        kind = _KINDS.index(dtype.kind)
        result_type = self.type_of(result)
        if name in _COMPARISONS:
            op = _COMPARISONS[name][kind]
        elif kind == 3:
            op = None
        elif name in _EXTREMA:
            return self._extremum(name, kind, result, *operands)
        elif (name, dtype.kind) == ("Mod", "int"):
            return self._remainder(result, *operands)
        else:
            op = _ARITHMETIC[name][kind]
        if op is None:
            raise EmitError(f"{name} of {dtype.kind}")
        return fitted(self.module, self.module.value(op, result_type, *operands), result)

    def _remainder(self, dtype: DType, a: int, b: int) -> int:
        """Of the division towards zero: Vulkan leaves OpSRem open where an operand is negative."""
        result = self.type_of(dtype)
        quotient = self.module.value(Op.S_DIV, result, a, b)
        product = self.module.value(Op.I_MUL, result, quotient, b)
        return self.module.value(Op.I_SUB, result, a, product)

    def _extremum(self, name: str, kind: int, dtype: DType, a: int, b: int) -> int:
        """GLSL.std.450 has integers of 32 bits only."""
        if dtype.kind == "float" or dtype.bits <= 32:
            return self._extended(_EXTREMA[name][kind], dtype, a, b)
        less = _COMPARISONS["LT" if name == "Min" else "GT"][kind]
        first = self.module.value(less, self.type_of(DType("bool", 1, dtype.lanes)), a, b)
        return self.module.value(Op.SELECT, self.type_of(dtype), first, a, b)

    def _extended(self, function: Glsl, dtype: DType, *operands: int) -> int:
        extended = self.module.extended
        return self.module.value(Op.EXT_INST, self.type_of(dtype), extended, function, *operands)

    def _emit_And(self, node) -> int:
        return self._logical(Op.LOGICAL_AND, node, node.a, node.b)

    def _emit_Or(self, node) -> int:
        return self._logical(Op.LOGICAL_OR, node, node.a, node.b)

    def _emit_Not(self, node) -> int:
        return self._logical(Op.LOGICAL_NOT, node, node.a)

    def _emit_BitwiseNot(self, node) -> int:
        return fitted(self.module, self._logical(Op.NOT, node, node.a), dtype_of(node))

    def _logical(self, op: Op, node, *operands) -> int:
        values = [self.expression(x) for x in operands]
        return self.module.value(op, self.type_of(dtype_of(node)), *values)

    def _emit_Cast(self, node) -> int:
        return converted(
            self.module, self.expression(node.value), dtype_of(node.value), dtype_of(node)
        )

    def _emit_Select(self, node) -> int:
        """Both sides are computed."""
        dtype = dtype_of(node)
        condition = self.expression(node.condition)
        if dtype_of(node.condition).lanes != dtype.lanes:
            condition = self.module.splat(condition, BOOL.of_lanes(dtype.lanes))
        sides = self.expression(node.true_value), self.expression(node.false_value)
        return self.module.value(Op.SELECT, self.type_of(dtype), condition, *sides)

    def _emit_Let(self, node) -> int:
        self.values[hash(node.var)] = self.expression(node.value)
        return self.expression(node.body)

    # Calls

    def _emit_Call(self, node) -> int:
        name, args = node.op.name.rpartition(".")[2], list(node.args)
        if name in ("call_pure_extern", "call_extern"):
            name, args = str(args[0].value), args[1:]
            name = name if name in _MATHS else name.removesuffix("f")
        if name in _MATHS:
            return self._function(name, dtype_of(node), args)
        if name in _BITWISE:
            return self._binary(_BITWISE[name], *args, dtype_of(node))
        if name in _SHUFFLES:
            return self._shuffled(name, node, args)
        emit = getattr(self, f"_call_{name}", None)
        if emit is None:
            raise EmitError(f"a call of {name}")
        return emit(node, args)

    def _function(self, name: str, dtype: DType, args) -> int:
        function = _MATHS[name]
        if dtype.kind != "float" or (dtype.bits == 64 and function in _OF_32_BITS):
            raise EmitError(f"{name} of {dtype.kind}{dtype.bits}")
        value = self._extended(function, dtype, *(self.expression(arg) for arg in args))
        return fitted(self.module, value, dtype)

    def _call_if_then_else(self, node, args) -> int:
        """Only the side that is taken is computed: it may be the only one that may load."""
        module = self.module
        then, other, merge = module.new_id(), module.new_id(), module.new_id()
        condition = self.expression(args[0])
        module.do(Op.SELECTION_MERGE, merge, 0)
        module.do(Op.BRANCH_CONDITIONAL, condition, then, other)
        ends = []
        for label, side in ((then, args[1]), (other, args[2])):
            self.begin_block(label)
            ends += [self.expression(side), self.block]
            module.do(Op.BRANCH, merge)
        self.begin_block(merge)
        return module.value(Op.PHI, self.type_of(dtype_of(node)), *ends)

    def begin_block(self, label: int) -> None:
        self.module.do(Op.LABEL, label)
        self.block = label

    def _call_reinterpret(self, node, args) -> int:
        source, target = dtype_of(args[0]), dtype_of(node)
        value = self.expression(args[0])
        if source == target:
            return value
        if source != source.carried or target != target.carried:
            raise EmitError(f"the bits of {source} as {target}")
        return self.module.value(Op.BITCAST, self.type_of(target), value)

    def _shuffled(self, name: str, node, args) -> int:
        """args: mask (of CUDA, passed over), value, lane or distance, width, warp size."""
        dtype, width = dtype_of(node), int(args[3])
        if width != int(args[4]):
            raise EmitError(f"{name} in a part of a subgroup")
        if dtype.bits != 32 or dtype.lanes != 1:
            raise EmitError(f"{name} of {dtype}, not of 32 bits")
        if self.subgroup_size not in (0, width):
            raise EmitError(f"{name} in subgroups of {self.subgroup_size} and of {width}")
        self.subgroup_size = width
        op, capability = _SHUFFLES[name]
        self.module.need(Capability.GROUP_NON_UNIFORM)
        self.module.need(capability)
        value = self.expression(args[1])
        lane = converted(self.module, self.expression(args[2]), dtype_of(args[2]), UINT32)
        scope = self.module.constant(UINT32, Scope.SUBGROUP)
        return self.module.value(op, self.type_of(dtype), scope, value, lane)

    def _call_tvm_warp_activemask(self, node, args) -> int:
        """What CUDA's shuffles want to be told; SPIR-V's know it."""
        return self.module.constant(dtype_of(node), 0xFFFFFFFF)

    def _call_large_uint_imm(self, node, args) -> int:
        low, high = (int(arg.value) for arg in args)
        return self.module.constant(dtype_of(node), high << 32 | low)

    def _call_likely(self, node, args) -> int:
        return self.expression(args[0])

    _call_tvm_thread_invariant = _call_likely

    def is_true(self, node) -> int:
        """A condition, whatever integer it is."""
        return converted(self.module, self.expression(node), dtype_of(node), BOOL)
