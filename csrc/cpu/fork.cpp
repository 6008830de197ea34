#include "fork.h"

#include <ATen/Parallel.h>

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace m2d::cpu {
namespace {

std::atomic<bool> forked{false};
std::atomic<int> threads_at_fork{0};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered =
    pthread_atfork([] { threads_at_fork.store(at::get_num_threads(), std::memory_order_relaxed); },
                   nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

}  // namespace

void use_one_thread_after_fork() {
  if (!forked.exchange(false, std::memory_order_relaxed)) return;
  if (at::get_num_threads() == threads_at_fork.load(std::memory_order_relaxed))
    at::set_num_threads(1);
}

}  // namespace m2d::cpu
