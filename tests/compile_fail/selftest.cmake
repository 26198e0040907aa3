# The harness itself: it accepts a good case and refuses each kind of bad one for the right reason.
function(expect_run case outcome words)
  set(file ${CMAKE_CURRENT_LIST_DIR}/selftest/${case}.cpp)
  execute_process(COMMAND ${CMAKE_COMMAND} -D COMPILER=${COMPILER} -D FLAGS=${FLAGS} -D CASE=${file}
                          -P ${CMAKE_CURRENT_LIST_DIR}/run_case.cmake
                  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(REGEX REPLACE "[ \n]+" " " output "${output}")
  if(outcome STREQUAL "accepted" AND NOT result EQUAL 0)
    message(FATAL_ERROR "${case} should be accepted:\n${output}")
  endif()
  if(outcome STREQUAL "refused" AND (result EQUAL 0 OR NOT output MATCHES "${words}"))
    message(FATAL_ERROR "${case} should be refused with '${words}':\n${output}")
  endif()
endfunction()

expect_run(good accepted "")
expect_run(good_flags accepted "")
expect_run(broken_without_misuse refused "does not compile without the misuse")
expect_run(misuse_compiles refused "compiles in spite of the misuse")
expect_run(other_message refused "but the message lacks 'the words of another error'")
expect_run(nothing_expected refused "states no")
expect_run(no_misuse refused "has neither")
