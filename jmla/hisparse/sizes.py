"""How large a host-resident cache is: everything about it that is static."""

import dataclasses

from jmla.config import raise_if


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiSparseSizes:
    """Sizes of one layer's host rows and device buffers. Hashable, static under jit.

    A request's device buffer has `buffer_slots` slots: `device_buffer_size` that the LRU rule
    manages, then one reserved slot for each of the `newest` tokens of a step. They lie in pages of
    the device's pool, which a request comes to own as it grows.

    Attributes:
        requests: rows of the batch; an idle row is one of them.
        max_length: tokens of the longest request.
        page_size: tokens per page, of host rows and of device buffers alike.
        num_pages: pages of host rows, and of index keys on the device.
        num_buffer_pages: pages of buffer rows on the device, for all requests together.
        device_buffer_size: slots of one request that the LRU rule manages.
        newest: reserved slots of one request: how many tokens a step may append.

    Raises:
        ValueError: naming every size that is out of range.
    """

    requests: int
    max_length: int
    page_size: int
    num_pages: int
    num_buffer_pages: int
    device_buffer_size: int
    newest: int = 1

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{field.name}={value!r}: expected a whole number, at least 1")
        if not problems:
            for name in ("num_pages", "num_buffer_pages"):
                slots = getattr(self, name) * self.page_size
                if slots >= 2**31:
                    problems.append(
                        f"{name}={getattr(self, name)} of {self.page_size=}: expected fewer than "
                        f"{2**31} slots, which are int32"
                    )
        raise_if("HiSparseSizes", problems)

    @property
    def max_pages(self) -> int:
        """Pages of host rows that the longest request needs."""
        return -(-self.max_length // self.page_size)

    @property
    def buffer_slots(self) -> int:
        """Slots of one request's device buffer, the reserved ones included."""
        return self.device_buffer_size + self.newest

    @property
    def max_buffer_pages(self) -> int:
        """Pages of the device's pool that a request longer than its buffer owns."""
        return -(-self.buffer_slots // self.page_size)

    def pages_of(self, length: int) -> int:
        """Pages of host rows that a request of `length` tokens needs."""
        return -(-length // self.page_size)

    def buffer_pages_of(self, length: int) -> int:
        """Pages of the device's pool that a request of `length` tokens needs.

        One that fits into the buffer has a slot per token; a longer one has the whole buffer and
        the reserved slots.
        """
        if length > self.device_buffer_size:
            return self.max_buffer_pages
        return -(-length // self.page_size)
