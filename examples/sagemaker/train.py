"""Start `launch.py` as a training job on Amazon SageMaker.

    python examples/sagemaker/train.py --image IMAGE --bucket BUCKET --role ROLE \
        experiment=hh_gptj_6b_p4d reward=published

prints the job; `--start` starts it, which needs an AWS account and costs money. It needs the extra
`sagemaker`. Everything that is not an option is an override of `launch.py`.

The image has Python 3.11 or newer and PyTorch: one of AWS's, or this repository's own Dockerfile
pushed to your registry. The repository is uploaded, and `job.sh` installs it there and runs it. The
outputs are in the job's checkpoint folder, which SageMaker copies to S3 all the time and brings
back after an interruption: the run then resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sagemaker.core.helper.session_helper import Session
from sagemaker.core.shapes import Tag
from sagemaker.core.training.configs import (
    CheckpointConfig,
    Compute,
    OutputDataConfig,
    SourceCode,
    StoppingCondition,
)
from sagemaker.train import ModelTrainer
from sagemaker.train.model_trainer import Mode

ROOT = Path(__file__).resolve().parents[2]
NAME = "rlhf-exp"
"""Beginning of the names of all jobs, and the folder in the bucket; `clean_up.py` goes by it."""

INSTANCE = "ml.p4d.24xlarge"
CHECKPOINTS = "/opt/ml/checkpoints"
NOT_UPLOADED = [
    *(".git", ".env", ".venv", ".venv-trlx", "__pycache__", ".cache", ".ipynb_checkpoints"),
    *("outputs", "*.egg-info", ".pytest_cache", ".mypy_cache", ".ruff_cache", "build", "dist"),
]
KEPT_VARIABLES = ("HF_TOKEN", "WANDB_API_KEY")
"""Environment variables that the job gets if they are set here and named by `--pass-env`."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options and the overrides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", required=True, help="training image with Python and PyTorch")
    parser.add_argument("--bucket", required=True, help="S3 bucket for code, checkpoints, results")
    parser.add_argument("--role", help="ARN of the job's execution role")
    parser.add_argument("--instance", default=INSTANCE, help=f"default {INSTANCE}")
    parser.add_argument("--days", type=float, default=5, help="longest run time, default 5")
    parser.add_argument("--disk", type=int, default=1000, help="GB of disk, default 1000")
    parser.add_argument("--run", default="run", help="name of the checkpoint folder in the bucket")
    parser.add_argument("--on-demand", action="store_true", help="no spot instance")
    parser.add_argument("--pass-env", action="append", default=[], choices=KEPT_VARIABLES)
    parser.add_argument("--local", action="store_true", help="run in Docker on this machine")
    parser.add_argument("--start", action="store_true", help="start the job, not only print it")
    parser.add_argument("overrides", nargs="*", help="as on launch.py's command line")
    return parser.parse_intermixed_args(argv)


def trainer_of(options: argparse.Namespace, session: Session | None = None) -> ModelTrainer:
    """Return the job.

    Args:
        options: See `arguments`.
        session: Talks to AWS; by default with the credentials and region of this machine.
    """
    seconds = round(options.days * 86400)
    place = f"s3://{options.bucket}/{NAME}"
    spot = not (options.on_demand or options.local)
    waits = {"max_wait_time_in_seconds": 2 * seconds} if spot else {}
    if session is None and not options.local:
        session = Session(default_bucket=options.bucket)
    return ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER if options.local else Mode.SAGEMAKER_TRAINING_JOB,
        sagemaker_session=session,
        role=options.role,
        base_job_name=NAME,
        training_image=options.image,
        source_code=SourceCode(
            source_dir=str(ROOT),
            command="bash examples/sagemaker/job.sh",
            args=list(options.overrides),
            ignore_patterns=NOT_UPLOADED,
        ),
        compute=Compute(
            instance_type="local_cpu" if options.local else options.instance,
            instance_count=1,
            volume_size_in_gb=options.disk,
            enable_managed_spot_training=spot,
        ),
        stopping_condition=StoppingCondition(max_runtime_in_seconds=seconds, **waits),
        output_data_config=OutputDataConfig(s3_output_path=f"{place}/jobs"),
        # The same folder for the same run, so that a job that is started again goes on.
        checkpoint_config=CheckpointConfig(
            s3_uri=f"{place}/runs/{options.run}", local_path=CHECKPOINTS
        ),
        environment={name: os.environ[name] for name in options.pass_env},
        tags=[Tag(key="project", value=NAME)],
    )


def described(options: argparse.Namespace) -> str:
    """Return what would be started, without asking AWS anything."""
    rows = {
        "image": options.image,
        "machine": "this one, in Docker" if options.local else options.instance,
        "spot": "no" if options.on_demand or options.local else "yes",
        "longest": f"{options.days:g} days",
        "command": " ".join(["python launch.py", *options.overrides]),
        "outputs": f"s3://{options.bucket}/{NAME}/runs/{options.run}",
    }
    return "\n".join(f"{name:9} {value}" for name, value in rows.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the job, and start it if asked."""
    options = arguments(argv)
    print(described(options))
    if not options.start:
        print("\nNothing was started; --start does (it needs an AWS account, and costs money).")
        return
    trainer_of(options).train(wait=options.local)


if __name__ == "__main__":
    main()
