#pragma once

#include <CLI/CLI.hpp>

#include <budwood/peft/merge.h>
#include <string>
#include <vector>

/// Verbs of the native program that have a source of their own; they run as callbacks of `app`.

/// merge, unmerge, verify, convert
void add_merge_verbs(CLI::App& app);

void print_warnings(const std::vector<std::string>& warnings);
/// Adapters with their weights, 1 where none are given.
std::vector<budwood::MergeSource> merge_sources(const std::vector<std::string>& adapters,
                                                const std::vector<double>& weights);
