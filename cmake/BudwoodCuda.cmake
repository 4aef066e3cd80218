# CUDA. BUDWOOD_WITH_CUDA: packed weights get their CUDA kernels. BUDWOOD_NVCC: the compiler, or
# NOTFOUND; the tests compile the kernels wherever there is one.
set(BUDWOOD_CUDA AUTO CACHE STRING
    "CUDA kernels for packed weights: AUTO (when torch has CUDA and nvcc is found), ON or OFF")
set_property(CACHE BUDWOOD_CUDA PROPERTY STRINGS AUTO ON OFF)
set(BUDWOOD_CUDA_ARCHITECTURES "75;80;86;89;90;100;120" CACHE STRING
    "GPU architectures that the kernels are compiled for")
find_program(BUDWOOD_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME PATHS /usr/local/cuda
             PATH_SUFFIXES bin)

set(BUDWOOD_WITH_CUDA OFF)
if(BUDWOOD_CUDA STREQUAL "AUTO" OR BUDWOOD_CUDA)
  set(missing "")
  if(NOT BUDWOOD_TORCH_CUDA)
    set(missing "this torch (${BUDWOOD_TORCH_VERSION}) is built without CUDA")
  elseif(NOT BUDWOOD_NVCC)
    set(missing "nvcc is not found (set CUDACXX or CUDA_HOME)")
  else()
    execute_process(COMMAND "${BUDWOOD_NVCC}" --version OUTPUT_VARIABLE text)
    string(REGEX REPLACE ".*release ([0-9]+)\\..*" "\\1" nvcc_major "${text}")
    string(REGEX REPLACE "\\..*" "" torch_major "${BUDWOOD_TORCH_CUDA}")
    if(NOT torch_major STREQUAL "unknown" AND NOT nvcc_major STREQUAL torch_major)
      set(missing "torch is built with CUDA ${BUDWOOD_TORCH_CUDA}, nvcc is of CUDA ${nvcc_major}")
    endif()
  endif()
  if(NOT missing)
    set(BUDWOOD_WITH_CUDA ON)
    set(CMAKE_CUDA_COMPILER "${BUDWOOD_NVCC}" CACHE FILEPATH "CUDA compiler")
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "Host compiler of nvcc")
    # Machine code for these, and PTX of the last for what comes after.
    list(TRANSFORM BUDWOOD_CUDA_ARCHITECTURES APPEND "-real" OUTPUT_VARIABLE
         CMAKE_CUDA_ARCHITECTURES)
    list(GET BUDWOOD_CUDA_ARCHITECTURES -1 last)
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${last}-virtual")
    enable_language(CUDA)
    # CMake 3.25 does not know that nvcc has C++20.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    endif()
    find_package(CUDAToolkit REQUIRED)
    message(STATUS "CUDA kernels: ON, for sm_${BUDWOOD_CUDA_ARCHITECTURES}")
  elseif(BUDWOOD_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: OFF, ${missing}")
  else()
    message(FATAL_ERROR "BUDWOOD_CUDA is ${BUDWOOD_CUDA}, but ${missing}")
  endif()
endif()
