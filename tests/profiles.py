"""How many examples a property is tried on."""

from hypothesis import HealthCheck, settings

_LONG = 50  # times as many with --hypothesis-profile=long


def examples(number: int) -> settings:
    """Return a fixed series of that many, so that the same runs everywhere; not in a long run."""
    is_long = settings.get_current_profile_name() == "long"
    return settings(
        max_examples=number * (_LONG if is_long else 1),
        derandomize=not is_long,
        print_blob=is_long,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
