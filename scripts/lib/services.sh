# Router, prefill worker and decode worker on loopback, as children of the script.

BIN=$ROOT/build/release/bin
SERVICES=()

# start_service NAME BINARY FLAGS...: in the background; its log is $LOGS/NAME.log.
# It gets SIGTERM if the script dies without saying good-bye, and no Ctrl-C of its own.
start_service() {
  local name=$1
  shift
  # Made here, so that wait_ready finds them before the child has run.
  : > "$LOGS/$name.out"
  : > "$LOGS/$name.log"
  setsid setpriv --pdeathsig TERM -- "$@" > "$LOGS/$name.out" 2> "$LOGS/$name.log" < /dev/null &
  SERVICES+=("$name:$!")
}

# wait_ready NAME SECONDS: sets ADDRESS to the HOST:PORT that the service printed.
wait_ready() {
  local name=$1 deadline=$((SECONDS + $2)) pid=
  local service
  for service in "${SERVICES[@]}"; do
    case $service in "$name":*) pid=${service#*:} ;; esac
  done
  while true; do
    ADDRESS=$(awk '$1 == "ready" {print $2; exit}' "$LOGS/$name.out")
    [ -z "$ADDRESS" ] || return 0
    kill -0 "$pid" 2> /dev/null || service_failed "$name" "ended at once"
    [ "$SECONDS" -lt "$deadline" ] || service_failed "$name" "was not ready after $2 s"
    sleep 0.05
  done
}

# The last lines of a service's log, its own error last, and out.
service_failed() {
  say "--- the log of $1, last lines"
  tail -n 15 "$LOGS/$1.log" >&2
  say "---"
  die "$1 $2: $(grep '^winnow' "$LOGS/$1.log" | tail -n 1 || true)"
}

stop_services() {
  local service pid pids=()
  for service in "${SERVICES[@]}"; do pids+=("${service#*:}"); done
  SERVICES=()
  [ ${#pids[@]} -gt 0 ] || return 0
  kill -TERM "${pids[@]}" 2> /dev/null || true
  local deadline=$((SECONDS + 10))
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2> /dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.05; done
    kill -KILL "$pid" 2> /dev/null || true
    wait "$pid" 2> /dev/null || true
  done
}
