#include "pipeline.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>

namespace m2d::cpu {
namespace {

using Task = Pipeline::Task;

// What a thread is to do next: one task, or a reading and a writing one at once.
struct Work {
  int64_t num_tasks = 0;
  Task tasks[2];
  int64_t places[2];  // of their layers in the pipeline's order
};

// Hands tasks to threads. All but the constructor may be called by several at once.
class Scheduler {
 public:
  explicit Scheduler(const Pipeline& pipeline)
      : p_(pipeline),
        layers_(pipeline.layers.size()),
        unfinished_layers_(static_cast<int64_t>(layers_.size())),
        free_slots_(pipeline.num_slots),
        num_threads_(at::get_num_threads()) {
    for (int64_t i = 0; i < p_.num_slots; ++i) free_slots_[i] = i;
    for (size_t place = 0; place < layers_.size(); ++place) begin_step(place, 0);
  }

  // Works until nothing is left to do.
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      if (unfinished_layers_ == 0 || failure_) return;
      const Work work = next_work();
      lock.unlock();
      if (work.num_tasks == 0) {
        std::this_thread::yield();
        continue;
      }
      try {
        work.num_tasks == 2 ? p_.run_both(work.tasks[0], work.tasks[1])
                            : p_.run_task(work.tasks[0]);
      } catch (...) {
        lock.lock();
        failure_ = std::current_exception();
        return;
      }
      lock.lock();
      for (int64_t i = 0; i < work.num_tasks; ++i) finish(work.places[i], work.tasks[i]);
    }
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  static constexpr int64_t kNone = -1;

  struct Layer {
    int64_t step = 0;
    int64_t num_tasks = 0;  // of the step
    int64_t started = 0, finished = 0;
    int64_t slot = kNone;

    bool has_task() const { return started < num_tasks; }
  };

  enum Kind { kReads, kComputes, kWrites, kKinds };

  Kind kind(int64_t step) const {
    if (step < p_.num_reading_steps) return kReads;
    return step < first_writing_step() ? kComputes : kWrites;
  }
  int64_t first_writing_step() const { return p_.num_steps - p_.num_writing_steps; }

  Work next_work() {
    int64_t first[kKinds] = {kNone, kNone, kNone};  // place of the first layer that has a task
    for (int64_t place = 0; place < static_cast<int64_t>(layers_.size()); ++place) {
      const Layer& layer = layers_[place];
      if (!layer.has_task()) continue;
      int64_t& of_kind = first[kind(layer.step)];
      if (of_kind == kNone && take_slot(place)) of_kind = place;
    }
    Work work;
    choose(first[kReads], first[kComputes], first[kWrites], work);
    return work;
  }

  // Of the places any may be kNone.
  void choose(int64_t reading, int64_t computing, int64_t writing, Work& work) {
    const int half = std::max(1, num_threads_ / 2);
    if (computing != kNone && (reading == kNone || threads_[kComputes] < half)) {
      start(computing, work);
    } else if (writing == kNone) {
      if (reading != kNone) start(reading, work);
    } else if (reading == kNone) {
      start(writing, work);
    } else if (p_.run_both) {
      start(reading, work);
      start(writing, work);
    } else {
      start(threads_[kWrites] < half ? writing : reading, work);
    }
  }

  void start(int64_t place, Work& work) {
    Layer& layer = layers_[place];
    ++threads_[kind(layer.step)];
    work.places[work.num_tasks] = place;
    work.tasks[work.num_tasks++] = {p_.layers[place], layer.step, layer.slot, layer.started++};
  }

  // Whether the layer may go on: it has a slot where its step needs one.
  bool take_slot(int64_t place) {
    Layer& layer = layers_[place];
    if (layer.slot != kNone || layer.step < p_.num_leading_steps ||
        layer.step >= first_writing_step())
      return true;
    if (layers_.front().step < p_.num_leading_steps || free_slots_.empty()) return false;
    layer.slot = free_slots_.back();
    free_slots_.pop_back();
    return true;
  }

  void finish(int64_t place, const Task& task) {
    --threads_[kind(task.step)];
    Layer& layer = layers_[place];
    if (++layer.finished == layer.num_tasks) begin_step(place, task.step + 1);
  }

  // Steps without tasks are passed over.
  void begin_step(int64_t place, int64_t step) {
    Layer& layer = layers_[place];
    layer.started = layer.finished = layer.num_tasks = 0;
    for (; step < p_.num_steps && layer.num_tasks == 0; ++step) {
      layer.step = step;
      layer.num_tasks = p_.num_tasks(p_.layers[place], step);
    }
    if (layer.num_tasks == 0) {
      layer.step = p_.num_steps;
      --unfinished_layers_;
    }
    if (layer.step < first_writing_step() || layer.slot == kNone) return;
    free_slots_.push_back(layer.slot);
    layer.slot = kNone;
  }

  const Pipeline& p_;
  std::mutex mutex_;
  std::vector<Layer> layers_;
  int64_t unfinished_layers_;
  std::vector<int64_t> free_slots_;
  const int num_threads_;
  int threads_[kKinds] = {0, 0, 0};
  std::exception_ptr failure_;
};

}  // namespace

void Pipeline::run() const {
  Scheduler scheduler(*this);
  // Each range is one thread's work until the end. Where fewer threads run them, the first ones leave nothing over.
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { scheduler.work(); });
  scheduler.rethrow();
}

}  // namespace m2d::cpu
