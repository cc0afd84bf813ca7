"""What every runtime offers: load an artifact, feed it named arrays, get named arrays back."""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class RuntimeFault(Exception):
    """An engine is missing, refused an artifact or failed; `what` is one line, `fix` says what to do about it."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = " ".join(what.split())
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}" if self.fix else self.what


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What a backend wrote.

    runtime  key in `runtimes.RUNTIMES` of what runs it
    model    the file to load; files it refers to lie beside it
    inputs   names to feed, in order
    outputs  names to get back, in order
    """

    runtime: str
    model: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Session(abc.ABC):
    """A loaded artifact, ready to run."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @abc.abstractmethod
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in order. Raises RuntimeFault when the feeds do not fit or the engine fails."""

    @contextlib.contextmanager
    def prepared(self, feeds: Mapping[str, Array]) -> Iterator[Callable[[], object]]:
        """A function that runs the network on `feeds` alone, for timing: what can be done beforehand is done."""
        yield lambda: self.run(feeds)

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Raise RuntimeFault unless exactly the session's inputs are fed."""
        missing = [name for name in self.inputs if name not in feeds]
        unknown = [name for name in feeds if name not in self.inputs]
        if missing or unknown:
            parts = [f"missing {', '.join(missing)}"] if missing else []
            parts += [f"unknown {', '.join(unknown)}"] if unknown else []
            raise RuntimeFault(f"inputs do not fit: {'; '.join(parts)}", fix=f"feed {', '.join(self.inputs)}")

    def close(self) -> None:  # noqa: B027  # a hook: most sessions hold little
        """Let go of memory; the session may still be run."""


class OnDemand(Session):
    """A session that is loaded when it is first run, and again after it was closed."""

    def __init__(self, runtime: "Runtime", artifact: Artifact) -> None:
        self._runtime, self._artifact = runtime, artifact
        self._session: Session | None = None
        self.inputs, self.outputs = artifact.inputs, artifact.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises RuntimeFault also where loading does."""
        if self._session is None:
            self._session = self._runtime.load(self._artifact)
        return self._session.run(feeds)

    def close(self) -> None:
        """Unload."""
        self._session = None


class Runtime(abc.ABC):
    """One engine with its settings."""

    @abc.abstractmethod
    def load(self, artifact: Artifact) -> Session:
        """Load an artifact. Raises RuntimeFault when the engine is missing here or refuses the file."""
