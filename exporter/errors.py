"""What a user is told when something goes wrong: where, what, and what to do, on one line.

The exit code of the command is the class's: 1 a fault of ours, 2 bad usage or bad input, 4 a target that could not be
completed. Faults of passes and runtimes are wrapped into these once, in `exporter.compile`.
"""


class QExportError(Exception):
    """Carries `what` happened, `where` (node, file or flag) and the `fix` (what to do); `str()` is one line."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return " ".join((f"{line}; {self.fix}" if self.fix else line).split())

    def __reduce__(self) -> tuple[object, ...]:
        """Keyword-only arguments do not survive Exception's own pickling, and builders raise in subprocesses."""
        return _rebuild, (type(self), self.what, self.where, self.fix)


class InputError(QExportError):
    """Bad usage or bad input: a file, flag or option that the user can put right."""

    exit_code = 2


class TargetError(QExportError):
    """A target could not be completed here: its builder is missing, failed or crashed."""

    exit_code = 4


class InternalError(QExportError):
    """A fault of ours. The fix, unless given, says how to report it."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(
            what,
            where=where,
            fix=fix or "this is a bug in qexport: please report it with the command and the output of `qexport doctor`",
        )


def _rebuild(kind: type[QExportError], what: str, where: str, fix: str) -> QExportError:
    return kind(what, where=where, fix=fix)
