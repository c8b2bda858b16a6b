"""Tasks of lm-evaluation-harness as a config names them: by name, by file, or by folder.

A task's name is one that lm-eval knows. A `.yaml` file is a task or a group of the user's own, a
folder all of those in it. What counts of them for a result is their content: `task_content`.
"""

from __future__ import annotations

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
    functions, and the files and folders that `dataset_path` and `dataset_kwargs` name.

    Args:
        task: An entry of the config.
        file_digest: Returns the digest of a file's content.
    """
    if not is_path(task):
        return task
    files = task_files(task)
    beside = {
        near
        for folder in {file.parent for file in files}
        for near in folder.iterdir()
        if near.suffix in (*_SUFFIXES, ".py")
    }
    data = {path for file in beside if file.suffix != ".py" for path in _local_data(_read(file))}
    return {
        "tasks": [file.name for file in files],
        "files": {file.name: file_digest(file) for file in sorted(beside)},
        "data": [file_digest(file) for file in sorted(data)],
    }


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
