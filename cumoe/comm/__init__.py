"""Several GPUs: process groups, peer memory, and fused all-reduces on it."""

from cumoe.comm.allreduce import AllReduced, allreduce, finalize_allreduce, reduce_allreduce
from cumoe.comm.epilogue import Epilogue, Quantization
from cumoe.comm.group import CheckedGroup, Group, GroupError, SingleGroup, check_same
from cumoe.comm.jax_group import JaxGroup
from cumoe.comm.rendezvous import TcpGroup, connect_tcp
from cumoe.comm.threads import ThreadGroup, run_ranks
from cumoe.comm.workspace import Workspace, WorkspaceError

__all__ = [
    "AllReduced",
    "CheckedGroup",
    "Epilogue",
    "Group",
    "GroupError",
    "JaxGroup",
    "Quantization",
    "SingleGroup",
    "TcpGroup",
    "ThreadGroup",
    "Workspace",
    "WorkspaceError",
    "allreduce",
    "check_same",
    "connect_tcp",
    "finalize_allreduce",
    "reduce_allreduce",
    "run_ranks",
]
