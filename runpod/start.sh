#!/usr/bin/env bash
# The command of a pod: wait for the job, install emogen, train, stop the pod.
#
# `emogen pod launch` puts this file into the request that creates the pod, so the time limits hold before anything has
# been sent. Runpod restarts a pod whose command ends, and charges for it. Therefore this script never ends by itself:
# it stops its pod, then sleeps. After a restart it resumes from the newest checkpoint, in three attempts at most; it
# does nothing if the job is done or has failed.
#
# EMOGEN_POD        name of the pod, <job>-<epoch seconds>
# EMOGEN_DEADLINE   when training has to end, in epoch seconds
# EMOGEN_WORKSPACE  where the volume is mounted; default /workspace
# EMOGEN_PYTHON     a Python interpreter with emogen; by default emogen is installed on top of the image's torch
# EMOGEN_WAIT       seconds to wait for the job; default 1800
# EMOGEN_GRACE      seconds to wait after the job, so that its run can be fetched; default 600
# RUNPOD_POD_ID, RUNPOD_API_KEY, RUNPOD_API_URL   the pod to stop, the key, the address of the API
set -euo pipefail

: "${EMOGEN_POD:?}" "${EMOGEN_DEADLINE:?}" "${RUNPOD_POD_ID:?}" "${RUNPOD_API_KEY:?}"
workspace=${EMOGEN_WORKSPACE:-/workspace}
job=$workspace/emogen/${EMOGEN_POD%-*}
failed=$job/failed.$EMOGEN_POD
attempts=$job/attempts.$EMOGEN_POD
export HF_HOME=${HF_HOME:-$workspace/huggingface}

say() { echo "[emogen] $*"; }

fail() {
    echo "$*" >"$failed"
    exit 1
}

stop_pod() { # the key goes through standard input, because every process can read arguments
    local status
    status=$(printf 'header = "Authorization: Bearer %s"\n' "$RUNPOD_API_KEY" |
        curl --config - --silent --show-error --max-time 60 --output /dev/null --write-out '%{http_code}' \
            --header 'Content-Type: application/json' --data '{"action": "stop"}' \
            "${RUNPOD_API_URL:-https://api.runpod.io}/v2/pods/$RUNPOD_POD_ID/action") || return 1
    [[ $status == 2?? || $status == 404 || $status == 409 ]] # 409: the pod is stopping already
}

end() {
    trap - EXIT
    set +e
    if [[ -e $job/done ]]; then
        say "ended: done"
    else
        say "ended: failed: $(cat "$failed" 2>/dev/null || echo 'interrupted')"
    fi
    sleep "${EMOGEN_GRACE:-600}" # `emogen pod launch --follow` fetches the run now, and terminates the pod
    say "stopping the pod"
    until stop_pod; do
        say "the pod could not be stopped; trying again in one minute"
        sleep 60
    done
    while true; do sleep 3600; done
}
trap end EXIT

seconds_left() {
    local left=$((EMOGEN_DEADLINE - $(date +%s)))
    ((left > 0)) || fail "time limit reached"
    echo "$left"
}

wait_for_job() {
    until [[ -e $job/ready.$EMOGEN_POD ]]; do
        ((SECONDS < ${EMOGEN_WAIT:-1800})) || fail "no job arrived"
        sleep 1
    done
}

install_emogen() {
    python=${EMOGEN_PYTHON:-/opt/emogen/bin/python}
    [[ -z ${EMOGEN_PYTHON:-} ]] || return 0
    say "installing emogen"
    local left
    left=$(seconds_left)
    python3 -m venv --system-site-packages /opt/emogen # on the container's disk: volumes are slow with small files
    grep -vE '^(torch|triton)==' "$job/code/constraints.txt" >/opt/emogen/constraints.txt # the image has these
    env -u RUNPOD_API_KEY timeout "$left" "$python" -m pip install --quiet --progress-bar off --disable-pip-version-check \
        --constraint /opt/emogen/constraints.txt --editable "$job/code" || fail "pip could not install emogen"
}

train() {
    local left code=0
    left=$(seconds_left)
    cd "$job/job"
    local overrides=() # what the command line of the launch said, and no file may say
    [[ ! -e overrides ]] || mapfile -t overrides <overrides
    say "training for at most $left seconds"
    env -u RUNPOD_API_KEY timeout --kill-after=60 "$left" "$python" -m accelerate.commands.launch \
        --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        "$job/code/emogen/train.py" ./*.yaml output_dir="$job/run" resume_from_checkpoint=true \
        ${overrides[@]+"${overrides[@]}"} || code=$?
    case $code in
        0) date -u +%FT%TZ >"$job/done" ;;
        124 | 137) fail "time limit reached, or out of memory (exit code $code)" ;;
        *) fail "training ended with exit code $code" ;;
    esac
}

mkdir -p "$job"
if [[ -x /start.sh && -n ${PUBLIC_KEY:-} ]]; then
    /start.sh & # the start script of the image; it starts sshd
fi
[[ ! -e $job/done && ! -e $failed ]] || exit 0
wait_for_job
attempt=$(($(cat "$attempts" 2>/dev/null || echo 0) + 1))
((attempt <= 3)) || fail "interrupted three times"
echo "$attempt" >"$attempts"
install_emogen
train
