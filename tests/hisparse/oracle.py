"""The LRU rule in plain Python, one request at a time: what the arrays must say."""

from dataclasses import dataclass, field


@dataclass
class Buffer:
    """One request's device buffer.

    Attributes:
        size: slots that the LRU rule manages.
        newest: reserved slots after them.
        tokens: the position held by each slot, -1 for none.
        lru: the managed slots, least recently used first.
        fetched: the (slot, position) pairs of the last swap, in order.
    """

    size: int
    newest: int
    tokens: list[int] = field(init=False)
    lru: list[int] = field(init=False)
    fetched: list[tuple[int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.tokens = [-1] * (self.size + self.newest)
        self.lru = list(range(self.size))

    def admit(self, length: int) -> None:
        self.clear()
        for slot in range(min(length, self.size)):
            self.tokens[slot] = slot

    def append(self, length: int, count: int) -> None:
        if length == 0:
            return
        new = range(length - count, length)
        for slot in range(self.size + self.newest):
            if slot >= self.size or self.tokens[slot] >= new.start:
                self.tokens[slot] = -1
        for nth, position in enumerate(new):
            if position >= 0:
                slot = position if length <= self.size else self.size + nth
                self.tokens[slot] = position

    def swap(self, positions: list[int], length: int) -> list[int]:
        """The slot of each position; -1 for one outside the request."""
        self.fetched = []
        asked = [p for p in positions if 0 <= p < length]
        wanted = set(asked)
        if length <= self.size and all(self.tokens[p] == p for p in wanted):
            return [p if 0 <= p < length else -1 for p in positions]
        slot_of = {}
        for slot in range(self.size, self.size + self.newest):
            if self.tokens[slot] in wanted:
                slot_of[self.tokens[slot]] = slot
        hits, evictable = [], []
        for slot in self.lru:
            token = self.tokens[slot]
            if token in wanted and token not in slot_of:
                slot_of[token] = slot
                hits.append(slot)
            else:
                evictable.append(slot)
        for position in asked:
            if position not in slot_of:
                slot = evictable[len(self.fetched)]
                slot_of[position] = slot
                self.fetched.append((slot, position))
        for slot, position in self.fetched:
            self.tokens[slot] = position
        loaded = [slot for slot, _ in self.fetched]
        self.lru = evictable[len(loaded) :] + loaded + hits
        return [slot_of.get(p, -1) for p in positions]
