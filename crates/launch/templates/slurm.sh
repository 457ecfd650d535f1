#!/usr/bin/env bash
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
{%- if gpus %}
#SBATCH --gpus-per-node={{ gpus }}
{%- endif %}
{%- if cpus %}
#SBATCH --cpus-per-task={{ cpus }}
{%- endif %}
{%- if memory %}
#SBATCH --mem={{ memory }}
{%- endif %}
{%- if time %}
#SBATCH --time={{ time }}
{%- endif %}
{%- if array %}
#SBATCH --array={{ array }}
{%- endif %}
{%- for line in lines %}
#SBATCH {{ line }}
{%- endfor %}
#SBATCH --output={{ folder|line }}/slurm-{{ "%A_%a" if array else "%j" }}.out
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --{{ "requeue" if requeue else "no-requeue" }}
#SBATCH --signal=B:TERM@{{ grace }}
#
# Written by `shanty render --engine slurm`.
# Slurm sends this script SIGTERM {{ grace }} s before the time limit, and before it takes the nodes away; `scancel --signal=TERM --batch` does
# the same. Workers then hand back what they hold, and the last one writes a checkpoint{{ "; after that the job is requeued and goes on there" if requeue else "" }}.
# Ends with 0 where the job succeeded, 1 where it failed, 93 where a user cancelled it (never requeued), 130 where it was asked to
# end: submitted again, it goes on from its checkpoint.
set -uo pipefail

shanty=({{ command }})
folder={{ folder|sh }}
{%- if array %}
task=$SLURM_ARRAY_TASK_ID
folder=$folder/$task
{%- endif %}
requeue={{ "yes" if requeue else "no" }}
host=$(hostname)
mkdir -p "$folder"
asked=

say() { echo "$(date +%H:%M:%S) $*"; }
ended() { ! kill -0 "$1" 2>/dev/null; }
# A signal that is trapped ends `wait`, not the process that is waited for.
wait_for() { until ended "$1"; do wait "$1"; done; wait "$1"; }
# Steps alone: whoever is in this script goes on.
drain_steps() { scancel --signal=TERM "$SLURM_JOB_ID"; }
workers=
trap 'asked=yes; say "asked to end: workers hand back what they hold"; [ -n "$workers" ] && drain_steps' TERM USR1
{% if outside %}
# The coordinator is outside this allocation. {{ "SHANTY_TOKEN, " if not token_file else "" }}the base model and the store must be known on every node.
export SHANTY_COORDINATOR={{ outside|sh }}
{%- if ca %}
export SHANTY_CA={{ ca|sh }}
{%- endif %}
{%- if token_file %}
export SHANTY_TOKEN_FILE={{ token_file|sh }}
{%- endif %}
{%- if cert %}
export SHANTY_CERT={{ cert|sh }} SHANTY_KEY={{ key|sh }}
{%- endif %}
{% else %}
# The coordinator runs here, on the first node. It listens on the cluster's network, so it has a certificate and asks everybody for one:
# an authority of this job's own lies in its folder, which is on a file system that all nodes share.
port=$((10000 + SLURM_JOB_ID % 20000))
certs=$folder/certs
[ -f "$certs/ca.pem" ] || "${shanty[@]}" certs init --dir "$certs" --name {{ name|sh }} >/dev/null || exit 1
issue() { [ -f "$certs/$1.pem" ] || "${shanty[@]}" certs issue "$1" --dir "$certs" "${@:2}" >/dev/null || exit 1; }
issue "head-$host" --role coordinator --host "$host"
issue worker --role worker
issue user --role admin
# For a look from elsewhere: . FILE; shanty status {{ name }} --watch
cat > "$folder/environment" <<END
export SHANTY_COORDINATOR=https://$host:$port SHANTY_CA='$certs/ca.pem' SHANTY_CERT='$certs/user.pem' SHANTY_KEY='$certs/user.key'
END
. "$folder/environment"

serve() {
  "${shanty[@]}" coordinator --listen "0.0.0.0:$port" --state-dir "$folder/coordinator" --cert "$certs/head-$host.pem" \
    --key "$certs/head-$host.key" --ca "$certs/ca.pem" --revoked "$certs/revoked.pem" &
  coordinator=$!
}
serve
trap 'kill -TERM "$coordinator" 2>/dev/null; wait "$coordinator"' EXIT
until "${shanty[@]}" health >/dev/null 2>&1; do
  ended "$coordinator" && { say "the coordinator does not start"; exit 1; }
  sleep 0.2
done
# The same id each time: a job that was requeued, or submitted again, goes on.
job=$("${shanty[@]}" submit {{ job|sh }} --request-id slurm{% for set in sets %} --set {{ set }}{% endfor %}{% if store_of_task %} --set {{ store_of_task }}{% endif %}) || exit $?
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
  # Submitted again by hand after a failure or a cancellation: the next attempt.
  case $("${shanty[@]}" status "$job" --output json | sed -n 's/.*"state":"\([a-z]*\)".*/\1/p') in
    failed | cancelled) "${shanty[@]}" resume "$job" --detach || exit $? ;;
  esac
fi
say "job $job, attempt of Slurm's ${SLURM_RESTART_COUNT:-0}, coordinator $SHANTY_COORDINATOR"
{% endif %}
go_on_later() {
{%- if not outside %}
  kill -TERM "$coordinator" 2>/dev/null && wait_for "$coordinator"
{%- endif %}
  if [ $requeue = yes ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --states=all --format=%T)" = RUNNING ]; then
    say "requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
  exit 130
}
[ -n "$asked" ] && go_on_later

# A worker that dies takes no other with it; the crew goes on.
{% if not outside %}SHANTY_CERT=$certs/worker.pem SHANTY_KEY=$certs/worker.key \
  {% endif %}srun --ntasks-per-node=1 --kill-on-bad-exit=0 --no-kill{% for flag in srun %} {{ flag|sh }}{% endfor %} {{ worker_command }} worker{% for flag in worker %} {{ flag|sh }}{% endfor %} &
workers=$!
# Asked while the step began: nobody was there yet to hear of it.
[ -n "$asked" ] && { sleep 5; drain_steps; }
{% if outside %}
until [ -n "$asked" ] || ended "$workers"; do wait "$workers"; done
wait_for "$workers"
code=$?
finished=no
[ -z "$asked" ] && exit $code
{% else %}
"${shanty[@]}" status "$job" --watch &
watch=$!
until [ -n "$asked" ] || ended "$watch" || ended "$workers"; do
  if ended "$coordinator"; then
    say "the coordinator ended; it is started again"
    sleep 1
    serve
  fi
  wait -n "$watch" "$workers" "$coordinator"
done
finished=no
if [ -z "$asked" ] && ended "$workers" && ! ended "$watch"; then
  say "no worker is left"
  kill -TERM "$watch"
  exit 1
fi
if ended "$watch"; then
  wait "$watch"
  code=$?
  finished=yes
  # Its workers have nothing to do any more.
  drain_steps
fi
wait_for "$workers"
[ $finished = yes ] && { say "job $job is over: $code"; exit $code; }
kill -INT "$watch" 2>/dev/null
{% endif %}
go_on_later
