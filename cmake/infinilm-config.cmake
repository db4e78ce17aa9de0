# find_package(infinilm CONFIG): the headers of the backend ABI, and a function to build a backend with.
#
#   infinilm::backend            an interface target: the include directory, and nothing to link
#   infinilm_add_backend(NAME source...)
#                                a module NAME.so that exports its entry alone; link what you need to it
#   infinilm_INCLUDE_DIR         where infinilm/backend.h is
get_filename_component(infinilm_INCLUDE_DIR "${CMAKE_CURRENT_LIST_DIR}/../include" ABSOLUTE)
if(NOT EXISTS "${infinilm_INCLUDE_DIR}/infinilm/backend.h")
  set(infinilm_FOUND FALSE)
  set(infinilm_NOT_FOUND_MESSAGE "there is no infinilm/backend.h in ${infinilm_INCLUDE_DIR}; install infinilm again")
  return()
endif()

if(NOT TARGET infinilm::backend)
  add_library(infinilm::backend INTERFACE IMPORTED)
  set_target_properties(infinilm::backend PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${infinilm_INCLUDE_DIR}")
endif()

set(infinilm_EXPORTS "${CMAKE_CURRENT_LIST_DIR}/infinilm-backend.map")

function(infinilm_add_backend name)
  add_library(${name} MODULE ${ARGN})
  target_link_libraries(${name} PRIVATE infinilm::backend)
  set_target_properties(${name} PROPERTIES
    PREFIX "" SUFFIX ".so"
    C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  if(UNIX AND NOT APPLE)
    target_link_options(${name} PRIVATE "LINKER:--version-script=${infinilm_EXPORTS}")
    set_property(TARGET ${name} APPEND PROPERTY LINK_DEPENDS "${infinilm_EXPORTS}")
  endif()
  get_target_property(standard ${name} CXX_STANDARD)
  if(NOT standard)
    target_compile_features(${name} PRIVATE cxx_std_17)
  endif()
endfunction()
