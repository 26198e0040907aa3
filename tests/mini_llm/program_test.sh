#!/usr/bin/env bash
# The program as a user meets it: exit codes, what goes to stdout and what to stderr, and that bad input is named.
#   program_test.sh PROGRAM SOURCE_DIR
set -uo pipefail
program=$1
models=$2/examples/models
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=$scratch/out
err=$scratch/err
failures=0

fail() {
  failures=$((failures + 1))
  echo "FAILED: $1"
  echo "  stdout: $(head -c 300 "$out")"
  echo "  stderr: $(tail -c 600 "$err")"
}

# succeeds CLAIM ARGUMENTS...: exit code 0.
succeeds() {
  local claim=$1
  shift
  "$program" "$@" >"$out" 2>"$err" </dev/null || fail "$claim"
}

# refuses CLAIM PATTERN ARGUMENTS...: exit code 1, nothing on stdout, and a message that matches the pattern.
refuses() {
  local claim=$1 pattern=$2 status=0
  shift 2
  "$program" "$@" >"$out" 2>"$err" </dev/null || status=$?
  [[ $status -eq 1 && ! -s $out ]] && grep -qE -- "$pattern" "$err" || fail "$claim (exit code $status)"
}

# A copy of a model's directory that can be damaged.
copy_of() {
  local copy
  copy=$(mktemp -d -p "$scratch")
  cp -r "$models/$1/." "$copy"
  echo "$copy"
}

short=(-p "The old house stood" -n 12 --temp 0)

succeeds "generate writes its text to stdout" generate "${short[@]}"
[[ -s $out ]] || fail "generate writes its text to stdout"
grep -q "eval time" "$err" || fail "the report goes to stderr"
text=$(cat "$out")

printf 'The old house stood' | "$program" generate -f - -n 12 --temp 0 >"$out" 2>"$err" || fail "a prompt from stdin"
[[ $(cat "$out") == "$text" ]] || fail "a prompt from stdin gives the text that the same prompt as an argument gives"

succeeds "the guide none" generate "${short[@]}" --guide none --draft 0
exact=$(cat "$out")
succeeds "keeping everything" generate "${short[@]}" --keep 1 --draft 4 --sparse-draft
[[ $(cat "$out") == "$exact" ]] || fail "with --keep 1 the greedy text is the exact one"

succeeds "the shipped draft of SmolLM2 writes on its own" generate -m "$models/smollm2-draft-17m.gguf" "${short[@]}"
[[ -s $out ]] || fail "the shipped draft of SmolLM2 writes on its own"
refuses "the shipped draft of SmolLM2 is no draft of another vocabulary" "vocab|token" \
  generate -md "$models/smollm2-draft-17m.gguf" "${short[@]}"

succeeds "an empty prompt: the text begins with the begin token" generate -p "" -n 4
succeeds "generate --json" generate "${short[@]}" --json
grep -q '"text"' "$out" || fail "--json writes one object with the text in it"
succeeds "--version" --version
succeeds "--help" --help

refuses "an unknown flag" "no-such-flag" generate --no-such-flag
refuses "a number out of range" "draft.*16" generate --draft 16
refuses "a model directory that is not there" "nowhere" generate -m "$scratch/nowhere"
refuses "a prompt file that is not there" "missing.txt" generate -f "$scratch/missing.txt"
refuses "a context over the model's" "8192.*4096" generate "${short[@]}" -c 8192
refuses "a prompt over the context" "3760.*256" generate -c 256
refuses "a guide that is not there" "psychic" generate "${short[@]}" --guide psychic
refuses "a device that is not there" "'tpu' is none of cpu, cuda" generate "${short[@]}" --device tpu
if ! command -v nvidia-smi >/dev/null; then
  refuses "the GPU where there is none" "--device cuda: (no usable GPU|this program was built for the CPU only)" \
    generate "${short[@]}" --device cuda
fi
refuses "a depth over the context" "100000.*4095" bench -d 100000

copy=$(copy_of books-7m)
size=$(stat -c %s "$copy/model.safetensors")
truncate -s $((size / 2)) "$copy/model.safetensors"
refuses "truncated weights" "model.safetensors" generate -m "$copy" "${short[@]}"

copy=$(copy_of books-7m)
printf '\xc0\x7f' | dd of="$copy/model.safetensors" bs=1 seek=$((size - 2)) conv=notrunc status=none # a bf16 NaN
refuses "NaN weights, with the tensor's name" "NaN.*model\.|model\..*NaN" generate -m "$copy" "${short[@]}"

copy=$(copy_of books-1m)
sed -i 's/"A":/"swapped":/; s/"B":/"A":/; s/"swapped":/"B":/' "$copy/tokenizer.json" # the ids of two letters
refuses "a draft of another vocabulary" "vocabular.*\"(A|B)\"" generate --md "$copy" "${short[@]}"

sed '0,/"weights":/s/"weights": *"[0-9]*"/"weights": "1"/' "$models/alignment.json" >"$scratch/other.json"
refuses "an alignment that was made for other weights" "other.json|weights" generate "${short[@]}" --alignment "$scratch/other.json"
head -c 1000 "$models/alignment.json" >"$scratch/cut.json"
refuses "a truncated alignment" "cut.json" generate "${short[@]}" --alignment "$scratch/cut.json"
refuses "a text that is too short to score" "tokens" perplexity -f /dev/null

# Directories for files, files for directories, and what cannot be written: named, before the work.
refuses "a directory for a prompt" "$scratch: is a directory" generate -f "$scratch"
refuses "a directory for a text to score" "$scratch: is a directory" perplexity -f "$scratch"
refuses "a directory for a text to calibrate with" "$scratch: is a directory" calibrate -f "$scratch" -o "$scratch/a.json"
refuses "a text to score that is not there" "missing.txt" perplexity -f "$scratch/missing.txt"
refuses "a directory for an alignment" "$scratch: is a directory" generate "${short[@]}" --alignment "$scratch"
refuses "a file for a model directory" "config.json: is a file" generate -m "$models/books-1m/config.json"
refuses "an alignment that would be a directory" "$scratch: is a directory" calibrate --tokens 200 --prefill 64 -o "$scratch"
refuses "pictures that cannot be written" "none/p-divergence.svg" \
  calibrate --tokens 200 --prefill 64 -o "$scratch/a.json" --plot "$scratch/none/p"
refuses "a picture that would be a directory" "$scratch: is a directory" perplexity -f "$models/prompt.txt" --plot "$scratch"
mkfifo "$scratch/pipe" # not /dev/null: a program that renames its output into place would replace the device
refuses "results that would replace a pipe" "pipe: is no regular file" perplexity -f "$models/prompt.txt" --json "$scratch/pipe"
refuses "an alignment that would replace a pipe" "pipe: is no regular file" calibrate --tokens 200 --prefill 64 -o "$scratch/pipe"
[[ -z $(find "$scratch" -name "*.partial") ]] || fail "trying an output leaves nothing behind"

printf 'GGUF' >"$scratch/model.gguf"
refuses "a GGUF file that is cut short" "model.gguf: version: 4 bytes are needed" generate -m "$scratch/model.gguf" "${short[@]}"
refuses "a directory that holds one" "give $scratch/model.gguf" generate -m "$scratch" "${short[@]}"
types=$2/tests/mini_llm/data/gguf_types.gguf
succeeds "a GGUF file as target and draft" generate -m "$types" --md "$types" --guide none -p ABC --temp 0 -n 8 --ignore-eos
copy=$(copy_of books-1m)
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n' >"$copy/model.safetensors"
refuses "weights that Git LFS has not fetched" "model.safetensors: is a Git LFS pointer.*git lfs pull" \
  generate -m "$copy" "${short[@]}"

copy=$(copy_of books-1m)
sed -i 's/"max_position_embeddings": 4096/"max_position_embeddings": 1048576/' "$copy/config.json"
small=(-t 1 -p "It was" --temp 0 --draft 0 --guide none -m)
for context in "" "-c 1048576"; do
  # shellcheck disable=SC2086
  succeeds "a long context ${context:-by default}" generate "${small[@]}" "$copy" -n 8 $context
  peak=$(sed -n 's/^peak memory *= \([0-9]*\) MiB/\1/p' "$err")
  [[ -n $peak && $peak -lt 300 ]] || fail "8 tokens of a model of 2^20 positions take what they use (${peak} MiB)"
done
status=0
limit=300000 # KiB of addresses; a program with the GPU's libraries needs more to start
until (ulimit -v $limit && exec "$program" --version) >/dev/null 2>&1 || [[ $limit -gt 20000000 ]]; do
  limit=$((limit + 200000))
done
if [[ $limit -gt 20000000 ]]; then
  echo "not tried: a run that the memory cannot hold (under the address sanitizer no program starts with a limit)"
else
  (ulimit -v $((limit + 300000)) && exec "$program" generate "${small[@]}" "$copy" -n 1000000) >"$out" 2>"$err" || status=$?
  [[ $status -eq 1 && ! -s $out ]] && grep -qE "may take [0-9]+ MiB of memory.*can be had.*-c" "$err" ||
    fail "a run that the memory cannot hold is refused before it begins (exit code $status)"
fi

copy=$(copy_of books-1m)
sed -i 's/"max_position_embeddings": 4096/"max_position_embeddings": 128/' "$copy/config.json"
succeeds "plain text for comparison" generate -t 1 -p "It was" -n 200 --temp 0 --draft 0 --guide none
cp "$out" "$scratch/plain"
succeeds "a draft of a shorter context" generate -t 1 -p "It was" -n 200 --temp 0 --md "$copy" --draft 2 --guide none
cmp -s "$out" "$scratch/plain" || fail "a draft of a shorter context changes nothing of an exact text"

if [[ -w /dev/full ]]; then
  status=0
  "$program" generate "${short[@]}" >/dev/full 2>"$err" || status=$?
  [[ $status -eq 1 ]] && grep -q "could not be written" "$err" || fail "a full disk behind stdout (exit code $status)"
fi
refuses "an output that cannot be written" "none/such" calibrate --tokens 256 -o "$scratch/none/such"

[[ $failures -eq 0 ]] && echo "all passed"
exit $((failures > 0))
