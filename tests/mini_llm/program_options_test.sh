#!/usr/bin/env bash
# Every option of every command, given nothing, nonsense and the ends of its range: an exit code, and one line of less
# than 200 characters that names the option.
#   program_options_test.sh PROGRAM SOURCE_DIR
set -uo pipefail
program=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=$scratch/out
err=$scratch/err
text=$scratch/text.txt
head -c 1500 "$2/examples/models/prompt.txt" >"$text"
failures=0
most=2147483647
tiny=0.000001
nearly_one=0.999999

fail() {
  failures=$((failures + 1))
  echo "FAILED: $1"
  echo "  stdout: $(head -c 200 "$out")"
  echo "  stderr: $(head -c 400 "$err")"
}

# One line an option: command, all its names, kind, least and greatest value, arguments that make it matter.
# Kinds: integer, number, integers and numbers (lists), seed, text.
table() {
  local command
  for command in generate calibrate perplexity bench; do
    echo "$command|-m,--model|text"
    echo "$command|--md,--model-draft,--draft-model|text"
    echo "$command|-t,--threads|integer|0|1024"
    echo "$command|--kv,--cache-type|text"
    [[ $command == calibrate ]] || echo "$command|--alignment|text"
    echo "$command|--record-steps|integer|0|$most"
    [[ $command == calibrate ]] || echo "$command|--record-every|integer|1|$most"
  done
  for command in generate perplexity; do
    echo "$command|--refresh|integer|0|$most"
    echo "$command|--dense-layers|integer|0|$most"
    echo "$command|--sinks|integer|0|$most"
    echo "$command|--recent|integer|0|$most"
  done
  for command in generate calibrate perplexity; do echo "$command|-f,--file|text"; done
  cat <<EOF
generate|--guide|text
generate|-c,--ctx-size|integer|0|$most
generate|--draft,--draft-max|integer|0|15
generate|--keep|number|0|1
generate|--keep-max|integer|0|$most
generate|--window|integer|0|$most|--guide window
generate|--pages|number|$tiny|1|--guide quest
generate|--min-context|integer|0|$most
generate|--draft-keep|number|0|1|--sparse-draft
generate|-p,--prompt|prompt
generate|-n,--n-predict,--max-tokens|integer|0|16777216
generate|-s,--seed|seed|-9223372036854775808|18446744073709551615
generate|--temp,--temperature|number|0|1000
generate|--top-k|integer|-1|$most
generate|--top-p|number|0|1
generate|--min-p|number|0|1
generate|--device|text
perplexity|--device|text
calibrate|--tokens|integer|1|$most
calibrate|-s,--seed|seed|-9223372036854775808|18446744073709551615
calibrate|--draft,--draft-max,--draft-length|integer|1|15
calibrate|--prefill|integer|1|$most
calibrate|--every|integer|1|$most
calibrate|--windows|integers|1|1048576
calibrate|--sinks|integer|0|$most
calibrate|-o,--out|text
calibrate|--plot|text
perplexity|--contexts|integers|16|$most
perplexity|--guides|text
perplexity|-p,--p,--keep|numbers|0|1
perplexity|--quest,--pages|numbers|$tiny|1|--guides quest
perplexity|--windows|integers|0|1073741824|--guides window
perplexity|--prefill|number|$tiny|$nearly_one
perplexity|--draft,--draft-max,--draft-length|integer|1|15
perplexity|--plot|text
perplexity|--json|text
bench|-p,--n-prompt|integers|0|$most
bench|-n,--n-gen|integers|0|$most
bench|-d,--n-depth|integers|0|$most
bench|-r,--repetitions|integer|1|1000|-n 0
bench|-w,--warm-ups|integer|0|1000|-n 0
bench|--guide,--guides|text
bench|--draft,--draft-max,--draft-length|integers|1|15|--guides draft
bench|--keep|number|0|1|--guides draft
bench|-o,--output|text
EOF
}

# What makes a command's work small; the option that is tried, and what comes with it, take their own values.
base() {
  case $1 in
    generate) echo "-p hi
-t 1
-n 2
-c 48
--temp 0
--guide draft" ;;
    calibrate) echo "-f $text
-t 1
--tokens 200
--prefill 64
--windows 16
-o $scratch/alignment.json" ;;
    perplexity) echo "-f $text
-t 1
--contexts 48
--guides draft
--p 0.9" ;;
    bench) echo "-t 1
-p 0
-n 1
-d 0
-r 1
-w 0" ;;
  esac
}

# run COMMAND NAMES EXTRA ARGUMENTS...: the exit code
run() {
  local command=$1 names=",$2," extra=$3 option value
  shift 3
  local arguments=()
  while read -r option value; do
    [[ $names == *",$option,"* || " $extra " == *" $option "* ]] || arguments+=("$option" "$value")
  done < <(base "$command")
  timeout 120 "$program" "$command" "${arguments[@]}" $extra "$@" >"$out" 2>"$err" </dev/null
}

# The first line on stderr is short and has one of these names in it.
names_it() {
  local name line
  line=$(grep -v '^$' "$err" | head -1)
  [[ ${#line} -lt 200 ]] || return 1
  for name in ${1//,/ }; do [[ $line == *"$name"* ]] && return 0; done
  return 1
}

refuses() { # COMMAND NAMES EXTRA NAME VALUE
  local status=0
  run "$1" "$2" "$3" "$4" "$5" || status=$?
  [[ $status -eq 1 && ! -s $out ]] && names_it "$2" || fail "$1 $4 '$5' is refused by the option's name (exit code $status)"
}

serves() { # COMMAND NAMES EXTRA NAME VALUE: or refuses by name what the models at hand cannot do
  local status=0
  run "$1" "$2" "$3" "$4" "$5" || status=$?
  [[ $status -eq 0 ]] || { [[ $status -eq 1 ]] && names_it "$2"; } || fail "$1 $4 $5 is served, or refused by name (exit code $status)"
}

bad_values() { # KIND LEAST GREATEST
  printf '%s\n' many nan inf -inf 0x10 1e999 "5 " +5 1,,2 "$(printf '9%.0s' {1..300})" -1e999
  case $1 in
    integer | integers) echo $(($2 - 1)) && echo $(($3 + 1)) && printf '%s\n' 1.5 99999999999999999999 -99999999999999999999 ;;
    number | numbers) echo "-$tiny" && echo "$3.5" ;;
    seed) printf '%s\n' 18446744073709551616 -9223372036854775809 1.5 ;;
  esac
  case $1 in integers | numbers) printf '%s\n' "$2,many" "$2," "," ;; esac
}

while IFS='|' read -r command names kind least greatest extra; do
  name=${names##*,} # the last of the spellings
  if [[ $kind == prompt ]]; then
    run "$command" "$names" "" "$name" "" || fail "$command: an empty prompt is one: the begin token alone"
    continue
  fi
  refuses "$command" "$names" "$extra" "$name" ""
  for each in ${names//,/ }; do
    if [[ $each == --* ]]; then
      status=0
      run "$command" "$names" "$extra" "$each=" || status=$?
      [[ $status -eq 1 && ! -s $out ]] && names_it "$names" || fail "$command $each= is refused by name (exit code $status)"
    fi
  done
  [[ $kind == text ]] && continue
  while IFS= read -r value; do
    refuses "$command" "$names" "$extra" "$name" "$value"
  done < <(bad_values "$kind" "$least" "$greatest")
  serves "$command" "$names" "$extra" "$name" "$least"
  serves "$command" "$names" "$extra" "$name" "$greatest"
done < <(table)

# Nothing that takes a value is missing from the table.
for command in generate calibrate perplexity bench; do
  while read -r names; do
    grep -qF "$command|$names|" < <(table) || { : >"$out"; : >"$err"; fail "$command $names is not in this test's table"; }
  done < <("$program" "$command" --help | sed -nE 's/^  (-[^ ]+) (TEXT|INTEGER|NUMBER).*/\1/p')
  [[ $("$program" "$command" --help | grep -cE '^  -[^ ]+ (TEXT|INTEGER|NUMBER)') -ge 10 ]] || fail "$command --help lists its options"
done

says() { # CLAIM PATTERN ARGUMENTS...
  local claim=$1 pattern=$2
  shift 2
  "$program" "$@" >"$out" 2>"$err" </dev/null
  grep -qE -- "$pattern" "$err" || fail "$claim"
}
short=(generate -p hi -n 1 -t 1)
says "a seed of 2^63 is used exactly" "seed 9223372036854775808," "${short[@]}" --seed 9223372036854775808
says "a seed of 2^64-1 is used exactly" "seed 18446744073709551615," "${short[@]}" --seed 18446744073709551615
says "010 is ten, not eight" "seed 10," "${short[@]}" --seed 010
says "a seed below zero is drawn" "seed [0-9]+," "${short[@]}" --seed -1
says "--top-k -1 is off" "seed 1," "${short[@]}" --top-k -1
says "a refresh that no pass takes is refused by name, with what would do" "--refresh 2147483647 .* give 0 to 84" \
  "${short[@]}" --refresh 2147483647
says "--compare tries longer drafts: a refresh that fits only its own is refused before the work" "--refresh 60 with 8 " \
  "${short[@]}" --refresh 60 --compare
says "-md is the draft, as llama.cpp spells it" "^mini_llm: nowhere" "${short[@]}" -md nowhere
says "-md= too" "^mini_llm: nowhere" "${short[@]}" -md=nowhere
says "what is advised is what is taken" "needs a draft model \(-md\)" "${short[@]}" -m "$2/examples/models/books-7m" --guide draft
says "calibrate --windows none has no recency signals" "alignment written" calibrate -t 1 -f "$text" --tokens 200 --prefill 64 \
  --windows none -o "$scratch/alignment.json"

[[ $failures -eq 0 ]] && echo "all passed"
exit $((failures > 0))
