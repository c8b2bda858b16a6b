"""examples/sagemaker: the notebook at the smallest size, the scripts against the SDK's models."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SDK_PYTHON = os.environ.get("RLHF_EXP_SAGEMAKER_PYTHON")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_walks_through_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("RECIPE", "smoke")
    monkeypatch.setenv("RECIPE_OUTPUTS", str(tmp_path / "outputs"))
    folder = ROOT / "examples" / "sagemaker"
    notebook = nbformat.read(folder / "recipe.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    told = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    for stage in ("sft", "reward", "ppo", "eval"):
        assert (tmp_path / "outputs" / "store").joinpath(stage).is_dir(), stage
    assert "toxicity" in told.lower()
    assert list((tmp_path / "outputs" / "ground_truth").iterdir())
    assert list((tmp_path / "outputs" / "reports").glob("eval-*.html"))


@pytest.fixture(scope="module")
def checked() -> dict[str, Any]:
    if SDK_PYTHON is None:
        pytest.skip("RLHF_EXP_SAGEMAKER_PYTHON names no interpreter with the extra `sagemaker`")
    argv = ["--image", "123456789012.dkr.ecr.us-east-1.amazonaws.com/rlhf:1", "--bucket", "mine"]
    argv += ["--role", "arn:aws:iam::123456789012:role/training", "--run", "first"]
    overrides = ["experiment=hh_gptj_6b_p4d", "reward=published", "name=two words"]
    script = Path(__file__).with_name("check_sagemaker.py")
    ended = subprocess.run(
        [SDK_PYTHON, str(script), *argv, *overrides],
        env={**os.environ, "AWS_EC2_METADATA_DISABLED": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.sagemaker
def test_a_job_is_what_the_service_expects(checked: dict[str, Any]) -> None:
    request = checked["job"]["request"]
    assert checked["job"]["problems"] == ""
    assert request["ResourceConfig"]["InstanceType"] == "ml.p4d.24xlarge"
    assert request["EnableManagedSpotTraining"] is True
    stopping = request["StoppingCondition"]
    assert stopping["MaxWaitTimeInSeconds"] >= stopping["MaxRuntimeInSeconds"] == 5 * 86400
    assert request["CheckpointConfig"] == {
        "S3Uri": "s3://mine/rlhf-exp/runs/first",
        "LocalPath": "/opt/ml/checkpoints",
    }


@pytest.mark.sagemaker
def test_the_job_runs_launch_py_with_its_outputs_in_the_checkpoint_folder(
    checked: dict[str, Any],
) -> None:
    code, drivers = checked["job"]["uploads"]
    assert code["key"].startswith("rlhf-exp/")
    assert {"launch.py", "rlhf_exp", "conf", "pyproject.toml"} <= set(code["files"].split())
    assert not {".git", ".venv", "outputs"} & set(code["files"].split())
    command = "job.sh experiment=hh_gptj_6b_p4d reward=published 'name=two words'"
    assert f"bash examples/sagemaker/{command}" in drivers["script"]
    job = (ROOT / "examples" / "sagemaker" / "job.sh").read_text()
    assert 'launch.py output_dir=/opt/ml/checkpoints/outputs "$@"' in job


@pytest.mark.sagemaker
def test_local_mode_asks_nothing_of_aws(checked: dict[str, Any]) -> None:
    assert checked["local"] == "LOCAL_CONTAINER local_cpu"


@pytest.mark.sagemaker
def test_cleaning_up_lists_first_and_touches_nothing_of_others(checked: dict[str, Any]) -> None:
    assert checked["listed"] == [
        "would stop job rlhf-exp-1",
        "would delete 1001 files, 1501.5 GB, under s3://bucket/rlhf-exp/",
    ]
    assert checked["deleted"] == [
        "stopped job rlhf-exp-1",
        "asked to delete 1001 files, 1501.5 GB, under s3://bucket/rlhf-exp/",
    ]
