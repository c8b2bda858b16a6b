"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a message for the user, printed without a traceback.

    The message names the file and line or the config key, what was found, what was expected and the
    remedy.
    """


class JobsFailed(Exception):
    """Jobs that ran elsewhere have failed; the message says which, and why."""


class WorkerSpent(JobsFailed):
    """A failed trial has ended the processes of its worker; started again, it goes on."""


class Detached(KeyboardInterrupt):
    """The user pressed Ctrl-C while jobs ran elsewhere; the message says that they go on."""
