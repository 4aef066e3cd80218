# LibTorch: TORCH_INSTALL_PREFIX, TORCH_INCLUDE_DIRS, TORCH_LIBRARIES, TORCH_CXX_FLAGS and the targets
# torch, torch_cpu and c10; BUDWOOD_TORCH_CUDA is the CUDA version torch was built with, or empty.
# It is that of Torch_DIR, BUDWOOD_TORCH_HINTS or CMAKE_PREFIX_PATH, else the one that python3 sees.
#
# A torch with CUDA is not asked for its own package: that stops the configuration where the CUDA
# toolkit is missing or incomplete, and all that is needed of it is its headers and libraries.
set(budwood_torch_dir "${Torch_DIR}")
string(REPLACE ":" ";" budwood_prefixes "$ENV{CMAKE_PREFIX_PATH}")
foreach(prefix ${BUDWOOD_TORCH_HINTS} ${CMAKE_PREFIX_PATH} ${budwood_prefixes})
  foreach(suffix . Torch share/cmake/Torch torch/share/cmake/Torch)
    if(NOT budwood_torch_dir AND EXISTS "${prefix}/${suffix}/TorchConfig.cmake")
      get_filename_component(budwood_torch_dir "${prefix}/${suffix}" ABSOLUTE)
    endif()
  endforeach()
endforeach()
if(NOT budwood_torch_dir)
  find_package(Python3 COMPONENTS Interpreter QUIET)
  if(Python3_FOUND)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c "import torch; print(torch.utils.cmake_prefix_path)"
      OUTPUT_VARIABLE budwood_prefixes OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    set(budwood_torch_dir "${budwood_prefixes}/Torch")
  endif()
endif()
get_filename_component(budwood_torch_root "${budwood_torch_dir}/../../.." ABSOLUTE)

set(BUDWOOD_TORCH_CUDA "")
if(EXISTS "${budwood_torch_root}/lib/libtorch_cuda.so")
  set(BUDWOOD_TORCH_CUDA "unknown")
  if(EXISTS "${budwood_torch_root}/version.py")
    file(STRINGS "${budwood_torch_root}/version.py" line REGEX "^cuda.* = '")
    string(REGEX REPLACE ".*'([^']*)'.*" "\\1" BUDWOOD_TORCH_CUDA "${line}")
  endif()
  set(TORCH_INSTALL_PREFIX "${budwood_torch_root}")
  set(TORCH_INCLUDE_DIRS "${budwood_torch_root}/include"
                         "${budwood_torch_root}/include/torch/csrc/api/include")
  set(TORCH_CXX_FLAGS "")
  foreach(name c10 torch_cpu torch)
    if(NOT TARGET ${name})
      add_library(${name} SHARED IMPORTED)
      set_target_properties(${name} PROPERTIES
        IMPORTED_LOCATION "${budwood_torch_root}/lib/lib${name}.so"
        INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED;USE_C10D_GLOO;USE_RPC;USE_TENSORPIPE"
        INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE_DIRS}")
    endif()
  endforeach()
  set(TORCH_LIBRARIES torch torch_cpu c10)
  set(Torch_FOUND TRUE)
else()
  find_package(Torch REQUIRED HINTS "${budwood_torch_dir}")
endif()
