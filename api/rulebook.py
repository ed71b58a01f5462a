"""Rule sets by the hash that transitions name, read from the run's blobs once each."""

from __future__ import annotations

from citybrain.errors import NotFound
from citybrain.layout import Layout
from streams.ruleset import Rule, decode_ruleset


class Rulebook:
    """Every rule set that ever made a transition, on demand."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sets: dict[str, dict[str, Rule]] = {}

    def rules(self, ruleset: str) -> tuple[Rule, ...]:
        """Return the rules of a rule set, in its order; raises NotFound."""
        return tuple(self._known(ruleset).values())

    def find(self, ruleset: str, rule: str) -> Rule | None:
        """Return a rule of a rule set, None where that has no such rule.

        Raises NotFound where the rule set itself is missing: the data folder is incomplete, and going on would drop
        alarms.
        """
        return self._known(ruleset).get(rule)

    def _known(self, ruleset: str) -> dict[str, Rule]:
        known = self._sets.get(ruleset)
        if known is None:
            content = decode_ruleset(self._layout.get_blob(ruleset))
            known = self._sets[ruleset] = {one.id: one for one in content.rules}
        return known

    def get(self, ruleset: str, rule: str) -> Rule:
        """Return a rule that made an alarm; raises NotFound."""
        found = self.find(ruleset, rule)
        if found is None:
            raise NotFound(f"rule {rule!r}: not in rule set {ruleset}, though an alarm names both")
        return found
