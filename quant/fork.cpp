#include <ATen/Parallel.h>
#include <pthread.h>

#include <budwood/quant/fork.h>

namespace budwood::quant {

void prepare_for_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { at::set_num_threads(1); });
  static_cast<void>(registered);
}

}  // namespace budwood::quant
