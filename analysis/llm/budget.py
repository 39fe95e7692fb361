"""What may still be spent: the most that a request can cost is set aside while it is under way."""

from __future__ import annotations

import asyncio

from analysis.llm.prices import dollars
from analysis.llm.stopping import Unasked

# Sums of cents in floating point.
TOLERANCE = 1e-9


def reached(limit: float) -> str:
    """Why what costs more than is left is not asked."""
    return f"analysis.llm.max_usd ({dollars(limit)}) is reached"


def not_asked(reason: str) -> str:
    """The reason of a question that fails because no more is asked."""
    return f"not asked: {reason}"


class Budget:
    """Dollars spent so far, dollars set aside, and the most that both may come to."""

    def __init__(self, limit: float, spent: float) -> None:
        self.limit = limit
        self.spent = spent
        self._aside: list[float] = []
        self._returned = asyncio.Event()

    @property
    def left(self) -> float:
        """Dollars that are neither spent nor set aside."""
        return self.limit - self.spent - sum(self._aside)

    def allows(self, usd: float) -> bool:
        """Whether that much is left; what costs nothing is always allowed."""
        return usd <= 0 or usd <= self.left + TOLERANCE

    async def set_aside(self, usd: float) -> None:
        """Waits until `usd` are left; raises `spent_up` if they will not be, since nothing else is under way."""
        while not self.allows(usd):
            if not self._aside:
                raise self.spent_up(usd)
            self._returned.clear()
            await self._returned.wait()
        self._aside.append(usd)

    def spent_up(self, usd: float) -> Unasked:
        """What to tell the user where the next request may cost `usd`."""
        left = dollars(max(self.left, 0))
        return Unasked(reached(self.limit), f"Raise it: the next may cost up to {dollars(usd)}, and {left} is left.")

    def settle(self, usd: float, cost: float) -> None:
        """Gives back what was set aside for a request, which cost `cost` (0 if no response came)."""
        self._aside.remove(usd)
        self.spent += cost
        self._returned.set()
