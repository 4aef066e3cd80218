# What Budwood builds on. Each is looked for on the system first; small header libraries can be
# fetched where a system package is missing.
include(FetchContent)
set(FETCHCONTENT_QUIET OFF)

include(BudwoodTorch)
get_filename_component(torch_root "${TORCH_INSTALL_PREFIX}" ABSOLUTE)
if(EXISTS "${torch_root}/version.py")
  file(STRINGS "${torch_root}/version.py" line REGEX "^__version__ = ")
  string(REGEX REPLACE ".*'([^']*)'.*" "\\1" BUDWOOD_TORCH_VERSION "${line}")
else()
  set(BUDWOOD_TORCH_VERSION "${Torch_VERSION}")
endif()

macro(budwood_dependency package target repository tag)
  find_package(${package} QUIET ${ARGN})
  if(NOT TARGET ${target})
    message(STATUS "${package} not found on the system: fetching ${tag}")
    FetchContent_Declare(${package} GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON)
    FetchContent_MakeAvailable(${package})
  endif()
endmacro()

# fmt is used header-only: the torch wheel puts headers of another fmt first on the include path.
budwood_dependency(fmt fmt::fmt-header-only "https://github.com/fmtlib/fmt.git" 10.2.1)
budwood_dependency(nlohmann_json nlohmann_json::nlohmann_json
                   "https://github.com/nlohmann/json.git" v3.11.3)
if(BUDWOOD_TOOLS)
  budwood_dependency(CLI11 CLI11::CLI11 "https://github.com/CLIUtils/CLI11.git" v2.4.2)
endif()
if(BUDWOOD_TESTS)
  budwood_dependency(doctest doctest::doctest "https://github.com/doctest/doctest.git" v2.4.11)
endif()

find_path(PCRE2_INCLUDE_DIR pcre2.h)
find_library(PCRE2_LIBRARY pcre2-8)
if(NOT PCRE2_INCLUDE_DIR OR NOT PCRE2_LIBRARY)
  message(FATAL_ERROR "PCRE2 (8 bit) is needed for target patterns: install libpcre2-dev")
endif()
