# Device code for less than compute capability 8.0 is refused in one sentence, and so is cuda.cuh without nvcc.
file(WRITE ${SCRATCH}/all.cu "#include <specattn/cuda.cuh>\n")
execute_process(COMMAND ${NVCC} -std=c++20 -arch=sm_75 -I ${INCLUDE} -ptx -o ${SCRATCH}/all.ptx ${SCRATCH}/all.cu
                RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
string(REGEX MATCHALL "error:" errors "${output}")
list(LENGTH errors count)
if(result EQUAL 0 OR NOT count EQUAL 1 OR NOT output MATCHES "compute capability 8.0: set CMAKE_CUDA_ARCHITECTURES")
  message(FATAL_ERROR "sm_75 should be refused in one sentence:\n${output}")
endif()
execute_process(COMMAND ${COMPILER} -std=c++20 -I ${INCLUDE} -fsyntax-only -x c++ ${SCRATCH}/all.cu
                RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
string(REGEX MATCHALL "error:" errors "${output}")
list(LENGTH errors count)
if(result EQUAL 0 OR NOT count EQUAL 1 OR NOT output MATCHES "compile this file with nvcc")
  message(FATAL_ERROR "cuda.cuh in a C++ file should be refused in one sentence:\n${output}")
endif()
