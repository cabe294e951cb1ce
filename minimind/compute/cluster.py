"""The same command started several times by Slurm or SkyPilot: their variables as torchrun's."""

import os
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from minimind.errors import UserError


@dataclass(frozen=True)
class Place:
    """One process's place among those that a cluster has started with the same command."""

    rank: int
    world: int
    local_rank: int  # on its machine
    address: str  # of the machine of rank 0
    job: str  # what has a name of its own where another job runs on the same machine
    num_gpus: int = 1  # this process's own

    def torchruns_variables(self, num_processes: int) -> dict[str, str]:
        """For this process as one that trains, or as torchrun that starts several."""
        port = str(20_000 + zlib.crc32(self.job.encode()) % 10_000)  # below those given at random
        rank, world, address = str(self.rank), str(self.world), self.address
        if num_processes > 1:
            variables = {"NNODES": world, "NODE_RANK": rank, "RDZV_BACKEND": "static"}
            variables |= {"MASTER_ADDR": address, "MASTER_PORT": port, "STANDALONE": "0"}
            return {f"PET_{name}": value for name, value in variables.items()}
        meeting = {"MASTER_ADDR": address, "MASTER_PORT": port}
        return {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": str(self.local_rank), **meeting}


def place_in_cluster(variables: Mapping[str, str] = os.environ) -> Place | None:
    """By the variables of `srun` or of a SkyPilot task; None for a process by itself.

    A shell within a Slurm job has SLURM_NTASKS too: only what srun has started is in a step.

    Raises:
        UserError: Slurm's list of machines cannot be read.
    """
    if "RANK" in variables or "PET_NNODES" in variables:  # torchrun's own come first
        return None
    if (tasks := int(variables.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
        return Place(
            int(variables["SLURM_PROCID"]),
            tasks,
            # By this option each task sees the GPUs that are its own.
            0 if "SLURM_GPUS_PER_TASK" in variables else int(variables["SLURM_LOCALID"]),
            _first_host(variables["SLURM_STEP_NODELIST"]),
            f"{variables['SLURM_JOB_ID']}.{variables['SLURM_STEP_ID']}",
        )
    addresses = variables.get("SKYPILOT_NODE_IPS", "").split()
    num_gpus = int(variables.get("SKYPILOT_NUM_GPUS_PER_NODE") or 0)
    if len(addresses) > 1 or num_gpus > 1:
        rank = int(variables.get("SKYPILOT_NODE_RANK", 0))
        job = variables.get("SKYPILOT_TASK_ID", "")
        return Place(rank, len(addresses), 0, addresses[0], job, max(1, num_gpus))
    return None


def _first_host(hosts: str) -> str:
    """Of Slurm's short way to write them: gpu[3-5,9]."""
    if not {"[", ","} & {*hosts}:
        return hosts
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"SLURM_STEP_NODELIST is {hosts!r}, and `scontrol show hostnames` does not say which "
            f"machines these are: {error}; put scontrol on the PATH of this machine."
        ) from None
