# attend_peers_cuda: FlashInfer's attention beside attend(). Its parts are built as its own build does (flags, and the
# CCCL and CUTLASS that its wheel brings next to the headers) and for sm_90a alone, ours as everywhere.
get_filename_component(flashinfer_data ${FLASHINFER_INCLUDE_DIR} DIRECTORY)
add_library(flashinfer_attend OBJECT peers/flashinfer_attend.cu peers/flashinfer_attend_sm90.cu
                                     peers/flashinfer_persistent.cu)
set_target_properties(flashinfer_attend PROPERTIES CUDA_ARCHITECTURES 90a)
target_link_libraries(flashinfer_attend PRIVATE specattn::cuda)
target_compile_definitions(flashinfer_attend PRIVATE CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED)
target_compile_options(flashinfer_attend PRIVATE -O3 -use_fast_math --expt-relaxed-constexpr -w)
target_include_directories(flashinfer_attend BEFORE PRIVATE ${flashinfer_data}/cccl/cub
                           ${flashinfer_data}/cccl/libcudacxx/include ${flashinfer_data}/cccl/thrust)
target_include_directories(flashinfer_attend PRIVATE ${PROJECT_SOURCE_DIR}/bench)
target_include_directories(flashinfer_attend SYSTEM PRIVATE ${FLASHINFER_INCLUDE_DIR} ${flashinfer_data}/cutlass/include
                           ${flashinfer_data}/cutlass/tools/util/include)

add_executable(attend_peers_cuda peers/attend_peers.cu)
target_link_libraries(attend_peers_cuda PRIVATE specattn::cuda flashinfer_attend)
target_include_directories(attend_peers_cuda PRIVATE ${PROJECT_SOURCE_DIR}/bench)
