"""TIR statements → SPIR-V's structured control flow, one method for each kind of node."""

from __future__ import annotations

from .expressions import Expressions, Memory, dtype_of
from .module import BOOL, UINT32, DType, EmitError
from .opcodes import (
    ACQUIRE_RELEASE_WORKGROUP_MEMORY,
    BuiltIn,
    Decoration,
    Op,
    Scope,
    Storage,
)

_BUILT_INS = {"blockIdx": BuiltIn.WORKGROUP_ID, "threadIdx": BuiltIn.LOCAL_INVOCATION_ID}
# Attributes that change nothing for this emitter.
_PASSED_OVER = {"reduce_scope", "pragma_unroll_explicit"}


class Statements(Expressions):
    """warp_size: threads that the target says run in step.

    workgroup: threads in x, y and z, as the kernel binds them; grid: workgroups, 0 where their
    number depends on arguments; shared_bytes: of a workgroup's memory.
    """

    def __init__(self, warp_size: int = 1):
        super().__init__()
        self.warp_size = warp_size
        self.workgroup, self.grid = [1, 1, 1], [1, 1, 1]
        self.shared_bytes = 0
        self._threads: dict[str, int] = {}
        self._built_ins: dict[BuiltIn, int] = {}

    def statement(self, node) -> None:
        """Raises EmitError."""
        emit = getattr(self, f"_do_{type(node).__name__}", None)
        if emit is None:
            raise EmitError(f"the statement {type(node).__name__}")
        emit(node)

    def _do_SeqStmt(self, node) -> None:
        for one in node.seq:
            self.statement(one)

    def _do_Bind(self, node) -> None:
        self.values[hash(node.var)] = self.expression(node.value)

    def _do_Evaluate(self, node) -> None:
        value = node.value
        if type(value).__name__ == "IntImm":
            return
        if type(value).__name__ == "Call" and value.op.name.endswith("tvm_storage_sync"):
            self._barrier(str(value.args[0].value))
        else:
            self.expression(value)

    def _barrier(self, scope: str) -> None:
        if scope not in ("shared", "warp"):
            raise EmitError(f"a barrier of scope {scope}")
        waiting = Scope.WORKGROUP if scope == "shared" else Scope.SUBGROUP
        operands = (waiting, Scope.WORKGROUP, ACQUIRE_RELEASE_WORKGROUP_MEMORY)
        ids = [self.module.constant(UINT32, operand) for operand in operands]
        self.module.do(Op.CONTROL_BARRIER, *ids)

    # Memory

    def _do_BufferStore(self, node) -> None:
        if len(node.indices) != 1:
            raise EmitError(f"a store of {len(node.indices)} indices to {node.buffer.name}")
        self.store(node.buffer, node.indices[0], node.value)

    def _do_DeclBuffer(self, node) -> None:
        data = node.data
        source = self.memory(data if type(data).__name__ == "Var" else data.args[0])
        dtype = DType.parse(str(node.buffer.dtype))
        if dtype != source.dtype:
            raise EmitError(f"{node.buffer.name}, which sees {source.dtype} as {dtype}")
        self.buffers[hash(node.buffer)] = source

    def _do_AllocBuffer(self, node) -> None:
        buffer, scope = node.buffer, str(node.buffer.scope())
        dtype = DType.parse(str(buffer.dtype))
        if dtype.lanes != 1:
            raise EmitError(f"{buffer.name}, memory of {dtype}")
        length = 1
        for extent in buffer.shape:
            length *= int(extent)
        array = self.module.array(dtype.carried, length)
        if scope == "shared":
            self.shared_bytes += length * dtype.carried.bits // 8
            memory = self.module.global_variable(Storage.WORKGROUP, array)
            self.buffers[hash(buffer)] = Memory(memory, Storage.WORKGROUP, dtype, False)
        elif scope == "local":
            memory = self.module.local_variable(array)
            self.buffers[hash(buffer)] = Memory(memory, Storage.FUNCTION, dtype, False)
        else:
            raise EmitError(f"{buffer.name}, memory of scope {scope}")

    # Threads

    def _do_AttrStmt(self, node) -> None:
        if node.attr_key == "thread_extent":
            self._bind_thread(node.node, node.value)
        elif node.attr_key == "tirx.volatile":
            # Threads in step would leave out barriers: SPIR-V has no such memory for them.
            if self.warp_size != 1:
                raise EmitError(f"volatile memory, for warps of {self.warp_size} threads")
        elif node.attr_key not in _PASSED_OVER:
            raise EmitError(f"the attribute {node.attr_key}")
        self.statement(node.body)

    def _bind_thread(self, axis, extent) -> None:
        tag = str(axis.thread_tag)
        group, _, dimension = tag.partition(".")
        if group not in _BUILT_INS or dimension not in ("x", "y", "z"):
            raise EmitError(f"the thread {tag}")
        place = "xyz".index(dimension)
        constant = int(extent) if type(extent).__name__ == "IntImm" else 0
        if group == "blockIdx":
            self.grid[place] = constant
        elif not constant:
            raise EmitError(f"{tag}, of no constant extent")
        else:
            self.workgroup[place] = constant
        if tag not in self._threads:
            self._threads[tag] = self._thread(_BUILT_INS[group], place)
        wanted = dtype_of(axis.var)
        self.values[hash(axis.var)] = self._thread_as(tag, wanted)

    def _thread(self, built_in: BuiltIn, place: int) -> int:
        module = self.module
        if built_in not in self._built_ins:
            variable = module.global_variable(Storage.INPUT, module.type(DType("uint", 32, 3)))
            module.decorate(variable, Decoration.BUILTIN, built_in)
            module.interface.append(variable)
            self._built_ins[built_in] = variable
        pointer = module.pointer(Storage.INPUT, module.type(UINT32))
        variable, index = self._built_ins[built_in], module.constant(UINT32, place)
        found = module.entry_value(Op.ACCESS_CHAIN, pointer, variable, index)
        return module.entry_value(Op.LOAD, module.type(UINT32), found)

    def _thread_as(self, tag: str, wanted: DType) -> int:
        """At the entry, so that every block may use it."""
        module, value = self.module, self._threads[tag]
        if wanted.carried.bits != 32:
            value = module.entry_value(Op.U_CONVERT, self.type_of(wanted.of("uint")), value)
        if wanted.kind == "uint":
            return value
        return module.entry_value(Op.BITCAST, self.type_of(wanted), value)

    # Control flow

    def _do_IfThenElse(self, node) -> None:
        module = self.module
        condition = self.is_true(node.condition)
        then, other, merge = module.new_id(), module.new_id(), module.new_id()
        has_else = node.else_case is not None
        module.do(Op.SELECTION_MERGE, merge, 0)
        module.do(Op.BRANCH_CONDITIONAL, condition, then, other if has_else else merge)
        self.begin_block(then)
        self.statement(node.then_case)
        module.do(Op.BRANCH, merge)
        if has_else:
            self.begin_block(other)
            self.statement(node.else_case)
            module.do(Op.BRANCH, merge)
        self.begin_block(merge)

    def _do_For(self, node) -> None:
        if node.thread_binding is not None:
            raise EmitError(f"the loop {node.loop_var.name}, which is bound to a thread")
        module, dtype = self.module, dtype_of(node.loop_var)
        result, counter = self.type_of(dtype), module.local_variable(self.type_of(dtype))
        first = self.expression(node.min)
        end = module.value(Op.I_ADD, result, first, self.expression(node.extent))
        step = module.constant(dtype, 1) if node.step is None else self.expression(node.step)
        module.do(Op.STORE, counter, first)

        def condition() -> int:
            value = module.value(Op.LOAD, result, counter)
            self.values[hash(node.loop_var)] = value
            less = Op.S_LESS_THAN if dtype.kind == "int" else Op.U_LESS_THAN
            return module.value(less, module.type(BOOL), value, end)

        def advance() -> None:
            value = module.value(Op.LOAD, result, counter)
            module.do(Op.STORE, counter, module.value(Op.I_ADD, result, value, step))

        self._loop(condition, lambda: self.statement(node.body), advance)

    def _do_While(self, node) -> None:
        self._loop(
            lambda: self.is_true(node.condition), lambda: self.statement(node.body), lambda: None
        )

    def _loop(self, condition, body, advance) -> None:
        module = self.module
        header, test, inside, following, merge = (module.new_id() for _ in range(5))
        module.do(Op.BRANCH, header)
        self.begin_block(header)
        module.do(Op.LOOP_MERGE, merge, following, 0)
        module.do(Op.BRANCH, test)
        self.begin_block(test)
        module.do(Op.BRANCH_CONDITIONAL, condition(), inside, merge)
        self.begin_block(inside)
        body()
        module.do(Op.BRANCH, following)
        self.begin_block(following)
        advance()
        module.do(Op.BRANCH, header)
        self.begin_block(merge)
