#include <budwood/peft/train/signals.h>
#include <signal.h>

#include <atomic>
#include <mutex>

namespace budwood::train {
namespace {

std::mutex mutex;
int alive = 0;
struct sigaction old_int, old_term;
std::atomic<int> signal_received{0};
static_assert(std::atomic<int>::is_always_lock_free);

void on_signal(int number) {
  if (signal_received.exchange(number) == 0) return;
  // The second one: as if nobody had asked.
  ::signal(number, SIG_DFL);
  ::raise(number);
}

}  // namespace

StopOnSignal::StopOnSignal() {
  const std::lock_guard lock(mutex);
  if (alive++ > 0) return;
  signal_received = 0;
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, &old_int);
  ::sigaction(SIGTERM, &action, &old_term);
}

StopOnSignal::~StopOnSignal() {
  const std::lock_guard lock(mutex);
  if (--alive > 0) return;
  ::sigaction(SIGINT, &old_int, nullptr);
  ::sigaction(SIGTERM, &old_term, nullptr);
  signal_received = 0;
}

int StopOnSignal::received() {
  return signal_received;
}

}  // namespace budwood::train
