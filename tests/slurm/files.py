"""The files that the daemons of a private Slurm read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.hosts import Host

GPUS_PER_NODE = 2
ACCOUNT = "lab"  # the account of the user

# Nodes look as large as those of a cluster, so that scripts may ask for what they would ask there. Jobs of `urgent`
# pre-empt those of `main`.
SLURM = """\
ClusterName=tests
SlurmctldHost={controller.name}({controller.address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
BatchStartTimeout=60
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdSpoolDir={folder}/run/%n
SlurmdLogFile={folder}/log/%n
SlurmdPidFile={folder}/run/%n.pid
SlurmctldDebug=info
SlurmdDebug=info
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={lost_after_s}
KillWait=5
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes=ALL MaxTime=2-00:00:00 DefaultTime=5 State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent PriorityTier=10 PreemptMode=OFF MaxTime=30
"""
NODE = "NodeName={host.name} NodeHostname={hostname} NodeAddr={host.address} Port={port} CPUs=64 RealMemory=2000000 \
Gres=gpu:{gpus} State=UNKNOWN\n"
# A job of an account that does not exist is refused.
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={controller.address}
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/munge.sock
AccountingStorageEnforce=associations
"""
DATABASE_DAEMON = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost={controller.name}
DbdAddr={controller.address}
DbdPort={ports[1]}
SlurmUser=root
LogFile={folder}/log/slurmdbd
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[2]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


@dataclass(frozen=True)
class Plan:
    """A cluster as it is to be: the controller's host and the nodes'; `ports` of slurmctld, slurmdbd, the database and
    every slurmd; a node that does not answer for `lost_after_s` seconds is lost.
    """

    folder: Path
    hosts: list[Host]
    ports: list[int]
    accounting: bool
    lost_after_s: int

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def write(self) -> None:
        """Folders, key and configuration."""
        for name in ("log", "run", "state"):
            (self.folder / name).mkdir()
        self._private("munge.key", os.urandom(128))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gpus = [self.folder / f"gpu{i}" for i in range(GPUS_PER_NODE)]
        for gpu in gpus:
            os.mknod(gpu, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        lines = [f"Name=gpu File={gpu}\n" for gpu in gpus]
        (self.folder / "gres.conf").write_text("".join(lines))
        self.conf.write_text(self._slurm())
        if self.accounting:
            self._private("slurmdbd.conf", self._filled(DATABASE_DAEMON).encode())

    def _slurm(self) -> str:
        controller, *nodes = self.hosts
        text = self._filled(SLURM) + (self._filled(ACCOUNTING) if self.accounting else "")
        for host, port in zip(nodes, self.ports[3:], strict=True):
            hostname = host.name if host.holder else controller.name
            text += NODE.format(host=host, hostname=hostname, port=port, gpus=GPUS_PER_NODE)
        return text

    def _filled(self, text: str) -> str:
        return text.format(
            controller=self.hosts[0], ports=self.ports, folder=self.folder, lost_after_s=self.lost_after_s
        )

    def _private(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)
