#!/bin/bash
# Goes on with a run on the machines of a hostfile until it is done, where no queue does that: again.sh HOSTFILE [options of sami_fast/train.py]

hostfile=$1
shift
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ConnectTimeout=10"    # to a machine that is gone, a connection ends

for attempt in $(seq 100); do
    deepspeed -q --hostfile "$hostfile" sami_fast/train.py "$@" --resume
    status=$?
    [ $status = 0 ] || [ $status = 2 ] && break         # done, or a mistake in the command
    sleep "${PAUSE:-60}"
done
exit $status
