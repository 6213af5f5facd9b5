"""The plan that a server is in, and another one when its budget changes.

Owns which plan is in force and that one change is planned at a time. How plans are made is given to
it; slots are the served model's.
"""

from collections.abc import Callable
from dataclasses import replace
from threading import Lock

from moefit.engine.engine import Engine
from moefit.errors import ConfigError
from moefit.plan.plan_file import Plan
from moefit.plan.rooms import SLACK
from moefit.server.refusal import Refused

_WITHOUT = "a mode beside the budget (--mode exact) sets it without a plan"


class LivePlan:
    """`make` gives a plan for a budget in bytes; `plan` None: what was planned has been changed.

    ends: the least budget that can be planned for, and the one that holds everything.
    """

    def __init__(self, engine: Engine, plan: Plan, make: Callable[[int], Plan]):
        self._engine, self._make = engine, make
        self.plan: Plan | None = plan
        low, high = engine.served.reckoner.ends
        self.ends = low + SLACK, high + SLACK
        self._rule, self._rest = plan.rule, plan.configuration.rest
        self._planning = Lock()

    def change(self, memory: int | None) -> None:
        """Plan for this budget and serve so; None is all that the model takes.

        Raises what planning does, and Refused while another change is being planned; everything is
        then as it was.
        """
        if not self._planning.acquire(blocking=False):
            raise Refused(
                409, "another budget is being planned; ask again when it is in force", code="busy"
            )
        try:
            self._change(memory)
        finally:
            self._planning.release()

    def leave(self) -> None:
        """Somebody has set something else than was planned; called between the same two steps."""
        self.plan = None

    def _change(self, memory: int | None) -> None:
        try:
            plan = self._make(self.ends[1] if memory is None else memory)
        except ConfigError as error:
            raise ConfigError(f"{error}; {_WITHOUT}") from error
        chosen = plan.configuration
        if (plan.rule, chosen.rest) != (self._rule, self._rest):
            raise ConfigError(
                f"the newest profile is of the model under the rule {plan.rule}, and it is served "
                f"under {self._rule}; run moefit profile with that --rule again, or {_WITHOUT}"
            )
        self._engine.between_steps(lambda: self._serve(replace(plan, memory=memory)))

    def _serve(self, plan: Plan) -> None:
        chosen = plan.configuration
        self._engine.served.set_placement(
            chosen.placement,
            memory=plan.memory,
            mode=chosen.mode,
            manager=chosen.manager,
            **chosen.policy_settings(),
        )
        self.plan = plan
