# Compiles CASE twice with COMPILER and FLAGS: as it is, which must succeed, and with the misuse, which must fail with
# each of the expected texts in the message. A case file carries
#   // expect: some words            text the message must contain; one line a text, at least one
#   #ifdef MISUSE                    around the misuse
# and, where the misuse is a flag and not a line,
#   // misuse-flags: -std=c++17      given to the second compilation
string(REPLACE "," ";" flags "${FLAGS}")
file(READ ${CASE} text)
string(REPLACE ";" "<semicolon>" text "${text}")
string(REGEX MATCHALL "// expect: [^\n]+" expected "${text}")
string(REGEX MATCH "// misuse-flags: ([^\n]+)" unused "${text}")
separate_arguments(misuse_flags UNIX_COMMAND "${CMAKE_MATCH_1}")

if(NOT expected)
  message(FATAL_ERROR "${CASE} states no '// expect:' text")
endif()
if(NOT misuse_flags AND NOT text MATCHES "#ifdef MISUSE")
  message(FATAL_ERROR "${CASE} has neither '#ifdef MISUSE' nor '// misuse-flags:'")
endif()

execute_process(COMMAND ${COMPILER} ${flags} -fsyntax-only ${CASE}
                RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  message("${output}")
  message(FATAL_ERROR "${CASE} does not compile without the misuse")
endif()

execute_process(COMMAND ${COMPILER} ${flags} -DMISUSE ${misuse_flags} -fsyntax-only ${CASE}
                RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(result EQUAL 0)
  message(FATAL_ERROR "${CASE} compiles in spite of the misuse")
endif()
foreach(line IN LISTS expected)
  string(REPLACE "// expect: " "" words "${line}")
  string(REPLACE "<semicolon>" ";" words "${words}")
  string(STRIP "${words}" words)
  string(FIND "${output}" "${words}" position)
  if(position EQUAL -1)
    message("${output}")
    message(FATAL_ERROR "${CASE} is refused, but the message lacks '${words}'")
  endif()
endforeach()
