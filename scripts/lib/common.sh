# Sourced by the scripts: where things are, how they speak, how they clean up.
# Standard output belongs to a script's result; everything said here goes to standard error.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${WINNOW_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/winnow}
# Debian's own Python: the one that its python3-numpy belongs to.
PYTHON=/usr/bin/python3
NAME=$(basename "$0")

say() { printf '%s\n' "$*" >&2; }

# One sentence that names the cause, then exit 1.
die() {
  say "$NAME: $*"
  exit 1
}

# A line that is rewritten on a terminal, and printed every tenth of the way elsewhere.
# progress LABEL DONE TOTAL
progress_last=
progress() {
  local percent=$(($3 > 0 ? 100 * $2 / $3 : 100))
  if [ -t 2 ]; then
    local filled=$((percent * 30 / 100))
    printf '\r\033[K%s [%-30s] %3d %%' "$1" "$(printf '%*s' "$filled" '' | tr ' ' '#')" "$percent" >&2
  elif [ "$progress_last" != "$1 $((percent / 10))" ]; then
    progress_last="$1 $((percent / 10))"
    say "$1: $percent %"
  fi
}
progress_end() { if [ -t 2 ]; then printf '\r\033[K' >&2; fi; }

# Commands to run when the script ends, however it ends, latest first.
cleanups=()
at_exit() { cleanups=("$1" "${cleanups[@]}"); }
run_cleanups() {
  local code=$? command
  trap '' INT TERM
  for command in "${cleanups[@]}"; do eval "$command" || true; done
  return "$code"
}
trap run_cleanups EXIT
trap 'progress_end; exit 130' INT
trap 'progress_end; exit 143' TERM HUP

# A directory of this run that vanishes with it.
TEMP=$(mktemp -d "${TMPDIR:-/tmp}/winnow.XXXXXX") || die "cannot make a directory in ${TMPDIR:-/tmp}: is the disk full?"
at_exit 'rm -rf "$TEMP"'

# need_space DIR MIB WHAT
need_space() {
  local dir=$1 free
  while [ ! -e "$dir" ]; do dir=$(dirname "$dir"); done
  free=$(df -Pm "$dir" | awk 'NR == 2 {print $4}')
  [ "$free" -ge "$2" ] || die "no space: $dir has $free MiB free, $3 needs $2 MiB"
}

# why LOG: the cause of a failed download or installation, as a sentence's end.
why() {
  if grep -qiE 'no space left|enough free space|disk quota' "$1"; then
    echo "no space left on the disk"
  elif grep -qiE 'could not resolve|name resolution|temporary failure|connection (refused|timed out|reset|broken)|network is unreachable|unable to connect|cannot initiate the connection|could not connect|proxyerror|max retries|read timed out|connecttimeout|failed to establish' "$1"; then
    echo "no network, or the package server does not answer"
  elif grep -q 'No matching distribution' "$1"; then
    echo "no network, or the package server does not have it"
  else
    grep -iE '^(E:|ERROR|.*error:)' "$1" | tail -n 1 | cut -c1-300 || true
  fi
}
