// The scheduler of the emulation. Never compile this file with -fsanitize=thread: the sanitizers' hooks below are weak,
// so that one object serves plain, AddressSanitizer and ThreadSanitizer programs.
#include "simt_emu.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#if defined(SIMT_UCONTEXT) || !defined(__x86_64__)
#define SIMT_USE_UCONTEXT 1
#include <ucontext.h>
#endif

#define SIMT_WEAK __attribute__((weak))
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t) SIMT_WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) SIMT_WEAK;
void __asan_poison_memory_region(void const volatile*, size_t) SIMT_WEAK;
void __asan_unpoison_memory_region(void const volatile*, size_t) SIMT_WEAK;
void* __tsan_get_current_fiber() SIMT_WEAK;
void* __tsan_create_fiber(unsigned) SIMT_WEAK;
void __tsan_switch_to_fiber(void*, unsigned) SIMT_WEAK;
void __tsan_acquire(void*) SIMT_WEAK;
void __tsan_release(void*) SIMT_WEAK;
void __tsan_ignore_thread_begin() SIMT_WEAK;
void __tsan_ignore_thread_end() SIMT_WEAK;
}

namespace simt {

ThreadContext* current = nullptr;

namespace {

// -- sanitizers --

bool with_asan() {
  return __sanitizer_start_switch_fiber && __asan_poison_memory_region;
}
bool with_tsan() {
  return __tsan_create_fiber != nullptr;
}

// ThreadSanitizer's only edges between threads are these: what a thread did before `release` happens before what
// another does after `acquire` of the same token.
void release(void* token) {
  if (with_tsan()) __tsan_release(token);
}
void acquire(void* token) {
  if (with_tsan()) __tsan_acquire(token);
}

// The emulation's own bookkeeping is no access of a kernel.
struct Quiet {
  Quiet() {
    if (with_tsan()) __tsan_ignore_thread_begin();
  }
  ~Quiet() {
    if (with_tsan()) __tsan_ignore_thread_end();
  }
};

// -- contexts --

struct Context {
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* asan_stack = nullptr;  // AddressSanitizer's fake stack while another context runs
  void* tsan_fiber = nullptr;
#ifdef SIMT_USE_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
};

#ifndef SIMT_USE_UCONTEXT
// Saves the callee-saved registers on the stack, changes stacks, restores. Four times as fast as swapcontext, which
// calls into the kernel for the signal mask.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

__attribute__((noinline)) void jump(Context& from, Context& to, bool last) {
  if (with_asan())
    __sanitizer_start_switch_fiber(last ? nullptr : &from.asan_stack, to.stack, to.stack_size);
  constexpr unsigned kNoEdge = 1;  // that threads share a processor orders nothing
  if (with_tsan()) __tsan_switch_to_fiber(to.tsan_fiber, kNoEdge);
#ifdef SIMT_USE_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
  if (with_asan()) __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
}

// -- threads, warps, blocks --

struct Block;
struct Warp;

enum class State : uint8_t { kReady, kWaiting, kExited };

struct Fiber : ThreadContext {
  Context context;
  char* stack = nullptr;
  Block* owner = nullptr;
  Warp* warp = nullptr;
  State state = State::kExited;
  const char* waits_in = nullptr;  // for diagnoses, with the line
  Site site{};
  void* deposit = nullptr;  // arguments and result of the collective under way
  std::vector<AsyncCopy> copies;
  std::vector<int> groups;  // copies in each committed group, oldest first
  int uncommitted = 0;
};

// Lanes of one warp that meet. Other masks of the warp may be under way at the same time.
struct Collective {
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  Site site{};
};

struct Warp {
  Fiber* lanes[32];
  unsigned ready = 0, live = 0;
  size_t position = 0;  // in Scheduler::ready
  uint64_t priority = 0;
  Collective collectives[8];
  unsigned barriers = 0;
  char tokens[2];  // by turns, so that a late acquire does not see the next barrier's releases
};

struct Barrier {
  std::vector<Fiber*> waiting;
  unsigned arrived = 0, opened = 0;
  Site site{};
  char tokens[2];
};

// A variable in shared memory: `size` bytes at `data` inside `raw`, the rest red zone.
struct SharedVariable {
  const void* key;
  const char* name;
  char* raw;
  size_t raw_size;
  char* data;
  size_t size;
};

struct Block {
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::vector<SharedVariable> shared;
  Barrier barrier;
  unsigned live = 0;
};

// How the next thread is chosen. Extreme run-ahead and starvation expose what is not synchronised, so all but one are
// by priority: the best warp that is ready runs until it waits.
enum class Policy {
  kInOrder,
  kBlocks,          // random priorities of blocks, then of their warps
  kWarps,           // random priorities of warps
  kUniform,         // any thread, redrawn at each switch
  kChangingBlocks,  // kBlocks, and now and then a priority is redrawn
  kChangingWarps,   // kWarps, likewise
  kReversedLanes,   // kBlocks, last lane first
};
constexpr int kSeededPolicies = 6;

struct Scheduler {
  LaunchDesc desc;
  const std::function<void()>* thread = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
  std::vector<Warp*> ready;                    // those with a lane that is ready
  Warp* favorite = nullptr;                    // runs on while it can
  Fiber* running = nullptr;
  Block* finished = nullptr;
  Barrier grid;
  unsigned live = 0;
  Context main;
  bool failed = false;
  std::string error;
  bool seeded = false;
  uint64_t seed = 0, random_state = 1;
  Policy policy = Policy::kInOrder;
  char started, exited;  // tokens
};
Scheduler scheduler;
int multiprocessors = 0;

constexpr size_t kStackSize = 512 << 10;   // reserved, not touched
constexpr size_t kSharedLimit = 48 << 10;  // static shared memory of a block

// Blocks that run at the same time in a launch that is not cooperative. ThreadSanitizer takes a millisecond to make a
// fiber.
size_t resident_blocks() {
  return with_tsan() ? 2 : 4;
}

uint64_t random_bits() {
  uint64_t& state = scheduler.random_state;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (state * 0x2545F4914F6CDD1DULL) >> 32;
}
uint64_t random_below(uint64_t n) {
  return (random_bits() * n) >> 32;
}

unsigned volume(const dim3& d) {
  return d.x * d.y * d.z;
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string where(const Fiber& f) {
  char text[96];
  std::snprintf(text, sizeof(text), "block (%u,%u,%u) thread %u", f.block.x, f.block.y, f.block.z,
                f.linear);
  return text;
}

// -- scheduling --

void set_ready(Fiber* f) {
  Warp* w = f->warp;
  f->state = State::kReady;
  if (w->ready == 0) {
    w->position = scheduler.ready.size();
    scheduler.ready.push_back(w);
  }
  w->ready |= 1u << f->lane;
}

void clear_ready(Fiber* f) {
  Warp* w = f->warp;
  w->ready &= ~(1u << f->lane);
  if (w->ready != 0) return;
  Warp* last = scheduler.ready.back();
  scheduler.ready[w->position] = last;
  last->position = w->position;
  scheduler.ready.pop_back();
  if (scheduler.favorite == w) scheduler.favorite = nullptr;
}

void draw_priority(Warp* w, uint64_t block_priority, uint64_t order) {
  switch (scheduler.policy) {
    case Policy::kInOrder:
      w->priority = ~order;
      break;
    case Policy::kWarps:
    case Policy::kChangingWarps:
      w->priority = random_bits();
      break;
    default:
      w->priority = (block_priority & 0xffff) << 32 | random_bits();
  }
}

Warp* pick_warp() {
  Scheduler& s = scheduler;
  if (s.policy == Policy::kUniform) return s.ready[random_below(s.ready.size())];
  if (s.favorite != nullptr) return s.favorite;
  Warp* best = s.ready[0];
  for (Warp* w : s.ready)
    if (w->priority > best->priority) best = w;
  const bool changing = s.policy == Policy::kChangingBlocks || s.policy == Policy::kChangingWarps;
  if (changing && random_below(8) == 0) best->priority = random_bits();
  return best;
}

unsigned pick_lane(unsigned ready) {
  if (scheduler.policy == Policy::kInOrder) return __builtin_ctz(ready);
  if (scheduler.policy == Policy::kReversedLanes) return 31 - __builtin_clz(ready);
  const unsigned first = static_cast<unsigned>(random_below(32));
  const unsigned rotated = ready >> first | (first != 0 ? ready << (32 - first) : 0);
  return (__builtin_ctz(rotated) + first) % 32;
}

// The thread to run next, or nullptr where none can.
Fiber* pick() {
  if (scheduler.ready.empty()) return nullptr;
  scheduler.favorite = pick_warp();
  return scheduler.favorite->lanes[pick_lane(scheduler.favorite->ready)];
}

void go_to_main(bool last) {
  Fiber* self = scheduler.running;
  scheduler.running = nullptr;
  current = nullptr;
  jump(self->context, scheduler.main, last);
}

void go_to(Fiber* next, bool last = false) {
  Fiber* self = scheduler.running;
  if (next == self) return;
  scheduler.running = next;
  current = next;
  jump(self->context, next->context, last);
}

// May run others before it returns.
void reschedule() {
  if (Fiber* next = pick()) go_to(next);
}

// Returns when another thread has set this one ready.
void wait_in(const char* name, Site site) {
  Fiber* self = scheduler.running;
  self->state = State::kWaiting;
  self->waits_in = name;
  self->site = site;
  clear_ready(self);
  if (Fiber* next = pick()) {
    go_to(next);
  } else {
    go_to_main(false);  // which finds the deadlock
  }
}

// -- barriers and collectives --

void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.opened;
  for (Fiber* f : barrier.waiting) set_ready(f);
  barrier.waiting.clear();
}

void arrive(Barrier& barrier, unsigned expected, const char* name, Site site) {
  if (barrier.arrived > 0 && !same(barrier.site, site))
    fail(site, "divergent %s: other threads wait at %s:%d", name, barrier.site.file,
         barrier.site.line);
  barrier.site = site;
  char* token = &barrier.tokens[barrier.opened % 2];
  release(token);
  if (++barrier.arrived == expected) {
    open(barrier);
    scheduler.favorite = nullptr;
    reschedule();
  } else {
    barrier.waiting.push_back(scheduler.running);
    wait_in(name, site);
  }
  acquire(token);
}

// Every lane of the mask deposits a pointer to its argument, on its own stack; the last one to come calls
// operation(deposits) for all. No order of memory accesses follows from it, as on the device.
template <class Operation>
void collective(const char* name, unsigned mask, void* argument, Site site,
                const Operation& operation) {
  Fiber* self = scheduler.running;
  Warp* w = self->warp;
  if ((mask >> self->lane & 1) == 0)
    fail(site, "%s: lane %u is not in its mask %08x", name, self->lane, mask);
  if ((mask & ~w->live) != 0)
    fail(site, "%s: mask %08x names lanes that have exited or never were, live are %08x", name,
         mask, w->live);
  Collective* meeting = nullptr;
  for (Collective& c : w->collectives) {
    if (c.arrived == 0 || c.mask != mask) continue;
    if (c.name != name || !same(c.site, site))
      fail(site, "divergent warp: lane %u is in %s, other lanes wait in %s at %s:%d", self->lane,
           name, c.name, c.site.file, c.site.line);
    meeting = &c;
  }
  for (Collective& c : w->collectives)
    if (meeting == nullptr && c.arrived == 0) meeting = &c;
  if (meeting == nullptr) fail(site, "too many collectives of one warp at a time");
  meeting->mask = mask;
  meeting->name = name;
  meeting->site = site;
  meeting->arrived |= 1u << self->lane;
  self->deposit = argument;
  if (meeting->arrived != mask) {
    wait_in(name, site);
    return;
  }
  void* deposits[32];
  for (unsigned i = 0; i < 32; ++i)
    deposits[i] = (mask >> i & 1) != 0 ? w->lanes[i]->deposit : nullptr;
  {
    Quiet quiet;
    operation(deposits);
  }
  meeting->arrived = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1) != 0 && w->lanes[i] != self) set_ready(w->lanes[i]);
  reschedule();
}

// -- shared memory --

SharedVariable allocate_shared(const void* key, const char* name, size_t size, size_t align) {
  constexpr size_t kRedZone = 64;
  SharedVariable v{key, name, nullptr, size + 4 * align + 2 * kRedZone, nullptr, size};
  v.raw = static_cast<char*>(std::malloc(v.raw_size));
  // Aligned as declared and no more, so that an access that needs more is seen.
  uintptr_t address = reinterpret_cast<uintptr_t>(v.raw) + kRedZone;
  address += (align - address % align) % align;
  if (address / align % 2 == 0) address += align;
  v.data = reinterpret_cast<char*>(address);
  std::memset(v.raw, 0xff, v.raw_size);  // NaN in every type
  poison(v.raw, v.data - v.raw, true);
  poison(v.data + size, v.raw + v.raw_size - (v.data + size), true);
  return v;
}

void free_shared(Block& block) {
  Quiet quiet;
  for (const SharedVariable& v : block.shared) {
    poison(v.raw, v.raw_size, false);
    for (char* p = v.raw; p < v.raw + v.raw_size && !scheduler.failed; ++p) {
      if ((p >= v.data && p < v.data + v.size) || *p == static_cast<char>(0xff)) continue;
      scheduler.failed = true;
      scheduler.error = "shared memory overrun: byte " + std::to_string(p - v.data) + " of '" +
                        v.name + "', which has " + std::to_string(v.size);
    }
    std::free(v.raw);
  }
  block.shared.clear();
}

// -- fibers --

void exit_thread() {
  Scheduler& s = scheduler;
  Fiber* self = s.running;
  Block* block = self->owner;
  if (!self->copies.empty())
    fail({"<exit>", 0}, "%zu asynchronous copies were never waited for", self->copies.size());
  release(&s.exited);
  self->state = State::kExited;
  clear_ready(self);
  self->warp->live &= ~(1u << self->lane);
  --block->live;
  --s.live;
  for (const Collective& c : self->warp->collectives)
    if (c.arrived != 0 && (c.mask >> self->lane & 1) != 0)
      fail(c.site, "%s waits for lane %u, which has exited", c.name, self->lane);
  if (s.grid.arrived > 0) fail(s.grid.site, "grid sync waits for a thread that has exited");
  // Since sm_70, __syncthreads does not wait for threads that have exited.
  if (block->live > 0 && block->barrier.arrived == block->live) open(block->barrier);
  if (block->live == 0) {
    s.finished = block;
    go_to_main(true);
  }
  if (Fiber* next = pick()) go_to(next, true);
  go_to_main(true);
}

void fiber_main() {
  if (with_asan()) {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    // The first fiber comes from the program's own stack, whose bounds are not known otherwise.
    if (scheduler.main.stack == nullptr) {
      scheduler.main.stack = stack;
      scheduler.main.stack_size = size;
    }
  }
  acquire(&scheduler.started);
  (*scheduler.thread)();
  exit_thread();
  std::abort();  // not reached
}

void allocate_stack(Fiber& f) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackSize + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("simt: stack of a thread");
    std::abort();
  }
  f.stack = static_cast<char*>(memory) + page;
  f.context.stack = f.stack;
  f.context.stack_size = kStackSize;
  if (with_tsan()) f.context.tsan_fiber = __tsan_create_fiber(0);
}

void prepare(Fiber& f) {
  if (f.stack == nullptr) allocate_stack(f);
  poison(f.stack, kStackSize, false);
  f.context.asan_stack = nullptr;
#ifdef SIMT_USE_UCONTEXT
  getcontext(&f.context.registers);
  f.context.registers.uc_stack.ss_sp = f.stack;
  f.context.registers.uc_stack.ss_size = kStackSize;
  f.context.registers.uc_link = nullptr;
  makecontext(&f.context.registers, fiber_main, 0);
#else
  uint64_t* top = reinterpret_cast<uint64_t*>(f.stack + kStackSize);
  *--top = 0;  // a return address that ends backtraces; it aligns the stack as a call does
  *--top = reinterpret_cast<uint64_t>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the registers of simt_switch
  f.context.stack_pointer = top;
#endif
}

void start_block(Block& block, unsigned index) {
  const LaunchDesc& desc = scheduler.desc;
  const unsigned threads = static_cast<unsigned>(block.fibers.size());
  block.live = threads;
  block.barrier = Barrier{};
  block.barrier.waiting.reserve(threads);
  block.warps.assign((threads + 31) / 32, Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = *block.fibers[i];
    f.thread = {i % desc.block.x, i / desc.block.x % desc.block.y,
                i / (desc.block.x * desc.block.y)};
    f.block = {index % desc.grid.x, index / desc.grid.x % desc.grid.y,
               index / (desc.grid.x * desc.grid.y)};
    f.block_dim = desc.block;
    f.grid_dim = desc.grid;
    f.linear = i;
    f.lane = i % 32;
    f.owner = &block;
    f.warp = &block.warps[i / 32];
    f.warp->lanes[f.lane] = &f;
    f.warp->live |= 1u << f.lane;
    f.copies.clear();
    f.groups.clear();
    f.uncommitted = 0;
    prepare(f);
  }
  const uint64_t block_priority = random_bits();
  for (size_t w = 0; w < block.warps.size(); ++w)
    draw_priority(&block.warps[w], block_priority, 64ull * index + w);
  for (Fiber* f : block.fibers) set_ready(f);
  scheduler.live += threads;
  scheduler.favorite = nullptr;
}

void report_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  scheduler.failed = true;
  scheduler.error = "deadlock:";
  for (const auto& block : blocks) {
    for (const Fiber* f : block->fibers) {
      if (f->state != State::kWaiting) continue;
      scheduler.error += "\n  " + where(*f) + " waits in " + f->waits_in + " at " + f->site.file +
                         ":" + std::to_string(f->site.line);
      break;
    }
  }
}

// Runs threads until all blocks are done or one has failed. Blocks start in any order.
void run_blocks(std::vector<std::unique_ptr<Block>>& blocks, const std::vector<unsigned>& order) {
  Scheduler& s = scheduler;
  size_t started = 0;
  for (auto& block : blocks) start_block(*block, order[started++]);
  for (size_t done = 0; done < order.size() && !s.failed;) {
    Fiber* next = pick();
    if (next == nullptr) {
      report_deadlock(blocks);
      break;
    }
    s.running = next;
    current = next;
    jump(s.main, next->context, false);
    if (s.finished == nullptr) continue;
    Block& block = *s.finished;
    s.finished = nullptr;
    acquire(&s.exited);
    free_shared(block);
    ++done;
    if (started < order.size() && !s.failed) start_block(block, order[started++]);
  }
  s.running = nullptr;
  current = nullptr;
}

// Fibers of a failed launch are abandoned where they stand, without destructors: kernels hold trivial types only.
void abandon(std::vector<std::unique_ptr<Block>>& blocks) {
  Scheduler& s = scheduler;
  for (auto& block : blocks) {
    for (Fiber* f : block->fibers) {
      if (with_tsan() && s.failed) {
        __tsan_switch_to_fiber(f->context.tsan_fiber, 1);
        __tsan_release(&s.exited);
        __tsan_switch_to_fiber(s.main.tsan_fiber, 1);
      }
      for (const AsyncCopy& copy : f->copies) poison(copy.target, 4 * copy.words, false);
    }
    free_shared(*block);
  }
}

void seed_schedule() {
  Scheduler& s = scheduler;
  if (!s.seeded) {
    const char* text = std::getenv("SIMT_SEED");
    set_seed(text != nullptr ? std::strtoull(text, nullptr, 0) : 0);
  }
  s.random_state = ((s.seed + 1) * 0x9E3779B97F4A7C15ULL) | 1;
  for (int i = 0; i < 8; ++i) random_bits();
  s.policy =
      s.seed == 0 ? Policy::kInOrder : static_cast<Policy>(1 + (s.seed - 1) % kSeededPolicies);
}

}  // namespace

void set_seed(uint64_t seed) {
  scheduler.seed = seed;
  scheduler.seeded = true;
}

void set_sm_count(int count) {
  multiprocessors = count;
}

int sm_count() {
  if (multiprocessors > 0) return multiprocessors;
  const char* text = std::getenv("SIMT_SMS");
  return text != nullptr ? std::atoi(text) : 3;
}

bool coin() {
  return random_bits() % 2 != 0;
}

void poison(void* begin, size_t size, bool on) {
  if (!with_asan()) return;
  (on ? __asan_poison_memory_region : __asan_unpoison_memory_region)(begin, size);
}

void fail(Site site, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  Scheduler& s = scheduler;
  s.failed = true;
  s.error = std::string(site.file) + ":" + std::to_string(site.line) + ": " + message + " [" +
            (s.running != nullptr ? where(*s.running) : "host") + "]";
  if (s.running != nullptr) go_to_main(true);
  std::fprintf(stderr, "simt: %s\n", s.error.c_str());
  std::abort();
}

void block_barrier(Site site) {
  Block& block = *scheduler.running->owner;
  arrive(block.barrier, block.live, "__syncthreads", site);
}

void grid_barrier(Site site) {
  Scheduler& s = scheduler;
  if (!s.desc.coop) fail(site, "grid sync in a launch that is not cooperative");
  if (s.live != volume(s.desc.grid) * volume(s.desc.block))
    fail(site, "grid sync after a thread of the grid has exited");
  if (s.running->owner->barrier.arrived > 0)
    fail(site, "grid sync while threads of the block wait at __syncthreads");
  arrive(s.grid, s.live, "grid sync", site);
}

void warp_barrier(unsigned mask, Site site) {
  Warp* w = scheduler.running->warp;
  char* token = &w->tokens[w->barriers % 2];
  release(token);
  collective("__syncwarp", mask, nullptr, site, [&](void**) { ++w->barriers; });
  acquire(token);
}

unsigned warp_ballot(unsigned mask, bool predicate, Site site) {
  struct Vote {
    bool predicate;
    unsigned result;
  } vote{predicate, 0};
  collective("vote", mask, &vote, site, [](void** deposits) {
    unsigned result = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (deposits[i] != nullptr && static_cast<Vote*>(deposits[i])->predicate) result |= 1u << i;
    for (unsigned i = 0; i < 32; ++i)
      if (deposits[i] != nullptr) static_cast<Vote*>(deposits[i])->result = result;
  });
  return vote.result;
}

void warp_shuffle(Shuffle kind, unsigned mask, void* value, size_t size, int operand, int width,
                  Site site) {
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                           "__shfl_xor_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(site, "%s: width %d", name, width);
  struct Exchange {
    unsigned char in[8], out[8];
    int operand;
  } exchange{{}, {}, operand};
  std::memcpy(exchange.in, value, size);
  collective(name, mask, &exchange, site, [&](void** deposits) {
    for (int lane = 0; lane < 32; ++lane) {
      if (deposits[lane] == nullptr) continue;
      Exchange& mine = *static_cast<Exchange*>(deposits[lane]);
      const int base = lane & ~(width - 1);
      int source = lane;
      switch (kind) {
        case Shuffle::kIndex:
          source = base + (mine.operand & (width - 1));
          break;
        case Shuffle::kUp:
          if (lane - mine.operand >= base) source = lane - mine.operand;
          break;
        case Shuffle::kDown:
          if (lane + mine.operand < base + width) source = lane + mine.operand;
          break;
        case Shuffle::kXor:
          if ((lane ^ mine.operand) < base + width) source = lane ^ mine.operand;
          break;
      }
      // What a lane outside the mask holds is undefined: NaN.
      if (deposits[source] == nullptr) {
        std::memset(mine.out, 0xff, sizeof(mine.out));
      } else {
        std::memcpy(mine.out, static_cast<Exchange*>(deposits[source])->in, sizeof(mine.out));
      }
    }
  });
  std::memcpy(value, exchange.out, size);
}

void warp_mma(int type, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4], Site site) {
  if (type != kTf32) fail(site, "mma of type %d", type);
  struct Fragments {
    uint32_t a[4], b[2];
    float d[4];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  collective("mma", 0xffffffffu, &mine, site, [](void** deposits) {
    const auto tf32 = [](uint32_t bits) { return simt_bits<float>(bits & 0xffffe000u); };
    float A[16][8], B[8][8], D[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *static_cast<Fragments*>(deposits[lane]);
      const int g = lane / 4;
      const int t = lane % 4;
      for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t + i / 2 * 4] = tf32(f.a[i]);
      for (int i = 0; i < 2; ++i) B[t + i * 4][g] = tf32(f.b[i]);
      for (int i = 0; i < 4; ++i) D[g + i / 2 * 8][t * 2 + i % 2] = f.d[i];
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 8; ++k)
        for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
    for (int lane = 0; lane < 32; ++lane) {
      Fragments& f = *static_cast<Fragments*>(deposits[lane]);
      for (int i = 0; i < 4; ++i) f.d[i] = D[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
}

void* shared_var(const void* key, const char* name, size_t size, size_t align) {
  std::vector<SharedVariable>& shared = scheduler.running->owner->shared;
  size_t total = size;
  for (const SharedVariable& v : shared) {
    if (v.key == key) return v.data;
    total += v.size;
  }
  if (total > kSharedLimit)
    fail({name, 0}, "%zu bytes of shared memory, a block has %zu", total, kSharedLimit);
  Quiet quiet;
  shared.push_back(allocate_shared(key, name, size, align));
  return shared.back().data;
}

bool is_shared(const void* begin, size_t size) {
  const char* p = static_cast<const char*>(begin);
  for (const SharedVariable& v : scheduler.running->owner->shared)
    if (p >= v.data && p + size <= v.data + v.size) return true;
  return false;
}

AsyncCopy& add_copy() {
  Quiet quiet;
  Fiber* self = scheduler.running;
  ++self->uncommitted;
  return self->copies.emplace_back();
}

void cp_commit() {
  Quiet quiet;
  Fiber* self = scheduler.running;
  self->groups.push_back(self->uncommitted);
  self->uncommitted = 0;
}

AsyncCopy* finished_copies(int pending, int* count) {
  Quiet quiet;
  Fiber* self = scheduler.running;
  *count = 0;
  while (static_cast<int>(self->groups.size()) > pending) {
    *count += self->groups.front();
    self->groups.erase(self->groups.begin());
  }
  return self->copies.data();
}

void remove_copies(int count) {
  Quiet quiet;
  std::vector<AsyncCopy>& copies = scheduler.running->copies;
  copies.erase(copies.begin(), copies.begin() + count);
}

cudaError_t run(const LaunchDesc& desc, const std::function<void()>& thread) {
  Scheduler& s = scheduler;
  const size_t threads = volume(desc.block);
  const size_t count = volume(desc.grid);
  if (threads == 0 || threads > 1024 || count == 0 || desc.smem != 0)
    return cudaErrorInvalidConfiguration;
  if (desc.coop && count > static_cast<size_t>(sm_count()))
    return cudaErrorCooperativeLaunchTooLarge;
  const size_t resident = desc.coop ? count : std::min(count, resident_blocks());
  seed_schedule();
  s.desc = desc;
  s.thread = &thread;
  s.ready.clear();
  s.ready.reserve(resident * ((threads + 31) / 32));
  s.favorite = nullptr;
  s.live = 0;
  s.grid = Barrier{};
  s.grid.waiting.reserve(resident * threads);
  s.failed = false;
  s.main.stack = nullptr;
  if (with_tsan()) s.main.tsan_fiber = __tsan_get_current_fiber();
  release(&s.started);

  while (s.fibers.size() < resident * threads) s.fibers.push_back(std::make_unique<Fiber>());
  std::vector<std::unique_ptr<Block>> blocks;
  for (size_t b = 0; b < resident; ++b) {
    blocks.push_back(std::make_unique<Block>());
    for (size_t t = 0; t < threads; ++t)
      blocks[b]->fibers.push_back(s.fibers[b * threads + t].get());
  }
  std::vector<unsigned> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = static_cast<unsigned>(i);
  if (s.policy != Policy::kInOrder)
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);

  run_blocks(blocks, order);
  abandon(blocks);
  acquire(&s.exited);
  if (s.failed) std::fprintf(stderr, "simt: %s\n", s.error.c_str());
  return s.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace simt
