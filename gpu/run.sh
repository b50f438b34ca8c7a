#!/usr/bin/env bash
# Everything that only a GPU can answer, on a machine with a driver, nvcc, cmake and a C++ compiler, without a network.
# usage: gpu/run.sh [build|test|model|sanitize|bench|all] [FOLDER]      (all; ./gpu-results)
# Writes FOLDER/results.json, FOLDER/summary.md, the log of every step and the benchmark's JSON and table. Every step has a
# time limit, together under 9 minutes, and 2 and a half more where there is a model to run. Exit code 1 if a step failed; what cannot run here is named and is no failure.
# INNERKV_LIMIT_SCALE multiplies the limits, for machines of few cores; INNERKV_CUDA_ARCHS is as for cmake.
# Works in a checkout after `npm ci` and in the folder that `npm run gpu:bundle` makes.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stage=all out=
for argument in "$@"; do
  case $argument in
    build | test | model | sanitize | bench | all) stage=$argument ;;
    *) out=$argument ;;
  esac
done
out=${out:-$PWD/gpu-results}
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root" || exit 1
build=$root/build-gpu
cores=$(nproc)
if [[ -x $root/node/bin/node ]]; then
  node=$root/node/bin/node headers=$root/node/include
else
  node=$(command -v node) headers=$(dirname "$(dirname "$node")")/include/node
fi
PATH=$(dirname "$node"):$PATH
export PATH root build out node headers cores
failed=0
: >"$out/steps-$stage.tsv"

# note NAME STATUS SECONDS: one line of the result.
note() {
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$out/steps-$stage.tsv"
  printf '=== %-24s %s (%s s)\n' "$1" "$2" "$3"
  [[ $2 != FAILED* ]] || failed=1
}

# step NAME LIMIT COMMAND...: 77 means that the step found nothing to run on.
step() {
  local name=$1 limit=$(($2 * ${INNERKV_LIMIT_SCALE:-1})) started=$SECONDS status
  shift 2
  echo "--- $name"
  if declare -F "$1" >/dev/null; then # timeout runs programs, not functions
    export -f "$1"
    set -- bash -c "set -uo pipefail; $1"
  fi
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  tail -n "${lines:-4}" "$out/$name.log"
  case $status in
    0) note "$name" passed $((SECONDS - started)) ;;
    77) note "$name" 'NOT RUN: no usable GPU' $((SECONDS - started)) ;;
    124 | 137) note "$name" "FAILED: over its limit of $limit s" $((SECONDS - started)) ;;
    *) note "$name" "FAILED: exit code $status" $((SECONDS - started)) ;;
  esac
  return $status
}

configure() {
  local options=()
  ! command -v ninja >/dev/null || options=(-G Ninja)
  cmake -S "$root" -B "$build" "${options[@]}" -DINNERKV_CUDA=ON -DINNERKV_TESTS=ON \
    ${INNERKV_CUDA_ARCHS:+"-DINNERKV_CUDA_ARCHS=$INNERKV_CUDA_ARCHS"} \
    "-DCMAKE_JS_INC=$headers;$root/node_modules/node-addon-api" -DCMAKE_JS_SRC= -DCMAKE_JS_LIB=
}

gpu_at_hand() { "$build/ptx_golden" >/dev/null 2>&1; [[ $? != 77 && -x $build/ptx_golden ]]; }

run_build() {
  step configure 20 configure || return
  step build 130 cmake --build "$build" -j "$cores" --target innerkv ptx_golden innerkv_cuda_bench \
    {recording,gpu_backend,gpu_cache,attend_half,gpu_products,gpu_model}_gpu_test || return
  mkdir -p build/Release && cp "$build/innerkv.node" build/Release/
}

# The C++ tests that need no GPU.
native_tests() {
  cmake --build "$build" -j "$(((cores + 1) / 2))" &&
    ctest --test-dir "$build" -j "$(((cores + 1) / 2))" -E '^(ptx_golden|.*_gpu_test)$' --output-on-failure
}

# Left out: the examples of the documents, which need type declarations that the bundle has not, and recorded data.
jest() {
  INNERKV_DATA=$root/none INNERKV_BACKEND=cuda "$node" node_modules/jest/bin/jest.js --json --outputFile="$out/jest.json" \
    --maxWorkers="$((cores < 8 ? cores : 8))" --testPathIgnorePatterns 38.documents \
    --testPathPatterns test/integration test/property test/unit
}

run_test() {
  local beside
  lines=8 step native-tests 250 native_tests & # on cores that the steps below leave idle
  beside=$!
  lines=2 step ptx_golden 20 "$build/ptx_golden"
  lines=8 step recording 5 "$build/recording_gpu_test"
  lines=8 step gpu_backend 40 "$build/gpu_backend_gpu_test"
  lines=8 step gpu_cache 10 "$build/gpu_cache_gpu_test"
  lines=8 step attend_half 30 "$build/attend_half_gpu_test"
  lines=12 step gpu_products 20 "$build/gpu_products_gpu_test"
  lines=10 step gpu_model 30 "$build/gpu_model_gpu_test"
  if gpu_at_hand; then
    lines=8 step jest-cuda 100 jest
  else
    note jest-cuda 'NOT RUN: no usable GPU' 0
  fi
  wait "$beside" || failed=1
}

# A real model: recorded losses and logits, then its speed. It is no part of the bundle: INNERKV_DATA names the folder.
data=${INNERKV_DATA:-$root/../shared/data}
smollm2=$data/models/smollm2-135m/smollm2-135m-instruct.q4_1.gguf
export smollm2

goldens() {
  INNERKV_BACKEND=cuda "$node" node_modules/jest/bin/jest.js --testPathPatterns test/integration/60.model.goldens
}

model_bench() {
  "$node" node_modules/ts-node/dist/bin.js --transpile-only benchmarks/run.ts model --backend cuda --model "$smollm2" \
    --contexts 64,4096 --schemes "${schemes:-fp16,rotated-k4v4,rotated-k3v3,rotated-k2v2}" --rounds 5 --tokens 16 \
    --out "$out/model${INNERKV_CUDA_GRAPHS:+-single-launches}"
}

run_model() {
  if [[ ! -f $smollm2 ]]; then
    note model "NOT RUN: no model at $smollm2" 0
  elif gpu_at_hand; then
    lines=8 step model-goldens 60 goldens
    lines=3 step model-bench 50 model_bench
    INNERKV_CUDA_GRAPHS=0 schemes=rotated-k2v2 lines=3 step model-bench-single-launches 20 model_bench
  else
    note model 'NOT RUN: no usable GPU' 0
  fi
}

run_sanitize() {
  local tool
  for tool in memcheck racecheck initcheck synccheck; do
    if ! command -v compute-sanitizer >/dev/null; then
      note "$tool" 'NOT RUN: no compute-sanitizer' 0
    elif ! gpu_at_hand; then
      note "$tool" 'NOT RUN: no usable GPU' 0
    elif ! timeout 20 compute-sanitizer --tool memcheck "$build/ptx_golden" >"$out/$tool.log" 2>&1 &&
      grep -qiE 'not supported|unable to|internal error' "$out/$tool.log"; then
      note "$tool" 'NOT RUN: compute-sanitizer does not work here' 0
    else
      INNERKV_GPU_SHAPES=3 INNERKV_GPU_LONGEST=300 step "$tool" 12 \
        compute-sanitizer --tool "$tool" --error-exitcode 99 "$build/gpu_backend_gpu_test" 'random shapes'
    fi
  done
}

bench() {
  "$node" node_modules/ts-node/dist/bin.js --transpile-only benchmarks/run.ts cuda --binary "$build/innerkv_cuda_bench" \
    --seconds "${INNERKV_BENCH_SECONDS:-55}" --out "$out/bench"
}

run_bench() {
  if gpu_at_hand; then
    lines=3 step bench 85 bench
  else
    note bench 'NOT RUN: no usable GPU' 0
  fi
}

case $stage in
  all)
    run_build
    run_test
    run_model
    run_sanitize
    run_bench
    ;;
  *) "run_$stage" ;;
esac

{
  echo '['
  separator=
  while IFS=$'\t' read -r name status seconds; do
    printf '%s  {"step": "%s", "status": "%s", "seconds": %s}' "$separator" "$name" "$status" "$seconds"
    separator=$',\n'
  done <"$out/steps-$stage.tsv"
  printf '\n]\n'
} >"$out/results.json"
{
  echo '# GPU suite'
  echo
  echo "$(date -u +%FT%TZ), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1 || true)"
  echo
  echo '| step | result | seconds |'
  echo '| --- | --- | ---: |'
  while IFS=$'\t' read -r name status seconds; do echo "| $name | $status | $seconds |"; done <"$out/steps-$stage.tsv"
  for table in bench model model-single-launches; do
    [[ ! -f $out/$table.md ]] || { echo && cat "$out/$table.md"; }
  done
} >"$out/summary.md"
sed -n '/^| step/,$p' "$out/summary.md"
echo "results: $out/summary.md, $out/results.json"
exit $failed
