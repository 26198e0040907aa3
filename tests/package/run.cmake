# Configures, builds and runs one consumer. MODE: installed, build_tree, add_subdirectory, fetch_content, wrong_version.
file(REMOVE_RECURSE ${SCRATCH})
set(project find_package)
set(options -D PACKAGE_TESTS=${CMAKE_CURRENT_LIST_DIR} -D HELLO=${HELLO} -D CMAKE_CXX_COMPILER=${CXX}
            -D CMAKE_BUILD_TYPE=Debug -D CMAKE_FIND_PACKAGE_NO_PACKAGE_REGISTRY=ON)
if(CUDA)
  list(APPEND options -D WITH_CUDA=ON -D CMAKE_CUDA_COMPILER=${CUDA} -D CMAKE_CUDA_ARCHITECTURES=80)
endif()

# A real install, then moved: an installed package must not remember where it was installed first.
function(install_to prefix)
  execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix}.first OUTPUT_QUIET
                  COMMAND_ERROR_IS_FATAL ANY)
  file(RENAME ${prefix}.first ${prefix})
endfunction()

if(MODE STREQUAL "build_tree")
  list(APPEND options -D specattn_DIR=${BUILD} -D WANTED_VERSION=${VERSION})
elseif(MODE MATCHES "^(add_subdirectory|fetch_content)$")
  set(project ${MODE})
  list(APPEND options -D SPECATTN_SOURCE=${SOURCE})
else()
  install_to(${SCRATCH}/prefix)
  list(APPEND options -D CMAKE_PREFIX_PATH=${SCRATCH}/prefix)
  if(MODE STREQUAL "wrong_version")
    list(APPEND options -D WANTED_VERSION=9.9)
  else()
    list(APPEND options -D WANTED_VERSION=${VERSION})
  endif()
endif()

execute_process(COMMAND ${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/${project} -B ${SCRATCH}/build ${options}
                RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(MODE STREQUAL "wrong_version")
  if(result EQUAL 0 OR NOT output MATCHES "requested version \"9.9\"" OR NOT output MATCHES "version: ${VERSION}")
    message(FATAL_ERROR "asking for version 9.9 should fail and name both versions:\n${output}")
  endif()
  return()
endif()
if(NOT result EQUAL 0)
  message("${output}")
  message(FATAL_ERROR "the consumer does not configure; what it printed is above")
endif()

execute_process(COMMAND ${CMAKE_COMMAND} --build ${SCRATCH}/build RESULT_VARIABLE result OUTPUT_VARIABLE output
                ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  message("${output}")
  message(FATAL_ERROR "the consumer does not build; what it printed is above")
endif()

execute_process(COMMAND ${SCRATCH}/build/consumer OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
if(NOT output STREQUAL "specattn ${VERSION}\n")
  message(FATAL_ERROR "the consumer should print 'specattn ${VERSION}', not '${output}'")
endif()
if(EXISTS ${SCRATCH}/build/consumer_hello)
  execute_process(COMMAND ${SCRATCH}/build/consumer_hello OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
endif()
