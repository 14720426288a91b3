# Builds a CMake preset, incrementally and quietly: progress only, the whole log on failure.

# build PRESET [TARGET...]
build() {
  local preset=$1 dir=$ROOT/build/$1 log=$ROOT/build/$1.log jobs
  shift
  if [ ! -e "$dir/build.ninja" ]; then
    mkdir -p "$ROOT/build" 2> /dev/null || die "cannot write to $ROOT/build"
    need_space "$ROOT/build" "${BUILD_MIB:-1500}" "the build"
    (cd "$ROOT" && cmake --preset "$preset") > "$log" 2>&1 || {
      cat "$log" >&2
      rm -rf "$dir/CMakeCache.txt" "$dir/build.ninja"
      die "configuring build/$preset failed (the log is above)"
    }
  fi
  # A compiler on a gRPC file takes up to a gigabyte.
  jobs=$(awk '/^MemAvailable/ {print int($2 / 1000000)}' /proc/meminfo)
  [ "$jobs" -le "$(nproc)" ] || jobs=$(nproc)
  [ "$jobs" -ge 1 ] || jobs=1
  local status=0
  NINJA_STATUS='[%f/%t] ' ninja -C "$dir" -j "$jobs" "$@" 2>&1 | tee "$log" | build_progress "building $preset" || status=$?
  progress_end
  [ "$status" = 0 ] || {
    sed -n '/^FAILED/,$p' "$log" | head -n 200 >&2
    if grep -q 'No space left on device' "$log"; then die "building build/$preset failed: no space left on the disk"; fi
    die "building build/$preset failed (the whole log: build/$preset.log)"
  }
}

build_progress() {
  local line
  while IFS= read -r line; do
    if [[ $line =~ ^\[([0-9]+)/([0-9]+)\] ]]; then
      progress "$1" "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    fi
  done
}
