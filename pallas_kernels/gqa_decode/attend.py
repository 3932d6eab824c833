"""Attention of a block's rows to its keys: each warp to its own, then all joined."""

import math
from collections.abc import Callable

from pallas_kernels.device.memory import load_global, load_shared, store_shared
from pallas_kernels.device.mma import multiply_add
from pallas_kernels.device.row_formats import pack_bf16
from pallas_kernels.device.simt import (
    WARP,
    Value,
    any_lane,
    branch,
    exp2,
    f32,
    fmax,
    loop,
    minimum,
    over_quad,
    ptx,
    select,
    when,
)
from pallas_kernels.gqa_decode.block import Block
from pallas_kernels.gqa_decode.finish import Partial, finish
from pallas_kernels.gqa_decode.ring import Ring
from pallas_kernels.gqa_decode.shape import MMA_ROWS

NO_LOGIT = -3e38  # a reference below every logit
# A row's reference is raised, to its largest logit, when a weight would pass 2^8.
LARGEST_WEIGHT = 8.0
_FRAGMENT_BYTES = 16 * WARP
_D = 4  # floats of a product that a thread has

# From a tile and a product over 16 columns to a fragment of the query.
_Query = Callable[[int, int], list[Value]]


def attend(block: Block) -> None:
    """All that a block does."""
    _Attention(block).run()


class _Attention:
    """The running softmax of a warp."""

    def __init__(self, block: Block) -> None:
        self.block, self.thread = block, block.thread
        self.tiles = block.tuning.tiles
        self.products = block.format.dim // 16  # of a key
        self.columns = block.format.dim // 8  # of 8 each
        self.rows = block.own_rows()

    def run(self) -> None:
        """Over all steps."""
        block = self.block
        first, last = block.steps()
        last_row = minimum(block.first_row + block.tuning.rows, block.shape.rows) - 1
        ring = Ring(block, first, block.reach(last_row))
        started = ring.start()
        query = self._load_query()
        factor = self._logit_factor()
        reaches = [block.reach(row) for row in self.rows]
        least = block.reach(block.first_row)
        state = Partial.empty(self.tiles, _D * self.columns, NO_LOGIT)
        size = len(state.values())

        def step(number: Value, *values: Value) -> list[Value]:
            stage, exists, carry = ring.next(number, list(values[size:]))
            logits = [x * factor for x in self._logits(stage, query)]
            first_key = block.first_key(number)
            some_masked = (first_key + block.tuning.keys > least) | exists.below(-1)
            logits = branch(
                some_masked, logits, lambda: self._masked(logits, exists, first_key, reaches)
            )
            added = self._add(state.with_values(list(values[:size])), logits, stage)
            return [*added.values(), *carry]

        results = loop(first, last, [*state.values(), *started], step)
        ring.finish()
        finish(block, state.with_values(list(results[:size])))

    def _load_query(self) -> _Query:
        """In registers or, for more blocks at a time, in shared memory; see `Tuning`."""
        block, thread = self.block, self.thread
        shared = block.query
        if shared is None:
            fragments = self._query_fragments(0)
            return lambda tile, product: fragments[product]

        def store(tile: int) -> None:
            for product, words in enumerate(self._query_fragments(tile)):
                place = (tile * self.products + product) * _FRAGMENT_BYTES
                store_shared(shared + thread.lane * 16, words, place)

        for tile in range(self.tiles):
            when(thread.warp.equals(tile), lambda tile=tile: store(tile))  # type: ignore[misc]
        ptx("bar.sync 0;", convergent=True)

        def load(tile: int, product: int) -> list[Value]:
            place = (tile * self.products + product) * _FRAGMENT_BYTES
            return load_shared(shared + thread.lane * 16, "rrrr", place)

        return load

    def _query_fragments(self, tile: int) -> list[list[Value]]:
        """Those of each product; a row that does not exist is the last one."""
        block, dim = self.block, self.block.format.dim
        pairs: list[list[list[Value]]] = []
        for row in self.rows[2 * tile : 2 * tile + 2]:
            place = block.result_place(minimum(row, block.shape.rows - 1)) * (2 * dim)
            source = block.array("q") + place
            words = []
            for pair in range(self.products // 2):
                column = block.format.query_column(pair, self.thread.column)
                loaded = load_global(source + (column * 2).wide(), "rrrr")
                words.append(block.format.order_query(loaded))
            pairs.append(words)
        return [
            [row[product // 2][2 * (product % 2) + i] for i in range(2) for row in pairs]
            for product in range(self.products)
        ]

    def _logit_factor(self) -> Value:
        """From sums of products to logarithms of base 2."""
        block = self.block
        (scale,) = load_global(block.array("sm_scale"), "f")
        if block.format.has_scale:
            scale = scale * load_global(block.array("key_scale"), "f")[0]
        return scale * (math.log2(math.e) * 2.0**block.format.power)

    def _logits(self, stage: Value, query: _Query) -> list[Value]:
        """Of each tile and each 8 keys, four."""
        block, memory = self.block, self.block.memory
        keys, scales = stage + memory.keys, stage + memory.key_scales
        firsts = range(0, block.tuning.keys, 8)
        words = [block.format.load_keys(keys, self.thread, first) for first in firsts]
        factors = [block.format.load_key_factors(scales, self.thread, first) for first in firsts]
        sums = [[[f32(0.0)] * _D for _ in firsts] for _ in range(self.tiles)]
        # By columns first: a fragment of the query that is in shared memory is read once.
        for pair in range(self.products // 2):
            a = [[query(tile, 2 * pair + i) for i in range(2)] for tile in range(self.tiles)]
            for eight in range(len(firsts)):
                b = block.format.key_operands(words[eight], factors[eight], pair)
                for i in range(2):
                    for tile, own in enumerate(sums):
                        own[eight] = multiply_add(own[eight], a[tile][i], b[2 * i : 2 * i + 2])
        return [x for own in sums for d in own for x in d]

    def _masked(
        self, logits: list[Value], exists: Value, first_key: Value, reaches: list[Value]
    ) -> list[Value]:
        """-inf for keys that are not there, and for those beyond a row's own position."""
        own = exists >> (self.thread.column * 2)
        first = first_key + self.thread.column * 2
        left = [reach - first for reach in reaches]
        masked = []
        for i, x in enumerate(logits):
            tile, rest = divmod(i, self._logits_of_tile)
            key, below = 8 * (rest // _D) + rest % 2, rest // 2 % 2
            holds = ((own >> key) & 1).equals(1) & (left[2 * tile + below] > key)
            masked.append(select(holds, x, f32(-math.inf)))
        return masked

    @property
    def _logits_of_tile(self) -> int:
        return _D * (self.block.tuning.keys // 8)

    def _add(self, state: Partial, logits: list[Value], stage: Value) -> Partial:
        """The state with the keys of a stage."""
        state = self._raised(state, logits)
        count = self._logits_of_tile
        weights, totals = [], []
        for tile in range(self.tiles):
            own = logits[count * tile : count * (tile + 1)]
            rows = state.references[2 * tile : 2 * tile + 2]
            p = [exp2(x - rows[i // 2 % 2]) for i, x in enumerate(own)]
            for below in range(2):
                total = state.totals[2 * tile + below]
                for i in range(2 * below, count, _D):
                    total = total + (p[i] + p[i + 1])
                totals.append(total)
            weights.append([pack_bf16(p[i], p[i + 1]) for i in range(0, count, 2)])
        outputs = [list(tile) for tile in state.outputs]
        memory = self.block.memory
        values, scales = stage + memory.values, stage + memory.value_scales
        for first in range(0, self.block.tuning.keys, MMA_ROWS):
            operands = self.block.format.load_values(values, scales, self.thread, first)
            fragment = slice(first // 4, first // 4 + 4)
            for tile, out in enumerate(outputs):
                for column, b in enumerate(operands):
                    part = slice(_D * column, _D * (column + 1))
                    out[part] = multiply_add(out[part], weights[tile][fragment], b)
        return Partial(outputs, state.references, totals)

    def _raised(self, state: Partial, logits: list[Value]) -> Partial:
        """The state with references that no weight of these logits is too large for."""
        count = self._logits_of_tile
        tops = []
        for row in range(2 * self.tiles):
            tile, below = divmod(row, 2)
            places = range(count * tile + 2 * below, count * (tile + 1), _D)
            own = [fmax(logits[i], logits[i + 1]) for i in places]
            while len(own) > 1:
                own = [fmax(a, b) for a, b in zip(own[::2], own[1::2], strict=True)]
            tops.append(own[0])
        over = tops[0] > state.references[0] + LARGEST_WEIGHT
        for top, reference in zip(tops[1:], state.references[1:], strict=True):
            over = over | (top > reference + LARGEST_WEIGHT)

        def raise_all() -> list[Value]:
            references = [
                fmax(over_quad(top, fmax), reference)
                for top, reference in zip(tops, state.references, strict=True)
            ]
            decays = [exp2(a - b) for a, b in zip(state.references, references, strict=True)]
            outputs = [
                [x * decays[2 * tile + i // 2 % 2] for i, x in enumerate(out)]
                for tile, out in enumerate(state.outputs)
            ]
            totals = [x * decay for x, decay in zip(state.totals, decays, strict=True)]
            return Partial(outputs, references, totals).values()

        return state.with_values(branch(any_lane(over), state.values(), raise_all))
