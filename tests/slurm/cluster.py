"""A real Slurm of several nodes on this machine, without root: Debian's programs, unpacked by `make test-slurm`.

Every node is a slurmd of its own. Node names are loopback addresses, so that what a script reads as the first node's
name can be reached. Daemons listen on the address of this machine's name, and a munged of the cluster's own lets
nobody but this user speak to them.
"""

from __future__ import annotations

import getpass
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / ".slurm"
_LIBRARIES = UNPACKED / "usr/lib/x86_64-linux-gnu"
_PLUGINS = _LIBRARIES / "slurm-wlm"
_FIRST_PORT = 17_000
_POLL_SECONDS = 0.1
_REVOKED_SECONDS = 2.0  # a requeued job that starts within the second of its end has no valid credential

_CONFIG = """
ClusterName=fake
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5,socket={folder}/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
SlurmdTimeout=10
KillWait=30
CompleteWait=0
MinJobAge=3600
JobRequeue=1
MailProg=/bin/true
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=64 RealMemory=512000 Gres=gpu:8"
    " State=UNKNOWN\n"
)


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    exit_code: int
    restarts: int
    reason: str
    exclude: str


class Cluster:
    """The daemons of one Slurm; use it as a context manager."""

    def __init__(self, folder: Path, *, num_nodes: int) -> None:
        self._folder = folder
        self.nodes = [f"127.0.0.{number}" for number in range(1, num_nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = slurm_environment() | {"SLURM_CONF": str(folder / "etc/slurm.conf")}

    def __enter__(self) -> Cluster:
        for name in ("etc", "state", "log", "run", "dev", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self._folder / name).mkdir(parents=True)
        address = socket.gethostbyname(socket.gethostname())
        port = _free_ports(address, len(self.nodes) + 1)
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        given = {"host": host, "address": address}
        text = _CONFIG.format(**given, user=user, port=port, folder=self._folder, plugins=_PLUGINS)
        for number, node in enumerate(self.nodes, start=1):
            text += _NODE.format(**given, name=node, port=port + number)
        every = ",".join(self.nodes)
        text += f"PartitionName=gpu Nodes={every} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30\n"
        text += f"PartitionName=urgent Nodes={every} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF\n"
        (self._folder / "etc/slurm.conf").write_text(text)
        # Slurm wants character devices for GPUs.
        for number in range(8):
            (self._folder / f"dev/nvidia{number}").symlink_to("/dev/null")
        (self._folder / "etc/gres.conf").write_text(f"NodeName={every} Name=gpu File={self._folder}/dev/nvidia[0-7]\n")
        (self._folder / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._start_munge()
        self._start("slurmctld", [str(UNPACKED / "usr/sbin/slurmctld-wlm"), "-D"])
        for node in self.nodes:
            self.start_node(node)
        self.wait_until(self._is_ready, 60, "all nodes idle")
        return self

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "--user", getpass.getuser(), check=False)
        self.wait_until(lambda: not self.call("squeue", "--noheader"), 60, "an empty queue")
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
        for daemon in self._daemons.values():
            daemon.wait(timeout=30)

    def _start_munge(self) -> None:
        """Slurm's daemons and clients share its key. Forced: it warns that other users do not reach its socket."""
        folder = self._folder / "munge"
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_bytes(os.urandom(128))
        files = [f"--{name}={folder}/{name.removesuffix('-file')}" for name in ("socket", "key-file", "pid-file")]
        files += [f"--{name}={folder}/{name.removesuffix('-file')}" for name in ("log-file", "seed-file")]
        self._start("munged", [str(UNPACKED / "usr/sbin/munged"), "--foreground", "--force", *files])
        self.wait_until((folder / "socket").exists, 30, "munged")

    def kill(self) -> None:
        """End the daemons of a cluster that did not start."""
        for daemon in self._daemons.values():
            daemon.kill()

    def clear(self) -> None:
        """Cancel what is left and bring all nodes back."""
        self.call("scancel", "--user", getpass.getuser(), check=False)
        self.wait_until(lambda: not self.call("squeue", "--noheader"), 60, "an empty queue")
        for node in self.nodes:
            if node not in self._daemons:
                self.repair(node)
        self.wait_until(self._is_ready, 60, "all nodes idle")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        stepd = str(UNPACKED / "usr/sbin/slurmstepd-wlm")
        self._start(node, [str(UNPACKED / "usr/sbin/slurmd-wlm"), "-D", "-N", node, "-d", stepd])

    def call(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's programs in the project's folder and return its output."""
        done = subprocess.run(
            command, env=self.environment | dict(env or {}), cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> JobState:
        """The state of a job, by its id."""
        text = self.call("scontrol", "show", "job", "--oneliner", job)
        found = dict(re.findall(r"(\w+)=(\S*)", text))
        status, _, number = found["ExitCode"].partition(":")
        code = 128 + int(number) if int(number) else int(status)
        return JobState(found["JobState"], code, int(found["Restarts"]), found["Reason"], found["ExcNodeList"])

    def wait(self, job: str, *states: str, seconds: float = 120) -> JobState:
        """Wait for one of these states; a job that waits after a requeue is told to start at once."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def is_there() -> bool:
            found = self.job(job)
            if found.state == "PENDING" and found.reason == "BeginTime" and "PENDING" not in wanted:
                time.sleep(_REVOKED_SECONDS)
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return found.state in wanted

        self.wait_until(is_there, seconds, f"job {job} in {wanted}")
        if not states:  # in the middle of a requeue a job is FAILED for a moment
            time.sleep(1)
            self.wait_until(is_there, seconds, f"job {job} in {wanted}")
        return self.job(job)

    def drain(self, seconds: float) -> None:
        """Wait until no job is left; those that wait after a requeue are told to start."""

        def is_empty() -> bool:
            lines = self.call("squeue", "--noheader", "--array", "--format=%A %r").splitlines()
            for job, reason in (line.split(" ", 1) for line in lines):
                if reason == "BeginTime":
                    time.sleep(_REVOKED_SECONDS)
                    self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return not lines

        self.wait_until(is_empty, seconds, "an empty queue")

    def crash(self, node: str) -> None:
        """Kill everything on a node at once, as when it loses power, and let Slurm notice at once."""
        for process in (self._daemons.pop(node).pid, *self._processes_on(node)):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")

    def repair(self, node: str) -> None:
        """Start a crashed node again."""
        self.start_node(node)
        self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll until it holds; fails with the daemons' last words."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self.call('squeue')}\n{self.logs()}"
            time.sleep(_POLL_SECONDS)

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        return "\n".join(file.read_text()[-800:] for file in sorted((self._folder / "log").glob("*.log")))

    def _start(self, name: str, command: list[str]) -> None:
        log = (self._folder / "log" / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def _is_ready(self) -> bool:
        text = self.call("scontrol", "show", "node", "--oneliner", check=False)
        return len(re.findall(r"Version=.* State=IDLE .*SlurmdStartTime=2", text)) == len(self.nodes)

    def _processes_on(self, node: str) -> list[int]:
        """Tasks of this cluster's node, and the slurmstepds that hold them."""
        wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        found: set[int] = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                values = set((folder / "environ").read_bytes().split(b"\0"))
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if wanted <= values:
                    found.add(int(folder.name))
                    if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                        found.add(parent)
            except (OSError, IndexError):
                continue
        return sorted(found)


def slurm_environment() -> dict[str, str]:
    """The environment in which the unpacked programs run."""
    paths = [str(UNPACKED / "usr/bin"), os.environ["PATH"]]
    return os.environ | {"PATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": f"{_LIBRARIES}:{_PLUGINS}"}


def why_no_cluster() -> str | None:
    """What this machine lacks for a Slurm; None: nothing that could be asked for."""
    for name in ("slurmctld-wlm", "slurmd-wlm", "munged"):
        program = UNPACKED / "usr/sbin" / name
        if not program.is_file():
            return "needs the Slurm that `make test-slurm` fetches"
        said = subprocess.run([program, "-V"], env=slurm_environment(), capture_output=True, text=True)
        if said.returncode != 0:
            return f"Debian's {name} does not run here: {said.stderr.strip()}"
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return f"the name of this machine, {name}, has no address; Slurm's daemons need one"
    if address.startswith("127.") and address != "127.0.0.1":
        return f"the name of this machine, {name}, is {address}, from where no srun is answered; 127.0.0.1 works"
    return None


def _free_ports(address: str, count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(_FIRST_PORT, _FIRST_PORT + 2000, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for number, probe in enumerate(probes):
                probe.bind((address, first + number))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")
