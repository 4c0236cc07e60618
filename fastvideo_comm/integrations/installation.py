"""What an integration replaced in a package, and how it is put back."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_MARK = "__fastvideo_comm_installation__"


class IntegrationError(ImportError):
    """The package is not installed, or is not the one that this integration knows."""


class Installation:
    """Replaced names of one package; `uninstall`, or the end of a `with`, puts them back.

    A name is replaced wherever a loaded module of the package holds it, so that it does not matter
    who imported it before. Modules that are loaded later import it from those.

    Example:
        >>> with install() as installation:  # doctest: +SKIP
        ...     installation.replaced

    Attributes:
        package: the package's name.
        version: its installed version.
        served: the parts of the package that then use this library, in the package's own words.
        replaced: `module.name` of every name that was replaced.
    """

    def __init__(self, package: str, version: str, served: Sequence[str]) -> None:
        """Starts with nothing replaced."""
        self.package = package
        self.version = version
        self.served = tuple(served)
        self.replaced: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def replace(self, original: Any, replacement: Any) -> None:
        """Puts `replacement` in the place of `original` in every loaded module of the package."""
        for name, module in list(sys.modules.items()):
            if name != self.package and not name.startswith(f"{self.package}."):
                continue
            for attribute, value in list(vars(module).items()):
                if value is original:
                    self.set(module, attribute, replacement)

    def set(self, owner: Any, attribute: str, replacement: Any) -> None:
        """Sets one attribute, of a module or of an object, and remembers what it was."""
        original = getattr(owner, attribute)
        setattr(owner, attribute, replacement)
        self._undo.append(lambda: setattr(owner, attribute, original))
        owner_name = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__name__
        self.replaced.append(f"{owner_name}.{attribute}")

    def on_uninstall(self, action: Callable[[], None]) -> None:
        """Has `action` called by `uninstall`, in the reverse order."""
        self._undo.append(action)

    def mark(self, module: ModuleType) -> None:
        """Hangs this installation on the patched module, where `installed_on` finds it."""
        setattr(module, _MARK, self)
        self._undo.append(lambda: delattr(module, _MARK))

    def uninstall(self) -> None:
        """Puts everything back; may be called again."""
        while self._undo:
            self._undo.pop()()
        self.replaced.clear()

    def __repr__(self) -> str:
        """What is served and what is replaced, a line for each."""
        lines = [f"fastvideo_comm in {self.package} {self.version}:"]
        lines += [f"  serves    {served}" for served in self.served]
        lines += [f"  replaces  {replaced}" for replaced in self.replaced]
        return "\n".join(lines) if self.replaced else f"{lines[0]} nothing, it was uninstalled"

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts everything back."""
        self.uninstall()


def installed_on(module: ModuleType | None) -> Installation | None:
    """The installation that hangs on `module`, if there is one."""
    found: Installation | None = getattr(module, _MARK, None)
    return found


def uninstall_from(module: str) -> None:
    """Undoes the installation that hangs on the module of this name, if there is one."""
    installation = installed_on(sys.modules.get(module))
    if installation is not None:
        installation.uninstall()


def checked_version(package: str, known: Sequence[str], *, allow_unknown: bool) -> str:
    """The installed version of `package`.

    Raises:
        IntegrationError: the package is not installed, or has a version that is not known.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise IntegrationError(
            f"{package} must be installed to be integrated with, got no such package; "
            f"tested with {package} {', '.join(known)}"
        ) from None
    if version not in known and not allow_unknown:
        raise IntegrationError(
            f"{package} must have a known version ({', '.join(known)}), got {version}; "
            "install(allow_unknown_version=True) tries that version"
        )
    return version


def looked_up(module: ModuleType, name: str, version: str) -> Any:
    """Returns `module.name`.

    Raises:
        IntegrationError: this version of the package has no such name.
    """
    if not hasattr(module, name):
        raise IntegrationError(
            f"{module.__name__} must have {name}, got version {version} without it"
        )
    return getattr(module, name)
