"""Tasks of lm-evaluation-harness as a config names them: by name, by file, or by folder.

A task's name is one that lm-eval knows. A `.yaml` file is a task or a group of the user's own, a
folder all of those in it. What counts of them for a result is their content: `task_content`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_exp.errors import UserError

KEY = "eval.harness.tasks"
_SUFFIXES = (".yaml", ".yml")
_DATA_FIELDS = ("dataset_path", "dataset_kwargs")


def is_path(task: str) -> bool:
    """Whether an entry of the config names a file or folder rather than a task of lm-eval."""
    return task.endswith(_SUFFIXES) or "/" in task or task.startswith((".", "~"))


def task_files(task: str) -> list[Path]:
    """Return the files of an entry that is a path: itself, or the tasks and groups in a folder.

    In a folder with groups the other files are the groups' own.

    Raises:
        UserError: There is no such file, none in the folder, or one is no task.
    """
    path = Path(task).expanduser()
    if path.is_dir():
        contents = {file: _read(file) for file in _task_yaml(path)}
        groups = [file for file, content in contents.items() if "group" in content]
        files = groups or [file for file, content in contents.items() if "task" in content]
        if not files:
            raise UserError(f"{KEY}: {path.resolve()} holds no .yaml file with `task:` or `group:`")
        return files
    if not path.is_file():
        raise UserError(f"{KEY}: there is no file or folder {path.resolve()}")
    if not {"task", "group"} & _read(path).keys():
        raise UserError(f"{KEY}: {path} is no task of lm-eval: it has neither `task:` nor `group:`")
    return [path]


def task_content(task: str, file_digest: Callable[[Path], str]) -> Any:  # noqa: ANN401 - JSON
    """Return what identifies a task: its name, or the content of its files and their local data.

    All `.yaml` and `.py` files beside a file count, since tasks include one another and call
    functions, those beside a file that is included or holds a group's task in a folder below, and
    the files and folders that `dataset_path` and `dataset_kwargs` name.

    Args:
        task: An entry of the config.
        file_digest: Returns the digest of a file's content.
    """
    if not is_path(task):
        return task
    files = task_files(task)
    beside = _all_beside(files)
    data = {path for content in beside.values() for path in _local_data(content)}
    start = files[0].parent
    return {
        "tasks": [file.name for file in files],
        "files": {os.path.relpath(file, start): file_digest(file) for file in sorted(beside)},
        "data": [file_digest(file) for file in sorted(data)],
    }


def _all_beside(files: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Return the `.yaml` and `.py` files in the folders of some files, and of what these need.

    Of the content what can be read of it: what else is in a folder need be no task.
    """
    found: dict[Path, dict[str, Any]] = {}
    folders = [file.parent for file in files]
    for folder in folders:  # more are appended meanwhile
        near = {
            file: {} if file.suffix == ".py" else _read_or_nothing(file)
            for file in folder.iterdir()
            if file.suffix in (*_SUFFIXES, ".py") and file.is_file()
        }
        found |= near
        needed = {path for file, content in near.items() for path in _included(file, content)}
        wanted = {name for content in near.values() for name in _members(content)}
        missing = wanted - {str(content.get("task")) for content in near.values()}
        if missing:
            needed |= {
                file
                for file in _yaml_below(folder)
                if str(_read_or_nothing(file).get("task")) in missing
            }
        known = {place.resolve() for place in folders}
        folders += sorted({file.parent for file in needed if file.parent.resolve() not in known})
    return found


def _yaml_below(folder: Path) -> Iterator[Path]:
    """Yield the YAML files below a folder, but in hidden folders, such as environments."""
    for place, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(place) / name for name in files if name.endswith(_SUFFIXES))


def _included(file: Path, content: dict[str, Any]) -> Iterator[Path]:
    """Yield the files that a task's file includes."""
    for text in _texts(content.get("include")):
        path = file.parent / Path(text).expanduser()
        if path.is_file():
            yield path


def _members(content: dict[str, Any]) -> Iterator[str]:
    """Yield the names of a group's tasks, those of the groups in it, too."""
    if "group" in content:
        for item in content["task"] if isinstance(content.get("task"), list) else ():
            if isinstance(item, str):
                yield item
            elif isinstance(item, dict):
                yield from _members(item)
                if isinstance(item.get("task"), str):
                    yield item["task"]


def folders_of(tasks: Sequence[str]) -> list[str]:
    """Return the folders in which lm-eval is to look for the tasks that groups name."""
    found = (file.parent for task in tasks if is_path(task) for file in task_files(task))
    return [str(folder) for folder in dict.fromkeys(found)]


def specifications(tasks: Sequence[str]) -> list[str]:
    """Return the tasks as `TaskManager.load` takes them: names, and paths of files."""
    return [
        name
        for task in tasks
        for name in ([str(file) for file in task_files(task)] if is_path(task) else [task])
    ]


def _task_yaml(folder: Path) -> list[Path]:
    """Return the YAML files in a folder but those that others only include (`_default.yaml`)."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in _SUFFIXES and not file.name.startswith("_")
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a task file; functions (`!function`) are left out.

    Raises:
        UserError: It is not YAML, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{KEY}: {path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{KEY}: {path} is no task of lm-eval: a YAML mapping was expected")
    return content


def _read_or_nothing(path: Path) -> dict[str, Any]:
    """Return the content of a file that may be of something else; then nothing."""
    try:
        return _read(path)
    except UserError:
        return {}


class _TaskLoader(yaml.SafeLoader):
    """Reads plain values; lm-eval's own tags are `None`."""


_TaskLoader.add_multi_constructor("!", lambda *_: None)


def _local_data(content: dict[str, Any]) -> Iterator[Path]:
    """Yield the files that a task's data come from, as far as they are on this machine."""
    for field in _DATA_FIELDS:
        for text in _texts(content.get(field)):
            path = Path(text).expanduser()
            if path.is_file():
                yield path
            elif path.is_dir():
                yield from (file for file in path.rglob("*") if file.is_file())


def _texts(value: object) -> Iterator[str]:
    """Yield the strings within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
