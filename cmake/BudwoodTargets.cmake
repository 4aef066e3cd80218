# Compile settings shared by the libraries.
add_library(budwood_settings INTERFACE)
target_compile_definitions(budwood_settings INTERFACE FMT_HEADER_ONLY=1)
target_include_directories(budwood_settings INTERFACE
  "$<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include>")
target_link_libraries(budwood_settings INTERFACE $<BUILD_INTERFACE:fmt::fmt-header-only>
                                                 $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>)
if(BUDWOOD_DEVELOPER_MODE)
  target_compile_options(budwood_settings INTERFACE -Wall -Wextra)
  # g++ 12 reports inlined std::string code of its own library.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(budwood_settings INTERFACE -Wno-stringop-overflow -Wno-restrict
                                                      -Wno-array-bounds)
  endif()
endif()

# Torch's headers are not ours to warn about; its flags (ABI, -D) come with TORCH_CXX_FLAGS.
add_library(budwood_torch INTERFACE)
target_include_directories(budwood_torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
target_link_libraries(budwood_torch INTERFACE torch torch_cpu c10)
separate_arguments(torch_flags UNIX_COMMAND "${TORCH_CXX_FLAGS}")
target_compile_options(budwood_torch INTERFACE ${torch_flags})

# at::parallel_for is inline and runs on one thread in code compiled without OpenMP. The runtime is
# GCC's, under the name by which torch loads it, so that a process has one pool of threads; clang's
# would be a second.
add_library(budwood_threads INTERFACE)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(budwood_threads INTERFACE -fopenmp)
  target_link_options(budwood_threads INTERFACE -fopenmp)
endif()
