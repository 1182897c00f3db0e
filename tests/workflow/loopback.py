"""A real Slurm and a real SSH server on this machine's loopback interface, for tests that ask for them.

Daemons are started by hand, not by systemd, keep their files in a folder of their own and are stopped by their ids.
Slurm's programs find their configuration in one place only, so a machine with a Slurm of its own is refused.
"""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .conftest import wait_for

CONFIGURATION = Path("/etc/slurm")
MARK = "# Written by forgetrace's tests, removed at their end.\n"
SLURM = """\
ClusterName=forgetrace
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
DefMemPerCPU=1000
MinJobAge=3600
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=64000 Gres=gpu:2 State=UNKNOWN
PartitionName=cpu Nodes=localhost Default=YES State=UP
PartitionName=gpu Nodes=localhost State=UP
"""
GRES = "NodeName=localhost Name=gpu File=/dev/null\nNodeName=localhost Name=gpu File=/dev/zero\n"  # stand for two GPUs
SSHD = """\
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
UsePAM no
StrictModes no
Subsystem sftp internal-sftp
"""


class Refused(Exception):
    """Why no server was started."""


def refuse_unless_ready(*programs: str) -> None:
    """Slurm's daemons change users and write to /etc; a test without them would prove nothing."""
    if os.geteuid() != 0:
        raise Refused("only root can start these servers")
    if missing := [program for program in programs if not shutil.which(program)]:
        raise Refused(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge openssh-server")


@contextmanager
def folder_of_servers() -> Iterator[Path]:
    """A folder that munged trusts: no other user may write to it, every user may enter it."""
    folder = Path(tempfile.mkdtemp(prefix="forgetrace-", dir="/run"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def daemon(*command: str | Path) -> Iterator[subprocess.Popen]:
    """A server in the foreground of a process of ours, ended with the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def slurm() -> Iterator[None]:
    """A cluster of one node with the partitions cpu and gpu; what still runs at the end is cancelled.

    Raises:
        Refused: this machine has a Slurm of its own, lacks the programs, or we are not root.
    """
    refuse_unless_ready("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
    for file in (CONFIGURATION / "slurm.conf", CONFIGURATION / "gres.conf"):
        if file.exists() and file.read_text(encoding="utf-8").startswith(MARK):
            raise Refused(f"{file} is of a test that runs, or was killed: then end its daemons and delete the file")
        if file.exists():
            raise Refused(f"{file} is not ours: this machine has a Slurm of its own")
    with ExitStack() as stack:
        folder = stack.enter_context(folder_of_servers())
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        CONFIGURATION.mkdir(exist_ok=True)
        for name, content in (("gres.conf", GRES), ("slurm.conf", SLURM.format(folder=folder))):
            stack.callback((CONFIGURATION / name).unlink)
            (CONFIGURATION / name).write_text(MARK + content, encoding="utf-8")
        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        stack.enter_context(daemon("munged", "--foreground", f"--socket={folder}/munge.socket", *munge))
        wait_for((folder / "munge.socket").exists, 20)
        stack.enter_context(daemon("slurmctld", "-D", "-i"))
        stack.enter_context(daemon("slurmd", "-D", "-N", "localhost"))
        wait_for(lambda: "idle" in printed("sinfo", "--noheader", "--format=%t"), 60)
        stack.callback(cancel_all)
        yield


def printed(*command: str) -> str:
    """What one of Slurm's own commands prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def cancel_all() -> None:
    """Cancel every job of our cluster and wait until none is left."""
    subprocess.run(["scancel", "--user", getpass.getuser()], timeout=60)
    wait_for(lambda: not printed("squeue", "--noheader"), 60)


def queue() -> str:
    return printed("squeue", "--noheader", "--format=%i %P %T %k")


@contextmanager
def ssh(home: Path) -> Iterator[str]:
    """An SSH server that the user whose home folder this is reaches by the name it yields.

    Raises:
        Refused: there is no sshd or no ssh-keygen, or we are not root.
    """
    refuse_unless_ready("sshd", "ssh-keygen")
    with folder_of_servers() as folder, ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = home / ".ssh"
        own.mkdir(mode=0o700)
        for key in (folder / "host_key", own / "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        host = (folder / "host_key.pub").read_text(encoding="utf-8")
        (own / "known_hosts").write_text(f"[127.0.0.1]:{port} {host}", encoding="utf-8")
        (own / "config").write_text(
            f"Host store\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {own}/key\n"
        )
        shutil.copy(own / "key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(SSHD.format(folder=folder, port=port), encoding="utf-8")
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's empty folder, which its service makes otherwise
        stack.enter_context(daemon(shutil.which("sshd"), "-D", "-f", folder / "sshd_config"))
        wait_for(lambda: listens(port), 20)
        yield "store"


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
