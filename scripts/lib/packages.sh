# Debian packages: only what is missing is installed, and nothing is asked of the network
# when nothing is missing.

BUILD_PACKAGES=(g++ cmake ninja-build ccache pkg-config
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev
  libhwy-dev prometheus-cpp-dev libcpp-httplib-dev libssl-dev nlohmann-json3-dev
  libpcre2-dev libutf8proc-dev)
MODEL_PACKAGES=(python3 python3-numpy python3-pip ca-certificates)
TEST_PACKAGES=(libgtest-dev libgmock-dev clang-format-14)

# Reads apt's status lines: "dlstatus:N:PERCENT:..." while loading, then "pmstatus:...".
apt_progress() {
  local kind percent
  while IFS=: read -r kind _ percent _; do
    percent=${percent%.*}
    case $kind in
      dlstatus) progress "  downloading packages" "${percent:-0}" 100 ;;
      pmstatus) progress "  installing packages" "${percent:-0}" 100 ;;
    esac
  done
}

# ensure_packages NAME...
ensure_packages() {
  command -v dpkg-query > /dev/null || {
    say "$NAME: this is no Debian; the build needs what these packages hold: $*"
    return 0
  }
  local missing=() package log=$TEMP/apt.log sudo=()
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2> /dev/null || die "Debian packages are missing; install them as root: apt-get install --no-install-recommends ${missing[*]}"
    sudo=(sudo -n)
  fi
  say "installing ${#missing[@]} Debian packages and what they need: ${missing[*]}"
  need_space /usr 1000 "the packages"
  export DEBIAN_FRONTEND=noninteractive
  "${sudo[@]}" apt-get -q -o DPkg::Lock::Timeout=300 update > "$log" 2>&1 || true
  # APT::Status-Fd=3 carries the progress; everything else goes to the log.
  if ! { "${sudo[@]}" apt-get -y -q -o DPkg::Lock::Timeout=300 -o APT::Status-Fd=1 install \
      --no-install-recommends "${missing[@]}" 2>> "$log" | tee -a "$log" | apt_progress; }; then
    progress_end
    die "the Debian packages could not be installed: $(why "$log")"
  fi
  progress_end
}
