# The installed package, and the same package from the build tree (specattn_DIR=<build>).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/specattn)
target_include_directories(specattn_core INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

configure_package_config_file(cmake/specattn-config.cmake.in ${PROJECT_BINARY_DIR}/specattn-config.cmake
                              INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/specattn-config-version.cmake
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
configure_file(cmake/cuda20.cmake ${PROJECT_BINARY_DIR}/cuda20.cmake COPYONLY)
configure_file(cmake/eigen.cmake ${PROJECT_BINARY_DIR}/eigen.cmake COPYONLY)

install(DIRECTORY include/specattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(FILES ${PROJECT_BINARY_DIR}/specattn-config.cmake ${PROJECT_BINARY_DIR}/specattn-config-version.cmake
              cmake/cuda20.cmake cmake/eigen.cmake
        DESTINATION ${package_dir})
foreach(part IN ITEMS core specattn cuda)
  install(TARGETS specattn_${part} EXPORT specattn-${part}-targets)
  install(EXPORT specattn-${part}-targets NAMESPACE specattn:: DESTINATION ${package_dir})
  if(PROJECT_IS_TOP_LEVEL)
    export(EXPORT specattn-${part}-targets NAMESPACE specattn:: FILE ${PROJECT_BINARY_DIR}/specattn-${part}-targets.cmake)
  endif()
endforeach()
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
