"""List what `train.py` has left on AWS; `--delete` stops its jobs and deletes its files.

    python examples/sagemaker/clean_up.py --bucket BUCKET

It needs the extra `sagemaker` and an AWS account. Jobs are those whose names begin with `rlhf-exp`,
files those under `rlhf-exp/` in the bucket: checkpoints, results and uploaded code. Notebook
instances and labelling jobs were not made by `train.py` and are not touched: AWS's console lists
them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import boto3

NAME = "rlhf-exp"
RUNNING = ("InProgress", "Stopping")
MOST_KEYS = 1000
"""Most files that S3 deletes in one request."""


def running_jobs(sagemaker: Any) -> Iterator[str]:  # noqa: ANN401 - boto3 makes its clients
    """Yield the names of this project's jobs that have not ended."""
    pages = sagemaker.get_paginator("list_training_jobs").paginate(NameContains=NAME)
    for page in pages:
        for job in page["TrainingJobSummaries"]:
            if job["TrainingJobName"].startswith(NAME) and job["TrainingJobStatus"] in RUNNING:
                yield job["TrainingJobName"]


def files(s3: Any, bucket: str) -> Iterator[tuple[str, int]]:  # noqa: ANN401
    """Yield key and size of each of this project's files in a bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{NAME}/")
    for page in pages:
        for entry in page.get("Contents", []):
            yield entry["Key"], entry["Size"]


def clean_up(sagemaker: Any, s3: Any, bucket: str, delete: bool) -> Iterator[str]:  # noqa: ANN401
    """Yield a line for what there is, or for what was stopped and deleted.

    Args:
        sagemaker: boto3's client of SageMaker.
        s3: boto3's client of S3.
        bucket: The bucket that `train.py` was given.
        delete: Whether to stop and delete; otherwise nothing changes.
    """
    for job in running_jobs(sagemaker):
        if delete:
            sagemaker.stop_training_job(TrainingJobName=job)
        yield f"{'stopped' if delete else 'would stop'} job {job}"
    found = list(files(s3, bucket))
    for start in range(0, len(found), MOST_KEYS):
        keys = [{"Key": key} for key, _ in found[start : start + MOST_KEYS]]
        if delete:
            failed = s3.delete_objects(Bucket=bucket, Delete={"Objects": keys}).get("Errors", [])
            yield from (f"not deleted: {error['Key']} ({error['Message']})" for error in failed)
    size = sum(number for _, number in found) / 1e9
    verb = "asked to delete" if delete else "would delete"
    yield f"{verb} {len(found)} files, {size:.1f} GB, under s3://{bucket}/{NAME}/"


def main(argv: Sequence[str] | None = None) -> None:
    """Print what there is, and delete it if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--region")
    parser.add_argument("--delete", action="store_true", help="stop and delete, not only list")
    options = parser.parse_args(argv)
    clients = boto3.Session(region_name=options.region)
    lines = clean_up(
        clients.client("sagemaker"), clients.client("s3"), options.bucket, options.delete
    )
    for line in lines:
        print(line)
    if not options.delete:
        print("Nothing was changed; --delete stops and deletes.")


if __name__ == "__main__":
    main()
