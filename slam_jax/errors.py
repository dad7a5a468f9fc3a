"""What ends a program in good order, and what is wrong with one sample among many."""


class UserError(ValueError):
    """A user's mistake: one line that names the value and the remedy.

    The programs print it without a traceback and exit with status 2.
    """


class Preempted(Exception):
    """The program was told to end and has saved what there was: to be started again.

    The programs print it and exit with status 42.
    """


class BadSample(ValueError):
    """A training sample that cannot be used; the next good one takes its place.

    reason: a few words, the same for all of a kind, since they are counted by it. shard and key
    say where it lies, "" where that is known further up. filtered: nothing is wrong with it, the
    user's filters leave it out.
    """

    def __init__(self, reason: str, shard: str = "", key: str = "", *, filtered: bool = False):
        super().__init__(reason)
        self.reason, self.shard, self.key, self.filtered = reason, shard, key, filtered
