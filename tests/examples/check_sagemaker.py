"""The scripts of examples/sagemaker against the SDK's own models, without an account.

Run by tests/examples/test_sagemaker.py in an interpreter with the extra `sagemaker`. It prints, as
JSON, the request that would start a job, what botocore's service model says of it, the job's own
script, and what cleaning up does to a service that answers from a list.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
from botocore.stub import Stubber
from botocore.validate import ParamValidator
from sagemaker.core.helper.session_helper import Session
from sagemaker.train.defaults import TrainDefaults

FOLDER = Path(__file__).parents[2] / "examples" / "sagemaker"
sys.path.insert(0, str(FOLDER))

import clean_up  # noqa: E402
import train  # noqa: E402

KEYS = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
CLIENTS = boto3.Session(region_name="us-east-1", **KEYS)


def job(*argv: str) -> dict[str, Any]:
    """Return the request that starts a job, with what would be uploaded."""
    uploads: list[dict[str, str]] = []

    def upload(_: Session, **where: Any) -> str:
        script = Path(where["path"]) / "sm_train.sh"
        listed = sorted(path.name for path in Path(where["path"]).iterdir())
        text = script.read_text() if script.is_file() else ""
        uploads.append({"key": where["key_prefix"], "files": " ".join(listed), "script": text})
        return f"s3://{where['bucket']}/{where['key_prefix']}"

    with (
        patch.object(Session, "upload_data", upload),
        patch.object(Session, "_create_s3_bucket_if_it_does_not_exist", lambda *_, **__: None),
        patch.object(TrainDefaults, "get_role", lambda role=None, **_: role),
    ):
        options = train.arguments(argv)
        session = Session(boto_session=CLIENTS, default_bucket=options.bucket)
        trainer = train.trainer_of(options, session)
        request = trainer._create_training_job_args(boto3=True)
    operation = CLIENTS.client("sagemaker").meta.service_model.operation_model("CreateTrainingJob")
    problems = ParamValidator().validate(request, operation.input_shape).generate_report()
    return {"request": request, "problems": problems, "uploads": uploads}


def local_mode(*argv: str) -> str:
    """Return how the job would run on this machine, made without a session or a role."""
    trainer = train.trainer_of(train.arguments([*argv, "--local"]))
    assert trainer.sagemaker_session is None
    return f"{trainer.training_mode.value} {trainer.compute.instance_type}"


def cleaned(delete: bool) -> list[str]:
    """Return what cleaning up says, of a service with two jobs of ours and one of another's."""
    sagemaker, s3 = CLIENTS.client("sagemaker"), CLIENTS.client("s3")
    jobs = [
        ("rlhf-exp-1", "InProgress"),
        ("rlhf-exp-2", "Completed"),
        ("my-rlhf-exp", "InProgress"),
    ]
    listed = [
        {
            "TrainingJobName": name,
            "TrainingJobArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{name}",
            "CreationTime": 0,
            "TrainingJobStatus": status,
        }
        for name, status in jobs
    ]
    found = [{"Key": f"rlhf-exp/{number}", "Size": 1_500_000_000} for number in range(1001)]
    with Stubber(sagemaker) as jobs_stub, Stubber(s3) as files_stub:
        jobs_stub.add_response(
            "list_training_jobs", {"TrainingJobSummaries": listed}, {"NameContains": "rlhf-exp"}
        )
        files_stub.add_response(
            "list_objects_v2", {"Contents": found}, {"Bucket": "bucket", "Prefix": "rlhf-exp/"}
        )
        if delete:
            jobs_stub.add_response("stop_training_job", {}, {"TrainingJobName": "rlhf-exp-1"})
            for part in (found[:1000], found[1000:]):
                keys = [{"Key": entry["Key"]} for entry in part]
                expected = {"Bucket": "bucket", "Delete": {"Objects": keys}}
                files_stub.add_response("delete_objects", {}, expected)
        lines = list(clean_up.clean_up(sagemaker, s3, "bucket", delete))
        jobs_stub.assert_no_pending_responses()
        files_stub.assert_no_pending_responses()
    return lines


if __name__ == "__main__":
    found = {
        "job": job(*sys.argv[1:]),
        "local": local_mode(*sys.argv[1:]),
        "listed": cleaned(False),
        "deleted": cleaned(True),
    }
    print(json.dumps(found, default=str))
