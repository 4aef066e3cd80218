# An installation is a prefix (C++) or the package folder of a wheel; both hold lib/, include/,
# bin/ and lib/cmake/budwood, and find_package(budwood) works from either.
include(CMakePackageConfigHelpers)

set(config_dir lib/cmake/budwood)
install(TARGETS budwood budwood_quant EXPORT budwood_targets
        LIBRARY DESTINATION lib COMPONENT library)
if(BUDWOOD_TOOLS)
  install(TARGETS budwood_tool RUNTIME DESTINATION bin COMPONENT tool)
endif()
if(BUDWOOD_PYTHON)
  install(TARGETS _C LIBRARY DESTINATION . COMPONENT python)
  install(FILES "${PROJECT_BINARY_DIR}/python/budwood/_build_info.py" DESTINATION .
          COMPONENT python)
endif()
install(DIRECTORY quant peft DESTINATION include/budwood COMPONENT development
        FILES_MATCHING PATTERN "*.h")
install(FILES "${PROJECT_BINARY_DIR}/include/budwood/version.h" DESTINATION include/budwood
        COMPONENT development)

install(EXPORT budwood_targets NAMESPACE budwood:: DESTINATION ${config_dir} COMPONENT development)
configure_package_config_file(cmake/budwood-config.cmake.in
  "${PROJECT_BINARY_DIR}/budwood-config.cmake" INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file("${PROJECT_BINARY_DIR}/budwood-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/budwood-config.cmake"
              "${PROJECT_BINARY_DIR}/budwood-config-version.cmake" cmake/BudwoodTorch.cmake
        DESTINATION ${config_dir} COMPONENT development)

# Beside each other, in the wheel's own torch, and where torch was when this was built.
set_target_properties(budwood budwood_quant PROPERTIES
  INSTALL_RPATH "$ORIGIN;$ORIGIN/../../torch/lib;${TORCH_INSTALL_PREFIX}/lib")
if(BUDWOOD_TOOLS)
  set_target_properties(budwood_tool PROPERTIES
    INSTALL_RPATH "$ORIGIN/../lib;$ORIGIN/../../torch/lib;${TORCH_INSTALL_PREFIX}/lib")
endif()
