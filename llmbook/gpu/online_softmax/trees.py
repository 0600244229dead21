"""Merging many states: in a chain, in a balanced tree, or in any tree at all."""

import random
from collections.abc import Sequence
from functools import reduce

from .state import State, merge

# A tree over blocks 0 … n−1: a block's number, or a pair of trees.
Tree = int | tuple["Tree", "Tree"]


def merge_tree(tree: Tree, blocks: Sequence[State]) -> State:
    """Merge the blocks in the order that the tree prescribes."""
    if isinstance(tree, int):
        return blocks[tree]
    left, right = tree
    return merge(merge_tree(left, blocks), merge_tree(right, blocks))


def chain(states: Sequence[State]) -> State:
    """((0 ⊕ 1) ⊕ 2) ⊕ …: one after another, n − 1 merges deep."""
    return reduce(merge, states)


def balanced(states: Sequence[State]) -> State:
    """Neighbours in pairs, then pairs of pairs: ⌈log2 n⌉ merges deep."""
    while len(states) > 1:
        pairs = [merge(*states[i : i + 2]) for i in range(0, len(states) - 1, 2)]
        states = pairs + list(states[len(pairs) * 2 :])
    return states[0]


def chain_tree(n: int) -> Tree:
    """The tree of `chain`."""
    tree: Tree = 0
    for block in range(1, n):
        tree = (tree, block)
    return tree


def balanced_tree(n: int) -> Tree:
    """The tree of `balanced`."""
    level: list[Tree] = list(range(n))
    while len(level) > 1:
        pairs: list[Tree] = [(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def random_tree(n: int, seed: int) -> Tree:
    """Any two trees meet next, in any order, until one is left: blocks arrive as a ring or a scheduler likes."""
    chosen, parts = random.Random(seed), list[Tree](range(n))
    while len(parts) > 1:
        left = parts.pop(chosen.randrange(len(parts)))
        right = parts.pop(chosen.randrange(len(parts)))
        parts.append((left, right))
    return parts[0]


def depth(tree: Tree) -> int:
    """How many merges the deepest block goes through."""
    return 0 if isinstance(tree, int) else 1 + max(map(depth, tree))
