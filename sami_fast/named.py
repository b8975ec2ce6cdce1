"""Somebody else's code by name, `package.module:Name` or `path/to/file.py:Name`. The one place that imports what a setting names."""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, one_line


def load_named(spec: str, key: str) -> Any:
    """Import a module, or run a file, and give what has that name in it.

    A module is looked for among the installed ones, then in the working folder. A file is run once, under a module name of its own, and
    finds modules that lie beside it while it runs. `sys.path` is as before afterwards.

    Args:
        spec: `package.module:Name` or `path/to/file.py:Name`; the name may have dots.
        key: The setting that holds it, for messages.
    Raises:
        UserError: no such module, file or name, or the module itself raises an error.
    """
    place, _, name = spec.rpartition(":")
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{key}: expected package.module:Name or path/to/file.py:Name, found {spec!r}")
    found: Any = _placed(place, key)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}: {place} has no {name}")
        found = getattr(found, part)
    return found


def absolute(spec: str) -> str:
    """The same with the path of its file in full, where it names a file, so that it means the same in any working folder."""
    place, _, name = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else spec


def source_digest(spec: str, key: str) -> str:
    """sha256 of the file that a name stands for and of the one that defines it, as they were when this process first asked; what these
    import in turn does not count. Arguments and errors as in `load_named`."""
    return " ".join(_digest(path) for path in sorted({*_sources(_placed(spec.rpartition(":")[0], key)), *_sources(load_named(spec, key))}))


def _sources(found: Any) -> list[str]:
    """The file of source in which a module, class or function stands; none of others."""
    try:
        path = inspect.getsourcefile(found)
    except TypeError:
        return []
    return [path] if path and Path(path).is_file() else []


@cache  # what is imported does not change with its file
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _placed(place: str, key: str) -> ModuleType:
    return _file(Path(place).expanduser(), key) if place.endswith(".py") else _module(place, key)


def _module(name: str, key: str) -> ModuleType:
    try:
        with _reachable(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{key}: no module {error.name}, neither installed nor in {Path.cwd()}") from None
        raise _raised(name, key, error) from None
    except (Exception, SystemExit) as error:  # of a stranger's module: any
        raise _raised(name, key, error) from None


def _file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{key}: no file {path}")
    path = path.resolve()
    name = f"sami_fast_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None  # of a file that ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up there
    try:
        with _reachable(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _raised(str(path), key, error) from None
    return module


@contextmanager
def _reachable(folder: Path) -> Iterator[None]:
    """Inside, modules are also looked for in the folder, last of all."""
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _raised(place: str, key: str, error: BaseException) -> UserError:
    """A sentence with the line that raised: of the module, not of what it imported in turn."""
    if isinstance(error, SyntaxError):
        return UserError(f"{key}: {error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and not f.filename.startswith("<frozen")]
    frames = [frame for frame in frames if not frame.filename.endswith("importlib/__init__.py")]
    where = f" at {frames[0].filename}, line {frames[0].lineno}" if frames else ""
    return UserError(f"{key}: importing {place} fails{where}: {type(error).__name__}: {one_line(error)}")
