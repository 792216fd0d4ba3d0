#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA card, in one go.
#
#   bench/gpu_check.sh                        what ends within 8 minutes: build tests memory ops logits serve faults soak
#   bench/gpu_check.sh sanitize ptx80 soak    the named parts, in this order
#   bench/gpu_check.sh whole models           other models: tiny ones against transformers, real shapes served
#   bench/gpu_check.sh adapters               what LoRA adapters cost a server
#   bench/gpu_check.sh peers ranks            on several cards: sums over them; two of them share a model
#
# Every part has a time limit and a log of its own; one that fails does not stop the next, and the
# exit code is the number of parts that failed. A line of a log that begins with "= " is a figure:
# the last lines of the output are a table of the parts, the tests that failed, and those figures.
#
#   OUT                    where summary.txt and logs.tgz (logs, junit files, JSON) are left
#                          (default: a new temporary folder)
#   PYSERVE_CHECK_DIR      models and compiled code, kept for the next run (default: in TMPDIR)
#   PYSERVE_CHECK_LIMIT_S  seconds for all parts together (default 470)
#   SOAK_S                 seconds of mixed load (default 30; 180 where soak is asked for by name)
#   PYTHON                 interpreter that holds torch (default python3)
set -u -o pipefail

self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "$self")/.." || exit 1
export PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYSERVE_CHECK_DIR=${PYSERVE_CHECK_DIR:-${TMPDIR:-/tmp}/pyserve-gpu-check}
export OUT=${OUT:-$(mktemp -d "${TMPDIR:-/tmp}/pyserve-gpu-check-out.XXXXXX")}
export LOGS=${LOGS:-$(mktemp -d "${TMPDIR:-/tmp}/pyserve-gpu-check-logs.XXXXXX")}
export PYSERVE_CACHE=$PYSERVE_CHECK_DIR/cache  # emptied by the part build
llama="$PYSERVE_CHECK_DIR/llama-3.1-8b"
ptx80_cache="$PYSERVE_CHECK_DIR/cache-ptx80"
load='from pyserve.ops import build
build.load_native(is_reference_allowed=False, progress=print, device="cuda")'

# Seconds a part may take. sanitize and ptx80 may run beside each other on one card, from two calls
# of this script: racecheck alone takes 175.
limit_of() {
  case $1 in
    build | prepare) echo 240 ;;
    tests | memory | whole | models | adapters) echo 180 ;;
    ops) echo 60 ;;
    rows) echo 90 ;;
    logits) echo 150 ;;
    serve) echo 160 ;;
    masks | sleep) echo 200 ;;
    faults) echo 160 ;;
    peers) echo 400 ;;
    soak) echo $((SOAK_S + 60)) ;;
    sanitize | ptx80 | ranks) echo 350 ;;
    *) return 1 ;;
  esac
}

# pytest on each given file in a process of its own, 4 at a time: a CUDA error ends its file only.
# A test is ended, and named, before its file is.
# run_tests NAME SECONDS_PER_FILE FILES... -- PYTEST_ARGS...
run_tests() {
  local name=$1 limit=$2 file files=() failed=0 passed=0 i code log words
  shift 2
  children=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do files+=("$1") && shift; done
  [ $# -gt 0 ] && shift
  for file in "${files[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge 4 ]; do sleep 0.2; done
    log="$LOGS/$name-$(basename "$file" .py)"
    timeout -k 5 "$limit" "$PYTHON" -m pytest -v -rfE --tb=short -p no:cacheprovider -W default \
      --timeout $((limit - 10)) --junitxml "$log.xml" "$@" "$file" >"$log.log" 2>&1 &
    children+=($!)
  done
  for i in "${!files[@]}"; do
    code=0
    wait "${children[$i]}" || code=$?
    file=${files[$i]}
    log="$LOGS/$name-$(basename "$file" .py).log"
    case $code in
      0 | 5) ;;  # 5: nothing selected
      124 | 137) echo "FAILED $file: not ended after $limit s" && failed=1 ;;
      *) failed=1 ;;
    esac
    grep -E '^(FAILED|ERROR) ' "$log" | cut -c 1-180
    # Where pytest itself died there is no summary: say what its last words were.
    if [ "$code" -ne 0 ] && [ "$code" -ne 5 ] && ! grep -qE '^(FAILED|ERROR) ' "$log"; then
      echo "FAILED $file: exit code $code: $(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-120)"
      grep -E '::.* (FAILED|ERROR) ' "$log" | head -n 5 | cut -c 1-150
    fi
    words=$(grep -E ' in [0-9.]+s' "$log" | tail -n 1 | tr -d '=')
    [[ $words =~ ([0-9]+)\ passed ]] && passed=$((passed + BASH_REMATCH[1]))
    echo "${file#tests/gpu/}: $words"
    [ "$code" -eq 0 ] || echo "= ${file#tests/gpu/}: exit code $code, $words"
  done
  echo "= $name: $passed tests passed in ${#files[@]} files"
  return $failed
}

# What the test files of a part that runs out of time have come to: failed tests, the running one.
unfinished() {
  local log
  for log in "$LOGS/$1"-*.log; do
    grep -qsE ' in [0-9.]+s' "$log" && grep -E '^(FAILED|ERROR) ' "$log"
    grep -qsE ' in [0-9.]+s' "$log" || echo "FAILED not ended, $(basename "$log"): $(tail -n 1 "$log")"
    grep -sE '::.* (FAILED|ERROR) ' "$log" | head -n 5
  done | cut -c 1-180
}

op_tests() {
  find tests/gpu -name 'test_*.py' ! -name test_server.py ! -name test_full_model.py \
    ! -name test_loader.py ! -name test_memory.py ! -name test_sleep.py \
    ! -name test_full_mixtures.py ! -name test_full_fp8.py ! -name test_adapters.py \
    ! -name test_tensor_parallel.py | sort
}

part_build() {  # the first start's compile, into an empty cache; the card writes a model meanwhile
  rm -rf "$PYSERVE_CACHE"
  children=()
  if [ -n "${NEEDS_LLAMA:-}" ]; then
    ensure_llama >"$LOGS/write.log" 2>&1 &
    children+=($!)
  fi
  part_prepare || return 1
  wait
}

part_prepare() {
  local start=$EPOCHREALTIME
  "$PYTHON" -c "$load" || return 1
  awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN {printf "= native ops ready: %.1f s\n", b - a}'
}

part_tests() {
  local files
  mapfile -t files < <(op_tests)
  run_tests tests 175 tests/gpu/test_full_model.py "${files[@]}"  # the longest first
}

part_whole() {
  run_tests whole 170 tests/gpu/test_full_{mixtures,fp8,rows}.py \
    tests/gpu/test_{adapters,experts_w4a16,latent}.py
}

part_models() {
  "$PYTHON" -m bench.gpu_models --folder "$PYSERVE_CHECK_DIR" --out "$LOGS" --json "$LOGS/models.json"
}

part_adapters() {
  "$PYTHON" -m bench.gpu_adapters --folder "$PYSERVE_CHECK_DIR" --out "$LOGS" --json "$LOGS/adapters.json"
}

part_memory() {  # each alone on the card: they measure speed, and all of the memory
  local failed=0
  run_tests memory 80 tests/gpu/test_loader.py || failed=1
  run_tests memory 80 tests/gpu/test_memory.py || failed=1
  return $failed
}

part_ops() {  # a process per group: a CUDA error ends its own only
  local group failed=0
  for group in norm,rope,activation,plan,linear attention sample,bitmask,logprobs; do
    "$PYTHON" -m bench.ops --device cuda --only "$group" --json "$LOGS/ops-${group%%,*}.json" ||
      failed=1
  done
  return $failed
}

part_rows() {  # which kernel is to take 33 to 128 rows of a linear, and whether 1 to 32 are as before
  "$PYTHON" -m bench.ops --device cuda --only few_rows --seconds 0.05 --json "$LOGS/rows.json"
}

part_logits() {
  "$PYTHON" -m bench.full_size --folder "$PYSERVE_CHECK_DIR" --keep llama-3.1-8b \
    --json "$LOGS/full_size.json"
}

ensure_llama() {
  [ -f "$llama/complete" ] || "$PYTHON" -m bench.full_size --folder "$PYSERVE_CHECK_DIR" --write-only llama-3.1-8b
}

part_serve() {
  ensure_llama || return 1
  "$PYTHON" -m bench.gpu_serve --model "$llama" --out "$LOGS" --json "$LOGS/serve.json" \
    -- --device cuda
}

part_sleep() {  # alone on the card: what it shows is to be ours
  local failed=0
  run_tests sleep 70 tests/gpu/test_sleep.py || failed=1
  ensure_llama && timeout -k 5 120 "$PYTHON" -m bench.sleep_wake --model "$llama" -- --device cuda || failed=1
  return $failed
}

part_masks() {  # of random weights: what they cost does not depend on the model
  local shapes="$PYSERVE_CHECK_DIR/llama-shapes"
  "$PYTHON" -m bench.make_model llama-3.1-8b "$shapes" &&
    "$PYTHON" -m bench.gpu_masks --model "$shapes" --out "$LOGS" --json "$LOGS/masks.json" \
      -- --device cuda --load-format dummy
}

part_peers() {  # NVLink multicast can take the cards of a shared host out of service: off
  local failed=0 cards
  export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
  cards=$(nvidia-smi --list-gpus | wc -l)
  run_tests peers 200 tests/gpu/test_peers.py || failed=1
  timeout -k 5 190 "$PYTHON" -m bench.gpu_peers --cards "$cards" --json "$LOGS/peers.json" || failed=1
  return $failed
}

part_faults() { run_tests faults 155 tests/gpu/test_server.py; }

part_ranks() {  # on a machine with several cards: two of them share a model
  local failed=0
  run_tests ranks 200 tests/gpu/test_tensor_parallel.py || failed=1
  "$PYTHON" -m bench.gpu_ranks --folder "$PYSERVE_CHECK_DIR" --parts served --out "$LOGS" \
    --json "$LOGS/ranks.json" || failed=1
  return $failed
}

part_soak() {
  ensure_llama || return 1
  "$PYTHON" -m bench.soak --seconds "$SOAK_S" -c 64 --vocab-size 32000 --device-memory \
    --max-growth-mib 64 --json "$LOGS/soak.json" -- --model "$llama" --device cuda
}

sanitize_with() {  # one tool, one file; only our kernels are watched, where the tool can choose
  local tool=$1 file=$2 filter=() help
  # All of the help is read first: grep -q would end the tool by a broken pipe, a failure here.
  help=$(compute-sanitizer --help)
  [[ $help != *--kernel-regex* ]] || filter=(--kernel-regex kns=pyserve)
  # Without torch's caching every tensor is an allocation of its own: a step over its end is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 exec timeout -k 5 345 compute-sanitizer --tool "$tool" "${filter[@]}" \
    --error-exitcode 86 --print-limit 30 "$PYTHON" -m pytest -q -rfE --tb=short \
    -p no:cacheprovider -W default --timeout 335 -m sanitize "$file"
}

part_sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH" && return 1; }
  local files tool file log code failed=0 logs=()
  mapfile -t files < <(grep -l 'mark\.sanitize' tests/gpu/*.py)
  children=()
  for tool in memcheck racecheck; do
    for file in "${files[@]}"; do
      while [ "$(jobs -rp | wc -l)" -ge 8 ]; do sleep 0.2; done
      log="$LOGS/sanitize-$tool-$(basename "$file" .py).log"
      sanitize_with "$tool" "$file" >"$log" 2>&1 &
      children+=($!)
      logs+=("$log")
    done
  done
  for i in "${!logs[@]}"; do
    log=${logs[$i]}
    code=0
    wait "${children[$i]}" || code=$?
    [ $code -eq 0 ] || failed=1
    grep -E '^(FAILED|ERROR) |^========= (Invalid|Error|Warning|Program hit|Uninit)' "$log" |
      sort | uniq -c | head -n 8 | cut -c 1-160
    echo "= $(basename "$log" .log): exit code $code, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1 | tr -d '='), $(grep -E '[0-9]+ (passed|failed)' "$log" | tail -n 1 | tr -d '=')"
  done
  return $failed
}

part_ptx80() {  # the card runs the sm_80 code, translated by its driver
  local files
  export PYSERVE_CACHE=$ptx80_cache PYSERVE_CUDA_ARCHS=80-ptx
  part_prepare || return 1
  mapfile -t files < <(op_tests)
  run_tests ptx80 300 "${files[@]}"
}

children=()  # processes in groups of their own: what ends this part must end them
if [ "${1:-}" = --part ]; then
  part=$2
  trap 'kill "${children[@]}" 2>/dev/null; unfinished "$part"; exit 143' TERM
  SOAK_S=${SOAK_S:-30} "part_$2"
  exit
fi

if [ $# -gt 0 ]; then
  parts=("$@")
  export SOAK_S=${SOAK_S:-180}
else
  parts=(build tests memory ops logits serve faults soak)
  export SOAK_S=${SOAK_S:-30}
fi
for part in "${parts[@]}"; do
  limit_of "$part" >/dev/null || { echo "no part $part; see the head of $self" && exit 64; }
done
case " ${parts[*]} " in *\ logits\ * | *\ serve\ * | *\ soak\ * | *\ sleep\ *) export NEEDS_LLAMA=1 ;; esac
[ "${parts[0]}" = build ] || parts=(prepare "${parts[@]}")
mkdir -p "$OUT" "$PYSERVE_CHECK_DIR"
total=${PYSERVE_CHECK_LIMIT_S:-470}
deadline=$((SECONDS + total))
nvidia-smi --query-gpu=name,driver_version,memory.used,memory.total --format=csv,noheader || true
"$PYTHON" -c 'import sys, torch, transformers; print("python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)'

rows=()
num_failed=0
for part in "${parts[@]}"; do
  left=$((deadline - SECONDS))
  if [ $((47 * left)) -lt "$total" ]; then  # 10 s of the default
    rows+=("$(printf '%-9s %-12s' "$part" "NOT RUN")  no time left")
    num_failed=$((num_failed + 1))
    continue
  fi
  limit=$(limit_of "$part")
  [ "$limit" -le $left ] || limit=$left
  began=$SECONDS
  code=0
  timeout -k 5 "$limit" bash "$self" --part "$part" >"$LOGS/$part.log" 2>&1 || code=$?
  case $code in
    0) state=ok ;;
    124 | 137) state="TIMED OUT" ;;
    *) state="FAILED ($code)" ;;
  esac
  [ $code -eq 0 ] || num_failed=$((num_failed + 1))
  rows+=("$(printf '%-9s %-12s %4d s' "$part" "$state" $((SECONDS - began)))")
  tar -czf "$OUT/logs.tgz" -C "$LOGS" .  # now: the machine may take the script away
  echo "--- $part: $state, $((SECONDS - began)) s"
  grep -E '^(FAILED|ERROR)' "$LOGS/$part.log" | head -n 20
  # Without a failed test to name, the log's end says why.
  if [ $code -ne 0 ] && ! grep -qE '^(FAILED|ERROR) tests' "$LOGS/$part.log"; then
    tail -n 25 "$LOGS/$part.log" | cut -c 1-240
  fi
  if [ $code -ne 0 ] && { [ "$part" = build ] || [ "$part" = prepare ]; }; then
    grep -nE 'error|Error' "$LOGS/$part.log" | head -n 20 | cut -c 1-240
    break  # nothing of the rest can run
  fi
done

{
  printf '\n=== %s\n' "$(nvidia-smi --query-gpu=name,memory.used --format=csv,noheader 2>/dev/null)"
  printf '%s\n' "${rows[@]}"
  for part in "${parts[@]}"; do
    [ -f "$LOGS/$part.log" ] && grep -E '^(FAILED|ERROR)' "$LOGS/$part.log"
  done | head -n 12 | cut -c 1-150
  for part in "${parts[@]}"; do
    [ -f "$LOGS/$part.log" ] && grep '^= ' "$LOGS/$part.log"
  done | cut -c 3-130 | head -n 38
} | tee "$OUT/summary.txt"
exit $num_failed
