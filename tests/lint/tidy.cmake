# clang-tidy over one file that includes every host header.
file(GLOB_RECURSE headers RELATIVE ${ROOT}/include ${ROOT}/include/*.hpp)
if(NOT JSON)
  list(FILTER headers EXCLUDE REGEX "alignment_json\\.hpp$")
endif()
set(text "")
foreach(header IN LISTS headers)
  string(APPEND text "#include <${header}>\n")
endforeach()
file(WRITE ${SCRATCH}/every_header.cpp "${text}")
string(REPLACE "," ";" system_includes "${SYSTEM_INCLUDES}")
set(flags -std=c++20 -I ${ROOT}/include)
foreach(directory IN LISTS system_includes)
  list(APPEND flags -isystem ${directory})
endforeach()

function(tidy source result_name output_name)
  execute_process(COMMAND ${CLANG_TIDY} --quiet --config-file=${ROOT}/.clang-tidy --warnings-as-errors=*
                          --header-filter=include/specattn ${source} -- ${flags}
                  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_QUIET)
  set(${result_name} ${result} PARENT_SCOPE)
  set(${output_name} "${output}" PARENT_SCOPE)
endfunction()

# The check must see a planted fault before its silence means anything.
file(WRITE ${SCRATCH}/planted.cpp "#include <string>\n#include <utility>\n"
     "std::size_t planted(std::string s) {\n  std::string t = std::move(s);\n  return s.size() + t.size();\n}\n")
tidy(${SCRATCH}/planted.cpp result output)
if(result EQUAL 0 OR NOT output MATCHES "use-after-move")
  message("${output}")
  message(FATAL_ERROR "clang-tidy misses a planted use after move")
endif()

tidy(${SCRATCH}/every_header.cpp result output)
if(NOT result EQUAL 0)
  message("${output}")
  message(FATAL_ERROR "clang-tidy has findings (above)")
endif()
