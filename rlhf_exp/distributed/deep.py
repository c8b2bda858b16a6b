"""DeepSpeed, set up so that it is what was asked for."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import distributed, nn

from rlhf_exp.errors import UserError
from rlhf_exp.models.reduction import BUCKET


def deepspeed_module() -> Any:  # noqa: ANN401 - an untyped library
    """Import deepspeed, without what it would compile on first use.

    Raises:
        UserError: It is not installed.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"distributed=zero*: deepspeed cannot be imported ({error}); install it with "
            "`pip install --no-build-isolation 'rlhf-exp[deepspeed]'`"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls functions of torch by their old names, which says so each time.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    # A communication kernel for CPUs of one host: half a minute of compiling, and a lock file that
    # a killed build leaves behind for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_for(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Any:  # noqa: ANN401 - an untyped library
    """Return DeepSpeed's engine over `module`, after seeing that it shards as asked.

    Args:
        module: On this process's device.
        optimizer: Of what trains.
        settings: DeepSpeed's config: what does not follow from the module.
    """
    deepspeed = deepspeed_module()
    elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
    zero = {"reduce_bucket_size": min(BUCKET, elements), **settings["zero_optimization"]}
    config = {
        # Whether a step is due is said before each forward pass, not counted.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        **settings,
        "zero_optimization": zero,
    }
    _forget_last_group(deepspeed)
    backend = distributed.get_backend()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    found = (engine.zero_optimization_stage(), engine.dp_world_size)
    expected = (zero["stage"], distributed.get_world_size())
    assert found == expected, f"DeepSpeed: (stage, processes) are {found}, not {expected}"
    return engine


def _forget_last_group(deepspeed: Any) -> None:  # noqa: ANN401 - an untyped library
    """Let DeepSpeed find the process group of this stage: it keeps the first one it has seen."""
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references(group=None)
