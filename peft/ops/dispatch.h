#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

/// What the operators share to register and to call each other through the dispatcher.
namespace budwood::ops {

/// Calls a registered operator of that signature.
template <class Signature>
class Operator;
template <class Result, class... Args>
class Operator<Result(Args...)> {
 public:
  explicit Operator(const char* name)
      : handle_(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(name, "")
                    .template typed<Result(Args...)>()) {}
  Result operator()(Args... args) const { return handle_.call(std::forward<Args>(args)...); }

 private:
  c10::TypedOperatorHandle<Result(Args...)> handle_;
};

/// The formula on devices and for dtypes without a kernel is written with ATen; CPU and CUDA share
/// an entry that chooses.
template <class Function>
void implement(torch::Library& m, const char* name, Function* function) {
  m.impl(name, c10::DispatchKey::CPU, function);
  m.impl(name, c10::DispatchKey::CUDA, function);
}

/// A backward has no backward of its own.
inline void without_gradient(torch::Library& m, const char* name) {
  m.impl(name, c10::DispatchKey::Autograd, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace budwood::ops
