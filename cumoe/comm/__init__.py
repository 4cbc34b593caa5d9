"""Several GPUs: process groups, peer memory, and fused all-reduces on it."""

from cumoe.comm.group import CheckedGroup, Group, GroupError, SingleGroup, check_same
from cumoe.comm.jax_group import JaxGroup
from cumoe.comm.rendezvous import TcpGroup, connect_tcp
from cumoe.comm.threads import ThreadGroup, run_ranks
from cumoe.comm.workspace import Workspace, WorkspaceError

__all__ = [
    "CheckedGroup",
    "Group",
    "GroupError",
    "JaxGroup",
    "SingleGroup",
    "TcpGroup",
    "ThreadGroup",
    "Workspace",
    "WorkspaceError",
    "check_same",
    "connect_tcp",
    "run_ranks",
]
