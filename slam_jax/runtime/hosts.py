"""Which of the hosts this process is."""

import jax


def part() -> tuple[int, int]:
    """(index of this process, how many there are)."""
    return jax.process_index(), jax.process_count()
