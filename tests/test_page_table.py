"""The page table against lists of tokens, with a dict of slots in place of the page tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phi3c.config import Phi3Config
from phi3c.errors import (
    CacheFullError,
    ContextLengthError,
    InputError,
    Phi3CError,
    RopeFactorError,
    SequenceError,
)
from phi3c.runtime.page_table import Copy, PageTable

TINY = Phi3Config.from_file(Path(__file__).parent.parent / "configs" / "tiny.json")
ORIGINAL = 12  # longest length that the short factors serve
CONTEXT = 40
MAX_BATCH = 3


def snapshot(table: PageTable) -> tuple:
    """All that a table knows, to compare."""
    sequences = {
        seq_id: (s.length, s.long_factors, [*s.pages], s.dropped, s.base, s.tree, s.uncommitted)
        for seq_id, s in table.sequences.items()
    }
    pool = table.pool
    return sequences, pool.num_free, [pool.owners(page) for page in range(pool.num_pages)]


def path_of(parents: list[int], leaf: int) -> list[int]:
    return [] if leaf < 0 else [*path_of(parents, parents[leaf]), leaf]


def chain_parents(n: int) -> list[int]:
    return list(range(-1, n - 1))


@dataclass
class Forward:
    """The last forward of a sequence: its length before, and the new tokens and their parents."""

    base: int
    parents: list[int]
    tokens: list[int]


@dataclass
class ModelSequence:
    """tokens: committed ones; peak: the most that pages were ever made for."""

    tokens: list[int]
    long_factors: bool
    last: Forward | None = None
    uncommitted: bool = False
    peak: int = 0


class TableMachine(RuleBasedStateMachine):
    """Every sequence reads back from its slots exactly the tokens that the model says it has."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]),
        capacity=st.integers(4, 24) | st.integers(4, 90),
        window=st.sampled_from([None, None, 1, 2, 5, 16, 100]),
        max_append=st.integers(3, 10),
    )
    def start(self, page_size, capacity, window, max_append):
        config = replace(TINY, sliding_window=window, original_max_position_embeddings=ORIGINAL)
        num_pages = -(-capacity // page_size)
        self.table = PageTable(config, num_pages, page_size, MAX_BATCH, max_append, CONTEXT)
        self.page_size, self.num_pages = page_size, num_pages
        self.window, self.max_append = window, max_append
        self.model: dict[int, ModelSequence] = {}
        self.memory: dict[int, int] = {}  # slot → token
        self.next_token = 0

    # What the model expects

    def attempt(self, action, must: set[type]):
        """`action()`, or None if it was refused. `must`: refusals of which one has to come."""
        before = snapshot(self.table)
        try:
            result = action()
        except Phi3CError as error:
            assert type(error) in must, f"refused with {error!r}; expected {must or 'success'}"
            assert snapshot(self.table) == before, "an error has changed something"
            return None
        assert not must, f"accepted; expected {must}"
        return result if result is not None else True

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def unknown_or_uncommitted(self, seq_id: int) -> bool:
        return seq_id not in self.model or self.model[seq_id].uncommitted

    def shortening_refusals(self, seq_id: int, length: int) -> set[type]:
        """For cutting a sequence to `length`, because of the window."""
        dropped = self.table.sequences[seq_id].dropped * self.page_size
        if self.window is not None and dropped > max(0, length - self.window + 1):
            assert length < self.model[seq_id].peak - self.max_append, "a forward cannot be undone"
            return {SequenceError}
        return set()

    def forward_refusals(self, ids, lengths, parents) -> set[type]:
        must: set[type] = set()
        if len(set(ids)) != len(ids) or any(map(self.unknown_or_uncommitted, ids)):
            must.add(SequenceError)
        trees = self.trees(lengths, parents)
        if not ids or len(ids) > MAX_BATCH or len(ids) != len(lengths) or trees is None:
            must.add(InputError)
        for seq_id, tree in zip(ids, trees or [], strict=False):
            if sequence := self.model.get(seq_id):
                height = max((len(path_of(tree, i)) for i in range(len(tree))), default=0)
                total = len(sequence.tokens) + height
                if total > CONTEXT:
                    must.add(ContextLengthError)
                if total > ORIGINAL and not sequence.long_factors:
                    must.add(RopeFactorError)
        return must

    def trees(self, lengths, parents) -> list[list[int]] | None:
        """Parents per sequence; None if they make no sense."""
        if min(lengths, default=0) < 1 or sum(lengths) > self.max_append:
            return None
        if parents is None:
            return [chain_parents(n) for n in lengths]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        trees = [parents[a : a + n] for a, n in zip(starts, lengths, strict=True)]
        fits = all(-1 <= parent < i for tree in trees for i, parent in enumerate(tree))
        return trees if fits and len(parents) == sum(lengths) else None

    def is_full(self, ids, lengths) -> bool:
        """Whether a forward that is otherwise accepted finds too few pages: a rehearsal of it."""
        pool = self.table.pool
        owners = [pool.owners(page) for page in range(self.num_pages)]
        sequences = [self.table.sequences[seq_id] for seq_id in ids]
        for sequence, n in zip(sequences, lengths, strict=True):
            if self.window is not None:  # what a forward added can be undone: max_append more
                unseen = sequence.length + n - self.window - self.max_append + 1
                for page in sequence.pages[: max(0, unseen // self.page_size - sequence.dropped)]:
                    owners[page] -= 1
        free = owners.count(0)
        for sequence, n in zip(sequences, lengths, strict=True):
            held, after = self.pages_for(sequence.length), self.pages_for(sequence.length + n)
            free -= after - held
            if sequence.length % self.page_size and owners[sequence.pages[-1]] > 1:
                owners[sequence.pages[-1]] -= 1
                free -= 1
        return free < 0

    # Sequences

    @rule(seq_id=st.integers(0, 4), max_length=st.none() | st.integers(-1, CONTEXT + 1))
    def add(self, seq_id, max_length):
        must = {SequenceError} if seq_id in self.model else set()
        if max_length is not None and not 1 <= max_length <= CONTEXT:
            must.add(ContextLengthError)
        if self.attempt(lambda: self.table.add(seq_id, max_length), must):
            self.model[seq_id] = ModelSequence([], (max_length or 0) > ORIGINAL)

    @rule(seq_id=st.integers(0, 4))
    def add_long(self, seq_id):
        self.add(seq_id, CONTEXT)

    @rule(seq_id=st.integers(0, 5))
    def remove(self, seq_id):
        must = set() if seq_id in self.model else {SequenceError}
        if self.attempt(lambda: self.table.remove(seq_id), must):
            del self.model[seq_id]

    @rule(parent=st.integers(0, 4), child=st.integers(0, 4), cut=st.integers(-1, 9))
    def fork(self, parent, child, cut):
        """At `cut` tokens before the parent's end, or at −1."""
        length = len(self.model[parent].tokens) if parent in self.model else 0
        position = -1 if cut == -1 else length - cut
        must = {SequenceError}
        if not self.unknown_or_uncommitted(parent) and child not in self.model and position >= -1:
            length = length if position == -1 else position
            must = self.shortening_refusals(parent, length)
        if self.attempt(lambda: self.table.fork(parent, child, position), must):
            old = self.model[parent]
            self.model[child] = ModelSequence(old.tokens[:length], old.long_factors, peak=old.peak)

    @precondition(lambda self: self.ready() and len(self.model) < 5)
    @rule(data=st.data(), cut=st.integers(0, 9))
    def fork_to_a_new_one(self, data, cut):
        parent = data.draw(st.sampled_from(self.ready()))
        child = next(i for i in range(5) if i not in self.model)
        self.fork(parent, child, min(cut, len(self.model[parent].tokens)))

    @rule(parent=st.integers(0, 4), child=st.integers(0, 4))
    def fork_past_the_end(self, parent, child):
        length = len(self.model[parent].tokens) if parent in self.model else 0
        self.attempt(lambda: self.table.fork(parent, child, length + 1), {SequenceError})

    @rule(seq_id=st.integers(0, 4), n=st.integers(0, 5) | st.integers(-1, CONTEXT))
    def popn(self, seq_id, n):
        must = {SequenceError}
        if not self.unknown_or_uncommitted(seq_id):
            length = len(self.model[seq_id].tokens)
            if 0 <= n <= length:
                must = self.shortening_refusals(seq_id, length - n)
        if self.attempt(lambda: self.table.popn(seq_id, n), must):
            sequence = self.model[seq_id]
            sequence.tokens = sequence.tokens[: len(sequence.tokens) - n]
            sequence.last = None

    # Forwards

    def ready(self) -> list[int]:
        return [i for i in self.model if not self.unknown_or_uncommitted(i)]

    @precondition(lambda self: self.ready())
    @rule(data=st.data(), aborts=st.sampled_from([False, False, False, True]))
    def append_chains(self, data, aborts):
        ids = data.draw(st.permutations(self.ready()))[:MAX_BATCH]
        lengths = [data.draw(st.integers(1, max(1, self.max_append // len(ids)))) for _ in ids]
        self.forward(ids, lengths, None, aborts)

    @precondition(lambda self: self.ready())
    @rule(data=st.data(), aborts=st.sampled_from([False, False, False, True]))
    def append_trees(self, data, aborts):
        ids = data.draw(st.permutations(self.ready()))[: data.draw(st.integers(1, MAX_BATCH))]
        lengths = [data.draw(st.integers(1, max(1, self.max_append // len(ids)))) for _ in ids]
        parents = [data.draw(st.integers(-1, i - 1)) for n in lengths for i in range(n)]
        self.forward(ids, lengths, parents, aborts)

    @rule(
        ids=st.lists(st.integers(0, 5), max_size=MAX_BATCH + 1),
        lengths=st.lists(st.integers(0, 6), max_size=MAX_BATCH + 1),
        parents=st.none() | st.lists(st.integers(-2, 3), max_size=8),
    )
    def append_anything(self, ids, lengths, parents):
        self.forward(ids, lengths, parents, aborts=False)

    def forward(self, ids, lengths, parents, aborts):
        must = self.forward_refusals(ids, lengths, parents)
        if not must and self.is_full(ids, lengths):
            must = {CacheFullError}
        begun = self.attempt(lambda: self.table.begin(ids, lengths, parents), must)
        if begun is None:
            return
        appends, copy = begin_in_order(begun, ids, lengths)
        self.apply(copy)
        for append, tree in zip(appends, self.trees(lengths, parents), strict=True):
            tokens = list(range(self.next_token, self.next_token + len(tree)))
            self.next_token += len(tree)
            model = self.model[append.seq_id]
            model.last = Forward(len(model.tokens), tree, tokens)
            model.peak = max(model.peak, len(model.tokens) + len(tree))
            self.check_window(append.seq_id, len(model.tokens))
            for i, token in enumerate(tokens):
                slot = self.table.slot(append.sequence, len(model.tokens) + i)
                assert self.table.pool.owners(slot // self.page_size) == 1, "a shared page written"
                self.memory[slot] = token
        self.check_tokens({seq_id: self.model[seq_id].last.tokens for seq_id in ids})
        if aborts:
            self.table.abort(appends)
        else:
            self.table.end(appends)
        for seq_id in ids:
            model = self.model[seq_id]
            if aborts:
                model.last = None
            elif model.last.parents == chain_parents(len(model.last.parents)):
                model.tokens = model.tokens + model.last.tokens
            else:
                model.uncommitted = True

    @precondition(lambda self: any(s.last for s in self.model.values()))
    @rule(data=st.data())
    def commit(self, data):
        candidates = [i for i, s in self.model.items() if s.last]
        ids = data.draw(st.lists(st.sampled_from(candidates), unique=True, min_size=1))
        sizes = [len(self.model[i].last.parents) for i in ids]
        self.commit_leaves(ids, [data.draw(st.integers(-1, n - 1)) for n in sizes])

    @rule(seq_id=st.integers(0, 5), leaf=st.integers(-2, 5))
    def commit_any_one(self, seq_id, leaf):
        self.commit_leaves([seq_id], [leaf])

    @rule(ids=st.lists(st.integers(0, 5), max_size=3), leaves=st.lists(st.integers(-2, 5)))
    def commit_anything(self, ids, leaves):
        self.commit_leaves(ids, leaves[: len(ids) + 1])

    def commit_leaves(self, ids, leaves):
        must: set[type] = set()
        if len(ids) != len(leaves) or len(set(ids)) != len(ids):
            must.add(InputError)
        for seq_id, leaf in zip(ids, leaves, strict=False):
            if seq_id not in self.model or self.model[seq_id].last is None:
                must.add(SequenceError)
            elif not -1 <= leaf < len(self.model[seq_id].last.parents):
                must.add(InputError)
        # Copied before anything else is written, though their pages may be free by now.
        copy = self.attempt(lambda: self.table.commit(ids, leaves), must)
        if copy is None:
            return
        self.apply(copy)
        for seq_id, leaf in zip(ids, leaves, strict=True):
            model = self.model[seq_id]
            last = model.last
            accepted = [last.tokens[i] for i in path_of(last.parents, leaf)]
            model.tokens = model.tokens[: last.base] + accepted
            model.last, model.uncommitted = None, False

    def apply(self, copy: Copy) -> None:
        """What the copy kernel does: one token after another."""
        for source, target in zip(copy.source, copy.target, strict=True):
            self.memory[target] = self.memory[source]

    # What must always hold

    def check_window(self, seq_id: int, length: int) -> None:
        """A token at position `length` finds its whole window."""
        dropped = self.table.sequences[seq_id].dropped * self.page_size
        first = 0 if self.window is None else max(0, length - self.window + 1)
        assert dropped <= first, f"tokens before {dropped} are gone, {first} is needed"

    def check_tokens(self, new_tokens: dict[int, list[int]]) -> None:
        """Every held slot of every sequence; those in `new_tokens` have these behind the rest."""
        for seq_id, model in self.model.items():
            sequence = self.table.sequences[seq_id]
            tokens = model.tokens + new_tokens.get(seq_id, [])
            indices = range(sequence.dropped * self.page_size, len(tokens))
            found = [self.memory.get(self.table.slot(sequence, i)) for i in indices]
            assert found == tokens[indices.start :], f"sequence {seq_id}"

    @invariant()
    def free_pages_hold_nothing(self):
        pool = self.table.pool
        free = {page for page in range(self.num_pages) if pool.owners(page) == 0}
        self.memory = {s: t for s, t in self.memory.items() if s // self.page_size not in free}

    @invariant()
    def sequences_read_back_their_tokens(self):
        assert set(self.table.sequences) == set(self.model)
        pending = {i: s.last.tokens for i, s in self.model.items() if s.uncommitted}
        self.check_tokens(pending)
        for seq_id, model in self.model.items():
            assert self.table.length(seq_id) == len(model.tokens)
            assert self.table.sequences[seq_id].long_factors == model.long_factors
            self.check_window(seq_id, len(model.tokens))

    @invariant()
    def pages_are_all_accounted_for(self):
        pool = self.table.pool
        owners = Counter(page for s in self.table.sequences.values() for page in s.pages)
        assert [pool.owners(page) for page in range(self.num_pages)] == [
            owners[page] for page in range(self.num_pages)
        ]
        assert len(owners) + pool.num_free == self.num_pages

    @invariant()
    def sequences_hold_no_more_pages_than_they_need(self):
        for seq_id, model in self.model.items():
            sequence = self.table.sequences[seq_id]
            extra = len(model.last.tokens) if model.uncommitted else 0
            tokens = len(model.tokens) + extra
            assert sequence.dropped + len(sequence.pages) == self.pages_for(tokens)
            if self.window is not None:
                most = self.window + self.max_append - 1 + 2 * (self.page_size - 1)
                assert len(sequence.pages) <= most // self.page_size


def begin_in_order(begun, ids, lengths):
    """`begin`'s parts are those that were asked for, in that order."""
    appends, copy = begun
    assert [a.seq_id for a in appends] == list(ids)
    assert [a.tree.size for a in appends] == list(lengths)
    return appends, copy


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


# Examples, one behaviour each


def new_table(num_pages=16, page_size=4, window=None, max_append=8, original=256) -> PageTable:
    config = replace(TINY, sliding_window=window, original_max_position_embeddings=original)
    return PageTable(config, num_pages, page_size, MAX_BATCH, max_append, 64)


def append(table: PageTable, seq_id: int, n: int, parents=None) -> Copy:
    """A forward of n tokens that runs."""
    appends, copy = table.begin([seq_id], [n], parents)
    table.end(appends)
    return copy


def grow(table: PageTable, seq_id: int, n: int) -> None:
    """n tokens, in forwards of one."""
    for _ in range(n):
        append(table, seq_id, 1)


def test_a_fork_shares_pages_until_it_writes():
    table = new_table()
    table.add(0, None)
    append(table, 0, 6)
    table.fork(0, 1, -1)
    parent, child = table.sequences[0], table.sequences[1]
    assert child.pages == parent.pages and table.pool.num_free == 14
    copy = append(table, 1, 1)
    assert child.pages[0] == parent.pages[0] and child.pages[1] != parent.pages[1]
    assert copy.source == [parent.pages[1] * 4, parent.pages[1] * 4 + 1]
    assert copy.target == [child.pages[1] * 4, child.pages[1] * 4 + 1]


def test_a_fork_at_a_page_edge_copies_nothing():
    table = new_table()
    table.add(0, None)
    append(table, 0, 6)
    table.fork(0, 1, 4)
    assert append(table, 1, 3) == Copy([], [])
    assert table.pool.num_free == 13


def test_the_last_owner_of_a_page_writes_it_without_a_copy():
    table = new_table()
    table.add(0, None)
    append(table, 0, 2)
    table.fork(0, 1, -1)
    appends, copy = table.begin([0, 1], [1, 1], None)
    table.end(appends)
    assert len(copy.source) == 2, "one of the two copies its two tokens"
    assert table.pool.num_free == 14


def test_a_page_that_its_other_owner_drops_is_written_without_a_copy():
    table = new_table(num_pages=2, window=1, max_append=4)
    table.add(0, None)
    append(table, 0, 4)
    append(table, 0, 3)
    table.fork(0, 1, 3)
    # No page is free. Sequence 0 drops its first, which is then sequence 1's alone.
    appends, copy = table.begin([0, 1], [1, 1], None)
    table.end(appends)
    assert copy == Copy([], []) and table.pool.num_free == 0


def test_a_full_cache_changes_nothing_and_says_what_it_needs():
    table = new_table(num_pages=3)
    table.add(0, None)
    append(table, 0, 7)
    before = snapshot(table)
    with pytest.raises(CacheFullError, match="8 tokens need 2 more pages of 4.*1 of 3 are free"):
        table.begin([0], [8], None)
    assert snapshot(table) == before
    append(table, 0, 5)


def test_a_copy_needs_a_page_too():
    table = new_table(num_pages=1)
    table.add(0, None)
    append(table, 0, 2)
    table.fork(0, 1, -1)
    before = snapshot(table)
    for ids in ([0], [1], [0, 1]):
        with pytest.raises(CacheFullError, match="need 1 more pages"):
            table.begin(ids, [1] * len(ids), None)
        assert snapshot(table) == before


def test_a_page_that_leaves_one_window_is_not_free_while_a_fork_holds_it():
    table = new_table(num_pages=2, window=1, max_append=4)
    table.add(0, None)
    append(table, 0, 4)
    append(table, 0, 3)
    table.fork(0, 1, 4)
    before = snapshot(table)
    with pytest.raises(CacheFullError):
        table.begin([0], [2], None)
    assert snapshot(table) == before
    table.remove(1)
    append(table, 0, 2)


def test_an_aborted_forward_gives_its_pages_back():
    table = new_table()
    table.add(0, None)
    append(table, 0, 3)
    free = table.pool.num_free
    appends, _ = table.begin([0], [8], None)
    assert table.pool.num_free == free - 2
    table.abort(appends)
    assert table.pool.num_free == free and table.length(0) == 3
    with pytest.raises(SequenceError, match="no forward to commit"):
        table.commit([0], [0])


def test_commit_compacts_the_accepted_path():
    table = new_table()
    table.add(0, None)
    append(table, 0, 3)
    append(table, 0, 6, [-1, -1, 0, 1, 1, 3])
    sequence = table.sequences[0]
    slots = [table.slot(sequence, 3 + i) for i in range(6)]
    assert table.length(0) == 3, "a tree waits for its commit"
    copy = table.commit([0], [5])  # 1, 3, 5
    assert copy == Copy([slots[1], slots[3], slots[5]], slots[:3])
    assert table.length(0) == 6 and len(sequence.pages) == 2


def test_a_chain_may_be_accepted_in_part():
    table = new_table()
    table.add(0, None)
    append(table, 0, 5)
    assert table.commit([0], [1]) == Copy([], [])
    assert table.length(0) == 2


def test_a_forward_is_committed_once_and_not_after_a_pop():
    table = new_table()
    table.add(0, None)
    append(table, 0, 5)
    table.commit([0], [3])
    with pytest.raises(SequenceError, match="sequence 0 has no forward to commit"):
        table.commit([0], [3])
    append(table, 0, 1)
    table.popn(0, 1)
    with pytest.raises(SequenceError, match="sequence 0 has no forward to commit"):
        table.commit([0], [0])
    assert table.length(0) == 4


def test_an_uncommitted_tree_blocks_its_sequence_alone():
    table = new_table()
    table.add(0, None)
    table.add(1, None)
    append(table, 0, 2, [-1, -1])
    for refused in (
        lambda: table.begin([0], [1], None),
        lambda: table.popn(0, 0),
        lambda: table.fork(0, 2, -1),
    ):
        with pytest.raises(SequenceError, match="verified tree"):
            refused()
    append(table, 1, 1)
    table.commit([0], [-1])
    assert table.length(0) == 0 and table.pool.num_free == 15


def test_pages_that_left_the_window_are_freed():
    table = new_table(window=5, max_append=4)
    table.add(0, None)
    grow(table, 0, 40)
    sequence = table.sequences[0]
    # Token 39 sees 35 … 39; undoing a forward of 4 may ask for 31 … 35 again.
    assert sequence.dropped == 8 and len(sequence.pages) == 2
    assert table.pool.num_free == 14
    table.popn(0, 4)
    with pytest.raises(SequenceError, match="have left the sliding window of 5 and are freed"):
        table.popn(0, 1)


def test_a_long_sequence_with_a_window_fits_into_few_pages():
    table = new_table(num_pages=2, window=5, max_append=4)
    table.add(0, None)
    for _ in range(16):  # each needs the page that it frees
        append(table, 0, 4)
    assert table.length(0) == 64


def test_a_sequence_may_begin_behind_its_window():
    table = new_table(window=5)
    table.add(0, None)
    grow(table, 0, 20)
    dropped, pages = table.full_pages(0)
    assert (dropped, len(pages)) == (2, 3)
    before = snapshot(table)
    with pytest.raises(SequenceError, match="before 20 have left the sliding window of 5"):
        table.add(1, None, [], 5)
    assert snapshot(table) == before
    table.add(1, None, pages[2:], 4)
    assert table.length(1) == 20 and table.pages(1) == pages[2:]
    append(table, 1, 3)
    one, two = table.sequences[0], table.sequences[1]
    assert table.slots(two, 16, 4).tolist() == [table.slot(one, i) for i in range(16, 20)]
    assert table.slots(two, 19, 4).tolist() == [table.slot(two, i) for i in range(19, 23)]
    table.remove(0)
    table.remove(1)
    assert table.pool.num_free == table.pool.num_pages


def test_a_sequence_grows_past_the_original_context_only_with_long_factors():
    table = new_table(original=12, max_append=16)
    for seq_id, max_length in enumerate([None, 12, 13]):
        table.add(seq_id, max_length)
        append(table, seq_id, 12)
    for seq_id in (0, 1):
        with pytest.raises(RopeFactorError, match="would have 13 tokens, past original_max"):
            append(table, seq_id, 1)
    append(table, 2, 1)
    assert table.length(2) == 13


def test_a_prompt_that_crosses_the_original_context_is_refused_whole():
    table = new_table(original=12, max_append=16)
    table.add(0, None)
    with pytest.raises(RopeFactorError):
        append(table, 0, 13)
    assert table.length(0) == 0 and table.pool.num_free == 16


def test_a_fork_keeps_its_parents_factors():
    table = new_table(original=12)
    table.add(0, 20)
    append(table, 0, 8)
    table.fork(0, 1, 3)
    append(table, 1, 8)
    append(table, 1, 8)
    assert table.length(1) == 19


def test_a_tree_counts_by_its_height_against_the_context():
    table = new_table(original=12)
    table.add(0, None)
    append(table, 0, 8)
    append(table, 0, 2)
    append(table, 0, 6, [-1, -1, -1, 0, 1, 2])  # 16 slots, but 12 positions
    table.commit([0], [5])
    with pytest.raises(RopeFactorError):
        append(table, 0, 2, [-1, -1])


def test_one_refused_sequence_refuses_the_batch():
    table = new_table(original=12)
    for seq_id in (0, 1):
        table.add(seq_id, None)
    append(table, 1, 8)
    append(table, 1, 4)
    before = snapshot(table)
    with pytest.raises(RopeFactorError):
        table.begin([0, 1], [4, 1], None)
    assert snapshot(table) == before


@pytest.mark.parametrize("max_length", [0, -1, 65])
def test_max_length_must_fit_the_context(max_length):
    with pytest.raises(ContextLengthError, match=f"found {max_length}; accepted: 1 to 64"):
        new_table().add(0, max_length)
