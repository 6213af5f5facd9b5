"""Which blocks of tokens have keys and values, by content.

A block is a fixed number of consecutive tokens; its keys and values depend on all tokens before it
too. `PrefixTree` is a radix tree of blocks with a root per namespace: a path from a root is a text.
Requests hold the blocks of their text while they run. Blocks that no request holds are idle, and
the least recently used idle block has no others below it. Knows nothing of where blocks lie. No
tensors or threads.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The text of a request.

    Attributes:
        namespace: Only requests of the same namespace share blocks.
        tokens: Token ids of the prompt.
        durable: Whether its namespace means the same after a restart.
    """

    namespace: str
    tokens: Sequence[int]
    durable: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class Block:
    """Node of the tree.

    Attributes:
        number: Its id, which is not used again.
        tokens: Token ids of the block.
        depth: Number of blocks before it; -1 for a root.
        parent: The block before it; None for a root.
        children: Blocks after it, by their tokens.
        holders: Requests whose text contains it.
        namespace: Of a root.
    """

    number: int
    tokens: tuple[int, ...]
    depth: int
    parent: "Block | None"
    children: dict[tuple[int, ...], "Block"] = field(
        default_factory=dict["tuple[int, ...]", "Block"]
    )
    holders: dict[str, None] = field(default_factory=dict[str, None])
    namespace: str = ""


class PrefixTree:
    """Radix tree of blocks of `size` tokens.

    Attributes:
        size: Tokens per block.
        idle: Blocks without holders by number, the least recently used first.
    """

    def __init__(self, size: int):
        assert size > 0
        self.size = size
        self.idle: OrderedDict[int, Block] = OrderedDict()
        self._roots: dict[str, Block] = {}
        self._next = 0
        self._count = 0

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self._count

    def root(self, namespace: str) -> Block:
        """Return the root of a namespace, creating it if there is none."""
        if namespace not in self._roots:
            self._roots[namespace] = Block(
                number=-1, tokens=(), depth=-1, parent=None, namespace=namespace
            )
        return self._roots[namespace]

    def match(self, prefix: Prefix, most: int) -> list[Block]:
        """Return the known blocks that a text begins with, and mark them as used.

        Args:
            prefix: The text.
            most: Number of tokens to match at most.
        """
        block, path = self._roots.get(prefix.namespace), list[Block]()
        for start in range(0, most - self.size + 1, self.size):
            if block is None:
                break
            block = block.children.get(tuple(prefix.tokens[start : start + self.size]))
            if block is not None:
                path.append(block)
        for one in reversed(path):
            if one.number in self.idle:
                self.idle.move_to_end(one.number)
        return path

    def add(self, parent: Block, tokens: Sequence[int], holder: str) -> Block:
        """Return a new block below `parent`, held by a request."""
        key = tuple(tokens)
        assert len(key) == self.size and key not in parent.children
        block = Block(number=self._next, tokens=key, depth=parent.depth + 1, parent=parent)
        self._next += 1
        self._count += 1
        parent.children[key] = block
        block.holders[holder] = None
        return block

    def hold(self, block: Block, holder: str) -> bool:
        """Let a request hold a block; return whether it was idle."""
        block.holders[holder] = None
        return self.idle.pop(block.number, None) is not None

    def release(self, block: Block, holder: str) -> bool:
        """Let a request hold a block no longer; return whether it is idle now.

        A request releases the last block of its text first.
        """
        del block.holders[holder]
        if block.holders:
            return False
        self.idle[block.number] = block
        return True

    def oldest(self) -> Block:
        """Return the least recently used idle block; none are below it."""
        return next(iter(self.idle.values()))

    def remove(self, block: Block) -> list[Block]:
        """Remove a block that is idle, with all blocks below it; return them."""
        assert block.parent is not None
        del block.parent.children[block.tokens]
        removed, stack = list[Block](), [block]
        while stack:
            one = stack.pop()
            stack.extend(one.children.values())
            del self.idle[one.number]
            removed.append(one)
        self._count -= len(removed)
        if block.parent.depth < 0 and not block.parent.children:
            del self._roots[block.parent.namespace]
        return removed

    def check(self) -> None:
        """Raise AssertionError if blocks, holders and the order of use disagree."""
        seen: set[int] = set()
        order = {number: index for index, number in enumerate(self.idle)}
        for name, root in self._roots.items():
            assert root.children and root.namespace == name, "roots without blocks are removed"
            stack = list(root.children.values())
            while stack:
                block = stack.pop()
                self._check_block(block, order)
                seen.add(block.number)
                stack.extend(block.children.values())
        assert len(seen) == self._count
        assert order.keys() <= seen

    def _check_block(self, block: Block, order: dict[int, int]) -> None:
        parent = block.parent
        assert parent is not None and parent.children[block.tokens] is block
        assert block.depth == parent.depth + 1 and len(block.tokens) == self.size
        assert (block.number in order) == (not block.holders), "idle blocks have no holders"
        if parent.depth >= 0:
            assert block.holders.keys() <= parent.holders.keys(), "a request holds all its text"
            if parent.number in order:
                assert order[block.number] < order[parent.number], "used after the block before it"
