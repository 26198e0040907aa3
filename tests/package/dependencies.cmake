# Configures and builds the consumer PROJECT, which brings the library in as HOW says (get_specattn.cmake).
file(REMOVE_RECURSE ${SCRATCH})
set(options -D PACKAGE_TESTS=${CMAKE_CURRENT_LIST_DIR} -D HOW=${HOW} -D SPECATTN_SOURCE=${SOURCE} -D SPECATTN_CUDA=OFF
            -D CMAKE_CXX_COMPILER=${CXX} -D CMAKE_BUILD_TYPE=Debug -D CMAKE_FIND_PACKAGE_NO_PACKAGE_REGISTRY=ON
            -D EIGEN_INCLUDE=${EIGEN_INCLUDE})
if(HOW STREQUAL "installed")
  execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${SCRATCH}/prefix OUTPUT_QUIET
                  COMMAND_ERROR_IS_FATAL ANY)
  list(APPEND options -D specattn_DIR=${SCRATCH}/prefix/share/cmake/specattn)
endif()
foreach(arguments IN ITEMS "-S;${CMAKE_CURRENT_LIST_DIR}/${PROJECT};-B;${SCRATCH}/build;${options}"
                           "--build;${SCRATCH}/build" "--install;${SCRATCH}/build;--prefix;${SCRATCH}/installed")
  execute_process(COMMAND ${CMAKE_COMMAND} ${arguments}
                  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message("${output}")
    message(FATAL_ERROR "${PROJECT}, ${HOW}, does not configure, build or install; what it printed is above")
  endif()
endforeach()
