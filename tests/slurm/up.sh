#!/bin/bash
# A SLURM of one node on this machine, for tests: `up.sh DIR` starts it under DIR and prints what to export.
# Needs root and the packages slurmctld, slurmd, slurm-client and munge (Debian 12, SLURM 22.05; not tried elsewhere).
# DIR must be within reach of the user munge, which a mode-700 temporary folder is not.
set -euo pipefail
mkdir -p "$1"
DIR=$(realpath "$1")
NODE=$(hostname -s)
mkdir -p "$DIR"/{state,spool,log}
chmod 755 "$DIR"
install -d -o munge -g munge -m 755 "$DIR/munge"
[ -f "$DIR/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key" && chown munge:munge "$DIR/munge/key")

cat >"$DIR/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$NODE(127.0.0.1)
SlurmctldPort=${SLURM_TEST_PORT:-16827}
SlurmdPort=$((${SLURM_TEST_PORT:-16827} + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.log
# No control groups, no accounting: what a container has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdParameters=config_overrides
# At least two, so that jobs of two tasks run anywhere.
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(($(nproc) > 2 ? $(nproc) : 2)) RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

export SLURM_CONF="$DIR/slurm.conf"
setpriv --reuid munge --regid munge --clear-groups munged --force --key-file="$DIR/munge/key" \
  --socket="$DIR/munge/socket" --pid-file="$DIR/munge/munged.pid" --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed"
slurmctld -c
slurmd -N "$NODE"
for _ in $(seq 60); do
  if sinfo --noheader --format %T 2>/dev/null | grep -q idle; then
    echo "export SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 0.5
done
tail -n 20 "$DIR"/log/*.log >&2
exit 1
