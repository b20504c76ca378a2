"""A SLURM cluster of two nodes on this machine, with files, ports and processes of its own."""

import contextlib
import os
import shutil
import socket
import subprocess

import psutil
from experiment import free_port
from waiting import wait_for

PATH = f"{os.environ['PATH']}:/usr/sbin"
PROGRAMS = ["munged", "slurmctld", "slurmd", "srun", "squeue", "scancel"]
NODES = ["n1", "n2"]
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
# Seconds that a job has after SIGTERM.
KillWait=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=32 Gres=gpu:2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=2
PartitionName=whole Nodes=n1,n2 PriorityTier=1 OverSubscribe=EXCLUSIVE
PartitionName=urgent Nodes=n1,n2 PriorityTier=2
"""


def missing():
    """Return why no cluster can be started here, or None."""
    found = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    if found:
        return f"needs {', '.join(found)}: Debian's slurm-wlm and munge"
    return None if os.getuid() == 0 else "only root can start a SLURM of its own"


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


class Cluster:
    """The daemons, which keep their logs in a folder; from boot() to stop()."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        ports = [free_port() for _ in range(3)]
        text = CONF.format(host=socket.gethostname(), folder=folder, ports=ports)
        (folder / "slurm.conf").write_text(text)
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        self.daemons = {}

    def boot(self):
        folder = self.folder
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        files.append(f"--socket={folder}/munge.socket")
        self.start("munged", "--foreground", "--force", *files)
        wait_for(lambda: (folder / "munge.socket").exists())
        self.start("slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"])

    def start(self, name, *command):
        output = (self.folder / f"{name}.out").open("w")
        self.daemons[name] = subprocess.Popen(
            [shutil.which(name.split()[0], path=PATH), *command],
            env=os.environ | self.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def start_node(self, node):
        self.start(f"slurmd {node}", "-D", "-N", node)

    def run(self, *command):
        """Run a command of SLURM's and return what it has printed."""
        how = {"capture_output": True, "text": True}
        return subprocess.run(command, env=os.environ | self.environment, **how).stdout

    def processes(self):
        """Return the cluster's processes: daemons, srun, tasks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
        return found

    def steps(self, node=""):
        """Return what has started the tasks on a node, or on both, and the tasks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() != "slurmstepd":
                    continue
                places = [place.laddr for place in process.net_connections("unix")]
                if any(place.startswith(f"{self.folder}/spool.{node}") for place in places):
                    found += [process, *process.children(recursive=True)]
        return found

    def kill_node(self, node):
        """End a node and its tasks at once, as a loss of power would, and have that noticed."""
        daemon = self.daemons.pop(f"slurmd {node}")
        daemon.kill()
        daemon.wait()
        kill(self.steps(node))
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=dead")

    def jobs(self):
        """Return the jobs that have not ended, as JOB|NAME|STATE, also those that are about to."""
        return self.run("squeue", "-h", "-o", "%i|%j|%T").split()

    def stop(self):
        """End all processes of the cluster, those of jobs, too."""
        for _ in range(2):  # the second time what they have started meanwhile
            kill([*self.steps(), *self.processes()])
        for daemon in self.daemons.values():
            daemon.wait()
