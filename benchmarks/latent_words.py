"""Words over a group of 60 elements, and what is learned of their products; knows tokens, nothing of models."""

import itertools
import zlib

import torch

SLOTS = 24  # an element's number is its place; thought j is always SLOTS positions behind element j
ELEMENTS = 60
BLANK, FILLER, EQUALS, END, PAD = range(ELEMENTS, ELEMENTS + 5)


def alternating() -> torch.Tensor:
    """The multiplication table (60, 60) of A5, the even permutations of five things."""
    swaps = {p: sum(a > b for a, b in itertools.combinations(p, 2)) for p in itertools.permutations(range(5))}
    even = [p for p, count in swaps.items() if count % 2 == 0]
    index = {p: i for i, p in enumerate(even)}
    return torch.tensor([[index[tuple(q[i] for i in p)] for q in even] for p in even])


def cyclic() -> torch.Tensor:
    """The control, in which nothing should differ: sums modulo 60."""
    return (torch.arange(ELEMENTS)[:, None] + torch.arange(ELEMENTS)) % ELEMENTS


TASKS = {"a5": alternating, "sum": cyclic}


def words_of(n: int, h: int, test: bool, generator: torch.Generator) -> torch.Tensor:
    """(n, h) elements; one word in ten, by its hash, is for testing (of one element: none is)."""
    found = torch.empty(0, h, dtype=torch.long)
    while len(found) < n:
        words = torch.randint(ELEMENTS, ((12 if test else 2) * n, h), generator=generator)
        kept = [h == 1 or (zlib.crc32(bytes(word)) % 10 == 0) == test for word in words.tolist()]
        found = torch.cat([found, words[torch.tensor(kept)]])
    return found[:n]


def prefix_products(words: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(n, h): of the first 1, 2, ... h elements."""
    products = [words[:, 0]]
    for column in words.T[1:]:
        products.append(table[products[-1], column])
    return torch.stack(products, 1)


def lesson(words: torch.Tensor, table: torch.Tensor, c: int, steps: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels: the word in SLOTS places, c fillers, h - c products, `=`, product; -100 is not learned.

    Without `steps` there is nothing between word and `=`.
    """
    n, h = words.shape
    products = prefix_products(words, table)
    body = products.clone()
    body[:, :c] = FILLER

    def filled(count: int, token: int) -> torch.Tensor:
        return torch.full((n, count), token)

    parts, labelled = [words, filled(SLOTS - h, BLANK)], [filled(SLOTS, -100)]
    if steps:
        parts, labelled = [*parts, body], [*labelled, filled(c, -100), products[:, c:]]
    tokens = torch.cat([*parts, filled(1, EQUALS), products[:, -1:]], 1)
    return tokens, torch.cat([*labelled, filled(1, -100), products[:, -1:]], 1)
