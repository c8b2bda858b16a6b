"""A real Slurm of several nodes on one machine: Debian's daemons, no systemd, no cgroups.

Debian's build of `slurmd` takes `-N`, so one host can run several nodes. Two things are emulated:
the nodes share a host name, and memory is not enforced. There is no accounting, as on a small site,
so `sacct` always fails. It needs root, because `slurmd` does.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
HOSTS = Path("/etc/hosts")
MARK = "# added by rlhf_exp's Slurm tests"

# Everything that a large site delays for good reasons happens at once: scheduling, the start of a
# requeued job (cred_expire, at least 5 s), the end of a killed one, and noticing a dead node.
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
PropagateResourceLimits=NONE
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
KillWait=5
SlurmdTimeout=6
InactiveLimit=0
WaitTime=0
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs={cpus}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=10
PartitionName=urgent Nodes={names} MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why no cluster can be started here, `None` if one can."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        return f"there is no {', '.join(missing)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd needs root"
    return None


class Cluster:
    """A running cluster; its nodes are called `node1`, `node2`, ...

    Args:
        folder: Where it keeps everything.
        nodes: Number of nodes, two or more.
        cpus: CPUs that a node says it has.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.folder = folder
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons and wait for the nodes."""
        (self.folder / "state").mkdir(parents=True)
        self.folder.chmod(0o755)
        host, port = socket.gethostname(), _free_ports(len(self.names) + 1)
        names = f"node[1-{len(self.names)}]"
        text = CONFIG.format(
            host=host,
            port=port,
            folder=self.folder,
            names=names,
            cpus=self.cpus,
            first=port + 1,
            last=port + len(self.names),
        )
        (self.folder / "slurm.conf").write_text(text)
        _resolve([host, *self.names])
        self._start_munge()
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for name in self.names:
            self.start_node(name)
        wait(self._ready, 30, lambda: self.output("sinfo"))

    def _start_munge(self) -> None:
        key, socket_path = self.folder / "munge.key", self.folder / "munge.socket"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        self._daemon(
            "munged",
            *("munged", "--foreground", "--force", f"--socket={socket_path}"),
            *(f"--key-file={key}", f"--pid-file={self.folder / 'munged.pid'}"),
            *(f"--seed-file={self.folder / 'munged.seed'}",),
            f"--log-file={self.folder / 'munged.log'}",
        )
        wait(socket_path.exists, 10)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self._daemon(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Let a node die: its daemon and everything that runs on it, by SIGKILL."""
        self._daemons[name].kill()
        for process in self.processes(name):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemons.pop(name).wait()

    def processes(self, node: str) -> list[psutil.Process]:
        """Return what runs on a node: jobs' scripts and tasks, and the daemons that watch them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if (environment.get("SLURM_CONF"), environment.get("SLURMD_NODENAME")) == (
                    self.environment["SLURM_CONF"],
                    node,
                ):
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        found.append(parent)
                    found.append(process)
        return found

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    def output(self, *command: str) -> str:
        """Return what a command prints; a failing one fails the test."""
        ended = self.run(*command)
        assert ended.returncode == 0, f"{command}: {ended.stderr}"
        return ended.stdout

    def stop(self) -> None:
        """End the jobs, then the daemons."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user=root")
            with suppress(AssertionError):
                wait(lambda: not self.output("squeue", "--noheader"), 15)
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for node in self.names:
            for process in self.processes(node):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        _forget()

    def _ready(self) -> bool:
        states = self.run("sinfo", "--noheader", "--format=%T").stdout.split()
        return bool(states) and set(states) == {"idle"}

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


def wait(
    condition: Callable[[], object], seconds: float, note: Callable[[], str] = lambda: ""
) -> None:
    """Wait until a condition holds; fail after `seconds`, with a note."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain. {note()}"
        time.sleep(0.1)


def _free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row."""
    for first in range(17100, 30000, 50):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def _resolve(names: list[str]) -> None:
    """Let the nodes' names be found: workers meet at the first node's."""
    with HOSTS.open("a") as file:
        for name in names:
            try:
                socket.gethostbyname(name)
            except OSError:
                file.write(f"127.0.0.1 {name} {MARK}\n")


def _forget() -> None:
    lines = HOSTS.read_text().splitlines(keepends=True)
    # Rewritten in place: in a container it may be a mount.
    HOSTS.write_text("".join(line for line in lines if MARK not in line))
