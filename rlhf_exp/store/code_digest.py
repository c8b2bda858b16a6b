"""Digests of the code that a stage runs: each module of our package by its syntax tree.

Comments, docstrings and formatting do not count; a changed constant, operator or name does. The
tree is written down without the parts that differ between Python versions, so that the digests stay
valid when Python is upgraded. Left out: other packages (their versions are in the manifest) and
data files (their digests belong in the key).

`CodeNotes` remembers the results of parsing on disk, by the content of each module: parsing the
modules behind a stage takes half a second, reading them a hundredth of one.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.sealed import seal_values, sealed_values


def code_digests(
    entry_module: str,
    package_root: Path,
    exclude: Iterable[str] = (),
    notes: Path | None = None,
) -> dict[str, str]:
    """Return the digest of every module that `entry_module` imports, itself included.

    Imports are found in the source, at any depth and inside functions, transitively; also modules
    named in a string (`"rlhf_exp.x.y"` or `"rlhf_exp.x.y:function"`), for `import_module` and
    spawned workers. Imports only for type checkers do not run and do not count.

    Args:
        entry_module: dotted name, such as `rlhf_exp.stages.ppo`.
        package_root: folder of the package itself, whose name is the first part of the dotted name.
        exclude: dotted names of modules and packages that cannot change results and are not
            followed, such as `rlhf_exp.report`.
        notes: file that remembers the results of parsing, by content.

    Returns:
        Relative path of each file, with slashes (`rlhf_exp/algo/losses.py`), to 16 hex characters,
        sorted by path. Empty `__init__.py` files are left out.

    Raises:
        UserError: a module does not parse; file and line are named.
        ModuleNotFoundError: `entry_module` is not in the package.
    """
    root = package_root.resolve()
    file_of = cache(partial(_module_file, root))  # many modules import the same ones
    if file_of(entry_module) is None:
        raise ModuleNotFoundError(f"no module {entry_module} below {root}")
    digests: dict[str, str] = {}
    left_out = tuple(exclude)
    known = CodeNotes(notes, Path(__file__))
    waiting, seen = [entry_module], {entry_module}
    while waiting:
        module = waiting.pop()
        path = file_of(module)
        assert path is not None
        source = path.read_bytes()
        place = f"{module} {path.name} {root.name}"  # what relative imports stand for
        digest, names = known.of(source, place, partial(_analyse, source, path, module, root.name))
        if digest:
            digests[path.relative_to(root.parent).as_posix()] = digest
        for name in names:
            for imported in _importable(file_of, name):
                if imported not in seen and not _below(imported, left_out):
                    seen.add(imported)
                    waiting.append(imported)
    known.keep()
    return dict(sorted(digests.items()))


def changed(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return the files whose digests differ, those that came and those that went, sorted."""
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))


def _below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _module_file(root: Path, module: str) -> Path | None:
    first, *rest = module.split(".")
    if first != root.name:
        return None
    base = root.joinpath(*rest)
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _importable(file_of: Callable[[str], Path | None], name: str) -> Iterator[str]:
    """Yield the modules that importing `name` runs: its packages, and itself if it is a module."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        module = ".".join(parts[:length])
        if file_of(module) is not None:
            yield module


def _analyse(source: bytes, path: Path, module: str, package: str) -> ParsedModule:
    """Return the digest of a module and the names that it imports."""
    try:
        tree = ast.parse(source, filename=str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error
    is_package = path.name == "__init__.py"
    base = module.split(".") if is_package else module.split(".")[:-1]
    names = {name for name in _imports(tree, base, package) if name.split(".")[0] == package}
    text = _written(tree)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16] if _statements(tree.body) else ""
    return ParsedModule(digest, tuple(sorted(names)))


def _imports(tree: ast.AST, base: list[str], package: str) -> Iterator[str]:
    for node in _running_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            yield stem
            # `from a import b`: b is a module or a name inside a; `_importable` knows which.
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if name.startswith(f"{package}.") and name.replace(".", "").isidentifier():
                yield name


def _running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those in `if TYPE_CHECKING:` and in docstrings."""
    yield node
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        if name == "body" and isinstance(node, ast.If) and _for_type_checkers(node.test):
            continue
        for child in children:
            if isinstance(child, ast.AST) and not _is_docstring(child):
                yield from _running_nodes(child)


def _for_type_checkers(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _is_docstring(node: ast.AST) -> bool:
    # Any string that stands alone: it has no effect, wherever it is.
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    return [statement for statement in body if not _is_docstring(statement)]


def _written(value: object) -> str:
    """Write a syntax tree down, without positions, docstrings and empty fields.

    `ast.dump` would not do: its output for the same source differs between Python versions,
    in empty fields and in those that came later.
    """
    if isinstance(value, ast.Constant):
        return f"{type(value.value).__name__}:{value.value!r}"
    if isinstance(value, ast.JoinedStr):
        # Python 3.12 ends some f-strings with an empty piece.
        pieces = [piece for piece in value.values if getattr(piece, "value", None) != ""]
        return f"JoinedStr({_written(pieces)})"
    if isinstance(value, ast.AST):
        parts = [
            f"{name}={_written(item)}"
            for name, item in ast.iter_fields(value)
            if name not in ("ctx", "type_comment", "type_ignores") and item not in (None, [])
        ]
        return f"{type(value).__name__}({','.join(parts)})"
    if isinstance(value, list):
        return f"[{','.join(_written(item) for item in value if not _is_docstring(item))}]"
    return repr(value)


class ParsedModule(NamedTuple):
    """The results of parsing a module.

    Attributes:
        digest: Digest of the syntax tree; "" for an empty module.
        names: Modules and names of the package that it imports, sorted.
    """

    digest: str
    names: tuple[str, ...]


class CodeNotes:
    """Remembers the results of parsing; several processes may share the file.

    Args:
        path: The JSON file; `None`: nothing is remembered. One that cannot be read or written costs
            time only, as does one whose folder nobody has made yet: a plan leaves nothing behind.
        parser: Source file of the parser: notes of another one, or of another Python, do not
            count.
    """

    def __init__(self, path: Path | None, parser: Path) -> None:
        self.path = path
        made_by = f"{sys.version_info[:2]} {hashlib.sha256(parser.read_bytes()).hexdigest()}"
        self._made_by = made_by
        self._fresh: dict[str, list[object]] = {}
        self._known = self._read()

    def of(self, source: bytes, place: str, parse: Callable[[], ParsedModule]) -> ParsedModule:
        """Return the digest and imports of a module, from the notes or by parsing.

        Args:
            source: Content of its file.
            place: Everything else that counts, such as its name.
            parse: Parses it.
        """
        name = hashlib.sha256(f"{place}\0".encode() + source).hexdigest()
        try:
            digest, names = self._known[name]
            return ParsedModule(str(digest), tuple(map(str, names)))  # type: ignore[call-overload]
        except (KeyError, TypeError, ValueError):
            module = parse()
        self._known[name] = self._fresh[name] = [module.digest, module.names]
        return module

    def keep(self) -> None:
        """Write the new results down, beside those that other processes have written meanwhile."""
        if self.path is None or not self._fresh or not self.path.parent.is_dir():
            return
        modules = self._read() | self._fresh
        try:
            content = {"made_by": self._made_by, "modules": modules}
            write_json_atomic(self.path, seal_values(content), durable=False)
        except OSError:
            return
        self._fresh = {}

    def _read(self) -> dict[str, list[object]]:
        if self.path is None:
            return {}
        try:
            content = sealed_values(self.path)
            known = content["modules"] if content["made_by"] == self._made_by else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if isinstance(known, dict) else {}
