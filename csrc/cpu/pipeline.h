// Layers on their way through the same steps, on all threads, without a barrier that all layers wait at.
//
// The first steps of a layer read, the later ones compute, and the last ones write: a core which does one leaves idle
// what the others need. While there is something to read, one half of the threads at most computes, and whoever writes
// reads at the same time, or one half of the threads writes where that cannot be.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace m2d::cpu {

struct Pipeline {
  struct Task {
    int64_t layer, step, slot, index;
  };

  std::vector<int64_t> layers;  // in the order in which they start; the first one leads
  int64_t num_steps = 0;
  int64_t num_reading_steps = 0;  // those that wait for memory, from the first on
  int64_t num_leading_steps =
      0;  // those of the leading layer that all others' later steps wait for
  int64_t num_writing_steps = 0;  // those that wait for memory again, up to the last
  // Between its leading and its writing steps a layer holds one of so many slots.
  int64_t num_slots = 0;

  // Tasks of a step, which may run in any order and at the same time. They all end before the layer's next step begins.
  std::function<int64_t(int64_t layer, int64_t step)> num_tasks;
  std::function<void(const Task& task)> run_task;
  // A reading and a writing task at the same time, where that is faster than one after the other; else nullptr.
  std::function<void(const Task& reading, const Task& writing)> run_both;

  // Returns when all is done. Throws what a task threw.
  void run() const;
};

}  // namespace m2d::cpu
