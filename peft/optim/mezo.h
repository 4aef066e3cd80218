#pragma once

#include <budwood/peft/tensor_file.h>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <vector>

namespace budwood::optim {

/// MeZO (arXiv 2305.17333): gradient descent from two losses and no gradient, in the memory of
/// inference. With z drawn anew for each step, the change is -rate (g z + weight_decay θ) where
/// g = (loss(θ + eps z) - loss(θ - eps z)) / (2 eps). z is a function of (seed, step, tensor,
/// element) and is never kept.
struct MezoOptions {
  double eps = 1e-3;
  double weight_decay = 0.0;  ///< of tensors with two or more dimensions
  uint64_t seed = 0;

  void validate() const;
};

/// What a run was: with the parameters that it began with it is the run itself.
struct MezoLog {
  MezoOptions options;
  std::vector<double> projected;   ///< g of each step
  std::vector<double> rates;       ///< its learning rate
  std::vector<std::string> names;  ///< parameters, in their order
  std::vector<std::vector<int64_t>> shapes;

  /// As a safetensors file.
  void save(const std::filesystem::path& path) const;
  /// Throws Error for a file that holds no such log.
  static MezoLog load(const std::filesystem::path& path);
};

class Mezo {
 public:
  /// parameters: fp32 or fp64 tensors, updated in place. Others are refused: what is added and
  /// taken off again would not come back.
  Mezo(NamedTensors parameters, MezoOptions options);

  /// One step; `loss` is called twice, and must be the same function both times: the same batch,
  /// nothing dropped out. Gradients are off while it runs. Returns the mean of the two losses.
  /// When it throws, or a loss is not finite, the parameters are brought back, to the rounding of
  /// two additions, and no step is counted.
  double step(const std::function<double()>& loss, double rate);

  const NamedTensors& parameters() const { return parameters_; }
  const MezoLog& log() const { return log_; }
  /// The log as tensors, for a checkpoint.
  NamedTensors state() const;
  void restore(const NamedTensors& state);

  /// Makes of the parameters that a run began with what it ended with, bit for bit, without a
  /// model. Throws Error where names or shapes are not the run's.
  static void replay(NamedTensors parameters, const MezoLog& log);

 private:
  void add_noise(double scale);
  void apply(double projected, double rate);

  NamedTensors parameters_;
  MezoLog log_;
};

}  // namespace budwood::optim
