"""How much of all requests' bodies is held at a time.

Owns the count and the middleware that keeps it: each body has its own limit, and many just below
it would still be too much together. Knows nothing of what is in them.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moefit.server.refusal import Refused


class Bodies:
    """Bytes held, at most `most`."""

    def __init__(self, most: int):
        self.most, self.held = most, 0

    def take(self, size: int) -> bool:
        """Hold so many more, unless they are too many."""
        if self.held + size > self.most:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        """They are held no more."""
        self.held -= size
        self.check()

    def check(self) -> None:
        """Raise AssertionError if the count can't be."""
        assert 0 <= self.held <= self.most, (self.held, self.most)


class BodiesInFlight:
    """Counts a body as it comes, not by what its head says, until its request is answered.

    One that would be too much is refused, and what there is of it given back: who only says that
    much will come takes nobody's place.
    """

    def __init__(self, app: ASGIApp, bodies: Bodies):
        self._app, self._bodies = app, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            if not self._bodies.take(size):
                raise _too_many(self._bodies.most)
            held += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._bodies.give_back(held)


def _too_many(most: int) -> Refused:
    return Refused(
        429,
        f"the bodies of all requests that are being answered may have {most:,} bytes together, and "
        "with this one they have more; try again later",
        code="too_many_bodies",
    )
