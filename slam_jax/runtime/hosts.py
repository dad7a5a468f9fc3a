"""Which of the hosts this is, for what they share out among themselves."""

import jax


def part() -> tuple[int, int]:
    """(number of this host, how many there are)."""
    return jax.process_index(), jax.process_count()
