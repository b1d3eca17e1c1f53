"""Keys and values that queries attend to: those of a source, and the cache of a decoder, which grows in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyRows(NamedTuple):
    """The keys and values that queries attend to, and where each sequence's are.

    keys, values: (N, H). begins: (B + 1,) int32, the first row of each sequence, and N at the end; with `lengths` (B,) int32 it
    is (B,), and sequences may begin anywhere and share rows. max_seqlen: at least the rows of the longest sequence.
    """

    keys: Tensor
    values: Tensor
    begins: Tensor
    max_seqlen: int
    lengths: Tensor | None = None

    def select(self, sequences: Tensor) -> KeyRows:
        """The rows of `sequences` (B',) int64, which may repeat; nothing is copied but their begins and lengths."""
        if self.lengths is None:
            return self._replace(begins=self.begins[:-1], lengths=self.begins.diff()).select(sequences)
        begins, lengths = (t.index_select(0, sequences) for t in (self.begins, self.lengths))
        return self._replace(begins=begins, lengths=lengths)


class DecoderCache:
    """Keys and values of the tokens so far, for each layer that runs and each sequence.

    A sequence has a slot of `longest` rows, of which the first `length` are filled. Which slot is a number: sequences that end
    leave, and sequences change places, without any row being moved.

    Args:
        steps: layers that run one after another. sequences: at the start. slots: most sequences at a time. longest: most
            tokens of a sequence.
    """

    memory: Tensor  # (steps, slots * longest, 2H), made when the first rows say their width and dtype

    def __init__(self, steps: int, sequences: int, slots: int, longest: int, device: torch.device) -> None:
        self.longest, self.length, self.device = longest, 0, device
        self._sizes = steps, slots * longest
        self._free = list(range(sequences, slots))
        self._place(list(range(sequences)))

    def _place(self, slots: list[int]) -> None:
        """Put sequence i of the batch into slots[i]."""
        self._slots = slots
        self._first = torch.tensor(slots, dtype=torch.int64, device=self.device) * self.longest
        self._begins = self._first.int()
        self._count(self.length)

    def _count(self, length: int) -> None:
        self.length, self._next = length, self._first + length
        self._lengths = torch.full_like(self._begins, length + 1)  # with the token that is coming

    def append(self, step: int, rows: Tensor) -> KeyRows:
        """Write the next token's keys and values (B, 2H) of one layer; returns all rows of that layer so far."""
        if step == 0 and self.length == 0:
            self.memory = rows.new_empty(*self._sizes, rows.shape[1])  # pages that are never written cost nothing
        memory, width = self.memory[step], rows.shape[1] // 2
        memory.index_copy_(0, self._next, rows)
        return KeyRows(memory[:, :width], memory[:, width:], self._begins, self.longest, self._lengths)

    def advance(self) -> None:
        """Count the token that all layers have appended."""
        self._count(self.length + 1)

    def continue_from(self, parents: list[int]) -> None:
        """Make sequence i a continuation of what was sequence parents[i]; a sequence that nothing continues leaves.

        The first continuation of a sequence takes over its slot. For each further one the rows so far, steps x length x 2H
        numbers, are copied into a free slot.
        """
        old, kept = self._slots, {self._slots[parent] for parent in parents}
        self._free += [slot for slot in old if slot not in kept]
        new, copies = list[int](), list[tuple[int, int]]()
        for parent in parents:
            slot = old[parent]
            if slot in kept:
                kept.remove(slot)  # the next continuation needs a copy
            else:
                copies.append((slot, self._free.pop()))
                slot = copies[-1][1]
            new.append(slot)
        if copies:
            slots = self.memory.unflatten(1, (-1, self.longest))[:, :, : self.length].unbind(1)
            # By slots: indexing takes several times as long, since it copies twice.
            torch._foreach_copy_([slots[target] for _, target in copies], [slots[source] for source, _ in copies])
        if new != old:
            self._place(new)
