# Brings the library in as HOW says: as an installed package (specattn_DIR) or as a subdirectory with its defaults.
macro(get_specattn component)
  if(HOW STREQUAL "installed")
    find_package(specattn REQUIRED COMPONENTS ${component})
  else()
    add_subdirectory(${SPECATTN_SOURCE} specattn)
  endif()
endmacro()
