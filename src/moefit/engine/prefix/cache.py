"""Reuse of keys and values that lie in the KV pool.

`PrefixCache` decides which blocks of earlier texts stay in places that no running request has
reserved, where a new request lies, and which blocks it begins with. Blocks never keep a request
from running: the least recently used are removed. A request that begins with idle blocks takes
them over, at their place if it can; blocks of running requests are copied. Its methods return the
moves of contents to carry out. No tensors or threads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moefit.engine.prefix.places import Move, Places, Source, merged, usable
from moefit.engine.prefix.tree import Block, Prefix, PrefixTree

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    """What the cache holds, and totals.

    Attributes:
        tokens: Tokens of idle blocks, which no running request holds.
        shared: Tokens of blocks that running requests hold.
        queries: Prompt tokens of requests that may reuse blocks.
        hits: Those whose keys and values were there.
        evicted: Tokens of blocks removed for lack of places.
    """

    tokens: int = 0
    shared: int = 0
    queries: int = 0
    hits: int = 0
    evicted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Where a new request lies.

    Attributes:
        cached: Tokens of its prompt whose keys and values are there after the moves.
        moves: To carry out in order.
    """

    cached: int
    moves: tuple[Move, ...]


class PrefixCache:
    """Assign the places of a KV pool to running requests and to blocks of earlier texts.

    Args:
        places: Tokens that the pool holds.
        block: Tokens per block.
    """

    def __init__(self, places: int, block: int = BLOCK_TOKENS):
        self._tree, self._places = PrefixTree(block), Places(places, block)
        self._held: dict[str, list[Block]] = {}
        self._namespaces: dict[str, str | None] = {}
        self._queries = self._hits = self._evicted = 0

    @property
    def places(self) -> int:
        """Number of places."""
        return self._places.places

    @property
    def block(self) -> int:
        """Tokens per block."""
        return self._tree.size

    @property
    def free(self) -> int:
        """Places that no running request has reserved."""
        return self._places.free

    def resize(self, places: int) -> tuple[Move, ...]:
        """Change the number of places; the least recently used blocks are removed to fit.

        Args:
            places: At least as many as running requests have reserved.

        Returns:
            Moves to carry out in order, before places at the end are removed.
        """
        reserved, moves = self.places - self.free, tuple[Move, ...]()
        assert places >= reserved, f"requests have reserved {reserved} places"
        while reserved + len(self._tree.idle) * self.block > places:
            self._evicted += self._remove(self._tree.oldest())
        if self._places.end > places:
            moves = merged(self._places.compact())
        self._places.resize(places)
        return moves

    def start(self, name: str) -> int:
        """Return the first place of a running request."""
        return self._places.start(name)

    def open(self, name: str, size: int, prefix: Prefix | None = None) -> Opened:
        """Reserve places for a request.

        Args:
            name: Request id.
            size: Tokens of prompt and completion, at most `free`.
            prefix: Its prompt, of which at least one token is left to compute; None neither reads
                nor keeps blocks.
        """
        assert name not in self._held, name
        assert 0 < size <= self.free, f"{size} of {self.free} free places"
        path: list[Block] = []
        if prefix is not None:
            path = self._tree.match(prefix, len(prefix.tokens) - 1)
            self._queries += len(prefix.tokens)
        path, moves = self._make_room(name, size, path)
        self._hits += len(path) * self.block
        self._held[name] = path
        self._namespaces[name] = None if prefix is None else prefix.namespace
        return Opened(cached=len(path) * self.block, moves=merged(moves))

    def extend(self, name: str, tokens: Sequence[int], computed: int) -> None:
        """Keep the blocks of a running request that have been computed.

        Args:
            name: Request id.
            tokens: Its prompt and completion so far.
            computed: Number of tokens whose keys and values are in its places.
        """
        namespace, held = self._namespaces[name], self._held[name]
        if namespace is None:
            return
        for start in range(len(held) * self.block, computed - self.block + 1, self.block):
            parent = held[-1] if held else self._tree.root(namespace)
            key = tuple(tokens[start : start + self.block])
            block = parent.children.get(key)
            if block is None:
                block = self._tree.add(parent, key, name)
            elif self._tree.hold(block, name):
                self._places.remove_block(block.number)
            held.append(block)

    def stop(self, name: str) -> None:
        """Keep no further blocks of a running request, such as after a change of the mode."""
        self._namespaces[name] = None

    def join(self, name: str, prefix: Prefix) -> Opened:
        """Give a running request blocks that others have computed since it was opened.

        Args:
            name: Request id; only its first `cached` tokens may have been computed.
            prefix: Its prompt, as for `open`.
        """
        held, start = self._held[name], self._places.start(name)
        moves: list[Move] = []
        for block in self._tree.match(prefix, len(prefix.tokens) - 1)[len(held) :]:
            target = start + block.depth * self.block
            moves.append(Move(source=self._source(block).place, target=target, size=self.block))
            if self._tree.hold(block, name):
                self._places.remove_block(block.number)
            held.append(block)
        self._hits += len(moves) * self.block
        return Opened(cached=len(held) * self.block, moves=merged(moves))

    def found(self, name: str, tokens: Sequence[int], computed: int) -> None:
        """Keep blocks as `extend` does that did not have to be computed."""
        before = len(self._held[name])
        self.extend(name, tokens, computed)
        self._hits += (len(self._held[name]) - before) * self.block

    def locate(self, prefix: Prefix, start: int, stop: int) -> list[int] | None:
        """Return the first places of the blocks of a text's tokens, at multiples of a block.

        Args:
            prefix: The text.
            start: First token.
            stop: End of the tokens, exclusive.

        Returns:
            None if not all have keys and values.
        """
        path = self._tree.match(prefix, stop)
        if len(path) * self.block < stop:
            return None
        return [self._source(block).place for block in path[start // self.block :]]

    def close(self, name: str, *, keep: bool = True) -> None:
        """Free a request's places, if it has any.

        Args:
            name: Request id.
            keep: Whether its blocks may be reused.
        """
        held = self._held.pop(name, None)
        self._namespaces.pop(name, None)
        if held is None:
            return
        start = self._places.start(name)
        self._places.release(name)
        for block in reversed(held):
            if self._tree.release(block, name):
                self._places.add_block(block.number, start + block.depth * self.block)
                if not keep:
                    self._remove(block)

    def known(self, prefix: Prefix) -> int:
        """Return how many tokens of a text have keys and values, in whole blocks."""
        return len(self._tree.match(prefix, len(prefix.tokens))) * self.block

    def reset(self) -> None:
        """Remove all idle blocks and set the totals to 0."""
        while self._tree.idle:
            self._remove(self._tree.oldest())
        self._queries = self._hits = self._evicted = 0

    def stats(self) -> PrefixStats:
        """Return what is held, and totals."""
        idle = len(self._tree.idle)
        return PrefixStats(
            tokens=idle * self.block,
            shared=(len(self._tree) - idle) * self.block,
            queries=self._queries,
            hits=self._hits,
            evicted=self._evicted,
        )

    def check(self) -> None:
        """Raise AssertionError if places overlap, or requests and blocks disagree."""
        self._tree.check()
        self._places.check()
        for number in self._tree.idle:
            assert 0 <= self._places.place(number) <= self.places - self.block
        for name, held in self._held.items():
            assert len(held) * self.block <= self._places.size(name)
            for depth, block in enumerate(held):
                assert block.depth == depth and name in block.holders
                assert depth == 0 or block.parent is held[depth - 1]

    def _make_room(self, name: str, size: int, path: list[Block]) -> tuple[list[Block], list[Move]]:
        """Reserve places; return the blocks that the request begins with, and moves."""
        moves: list[Move] = []
        inside = sum(block.number in self._tree.idle for block in path)
        self._evict(size, inside)
        start = self._places.window(size, self._sources(path))
        if start is None:  # the free places are in pieces
            self._evict(size, 0)
            path = [block for block in path if block.holders or block.number in self._tree.idle]
            moves += self._places.compact()
            start = self._places.window(size, self._sources(path))
            assert start is not None
        path = path[: usable(start, self._sources(path), self.block)]
        moves += self._clear(start, size, path)
        for index, (block, source) in enumerate(zip(path, self._sources(path), strict=True)):
            if (target := start + index * self.block) != source.place:
                moves.append(Move(source=source.place, target=target, size=self.block))
            if self._tree.hold(block, name):
                self._places.remove_block(block.number)
        self._places.assign(name, start, size)
        return path, moves

    def _evict(self, size: int, inside: int) -> None:
        """Remove the oldest idle blocks until a request fits beside all but `inside` of them."""
        while (len(self._tree.idle) - inside) * self.block + size > self._places.free:
            self._evicted += self._remove(self._tree.oldest())

    def _clear(self, start: int, size: int, path: Sequence[Block]) -> Iterator[Move]:
        """Yield moves that clear a window of idle blocks, except those of `path`."""
        kept = {block.number for block in path}
        numbers = [number for number in reversed(self._tree.idle) if number not in kept]
        idle = dict(self._tree.idle)
        for one in self._places.clear_window(start, size, numbers):
            if isinstance(one, Move):
                yield one
            else:
                self._evicted += self._remove(idle[one])

    def _sources(self, path: Sequence[Block]) -> list[Source]:
        return [self._source(block) for block in path]

    def _source(self, block: Block) -> Source:
        if block.number in self._tree.idle:
            return Source(place=self._places.place(block.number), idle=True)
        holder = next(iter(block.holders))
        place = self._places.start(holder) + block.depth * self.block
        return Source(place=place, idle=False)

    def _remove(self, block: Block) -> int:
        """Remove an idle block and those below it; return their number of tokens."""
        removed = self._tree.remove(block)
        for one in removed:
            self._places.remove_block(one.number)
        return len(removed) * self.block
