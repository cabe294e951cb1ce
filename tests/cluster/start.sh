#!/bin/sh
# A Slurm of this machine and user alone, until standard input ends:
#   tests/cluster/start.sh FOLDER PORT PORT
# Prints "ready" when it takes jobs, "broken" where it does not within a minute; SLURM_CONF=FOLDER/slurm.conf is how to speak to it.
set -eu
folder=$(realpath "$1")
host=$(hostname -s)
pids=
trap 'kill $pids 2>/dev/null; wait' EXIT
trap 'exit 1' INT TERM HUP

chmod 755 "$folder"
mkdir -p "$folder/state" "$folder/spool"
dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 2>/dev/null
chmod 600 "$folder/munge.key"
cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=20
SlurmctldPort=$2
SlurmdPort=$3
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=60
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES
CONF
export SLURM_CONF="$folder/slurm.conf"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munge.seed" --log-file="$folder/munged.log" &
pids="$pids $!"
slurmctld -D -c &
pids="$pids $!"
slurmd -D -N "$host" &
pids="$pids $!"
said=broken
for _ in $(seq 60); do
    if srun --immediate=5 true 2>/dev/null; then said=ready; break; fi
    sleep 1
done
echo $said
cat > /dev/null
scancel --signal=KILL --full --user="$(id -un)" # jobs that a failed test has left would run on
scancel --user="$(id -un)"
sleep 1
