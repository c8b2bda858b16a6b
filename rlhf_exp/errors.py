"""Exceptions with a meaning for the command line: user errors, failed jobs, detached jobs."""

from __future__ import annotations

from rlhf_exp.redaction import without_secrets


class UserError(ValueError):
    """An error that the user can correct, printed without a traceback.

    The message names the file and line or the config key, the value found, the value expected and
    the remedy. Secrets in it are hidden.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            *(without_secrets(text) if isinstance(text, str) else text for text in arguments)
        )


class JobsFailed(Exception):
    """Jobs in other processes have failed; the message says which, and why."""


class WorkerSpent(JobsFailed):
    """A failed trial has ended its worker's processes; a restarted worker continues the study."""


class Detached(KeyboardInterrupt):
    """Ctrl-C while jobs run in other processes; the message says that they continue."""
