#include "fork.h"

#include <ATen/Parallel.h>

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace m2d::cpu {
namespace {

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

}  // namespace

void use_one_thread_after_fork() {
  if (forked.exchange(false, std::memory_order_relaxed)) at::set_num_threads(1);
}

}  // namespace m2d::cpu
