# Eigen3::Eigen from 3.4 on: a target of that name that is there already, or a package. It is asked for twice, because the
# version file of Eigen 5 refuses requests for 3.4. Nothing happens without Eigen: see CMakeLists.txt on who needs it.
foreach(_specattn_eigen IN ITEMS 3.4 5)
  if(NOT TARGET Eigen3::Eigen)
    find_package(Eigen3 ${_specattn_eigen} QUIET NO_MODULE)
  endif()
endforeach()
unset(_specattn_eigen)
