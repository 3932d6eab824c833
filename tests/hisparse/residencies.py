"""Residencies of any size that may come to be, and selections over them."""

import jax.numpy as jnp
import numpy as np

from jmla.hisparse import HiSparseSizes, Residency


def random_residency(
    rng: np.random.Generator, sizes: HiSparseSizes
) -> tuple[Residency, np.ndarray]:
    """Idle, short and long requests in turn, some with fewer pages than they need; lengths."""
    size, context = sizes.device_buffer_size, sizes.max_pages * sizes.page_size
    lengths = np.zeros(sizes.requests, np.int32)
    tokens = np.full((sizes.requests, sizes.buffer_slots), -1, np.int32)
    lru = np.stack([rng.permutation(size) for _ in range(sizes.requests)]).astype(np.int32)
    for request in range(sizes.requests):
        kind = request % 4
        if kind == 3:
            lengths[request] = 0 if rng.random() < 0.5 else -7
        elif kind == 1:
            lengths[request] = size if rng.random() < 0.5 else rng.integers(1, size + 1)
            tokens[request, : lengths[request]] = np.arange(lengths[request])
        else:
            lengths[request] = rng.integers(size + 1, sizes.max_length + 1)
            held = rng.permutation(lengths[request])[: sizes.buffer_slots]
            kept = rng.random(len(held)) < 0.95
            tokens[request, : len(held)] = np.where(kept, held, -1)
            newest = np.arange(lengths[request] - sizes.newest, lengths[request])
            in_order = tokens[request, :size]
            in_order[np.isin(in_order, newest)] = -1
            tokens[request, size:] = newest
    page_table = rng.permutation(sizes.num_pages)[: sizes.requests * sizes.max_pages]
    page_table = page_table.reshape(sizes.requests, -1).astype(np.int32)
    buffer_table = rng.permutation(sizes.num_buffer_pages)[
        : sizes.requests * sizes.max_buffer_pages
    ]
    buffer_table = buffer_table.reshape(sizes.requests, -1).astype(np.int32)
    lost = rng.integers(0, sizes.max_pages)
    other = min(2, sizes.requests - 1)
    page_table[0, lost], page_table[other, lost // 2] = -1, sizes.num_pages
    buffer_table[other, -2], buffer_table[0, 1] = -1, sizes.num_buffer_pages
    assert context >= sizes.max_length
    tables = jnp.asarray(page_table), jnp.asarray(buffer_table)
    return Residency(*tables, jnp.asarray(tokens), jnp.asarray(lru), sizes), lengths


def random_selection(
    rng: np.random.Generator, residency: Residency, lengths: np.ndarray, n: int
) -> np.ndarray:
    """Positions that are held, that are not, that come twice, and that are none."""
    tokens = np.asarray(residency.tokens)
    chosen = np.full((len(lengths), n), -1, np.int32)
    for request, length in enumerate(lengths):
        if length < 1:
            chosen[request] = rng.integers(0, residency.sizes.max_length, n)
            continue
        held = rng.choice(tokens[request], n)
        other = rng.integers(0, length, n)
        chosen[request] = np.where(rng.random(n) < 0.7, held, other)
        wrong = rng.choice(np.asarray([-1, -5, -(2**31), length, 2**31 - 1], np.int64), n)
        chosen[request] = np.where(rng.random(n) < 0.1, wrong, chosen[request])
        if length <= residency.sizes.device_buffer_size and rng.random() < 0.5:
            # Looked up directly, unless the last page is not there.
            chosen[request] = rng.integers(-2, length, n)
    return chosen
