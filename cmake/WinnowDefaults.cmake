if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
find_program(WINNOW_CCACHE ccache)
if(WINNOW_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${WINNOW_CCACHE}")
endif()

# Warnings and sanitizers ride on one interface target, linked by winnow_library().
# -ffp-contract=off: a sum's bits must not depend on what the compiler fuses; code
# that wants a fused multiply-add says so.
add_library(winnow_compile_options INTERFACE)
target_compile_options(winnow_compile_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual
    -Wno-missing-field-initializers -ffp-contract=off>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra --expt-relaxed-constexpr -lineinfo>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:Clang>>:-Wthread-safety>)
if(WINNOW_WERROR)
  target_compile_options(winnow_compile_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(CMAKE_UNITY_BUILD)
  # A unity build includes sources, and this warns of whatever an included file defines.
  target_compile_options(winnow_compile_options INTERFACE
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-subobject-linkage>)
endif()
if(WINNOW_SANITIZE)
  target_compile_options(winnow_compile_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${WINNOW_SANITIZE} -fno-omit-frame-pointer>)
  target_link_options(winnow_compile_options INTERFACE -fsanitize=${WINNOW_SANITIZE})
endif()
