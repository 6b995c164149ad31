"""How many examples hypothesis tries: few in the default tier, five times as many in the slow one, always the same.

`--hypothesis-profile=laws-long` chooses the many.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

SHORT, LONG = "laws", "laws-long"

EXAMPLES = 12
"""Examples of a law in the short profile, where it does not say how many it needs."""

for _name, _factor in ((SHORT, 1), (LONG, 5)):
    settings.register_profile(
        _name,
        database=None,
        deadline=None,  # no example is judged by its time
        derandomize=True,
        max_examples=_factor * EXAMPLES,
        # A world is drawn from one seed and then filtered for close calls; both look slow or wasteful to hypothesis.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


def examples(number: int) -> settings:
    """Return settings for so many examples in the short profile, and five times as many in the long one."""
    return settings(max_examples=number * settings.default.max_examples // EXAMPLES)
