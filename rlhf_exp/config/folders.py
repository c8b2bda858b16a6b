"""The folders whose YAML files a config is composed from, and checks of those files.

`conf/` comes first, then the user's own: `--config-dir`, `hydra.searchpath`, and a folder `conf`
where the command is given. Hydra takes a file from the first folder that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import OmegaConf

from rlhf_exp.config.overrides import parse_override
from rlhf_exp.config.problems import Problem
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.config.text_values import text_problems
from rlhf_exp.errors import UserError

_SEARCH_PATH = "hydra.searchpath"


def config_folders(
    overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[list[Path], list[str]]:
    """Return the config folders, and the overrides that do not name any.

    Args:
        overrides: As on the command line.
        config_dir: The folder of `--config-dir`.

    Raises:
        UserError: For a folder that does not exist.
    """
    others = [text for text in overrides if text.partition("=")[0].lstrip("+") != _SEARCH_PATH]
    named = [parse_override(text) for text in overrides if text not in others]
    elements = _search_path_of_conf()
    for override in named:
        if isinstance(override, Override):
            elements = override.value()
    if not isinstance(elements, list):
        raise UserError(f"{_SEARCH_PATH}={elements}: expected a list, such as [file:///my/conf].")
    folders = [CONF]
    if config_dir is not None:
        folders.append(_existing(config_dir, f"--config-dir: there is no folder {config_dir}"))
    resolved = OmegaConf.to_container(OmegaConf.create(elements), resolve=True)
    assert isinstance(resolved, list)
    folders += [_search_path_folder(str(element)) for element in resolved]
    here = Path("conf")
    folders += [here.resolve()] if here.is_dir() else []
    return list(dict.fromkeys(folder.resolve() for folder in folders)), others


def _search_path_of_conf() -> object:
    content = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    return content.get("hydra", {}).get("searchpath") or []


def _search_path_folder(element: str) -> Path:
    scheme, found, rest = element.rpartition("://")
    if found and scheme not in ("file", "pkg"):
        raise UserError(f"{_SEARCH_PATH}: {element}: expected file://FOLDER or pkg://PACKAGE.")
    missing = f"{_SEARCH_PATH}: {element}: there is no such folder"
    if scheme != "pkg":
        return _existing(Path(rest), missing)
    try:
        spec = find_spec(rest.replace("/", "."))
    except (ImportError, ValueError):
        spec = None
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    if not locations:
        raise UserError(f"{_SEARCH_PATH}: {element}: there is no such package")
    return _existing(Path(locations[0]), missing)


def _existing(folder: Path, message: str) -> Path:
    path = folder.expanduser().resolve()
    if not path.is_dir():
        raise UserError(message)
    return path


def search_overrides(folders: Sequence[Path]) -> list[str]:
    """Return the override that lets Hydra search a user's own folders too."""
    quoted = [QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders]
    return [f"{_SEARCH_PATH}=[{','.join(quoted)}]"] if quoted else []


def file_problems(folders: Sequence[Path], name: str, package: str) -> list[Problem | str]:
    """Return the problems of one config file that Hydra composes.

    Args:
        folders: The config folders.
        name: The file's path below its folder, without `.yaml`.
        package: The section that its keys belong to.
    """
    files = [folder / f"{name}.yaml" for folder in folders]
    files = [file for file in files if file.is_file()]
    if not files:
        return []  # of Hydra, or of the schema
    different = [file for file in files[1:] if file.read_bytes() != files[0].read_bytes()]
    if different and name != "config":
        message = f"{different[0]}: {files[0]} has the same name and would be taken; rename yours."
        return [message]
    return [*text_problems(files[0], package)]
